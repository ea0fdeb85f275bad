"""Roles of observations: which actions are allowed, and what only the critic reads."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from purejaxppo.envs.base import ActionMask, Discrete, MultiDiscrete, Space, bound_action


def mask_of(space: Any) -> ActionMask | None:
    """The action mask in a space of observations."""
    return next((part for part in jax.tree.leaves(space) if isinstance(part, ActionMask)), None)


def allowed_actions(space: Any, obs: Any) -> jax.Array | None:
    """The action mask [..., *shape] in an observation of a space."""
    parts = zip(jax.tree.leaves(space), jax.tree.leaves(obs), strict=True)
    return next((x for part, x in parts if isinstance(part, ActionMask)), None)


def has_privileged(space: Any) -> bool:
    """Whether a space of observations has parts that only the critic reads."""
    return any(part.privileged for part in jax.tree.leaves(space))


def seen_by(space: Any, obs: Any, *, critic: bool) -> tuple[Any, Any]:
    """What the layers of a critic, or of an actor, read of an observation, with its space.

    It is the observation itself if it has no role. Otherwise it is a list of its other parts, or the part that is left.
    """
    parts = jax.tree.leaves(space)
    kept = [not isinstance(part, ActionMask) and (critic or not part.privileged) for part in parts]
    if all(kept):
        return space, obs
    spaces, seen = ([x for x, keep in zip(tree, kept) if keep] for tree in (parts, jax.tree.leaves(obs)))
    return (spaces[0], seen[0]) if len(seen) == 1 else (spaces, seen)


def without_privileged(space: Any, obs: Any) -> Any:
    """An observation without the parts that only the critic reads."""
    if not isinstance(space, Mapping):
        return obs
    acted_on = {name: part for name, part in space.items() if not all(x.privileged for x in jax.tree.leaves(part))}
    return {name: without_privileged(part, obs[name]) for name, part in acted_on.items()}


def with_privileged(space: Any, obs: Any, like: Any) -> Any:
    """An observation whose parts for the critic are zeros where they are left out; `like` has all shapes and dtypes."""
    if not isinstance(space, Mapping):
        return obs
    missing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
    return {
        name: with_privileged(part, obs[name], like[name]) if name in obs else missing[name]
        for name, part in space.items()
    }


def check_roles(space: Any, actions: Space) -> list[str]:
    """The faults of the roles in a space of observations, one sentence each."""
    parts = jax.tree.leaves(space)
    masks = [part for part in parts if isinstance(part, ActionMask)]
    if len(masks) > 1:
        return [f"observation_space holds the action masks {masks}; it may hold one."]
    if all(isinstance(part, ActionMask) or part.privileged for part in parts):
        return [f"observation_space is {space!r}, which leaves nothing for the actor to read."]
    shapes = [(actions.n,)] if isinstance(actions, Discrete) else []
    if isinstance(actions, MultiDiscrete):
        shapes = [(sum(actions.sizes),), actions.sizes]
    if masks and masks[0].shape not in shapes:
        remedy = f"its shape must be {' or '.join(map(str, shapes))}" if shapes else "only discrete actions have one"
        return [f"observation_space holds {masks[0]!r}, but the actions are {actions!r}; {remedy}."]
    return []


def random_action(key: jax.Array, space: Space, allowed: jax.Array | None = None) -> jax.Array:
    """An action of a space, with equal probability among those that a mask allows; a Box is clipped standard normal."""
    if isinstance(space, Discrete):
        return jax.random.randint(key, (), 0, space.n) if allowed is None else _random_index(key, allowed)
    if not isinstance(space, MultiDiscrete):
        return bound_action(jax.random.normal(key, (int(np.prod(space.shape)),)), space, "clip")
    sizes = np.reshape(space.sizes, space.shape)
    if allowed is None:
        return jax.random.randint(key, space.shape, jnp.zeros(space.shape, jnp.int32), jnp.array(sizes))
    if allowed.shape == space.sizes:
        return jnp.stack(jnp.unravel_index(_random_index(key, allowed.reshape(-1)), space.sizes)).astype(jnp.int32)
    choices = jnp.split(allowed, np.cumsum(space.sizes)[:-1])
    return jnp.stack([_random_index(k, choice) for k, choice in zip(jax.random.split(key, len(choices)), choices)])


def _random_index(key: jax.Array, allowed: jax.Array) -> jax.Array:
    logits = jnp.where(allowed | ~allowed.any(), 0.0, -jnp.inf)
    return jax.random.categorical(key, logits).astype(jnp.int32)
