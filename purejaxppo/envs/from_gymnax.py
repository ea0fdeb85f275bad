"""gymnax environments and wrappers, without auto-reset, terminated and truncated apart."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from purejaxppo.envs.base import Box, Discrete, Env, MultiDiscrete, Step, in_32_bits
from purejaxppo.envs.import_gymnax import import_gymnax
from purejaxppo.envs.without_reset import without_reset, wrapped_environments
from purejaxppo.text import quote

REPEATED = {"discount", "terminated", "truncated", "final_observation"}


def from_gymnax(env: Any, params: Any = None) -> Env:
    """An `Env` of a gymnax 1.0 environment, or of a wrapper around one.

    Wrappers, gymnax's and your own, do all that they do, with the resets of gymnax left out (see `without_reset`). An
    environment of before 1.0, whose `step_env` returns the time limit as a termination, has the two told apart.

    Args:
        env: a registered name, an environment or a wrapper.
        params: by default those of the environment.

    Raises:
        ValueError: for parameters of another environment, an unsupported space, or an interface that hides observations
            or the time limit.
    """
    if isinstance(env, str):
        env, default_params = import_gymnax().make(env)
        params = default_params if params is None else params
    params = env.default_params if params is None else params
    fields = getattr(getattr(env, "default_params", None), "__dict__", {})
    lacking = [name for name in fields if not hasattr(params, name)]
    if lacking:
        raise ValueError(
            f"params={quote(params)} of {_name(env)} must have {lacking[0]} (take env.default_params.replace(...))"
        )
    raw = without_reset(env, params)
    start = _start(env.action_space(params))
    try:
        declared = env.observation_space(params)
    except NotImplementedError:
        declared = None
    starts = _start(declared)

    def reset(key, params):
        obs, state = raw.reset(key, params)
        return in_32_bits(state), in_32_bits(_from_zero(starts, obs))

    def step(key, state, action, params):
        action = action if start is None else action + jnp.asarray(start, action.dtype)
        obs, state, reward, terminated, truncated, info = raw.step(key, state, action, params)
        return Step(
            state=in_32_bits(state),
            obs=in_32_bits(_from_zero(starts, obs)),
            reward=jnp.asarray(reward, jnp.float32),
            terminated=jnp.asarray(terminated, bool),
            truncated=jnp.asarray(truncated, bool),
            metrics=_numbers(info),
        )

    return Env(
        reset=reset,
        step=step,
        params=params,
        action_space=lambda params: _space(env.action_space(params)),
        observation_space=_observation_space(declared, jax.eval_shape(reset, jax.random.key(0), params)[1]),
        name=_name(env),
    )


def gymnax_names() -> list[str]:
    """The names registered in gymnax, without those that need to download data."""
    return [name for name in import_gymnax().registered_envs if name != "MNISTBandit-bsuite"]


def _numbers(info: dict) -> dict:
    """The numbers in the info of a step as `info_NAME`, without those that repeat other fields of the step."""
    scalars = {name: x for name, x in info.items() if isinstance(x, (jax.Array, float, int)) and jnp.ndim(x) == 0}
    kept = {name: x for name, x in scalars.items() if name not in REPEATED and not _is_key(x)}
    return {f"info_{name.replace('/', '_')}": x for name, x in kept.items()}


def _is_key(x) -> bool:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _name(env) -> str:
    """The name of an environment, with the wrappers around it: they make it another one."""
    wrapped = [*wrapped_environments(env).values()]
    return f"{type(env).__name__}({_name(wrapped[0])})" if wrapped else env.name


def _start(space):
    """The first integer of a discrete space, by name for a dictionary; None for 0, where our spaces begin."""
    if hasattr(space, "spaces") and hasattr(space.spaces, "items"):
        starts = {name: _start(part) for name, part in space.spaces.items()}
        return starts if any(start is not None for start in starts.values()) else None
    start = getattr(space, "start", 0)
    return start if np.any(start) else None


def _from_zero(start, obs):
    """An observation with every discrete part counted from 0."""
    if isinstance(start, dict):
        return {name: _from_zero(start[name], obs[name]) for name in start}
    return obs if start is None else obs - jnp.asarray(start, obs.dtype)


def _observation_space(declared, obs):
    """The declared kind of space with the shape and dtype that `reset` returns: in gymnax the two can differ."""
    kind = jax.tree.map(lambda x: Box(), obs) if declared is None else _space(declared)
    return jax.tree.map(
        lambda space, x: Box(shape=x.shape, dtype=x.dtype) if isinstance(space, Box) else space, kind, obs
    )


def _space(space):
    """A gymnax space as one of ours; its attributes tell its kind, so that subclasses work."""
    if hasattr(space, "spaces"):
        if not hasattr(space.spaces, "items"):
            raise ValueError(f"{space} is a tuple of spaces; make it a Dict, or a MultiDiscrete where all are discrete")
        return {name: _space(child) for name, child in space.spaces.items()}
    if hasattr(space, "nvec"):
        return MultiDiscrete(space.nvec)
    if hasattr(space, "n"):
        return Discrete(space.n)
    return Box(space.low, space.high, space.shape, space.dtype)
