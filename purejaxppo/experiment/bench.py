"""Benchmark of training on this machine: compile time, steps per second, memory, and the time of each stage."""

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from purejaxppo.advantages import estimate
from purejaxppo.batched import batched, runs
from purejaxppo.config import Hyperparams
from purejaxppo.envs.base import Box, action_space, observation_space
from purejaxppo.envs.roles import allowed_actions, random_action
from purejaxppo.experiment.memory import bytes_of, memory_of, show_memory
from purejaxppo.experiment.program import compile_training, first_state
from purejaxppo.ppo import PPO, bind
from purejaxppo.rollout import Actors, begin_where, draw_ahead, scan_steps, step_envs
from purejaxppo.update import minibatches, update


def bench(
    ppo: PPO,
    hyperparams: Hyperparams,
    num_seeds: Sequence[int],
    *,
    rounds: int,
    seconds: float,
    report: Callable[[str], Any] = print,
) -> dict[str, Any]:
    """Measures training for each number of seeds, then the stages of an update; returns plain data.

    Every time is a median after a warm-up and without compilation; rates of training also have the least and the most.

    Args:
        ppo: of one run.
        hyperparams: of every run.
        num_seeds: numbers of runs that train in one call, measured one after the other.
        rounds: repetitions of every measurement.
        seconds: approximate length of a repetition.
        report: called with each line of text as soon as its numbers are known.

    Returns:
        `training`, a row of `time_training` per number of seeds; `peak_bytes`; and `stages`, a row per stage with its
        name `stage`, `milliseconds` and `share` (see `time_stages`).
    """
    results: dict[str, Any] = {"training": [], "stages": []}
    report(f"{'seeds':>6} {'steps/s':>13} {'least':>13} {'most':>13} {'compile':>9}  slices")
    for number in num_seeds:
        row = time_training(ppo, hyperparams, number, rounds=rounds, seconds=seconds)
        results["training"].append(row)
        report(
            f"{number:>6} {row['steps_per_second']:>13,.0f} {row['least']:>13,.0f} {row['most']:>13,.0f} "
            f"{row['compile_seconds']:>7.1f} s  {row['num_slices']} of {row['slice_size']}, "
            f"{row['num_threads']} at a time"
        )
    results["peak_bytes"] = peak_bytes()
    report(f"peak memory {results['peak_bytes'] / 2**20:,.0f} MiB; of one run, in MiB:")
    for line in show_memory([results["training"][-1]["memory"]]).split("\n"):
        report(f"  {line}")
    report("one update of one run:")
    for name, milliseconds, share in time_stages(ppo, hyperparams, rounds=rounds, seconds=seconds):
        results["stages"].append({"stage": name, "milliseconds": milliseconds, "share": share})
        report(f"  {name:<12} {milliseconds:>9.3f} ms {share:>6.1%}")
    return results


def time_training(ppo: PPO, hyperparams: Hyperparams, num_seeds: int, *, rounds: int, seconds: float) -> dict[str, Any]:
    """Environment steps per second, over all runs, of whole updates that train in one call.

    Args:
        ppo: of one run.
        hyperparams: of every run.
        num_seeds: number of runs.
        rounds: repetitions.
        seconds: approximate length of a repetition, which has at least one update.

    Returns:
        Median, least and most of the rates, the seconds of compilation, the bytes of one run by what they hold (see
        `memory_of`), and how the runs are divided into slices and threads.
    """
    many = batched(ppo)
    keys, columns = runs(jax.random.key(0), num_seeds=num_seeds, hyperparams=hyperparams)
    state = first_state(many, keys, columns)
    program = compile_training(many, state)
    program(state, 1)
    start = time.perf_counter()
    program(state, 1)
    once = time.perf_counter() - start
    length = int(min(max(seconds / once, 1), program.num_updates))
    rates = []
    for _ in range(rounds):
        start = time.perf_counter()
        program(state, length)
        rates.append(num_seeds * length * ppo.config.steps_per_update / (time.perf_counter() - start))
    return {
        "num_seeds": num_seeds,
        "steps_per_second": statistics.median(rates),
        "least": min(rates),
        "most": max(rates),
        "compile_seconds": program.compile_seconds,
        "memory": memory_of(many, state, bytes_of(program) // program.slice_size),
        "slice_size": program.slice_size,
        "num_slices": program.num_slices,
        "num_threads": program.num_threads,
    }


def time_stages(ppo: PPO, hyperparams: Hyperparams, *, rounds: int, seconds: float) -> list[tuple[str, float, float]]:
    """The stages of an update: name, milliseconds, share of the update. Each stage is measured as a separate program.

    "acting" is the rollout minus the environment; "learning" is the epochs minus drawing its shuffles (it includes
    gathering the minibatches); "other" is the whole update minus the sum. A stage measured alone, whose inputs and
    outputs are read and written once per round, may take more or less time than inside the update. So a difference that
    would be negative is 0, and shares are those of the sum if that exceeds the update.

    Args:
        ppo: of one run.
        hyperparams: of the run.
        rounds: repetitions of which the median is taken.
        seconds: approximate length of two repetitions.
    """
    state = first_state(ppo, jax.random.key(0), hyperparams)
    fixed = {"network": ppo.network, "config": ppo.config}
    now = jax.tree.map(jnp.asarray, state.hyperparams.at(0, ppo.config))
    state, rollout = jax.jit(ppo.collect)(state)
    advantages = partial(estimate, **fixed)
    batch = jax.jit(advantages)(state.policy, rollout, rollout.reward, state.actors.memory, now)
    learn = partial(update, loss=partial(ppo.loss, **fixed), optimizer=ppo.optimizer, config=ppo.config)
    moments = state.policy.observation
    data = state, now, rollout, batch
    stages = {
        "whole": lambda key, state, *_: ppo.step(state.replace(key=key)),
        "rollout": lambda key, state, *_: ppo.collect(state.replace(key=key)),
        "environment": lambda key, state, *_: play(key, state.actors, state.env_params, ppo),
        "advantages": lambda key, state, now, rollout, batch: advantages(
            state.policy, rollout, rollout.reward, state.actors.memory, now
        ),
        "shuffling": lambda key, *_: minibatches(key, ppo.config),
        "update": lambda key, state, now, rollout, batch: learn(
            key, state.policy.params, state.opt_state, batch, now, observation=moments
        ),
    }
    exact = partial(bind, ppo.config.matmul_precision)
    timed = partial(time_stage, data=data, rounds=rounds, seconds=seconds / 2)
    times = {name: timed(exact(stage)) for name, stage in stages.items()}
    shares = {
        "acting": max(times["rollout"] - times["environment"], 0.0),
        "environment": times["environment"],
        "advantages": times["advantages"],
        "shuffling": times["shuffling"],
        "learning": max(times["update"] - times["shuffling"], 0.0),
    }
    whole = max(times["whole"], sum(shares.values()))
    shares["other"] = whole - sum(shares.values())
    return [(name, 1000 * taken, taken / whole) for name, taken in shares.items()]


def play(key: jax.Array, actors: Actors, env_params: Any, ppo: PPO) -> tuple[Any, tuple[Any, jax.Array]]:
    """Runs the environment of a rollout alone: T steps of N environments, with actions and start states drawn ahead.

    Under an action mask, actions are drawn in each step.

    Args:
        key: of the actions and the environments.
        actors: where the environments stand.
        env_params: parameters of the environment.
        ppo: of one run, for its environment and its config.

    Returns:
        The last states [N, ...], and the observations [T, N, ...] and rewards [T, N].
    """
    config, env = ppo.config, ppo.env
    space: Any = action_space(env, env_params)
    act_key, key = jax.random.split(key)
    shape = config.num_steps, config.num_envs
    if isinstance(space, Box):
        actions = jax.random.normal(act_key, (*shape, int(np.prod(space.shape))))
    else:
        actions = jax.vmap(jax.vmap(partial(random_action, space=space)))(jax.random.split(act_key, shape))
    draws = draw_ahead(key, None, env_params, env=env, config=config).replace(action=actions)

    def step(actors, draws):
        allowed = allowed_actions(observation_space(env), actors.obs)
        if allowed is not None:
            random = partial(random_action, space=space)
            action_keys = jax.vmap(partial(jax.random.fold_in, data=1))(draws.env_keys)
            draws = draws.replace(action=jax.vmap(lambda key, x: random(key, allowed=x))(action_keys, allowed))
        result = step_envs(draws.env_keys, actors.env_state, draws.action, env_params, env=env, config=config)
        done = result.terminated | result.truncated
        state, obs = begin_where(done, draws.start, (result.state, result.obs))
        return actors.replace(env_state=state, obs=obs, first=done), Played(obs=result.obs, reward=result.reward)

    actors, _, played = scan_steps(step, actors, draws, config)
    return actors.env_state, (played.obs, played.reward)


class Played(struct.PyTreeNode):
    """What is kept of a step of the environment alone."""

    obs: Any  # [N, ...]
    reward: jax.Array  # [N]
    reused: Any = None


def time_stage(stage: Callable[..., Any], data: tuple[Any, ...], *, rounds: int, seconds: float) -> float:
    """Seconds that stage(key, *data) takes, the median of `rounds` loops of about `seconds` each.

    Args:
        stage: a traceable function from (key, *data) to a pytree of arrays.
        data: its other arguments, pytrees of arrays.
        rounds: loops of which the median is taken.
        seconds: approximate length of a loop.
    """

    @jax.jit
    def loop(number, data):
        def body(i, total):
            # Inputs that depend on the previous round keep XLA from moving the stage out of the loop or removing it.
            now = jax.tree.map(lambda x: x + 0 * total if x.dtype == jnp.float32 else x, data)
            leaves = jax.tree.leaves(stage(jax.random.key(i), *now))
            sums = [x.sum(dtype=jnp.float32) for x in leaves if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)]
            return jnp.nan_to_num(sum(sums))

        return jax.lax.fori_loop(0, number, body, jnp.float32(0))

    jax.block_until_ready(loop(1, data))
    start = time.perf_counter()
    jax.block_until_ready(loop(2, data))
    number = max(2, int(2 * seconds / (time.perf_counter() - start)))
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(loop(number, data))
        taken.append((time.perf_counter() - start) / number)
    return statistics.median(taken)


def peak_bytes() -> int:
    """Peak memory so far in bytes: of the accelerator, or of this process if there is none."""
    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
