"""What an agent with a memory may need to see besides the observation: its previous action and reward."""

from typing import Any

import jax
import jax.numpy as jnp

from purejaxppo.envs.base import (
    Box,
    Env,
    Space,
    action_space,
    count_lost_as_zero,
    flatten_observation,
    observation_space,
)

ACTION, REWARD = "previous_action", "previous_reward"
OBSERVATION = "observation"


def with_memory_inputs(env: Env) -> Env:
    """`env` with `previous_action` and `previous_reward` beside what it shows, see `show_previous`.

    An environment that has them already stays as it is.

    Raises:
        ValueError: if the observation has another part of one of these names.
    """
    space = observation_space(env)
    shown = set(space) & {ACTION, REWARD} if isinstance(space, dict) else set()
    if len(shown) == 2:
        return env
    if shown:
        raise ValueError(f"memory_inputs=True adds {min(shown)!r}, which {env.name!r} has already (rename it there)")

    def reset(key, params):
        state, obs = env.reset(key, params)
        return state, show_nothing(obs, action_space(env, params))

    def step(key, state, action, params):
        result = env.step(key, state, action, params)
        ended = result.terminated | result.truncated
        reward = count_lost_as_zero(ended, result.reward)
        return result._replace(obs=show_previous(result.obs, action, reward, action_space(env, params)))

    actions = action_space(env, env.params)
    parts = {ACTION: Box(shape=(_size(actions),), dtype=_dtype(actions)), REWARD: Box()}
    return env._replace(reset=reset, step=step, observation_space=_join(space, parts))


def show_previous(obs: Any, action: Any, reward: Any, space: Space) -> dict[str, Any]:
    """An observation as a dictionary with `previous_action` [A] and `previous_reward` [].

    Args:
        obs: of the environment; unless it is a dictionary, it becomes the part `observation`.
        action: within its bounds; discrete ones are shown as one-hot uint8, which are never normalised.
        reward: raw.
        space: of the action.
    """
    action = flatten_observation(space, jnp.asarray(action)).astype(_dtype(space))
    return _join(obs, {ACTION: action, REWARD: jnp.asarray(reward, jnp.float32)})


def show_nothing(obs: Any, space: Space) -> dict[str, Any]:
    """The first observation of an episode, as `show_previous` has the others: both parts are 0."""
    return _join(obs, {ACTION: jnp.zeros(_size(space), _dtype(space)), REWARD: jnp.float32(0)})


def hide_previous(space: Any, was_dictionary: bool) -> Any:
    """The space of what `show_previous` was given, of the space of what it returned."""
    rest = {name: x for name, x in space.items() if name not in (ACTION, REWARD)}
    return rest[OBSERVATION] if rest.keys() == {OBSERVATION} and not was_dictionary else rest


def _join(whole: Any, parts: dict[str, Any]) -> dict[str, Any]:
    return (whole if isinstance(whole, dict) else {OBSERVATION: whole}) | parts


def _size(space: Space) -> int:
    """The length of `previous_action`."""
    return jax.eval_shape(lambda: flatten_observation(space, jnp.zeros(space.shape, jnp.int32))).shape[0]


def _dtype(space: Space) -> Any:
    return jnp.float32 if isinstance(space, Box) else jnp.uint8
