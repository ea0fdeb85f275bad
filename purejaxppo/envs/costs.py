"""What an environment costs: the time and the bytes of a start and of a step."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax

from purejaxppo.envs.base import Env, action_space, observation_space
from purejaxppo.envs.roles import allowed_actions, random_action
from purejaxppo.record import size_of

BATCH, ROUNDS = 64, 8  # environments whose costs are measured together, and steps of each
MEASURED = 0.05  # seconds


class EnvCosts(NamedTuple):
    """What an environment costs, measured on this machine in batches of `BATCH`."""

    start_seconds: float  # of one start state
    step_seconds: float  # of one step
    start_bytes: int  # of a start state with its observation
    transition_bytes: int  # of a step in a rollout: both observations, action, reward, flags, metrics

    def __str__(self) -> str:
        return (
            f"a start takes the time of {self.start_seconds / self.step_seconds:,.1f} steps and {self.start_bytes:,} "
            f"bytes; a step in a rollout takes {self.transition_bytes:,} bytes"
        )


def measure_costs(env: Env) -> EnvCosts:
    """The costs of an environment that can be played; compiles its reset and its step, and runs them."""
    keys, space = jax.random.split(jax.random.key(0), (ROUNDS, BATCH)), action_space(env, env.params)

    def reset(keys):
        return jax.vmap(env.reset, in_axes=(0, None))(keys, env.params)

    def act(key, obs):
        return random_action(key, space, allowed_actions(observation_space(env), obs))

    def step(start, keys):
        state, obs = start
        action_keys = jax.vmap(partial(jax.random.fold_in, data=1))(keys)
        actions = jax.vmap(act)(action_keys, obs)
        result = jax.vmap(env.step, in_axes=(0, 0, 0, None))(keys, state, actions, env.params)
        return jax.tree.map(lambda new, old: new.astype(old.dtype), (result.state, result.obs), start), result

    start = jax.jit(reset)(keys[0])
    _, result = jax.eval_shape(step, start, keys[0])
    action = jax.eval_shape(partial(random_action, space=space), keys[0, 0])
    kept = result.obs, result.obs, result.reward, result.terminated, result.metrics, result.episode_metrics
    return EnvCosts(
        start_seconds=_seconds(jax.jit(partial(jax.lax.map, reset)), keys) / keys.size,
        step_seconds=_seconds(jax.jit(partial(jax.lax.scan, step)), start, keys) / keys.size,
        start_bytes=size_of(start) // BATCH,
        transition_bytes=size_of(kept) // BATCH + size_of(action),
    )


def _seconds(function: Callable, *args: Any) -> float:
    """The least time of a call of a compiled function: of three at least, and of as many as fit in `MEASURED`."""
    jax.block_until_ready(function(*args))  # compiles
    taken = []
    while len(taken) < 3 or sum(taken) < MEASURED:
        start = time.perf_counter()
        jax.block_until_ready(function(*args))
        taken.append(time.perf_counter() - start)
    return min(taken)
