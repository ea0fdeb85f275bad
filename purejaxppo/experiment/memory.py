"""Where the memory of a run goes."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax

from purejaxppo.experiment.evaluations import Evaluations
from purejaxppo.experiment.program import Program
from purejaxppo.ppo import PPO
from purejaxppo.record import size_of
from purejaxppo.rollout import is_wide
from purejaxppo.starts import draw_starts, starts_per_step
from purejaxppo.text import align


def memory_of(ppo: PPO, state: Any, total: int) -> dict[str, int]:
    """Bytes of one run while it trains, by what they hold.

    Args:
        ppo: of one run or batched.
        state: of it, arrays or shapes.
        total: bytes of one run by the compiler's analysis.

    Returns:
        "learned" (policy and optimizer), "environments" (their states, observations and the memories of the network),
        "start states" (those that wait, and those drawn ahead for a rollout), "rollout" (what is kept of T x N steps),
        and "working memory" for the rest of `total`: activations, minibatches, what drawing a start state takes, and a
        copy of the state.
    """
    rollout = jax.eval_shape(ppo.collect, state)[1]
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), rollout) if ppo.many else rollout
    if is_wide(one.distribution):
        rollout = rollout.replace(distribution=())  # not kept
    key, num_runs = jax.random.key(0), state.num_updates.size
    number = (num_runs, ppo.config.num_steps, starts_per_step(ppo.env, ppo.config))
    drawn = jax.eval_shape(partial(draw_starts, shape=number, env=ppo.env), key, ppo.env.params)
    parts = {
        "learned": (state.policy, state.opt_state),
        "environments": state.actors.replace(pool=()),
        "start states": (state.actors.pool, drawn),
        "rollout": rollout,
    }
    sizes = {name: size_of(part) // num_runs for name, part in parts.items()}
    return sizes | {"working memory": max(total - sum(sizes.values()), 0)}


def show_memory(groups: list[Mapping[str, int]]) -> str:
    """A table in MiB of what `memory_of` says of one run of each group."""
    return align([{name: f"{size / 2**20:.2f}" for name, size in memory.items()} for memory in groups])


def bytes_of(program: Program, evaluations: Evaluations | None = None) -> int:
    """Memory of a compiled program on one device: inputs, outputs that do not reuse them, and temporaries.

    A program that is not divided into slices starts its next chunk from a copy of the state (see `chunks`). Evaluations
    that are compiled add their temporaries.
    """
    analysis = program.executable.memory_analysis()
    if analysis is None:
        return 0
    held = analysis.argument_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    copied = analysis.argument_size_in_bytes if program.num_slices == 1 else 0
    playing = evaluations.play.memory_analysis() if evaluations else None
    return held + copied + analysis.temp_size_in_bytes + (playing.temp_size_in_bytes if playing else 0)
