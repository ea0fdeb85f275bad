"""gymnax environments and wrappers without their auto-reset: a step shows the observation that it reached."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from purejaxppo.dependence import used_leaves

GYMNAX = "gymnax.environments."
NEVER = 2**30  # a time limit that no episode reaches; an environment may add to it


class WithoutReset:
    """A gymnax environment or wrapper with a `step` that never resets; its other attributes are those of `env`."""

    def __init__(self, env: Any, reset: Callable, step: Callable):
        self.env, self._reset, self._step = env, reset, step

    def __getattr__(self, name: str) -> Any:
        return getattr(self.env, name)

    def reset(self, key: jax.Array, params: Any = None) -> tuple[Any, Any]:
        """The observation and the state of a start."""
        result = self._reset(key, self.env.default_params if params is None else params)
        if not (isinstance(result, tuple) and len(result) == 2):
            raise ValueError(f"reset of {_name(self.env)} must return (obs, state), not {_kind(result)}")
        return result

    def step(self, key: jax.Array, state: Any, action: Any, params: Any = None) -> tuple:
        """Observation, state, reward, terminated, truncated and info of one step, before any reset."""
        return self._step(key, state, action, self.env.default_params if params is None else params)


def without_reset(env: Any, params: Any) -> WithoutReset:
    """A gymnax environment or wrapper whose `step` shows the observation that it reached.

    A wrapper is copied, and the copy wraps environments without reset. So its own code does what it does to keys,
    actions, observations, rewards and flags, and its `reset` gives every episode a new state of the wrapper. If a
    `step` resets by itself, the observation reached is `info["final_observation"]`, as gymnax documents.

    Args:
        env: of gymnax 1.0; its class has its own `step`, or else `step_env` and `is_truncated`.
        params: of the environment; shapes are traced with them.

    Raises:
        ValueError: for the interface of gymnax before 1.0, and for a `step` that does not show what it reached.
    """
    wrapped = {name: without_reset(inner, params) for name, inner in wrapped_environments(env).items()}
    copy, is_environment = _copy(env, wrapped), _base(env) is not None
    own_step, own_parts = _defines(env, "step"), _defines(env, "step_env", "reset_env", "is_truncated")
    if own_step and not (is_environment or wrapped or own_parts):
        raise ValueError(f"{_name(env)} must keep the environment that it wraps as an attribute, such as self._env")
    if own_step and (is_environment or wrapped):
        return WithoutReset(env, copy.reset, partial(_own_step, copy, _resets_itself(env, wrapped, params)))
    if wrapped and not (is_environment or own_parts):
        return WithoutReset(env, copy.reset, copy.step)  # `step` is that of the wrapped environment
    if any(_defines(inner.env, "step") for inner in wrapped.values()):
        raise ValueError(
            f"step_env of {_name(env)} does without the step of the wrapper that it wraps (override step instead)"
        )
    reset = copy.reset if _defines(env, "reset") else copy.reset_env
    return WithoutReset(env, reset, partial(_step_in_parts, copy))


def wrapped_environments(env: Any) -> dict[str, Any]:
    """The gymnax environments that a wrapper holds, by the names of its attributes."""
    attributes = getattr(env, "__dict__", {})
    return {name: x for name, x in attributes.items() if hasattr(x, "step_env") and not isinstance(x, type)}


def _own_step(env, resets_itself, key, state, action, params):
    obs, state, reward, terminated, truncated, info = _whole(env, env.step(key, state, action, params))
    if resets_itself:
        done = jnp.logical_or(terminated, truncated)
        obs = jax.tree.map(lambda last, x: jnp.where(done, last, x), info["final_observation"], obs)
    return obs, state, reward, terminated, truncated, {**info, "final_observation": obs}


def _resets_itself(env, wrapped, params) -> bool:
    """Whether the step of `env` resets, found by tracing it; refuses a step that hides the observation reached."""
    key = jax.random.key(0)
    start = WithoutReset(env, _copy(env, wrapped).reset, env.step)
    _, state = jax.eval_shape(start.reset, key, params)
    action = jax.eval_shape(env.action_space(params).sample, key)
    calls = []

    def record(name, function):
        return lambda *args, **named: calls.append(name) or function(*args, **named)

    recorded = {
        name: WithoutReset(inner, record("reset", inner.reset), record("step", inner.step))
        for name, inner in wrapped.items()
    }
    copy = _copy(env, recorded)  # not the one above, whose functions jit has traced already
    if _base(env):
        vars(copy)["reset_env"] = record("reset", env.reset_env)
    obs, *_, info = _whole(env, jax.eval_shape(copy.step, key, state, action, params))
    if wrapped and "step" not in calls:
        raise ValueError(f"step of {_name(env)} must call step of the environment that it holds, or its resets remain")
    if "reset" not in calls:
        return False
    if jax.tree.map(_shape, info.get("final_observation")) != jax.tree.map(_shape, obs):
        raise ValueError(
            f"step of {_name(env)} resets by itself, so it must keep the observation reached as "
            "info['final_observation'], with the shape of other observations (or leave resets to what it wraps)"
        )
    return True


def _whole(env, result):
    if not (isinstance(result, tuple) and len(result) == 6):
        raise ValueError(
            f"step of {_name(env)} must return (obs, state, reward, terminated, truncated, info), as in gymnax 1.0, "
            f"not {_kind(result)}"
        )
    return result


def _step_in_parts(env, key, state, action, params):
    result = env.step_env(key, state, action, params)
    if not (isinstance(result, tuple) and len(result) == 5):
        raise ValueError(
            f"step_env of {_name(env)} must return (obs, state, reward, terminated, info), as in gymnax 1.0, "
            f"not {_kind(result)}"
        )
    obs, next_state, reward, terminated, info = result
    # The environments of gymnax itself need no test, which would trace each step twice.
    if _defines(env, "step_env", "is_terminal", "is_terminated") and _ends_by_time(
        env, key, state, action, params
    ):  # before gymnax 1.0 one flag meant both
        endless = params.replace(max_steps_in_episode=jnp.full_like(params.max_steps_in_episode, NEVER))
        terminated = env.step_env(key, state, action, endless)[3]
    try:
        truncated = env.is_truncated(next_state, params)
    except AttributeError as error:
        raise ValueError(
            f"{_name(env)} does not tell when its time runs out: {error} (define is_truncated(state, params), as in "
            "gymnax 1.0, and leave the time limit out of terminated)"
        ) from error
    info = {**info, "terminated": terminated, "truncated": truncated, "final_observation": obs}
    return obs, next_state, reward, terminated, truncated, info


def _ends_by_time(env, key, state, action, params) -> bool:
    """Whether `terminated` depends on the time limit."""
    if not hasattr(params, "max_steps_in_episode"):
        return False

    def terminated(limit, key, state, action, params):
        return env.step_env(key, state, action, params.replace(max_steps_in_episode=limit))[3]

    arrays = jax.tree.map(jnp.asarray, (params.max_steps_in_episode, key, state, action, params))
    return used_leaves(terminated, *jax.tree.map(_shape, arrays))[0]


def _copy(env, wrapped):
    """A copy of an environment or a wrapper that holds other environments, and no auto-reset of gymnax's base class."""
    base, kind = _base(env), type(env)
    if base:
        without = type("WithoutReset", (base,), {"step": _step_in_parts})
        kind = type(kind.__name__, (kind, without), {})
    new = object.__new__(kind)
    vars(new).update(vars(env) | wrapped)  # not copy.copy, which asks wrappers for attributes before they have any
    return new


def _base(env):
    """The base class of gymnax's environments, or None if the object has another."""
    return next((c for c in type(env).__mro__ if c.__module__ == GYMNAX + "environment" and "step" in vars(c)), None)


def _defines(env, *methods: str) -> bool:
    """Whether one of these methods of an object is its own, not one of the environments of gymnax."""
    owners = [next((c for c in type(env).__mro__ if method in vars(c)), None) for method in methods]
    return any(owner is not None and not owner.__module__.startswith(GYMNAX) for owner in owners)


def _name(env) -> str:
    return type(env).__name__


def _kind(result) -> str:
    return f"{len(result)} values" if isinstance(result, tuple) else type(result).__name__


def _shape(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype)
