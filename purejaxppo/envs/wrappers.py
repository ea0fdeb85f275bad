"""Wrappers of any `Env`: time limits, stacked frames, repeated and sticky actions, randomized parameters.

A wrapped environment has a name of its own.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from purejaxppo.checks import check_number, check_whole
from purejaxppo.envs.base import (
    ActionMask,
    Box,
    Discrete,
    Env,
    MultiDiscrete,
    Step,
    action_space,
    bound_action,
    count_lost_as_zero,
    observation_space,
    privileged,
)
from purejaxppo.text import quote


class Timed(struct.PyTreeNode):
    """The state of an environment under `time_limit`."""

    state: Any
    time: jax.Array  # [] int32, steps taken


def time_limit(env: Env, max_steps: int) -> Env:
    """`env` with every episode truncated after `max_steps` steps, unless it ends before.

    Raises ValueError unless `env` is an `Env` and `max_steps` a whole number from 1.
    """
    check_is_env(env)
    max_steps = check_whole("max_steps", max_steps)

    def reset(key, params):
        state, obs = env.reset(key, params)
        return Timed(state=state, time=jnp.int32(0)), obs

    def step(key, timed, action, params):
        result = env.step(key, timed.state, action, params)
        time = timed.time + 1
        return result._replace(
            state=Timed(state=result.state, time=time),
            truncated=jnp.logical_or(result.truncated, time >= max_steps),
        )

    return env._replace(reset=reset, step=step, name=f"time_limit({env.name}, {max_steps})")


class Stacked(struct.PyTreeNode):
    """The state of an environment under `frame_stack`."""

    state: Any
    obs: Any  # the last observations, joined


def frame_stack(env: Env, num_frames: int) -> Env:
    """`env` with its last `num_frames` observations in one, the newest last; an episode begins with the first repeated.

    They are joined along the last axis: a vector [F] becomes [num_frames * F], and an image [H, W, C] becomes
    [H, W, num_frames * C]. A number becomes [num_frames], and a grid [H, W] becomes [H, W, num_frames]. Of a dictionary
    each part is stacked, except action masks.

    Raises ValueError unless `env` is an `Env` and `num_frames` a whole number from 1.
    """
    check_is_env(env)
    num_frames, spaces = check_whole("num_frames", num_frames), observation_space(env)

    def repeat(space, x):
        return x if isinstance(space, ActionMask) else _join([x] * num_frames)

    def push(space, frames, x):
        return x if isinstance(space, ActionMask) else _join([frames[..., _as_frame(x).shape[-1] :], x])

    def reset(key, params):
        state, obs = env.reset(key, params)
        obs = jax.tree.map(repeat, spaces, obs)
        return Stacked(state=state, obs=obs), obs

    def step(key, stacked, action, params):
        result = env.step(key, stacked.state, action, params)
        obs = jax.tree.map(push, spaces, stacked.obs, result.obs)
        return result._replace(state=Stacked(state=result.state, obs=obs), obs=obs)

    space = jax.tree.map(partial(_stacked_space, num_frames=num_frames), spaces)
    name = f"frame_stack({env.name}, {num_frames})"
    return env._replace(reset=reset, step=step, observation_space=space, name=name)


def _join(frames: list[Any]) -> jax.Array:
    return jnp.concatenate([_as_frame(x) for x in frames], axis=-1)


def _as_frame(x: Any) -> Any:
    """A number or a grid with an axis behind it, along which frames are joined."""
    return x[..., None] if np.ndim(x) in (0, 2) else x


def _stacked_space(space: Any, num_frames: int) -> Any:
    def join(x):
        return np.concatenate([_as_frame(np.broadcast_to(x, space.shape))] * num_frames, axis=-1)

    if isinstance(space, ActionMask):
        return space
    if isinstance(space, Discrete):
        stacked = MultiDiscrete(join(space.n))
    elif isinstance(space, MultiDiscrete):
        stacked = MultiDiscrete(join(np.reshape(space.sizes, space.shape)))
    else:
        low = join(space.low)
        stacked = Box(low, join(space.high), low.shape, space.dtype)
    return privileged(stacked) if space.privileged else stacked


def action_repeat(env: Env, num_repeats: int) -> Env:
    """`env` with every action taken `num_repeats` times, until the episode ends; the rewards are summed.

    A step reports the mean of the metrics of its steps, and the last `episode_metrics`.

    Raises ValueError unless `env` is an `Env` without action masks and `num_repeats` a whole number from 1.
    """
    check_is_env(env)
    check_has_no_mask("action_repeat", env)
    num_repeats = check_whole("num_repeats", num_repeats)

    def step(key, state, action, params):
        result = jax.eval_shape(lambda *args: _as_numbers(env.step(*args)), key, state, action, params)
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), result._replace(state=()))

        def repeat(carry, key):
            before, count = carry
            done = before.terminated | before.truncated
            new = _as_numbers(env.step(key, before.state, action, params))
            metrics = jax.tree.map(jnp.add, before.metrics, new.metrics)
            new = new._replace(reward=before.reward + new.reward, metrics=metrics)
            kept = jax.tree.map(lambda old, x: jnp.where(done, old, x), before, new)
            return (kept, count + ~done), ()

        carry = nothing._replace(state=state), jnp.int32(0)
        (result, count), _ = jax.lax.scan(repeat, carry, jax.random.split(key, num_repeats))
        return result._replace(metrics=jax.tree.map(lambda x: x / count, result.metrics))

    return env._replace(step=step, name=f"action_repeat({env.name}, {num_repeats})")


def _as_numbers(result: Step) -> Step:
    """A step whose reward and metrics can be summed: as float32, and without the nan of a last step (see `Step`)."""
    ended = result.terminated | result.truncated
    number = lambda x: count_lost_as_zero(ended, jnp.asarray(x, jnp.float32))
    return result._replace(reward=number(result.reward), metrics=jax.tree.map(number, result.metrics))


class Sticky(struct.PyTreeNode):
    """The state of an environment under `sticky_actions`."""

    state: Any
    action: jax.Array  # the last
    begun: jax.Array  # [] bool, whether there is a last action


def sticky_actions(env: Env, probability: float) -> Env:
    """`env` in which the last action is taken once more, in place of the one given, with a probability in each step.

    The first action of an episode is always the one given.

    Raises ValueError unless `env` is an `Env` without action masks and `probability` a number in [0, 1].
    """
    check_is_env(env)
    check_has_no_mask("sticky_actions", env)
    check_number("probability", probability, 0, 1)

    def reset(key, params):
        state, obs = env.reset(key, params)
        return Sticky(state=state, action=_no_action(env, params), begun=jnp.bool_(False)), obs

    def step(key, sticky, action, params):
        stick_key, step_key = jax.random.split(key)
        repeats = sticky.begun & (jax.random.uniform(stick_key) < probability)
        action = jnp.where(repeats, sticky.action, jnp.asarray(action, sticky.action.dtype))
        result = env.step(step_key, sticky.state, action, params)
        return result._replace(state=Sticky(state=result.state, action=action, begun=jnp.bool_(True)))

    return env._replace(reset=reset, step=step, name=f"sticky_actions({env.name}, {probability})")


def _no_action(env: Env, params: Any) -> jax.Array:
    space = action_space(env, params)
    if isinstance(space, Box):
        return bound_action(jnp.zeros(int(np.prod(space.shape))), space, "clip")
    return jnp.zeros(space.shape, jnp.int32)


class Randomized(struct.PyTreeNode):
    """The state of an environment under `randomize`."""

    state: Any
    params: Any  # of this episode


def randomize(env: Env, sample_params: Callable) -> Env:
    """`env` whose parameters every episode draws for itself (domain randomization).

    The bounds of actions stay those under the parameters of the run.

        >>> def sample(key, params):
        ...     return params.replace(length=params.length * jax.random.uniform(key, minval=0.5, maxval=1.5))
        >>> env = pjp.randomize(pjp.make_env("CartPole-v1"), sample)

    Args:
        env: any environment with parameters.
        sample_params: (key, params) -> params of one episode, from those of the run.

    Raises:
        ValueError: for an environment without parameters, or if `sample_params` cannot be called so or returns other
            parameters than the environment has.
    """
    check_is_env(env)
    if not jax.tree.leaves(env.params):
        raise ValueError(
            f"env={quote(env.name)} has no parameters to draw (put into Env.params what shall vary; for brax and "
            "playground make_env(NAME, traced=...) does)"
        )
    try:
        drawn = jax.eval_shape(sample_params, jax.random.key(0), env.params)
    except Exception as error:  # of any kind: the function is the user's
        raise ValueError(
            f"sample_params={quote(sample_params)} cannot be called as sample_params(key, params): "
            f"{type(error).__name__}: {error}"
        ) from error
    kinds = [jax.tree.map(lambda x: (np.shape(x), jnp.result_type(x)), params) for params in (env.params, drawn)]
    if kinds[0] != kinds[1]:
        raise ValueError(f"sample_params={quote(sample_params)} must return {kinds[0]}, not {kinds[1]}")

    def reset(key, params):
        params_key, reset_key = jax.random.split(key)
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), sample_params(params_key, params))
        state, obs = env.reset(reset_key, params)
        return Randomized(state=state, params=params), obs

    def step(key, state, action, params):
        result = env.step(key, state.state, action, state.params)
        return result._replace(state=state.replace(state=result.state))

    return env._replace(reset=reset, step=step, name=f"randomize({env.name})")


def check_is_env(env: Any) -> None:
    """Raises ValueError unless `env` is an `Env`."""
    if not isinstance(env, Env):
        raise ValueError(f"env={quote(env)} must be an Env (make_env makes one of a name, or of gymnax)")


def check_has_no_mask(wrapper: str, env: Env) -> None:
    """Raises ValueError if actions of an environment are masked, so that one may not be allowed a step later."""
    if any(isinstance(space, ActionMask) for space in jax.tree.leaves(observation_space(env))):
        raise ValueError(f"env={quote(env.name)} masks actions, so {wrapper} might take one that is not allowed")
