"""Actor-critic networks over sequences: what a network is, and what becomes one.

A network reads observations [T, B, ...] with flags `first` [T, B] that mark where an episode begins, from a memory
that a feed-forward network leaves empty: one path for both.
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from purejaxppo.config import Config
from purejaxppo.envs.base import Box, Discrete, MultiDiscrete
from purejaxppo.networks.distributions import MultiCategorical
from purejaxppo.networks.orthogonal import orthogonalize


class Network(NamedTuple):
    """Three pure functions; anything that offers them is a network."""

    initial_memory: Callable  # batch -> memory, leaves [B, ...]; () for feed-forward
    init: Callable  # key, memory, obs [T, B, ...], first [T, B] -> params, orthogonal ones drawn or not
    apply: Callable  # params, memory, obs [T, B, ...], first [T, B] -> memory, distribution, value [T, B]


def as_network(network) -> Network:
    """A network as it is, or made of a flax linen module. Raises ValueError for anything else."""
    if isinstance(network, nn.Module):
        return from_linen(network)
    if all(callable(getattr(network, name, None)) for name in Network._fields):
        return network
    raise ValueError(
        f"network={network!r} must be a Network, a flax linen module, or from_nnx(build) of a function that builds "
        "an nnx module"
    )


def from_linen(module: nn.Module) -> Network:
    """A network of a flax linen module that maps observations [B, ...] to (distribution, value [B]).

    Layers of `purejaxppo.networks.layers` in it begin as they do in ours.
    """
    return _feed_forward(draw_orthogonal(lambda key, obs: module.init(key, obs)), module.apply)


def draw_orthogonal(init: Callable) -> Callable:
    """The init of a flax module, with the weights drawn that are to be orthogonal."""
    # Flax draws nothing with the key itself, only with keys that it folds names into.
    return lambda key, *args: orthogonalize(key, init(key, *args))


def from_nnx(build: Callable) -> Network:
    """A network of a flax nnx module, given as the function from `nnx.Rngs` that builds it.

    The module maps observations [B, ...] to (distribution, value [B]) and has no variables but `nnx.Param`s.
    """
    from flax import nnx

    graph, _ = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))), nnx.Param)

    return _feed_forward(
        lambda key, obs: nnx.to_pure_dict(nnx.split(build(nnx.Rngs(key)), nnx.Param)[1]),
        lambda params, obs: nnx.merge(graph, nnx.State(params))(obs),
    )


def _feed_forward(init, apply) -> Network:
    """A network of two functions over one batch axis: init(key, obs) and apply(params, obs)."""

    def flat(obs):
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), obs)

    def init_sequences(key, memory, obs, first):
        return init(key, flat(obs))

    def apply_sequences(params, memory, obs, first):
        outputs = apply(params, flat(obs))
        return memory, *jax.tree.map(lambda x: x.reshape(*first.shape, *x.shape[1:]) if jnp.ndim(x) else x, outputs)

    # One run after another: a user's initialiser may call LAPACK, which must not run vmapped on a small thread pool.
    init_sequences = jax.custom_batching.sequential_vmap(init_sequences)
    return Network(initial_memory=lambda batch: (), init=init_sequences, apply=apply_sequences)


def check_network(network: Network, obs, action_space, config: Config):
    """Traces a network on two steps of N environments, each with observations of the shapes `obs`; compiles nothing.

    Raises ValueError where it does not fit them, the actions of the environment, or the segments of the config.
    """
    num_envs = config.num_envs

    def look(key):
        memory = network.initial_memory(num_envs)
        many = jax.tree.map(lambda x: jnp.zeros((2, num_envs, *x.shape), x.dtype), obs)
        first = jnp.zeros((2, num_envs), bool)
        params = network.init(key, memory, jax.tree.map(lambda x: x[:1], many), first[:1])
        return memory, network.apply(orthogonalize(key, params), memory, many, first)

    try:
        taken, (given, distribution, value) = jax.eval_shape(look, jax.random.key(0))
    except Exception as error:
        raise ValueError(f"network cannot be applied to observations [T, B, ...]: {error}") from error
    taken, given = (jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", memory) for memory in (taken, given))
    if taken != given:
        raise ValueError(f"network must give a memory like the one that it takes, {taken}, not {given}")
    if jax.tree.leaves(taken) and config.segment_length == 1:
        raise ValueError(
            "segment_length=1 teaches a network with a memory nothing about the past "
            f"(try segment_length={config.num_steps}, which is num_steps, or a divisor of it)"
        )
    missing = [name for name in ("sample", "mode", "log_prob", "entropy") if not hasattr(distribution, name)]
    if missing:
        raise ValueError(f"network must give a distribution, but {type(distribution).__name__} has no {missing[0]}")
    for leaf in jax.tree.leaves(distribution):
        if jnp.ndim(leaf) and leaf.shape[:2] != (2, num_envs):
            raise ValueError(
                f"network must give a distribution over [T, B] = (2, {num_envs}), but {type(distribution).__name__} "
                f"holds an array of shape {leaf.shape} (broadcast it, or make it a scalar)"
            )
    if value.shape != (2, num_envs):
        raise ValueError(f"network must give values [T, B] = (2, {num_envs}), not {value.shape}")
    _check_actions(distribution, action_space)


def _check_actions(distribution, space):
    """Refuses a distribution over other actions than those of the environment."""
    if isinstance(space, Discrete) and hasattr(distribution, "logits") and distribution.logits.shape[-1] != space.n:
        raise ValueError(f"network must choose among {space.n} actions, not {distribution.logits.shape[-1]}")
    if isinstance(space, MultiDiscrete) and isinstance(distribution, MultiCategorical):
        sizes, num_logits = tuple(distribution.sizes), distribution.logits.shape[-1]
        if sizes != tuple(space.sizes) or num_logits != sum(sizes):
            raise ValueError(
                f"network must give {sum(space.sizes)} logits for choices among {tuple(space.sizes)}, not {num_logits} "
                f"for {sizes}"
            )
    action = jax.eval_shape(lambda d, key: d.sample(key)[0, 0], distribution, jax.random.key(0))
    size = (int(np.prod(space.shape)),) if isinstance(space, Box) else space.shape
    if action.shape != size:
        raise ValueError(f"network must give actions of shape {size} for {space!r}, not {action.shape}")
