"""Successive halving: settings that do badly early give their place in the batch to others."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import jax
import numpy as np
from tqdm.auto import tqdm

from purejaxppo.batched import batched, seed_keys
from purejaxppo.checks import check_whole
from purejaxppo.experiment.program import Program, best_slice_size, compile, first_state, noted_interrupt, num_cores
from purejaxppo.experiment.report.statistics import STATISTICS
from purejaxppo.experiment.sweeps.columns import wave_arguments
from purejaxppo.experiment.sweeps.sweep import Sweep
from purejaxppo.ppo import PPO, TrainState, make_ppo


@dataclass(frozen=True)
class Halving:
    """What successive halving has come to."""

    sweep: Sweep
    ppo: PPO
    """Batched over runs."""
    rungs: tuple[int, ...]
    """Updates after which settings are compared."""
    scores: np.ndarray
    """[settings, rungs]; nan where a setting did not come so far, -inf where no episode ended or a run turned nan."""
    states: TrainState
    """Of all runs, [settings * seeds], each as far as it came; seeds vary fastest."""
    num_updates: int
    """Made by all runs together."""

    def ranked(self) -> list[dict]:
        """Settings with the `updates` after which they were compared last and their `score` then, the best first."""
        reached = (~np.isnan(self.scores)).sum(1)
        rows = [
            row | {"updates": self.rungs[number - 1] if number else 0, "score": float(scores[number - 1])}
            for row, number, scores in zip(self.sweep.table.rows(), reached, self.scores)
        ]
        return sorted(rows, key=lambda row: (row["updates"], np.nan_to_num(row["score"])), reverse=True)

    def best(self) -> dict:
        """The setting with the highest score of those that came furthest."""
        first = self.ranked()[0]
        return {name: first[name] for name in self.sweep.table.names}

    def state(self, seed: int = 0, **setting) -> TrainState:
        """The state of one run. Raises ValueError where no setting, or more than one, is meant."""
        if not 0 <= seed < self.sweep.num_seeds:
            raise ValueError(f"seed={seed} must be from 0 to {self.sweep.num_seeds - 1}")
        return self.states[self.sweep.table.index(**setting) * self.sweep.num_seeds + seed]


def successive_halving(
    sweep: Sweep,
    *,
    num_rungs: int = 4,
    eta: int = 3,
    num_places: int | None = None,
    progress: bool = True,
    make: Callable = make_ppo,
) -> Halving:
    """Trains the settings of a sweep for as long as they are among the best (Li et al., 2020, in rounds of a batch).

    A setting is compared after r, r eta, r eta^2, ... updates, `num_rungs` times, with all that came so far until then:
    by the interquartile mean over its seeds of the mean return in the last r updates. It goes on if it is in the best
    1 / `eta` of them. `num_places` settings (all by default) train side by side, and a place that falls free goes to
    the setting on the highest rung that may go on by now, or else to the next that has not begun. The same call gives
    the same result. Settings on the last rung are trained to the end of the run. Raises ValueError where settings
    differ in static fields, or where there are too few settings or updates for the rungs.
    """
    ladder = Ladder(_rungs(sweep, num_rungs, eta), eta, len(sweep.table))
    num_places = len(sweep.table) if num_places is None else num_places
    if not 1 <= num_places <= len(sweep.table):
        raise ValueError(f"num_places={num_places} must be from 1 to the {len(sweep.table)} settings")
    (group,) = sweep.groups()
    ppo = make(group.env, group.config)
    many = batched(ppo)
    seeds, *columns = wave_arguments(sweep, ppo, list(sweep.runs().values()))
    states = first_state(many, seed_keys(jax.random.key(sweep.seed), seeds), *columns)
    on_cpu = jax.devices()[0].platform == "cpu"
    num_threads, num_runs = num_cores() if on_cpu else 1, num_places * sweep.num_seeds
    size = best_slice_size(num_runs, num_threads, group.config) if on_cpu else num_runs
    program = compile(many, states[:size], ladder.rungs[0], slice_size=size)

    def train(settings, length):
        nonlocal states
        runs = np.add.outer(np.array(settings) * sweep.num_seeds, np.arange(sweep.num_seeds)).ravel()
        states, scores = train_runs(program, states, runs, length, pool)
        bar.update(length * len(runs) * group.config.steps_per_update)
        return STATISTICS["iqm"](scores.reshape(-1, sweep.num_seeds), axis=1)

    with (
        ThreadPoolExecutor(num_threads) as pool,
        tqdm(unit=" steps", unit_scale=True, disable=None if progress else True) as bar,
        noted_interrupt() as interrupt,
    ):
        while (settings := ladder.next_settings(num_places)) and not interrupt.is_set():
            ladder.climb(settings, train(settings, ladder.rungs[0]))
        left = group.config.num_updates - ladder.rungs[-1]
        while left and ladder.finished() and not interrupt.is_set():
            length = min(left, ladder.rungs[0])
            train(ladder.finished(), length)
            left -= length
    return Halving(sweep, many, ladder.rungs, ladder.scores, states, int(states.num_updates.sum()))


class Ladder:
    """Which settings go on: the rule of asynchronous successive halving (Li et al., 2020, algorithm 2)."""

    def __init__(self, rungs: tuple[int, ...], eta: int, num_settings: int):
        self.rungs, self.eta = rungs, eta
        self.scores = np.full((num_settings, len(rungs)), np.nan)
        self.num_updates = np.zeros(num_settings, int)
        self.active: list[int] = []

    def next_settings(self, num_places: int) -> list[int]:
        """Those that are under way, and in the free places whoever may go on or begin."""
        waiting = [i for i in self._may_go_on() + list(np.flatnonzero(self.num_updates == 0)) if i not in self.active]
        self.active += [int(i) for i in waiting[: num_places - len(self.active)]]
        return list(self.active)

    def climb(self, settings: list[int], scores):
        """Counts updates as many as the first rung for settings, and their scores where they reach a rung."""
        for setting, score in zip(settings, scores):
            self.num_updates[setting] += self.rungs[0]
            if self.num_updates[setting] in self.rungs:
                self.scores[setting, self.rungs.index(self.num_updates[setting])] = score
                self.active.remove(setting)

    def finished(self) -> list[int]:
        """Settings on the last rung."""
        return [int(i) for i in np.flatnonzero(~np.isnan(self.scores[:, -1]))]

    def _may_go_on(self) -> list[int]:
        """Settings that rest on a rung and are among its best, from the highest rung down."""
        found = []
        for rung in reversed(range(len(self.rungs) - 1)):
            order = np.argsort(-self.scores[:, rung], kind="stable")  # nan goes last
            best = order[: (~np.isnan(self.scores[:, rung])).sum() // self.eta]
            found += [i for i in best if self.num_updates[i] == self.rungs[rung]]
        return found


def train_runs(program: Program, states: TrainState, runs: np.ndarray, length: int, pool: ThreadPoolExecutor):
    """States in which some runs have trained on, and the mean return of each of these meanwhile, [runs].

    They go through in slices of the program's size, the last filled up with its last run.
    """
    size = program.slice_size
    slices = [runs[i : i + size] for i in range(0, len(runs), size)]
    slices = [np.append(part, np.repeat(part[-1], size - len(part))) for part in slices]
    trained = list(pool.map(lambda part: program(states[part], length, donate=True), slices))
    returns = []
    for part, (new, metrics) in zip(slices, trained):
        states = jax.tree.map(lambda all, some: all.at[part].set(some), states, new)
        count = metrics["num_episodes"].sum(1)
        total = np.nansum(metrics["episode_return"] * metrics["num_episodes"], axis=1)
        healthy = np.isfinite(metrics["loss"]).all(1) if "loss" in metrics else True
        returns.append(np.where((count > 0) & healthy, total / np.maximum(count, 1), -np.inf))
    return states, np.concatenate(returns)[: len(runs)]


def _rungs(sweep: Sweep, num_rungs: int, eta: int) -> tuple[int, ...]:
    check_whole("num_rungs", num_rungs)
    check_whole("eta", eta, at_least=2)
    groups = sweep.groups()
    if len(groups) > 1:
        raise ValueError(
            f"the settings need {len(groups)} programs, but halving has one for all (sweep hyperparameters and "
            "parameters of the environment only)"
        )
    factor, num_updates = eta ** (num_rungs - 1), groups[0].config.num_updates
    if len(sweep.table) < factor:
        raise ValueError(
            f"num_rungs={num_rungs} needs eta^(num_rungs - 1) = {factor} settings, of which one comes to the end, but "
            f"there are {len(sweep.table)} (try fewer rungs)"
        )
    if num_updates < factor:
        raise ValueError(f"num_rungs={num_rungs} needs {factor} updates, but num_updates={num_updates}")
    return tuple(num_updates // factor * eta**k for k in range(num_rungs))
