"""Evaluations of runs while they train: at intervals every policy plays whole episodes in fresh environments."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from purejaxppo.experiment.distributed import spans_processes, to_host
from purejaxppo.ppo import PPO
from purejaxppo.sharded import AXIS

EVALUATION_RETURN = "evaluation_return"


@dataclass(frozen=True)
class Evaluations:
    """When the policies of runs play, and the program that plays; `make_evaluations` makes one.

    They play with a branch of the key of each run that training does not use, so training is the same without them.
    """

    play: Any
    """(key, policy, env_params) of a state -> Evaluation [(R,) E]; a compiled program if it was made with a state."""
    every: int
    """Updates between two evaluations."""
    last: int
    """Updates of the whole run, after which there is one more."""

    def next_after(self, done: int) -> int:
        """The number of updates at which the next evaluation is due, after so many."""
        following = done - done % self.every + self.every
        return min(following, self.last) if done < self.last else following

    def is_due(self, done: int) -> bool:
        """Whether there is an evaluation after so many updates."""
        return done % self.every == 0 or done == self.last

    def measure(self, state: Any, metrics: Mapping[str, np.ndarray], due: bool) -> np.ndarray:
        """The metric `evaluation_return`, [(R,) U]: the mean return of every policy, nan where it did not play.

        Args:
            state: after a chunk; a population, too.
            metrics: of the chunk, [(R,) U].
            due: whether the state is to be evaluated, as the last one of the chunk; no other one of it is.
        """
        # A run that has turned nan does not report its loss or its learning rate.
        healthy = np.isfinite(metrics.get("loss", metrics["learning_rate"]))
        returns = np.full(healthy.shape, np.nan, np.float32)
        if due:
            runs = getattr(state, "runs", state)
            played = np.asarray(to_host(self.play(runs.key, runs.policy, runs.env_params).episode_return))
            returns[..., -1] = np.where(healthy[..., -1], played.mean(-1), np.nan)
        return returns


def ends_of_chunks(begin: int, end: int, most: int, evaluations: Evaluations | None) -> list[int]:
    """The numbers of updates at which chunks end, of at most so many updates each: also where an evaluation is due."""
    ends, done = [], begin
    while done < end:
        done = min(done + most, evaluations.next_after(done) if evaluations else end, end)
        ends.append(done)
    return ends


def make_evaluations(ppo: PPO, every: int, state: Any = None) -> Evaluations:
    """The evaluations of runs of a PPO.

    Args:
        ppo: what trains.
        every: updates between two evaluations.
        state: of the shapes and on the devices of those that will be evaluated, to compile now; by default the first
            evaluation compiles.
    """
    play = jax.jit(ppo.evaluate)
    if ppo.mesh is not None and AXIS in ppo.mesh.axis_names:  # every device has the policy: one of them plays
        device = ppo.mesh.local_devices[0]

        def play_on_one(*players: Any) -> Any:
            players = _in_this_process(*players) if spans_processes(players) else players
            return play(*jax.device_put(players, device))

        return Evaluations(play_on_one, every, ppo.config.num_updates)
    if state is not None:
        play = play.lower(state.key, state.policy, state.env_params).compile()
    return Evaluations(play, every, ppo.config.num_updates)


def _in_this_process(key: jax.Array, *rest: Any) -> tuple:
    """Arrays that lie on devices of several processes, whole and on the host of each; all must call it."""
    data, *others = jax.device_get(to_host((jax.random.key_data(key), *rest)))
    return jax.random.wrap_key_data(data), *others
