"""Successive halving: settings that score badly early leave their place in the batch to others.

A folder of it is that of a sweep, with one slice for each setting. So what reads, plots or completes a sweep takes it.
A call that resumes repeats all rounds, and takes from the slices what they hold: its result is that of an
uninterrupted call, whatever of the last round was stored.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import numpy as np
import xarray

from purejaxppo.batched import batched
from purejaxppo.checks import check_number, check_whole
from purejaxppo.experiment.distributed import ALL, process_count
from purejaxppo.experiment.identity import identify_ppo
from purejaxppo.experiment.jax_setup import num_cores
from purejaxppo.experiment.loop import Timer, check_on_interrupt, end, noted_interrupt, step_bar, warn
from purejaxppo.experiment.memory import bytes_of, memory_of, show_memory
from purejaxppo.experiment.report.failures import describe_failure, join_failures
from purejaxppo.experiment.report.statistics import NO_SCORE
from purejaxppo.experiment.sweeps.claims import check_idle
from purejaxppo.experiment.sweeps.halving_runs import Trainer, Training, compile_trainer, settings_of
from purejaxppo.experiment.sweeps.plan import choose_slice_size
from purejaxppo.experiment.sweeps.result import make_result
from purejaxppo.experiment.sweeps.rungs import (
    Ladder,
    best_first,
    choose_rungs,
    describe_criterion,
    last_scores,
)
from purejaxppo.experiment.sweeps.slices import check_identities, find_slices, open_slices
from purejaxppo.experiment.sweeps.sweep import Sweep, check_sweep, make_group
from purejaxppo.ppo import PPO, TrainState, make_ppo
from purejaxppo.sharded import choose_devices
from purejaxppo.text import align, count, show_setting

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Halving:
    """The result of successive halving."""

    sweep: Sweep
    ppo: PPO
    """Batched over runs."""
    rungs: tuple[int, ...]
    """Numbers of updates after which settings are compared."""
    scores: np.ndarray
    """[settings, rungs]; nan if a setting did not reach the rung, -inf if no episode ended or a run turned nan."""
    states: TrainState
    """Of all runs, [settings * seeds], each after as many updates as it made; seeds vary fastest."""
    num_updates: int
    """Updates of all runs together."""
    failed_metric: np.ndarray
    """[settings * seeds], what was not finite first in a run that turned nan, "" for others."""
    metrics: xarray.Dataset
    """As those of a `SweepResult`: nan for the updates that a setting did not reach."""
    interrupted: bool = False
    """Whether a signal ended the call."""
    unsaved: str = ""
    """What could not be written to the folder, as one sentence."""

    def ranked(self) -> list[dict]:
        """Settings with the `updates` of their last comparison and their `score` there, best first.

        A setting that failed goes last and has no score: a run of it turned nan, or ended no episode. So does, after an
        interrupt, a setting that was not compared yet.
        """
        (reached, last), settings = last_scores(self.scores), best_first(self.scores)
        rows, updates = self.sweep.table.rows(), (0, *self.rungs)
        return [
            rows[i] | {"updates": updates[reached[i]], "score": np.nan if np.isnan(last[i]) else float(last[i])}
            for i in settings
        ]

    def best(self) -> dict:
        """The setting with the highest score among those on the highest rung. Raises ValueError if none has a score."""
        first = self.ranked()[0]
        if np.isnan(first["score"]):
            raise ValueError(NO_SCORE)
        return {name: first[name] for name in self.sweep.table.names}

    def failed(self) -> list[str]:
        """A sentence for every run that turned nan."""
        rows, updates = self.sweep.table.rows(), np.asarray(self.states.num_updates) + 1  # frozen before the failure
        names = [show_setting(rows[setting]) + f" seed={seed}" for setting, seed in self.sweep.runs().values()]
        return [
            describe_failure(name.strip(), update, metric)
            for name, update, metric in zip(names, updates.tolist(), self.failed_metric.tolist())
            if metric
        ]

    def plots(self, title: str = "") -> "dict[str, Figure]":
        """The scores of all settings on their rungs as a plot by name; none if nothing has a score."""
        from purejaxppo.experiment.report.search_plots import plot_rungs

        if np.isnan(self.ranked()[0]["score"]):
            return {}
        steps = [updates * self.ppo.config.steps_per_update for updates in self.rungs]
        return {"rungs": plot_rungs(self.scores, steps, self.sweep.table.rows(), title)}

    def __repr__(self) -> str:
        return f"Halving of {len(self.sweep.table)} settings on {self.sweep.env}, rungs at {self.rungs} updates"

    def state(self, seed: int = 0, **setting: Any) -> TrainState:
        """The state of one run. Raises ValueError if no setting fits, or more than one."""
        if not 0 <= seed < self.sweep.num_seeds:
            raise ValueError(f"seed={seed} must be from 0 to {self.sweep.num_seeds - 1}")
        return self.states[self.sweep.table.index(**setting) * self.sweep.num_seeds + seed]


@dataclass(frozen=True)
class HalvingPlan:
    """Successive halving with its program, compiled; printing it shows what it will do."""

    sweep: Sweep
    rungs: tuple[int, ...]
    """Numbers of updates after which settings are compared."""
    eta: int
    num_places: int
    """Settings that train side by side."""
    ppo: PPO
    """Batched over runs."""
    trainers: tuple[Trainer, ...]
    """Each trains a slice of runs for up to as many updates as the first rung. One on a CPU; on an accelerator one for
    the settings of every rung, the largest first."""
    num_threads: int
    """Slices that train side by side."""
    memory: dict[str, int]
    """Bytes of one run, see `memory_of`."""
    identities: dict[str, dict[str, str]]
    """What is plugged in, see `Plan`."""
    make: Callable
    allow_changed: Sequence[str] = ()

    def expected(self) -> np.ndarray:
        """How many settings reach each rung, [rungs], if their scores are in random order and none fails."""
        ladder = Ladder(self.rungs, self.eta, len(self.sweep.table))
        scores = np.random.default_rng(0).permutation(len(self.sweep.table))
        while settings := ladder.next_settings(self.num_places):
            ladder.climb(settings, scores[settings])
        return (~np.isnan(ladder.scores)).sum(0)

    def __repr__(self) -> str:
        sweep, config = self.sweep, self.ppo.config
        numbers = self.expected()
        ends = (*self.rungs[:-1], config.num_updates)
        begins = (0, *ends[:-1])
        steps = sum(n * (end - begin) for n, begin, end in zip(numbers, begins, ends))
        steps = int(steps) * sweep.num_seeds * config.steps_per_update
        whole = len(sweep.table) * sweep.num_seeds * config.total_steps
        rows = [
            {"rung": i + 1, "updates": updates, "steps each": f"{updates * config.steps_per_update:,}", "settings": n}
            for i, (updates, n) in enumerate(zip(self.rungs, numbers.tolist()))
        ]
        left = config.num_updates - self.rungs[-1]
        lines = [
            f"{sweep.env}: halving of {len(sweep.table)} settings x {count(sweep.num_seeds, 'seed')}, one in "
            f"{self.eta} reaches the next rung, {self.num_places} at a time",
            f"compared by {describe_criterion(sweep, self.rungs)}",
            align(rows),
            *([f"settings on the last rung train for {count(left, 'update')} more, without a comparison"] * (left > 0)),
            f"about {steps:,} steps ({100 * steps / whole:.0f} % of those of all settings to the end), compiled in "
            f"{sum(trainer.program.compile_seconds for trainer in self.trainers):.1f} s",
            "memory of a run, in MiB:",
            show_memory([self.memory]),
        ]
        return "\n".join(lines)


def plan_halving(
    sweep: Sweep,
    folder: str | Path | None = None,
    *,
    num_rungs: int | None = None,
    eta: int = 3,
    num_places: int | None = None,
    devices: int | Sequence[Any] | None = None,
    make: Callable = make_ppo,
    allow_changed: Sequence[str] = (),
) -> HalvingPlan:
    """Compiles what `successive_halving` needs, and says what it will do; see there for the rule and the errors.

    Args:
        sweep: the settings and seeds.
        folder: results so far.
        num_rungs: how often a setting is compared at most, by default 4, or fewer if there are too few settings.
        eta: the inverse of the fraction that is promoted.
        num_places: settings that train side by side, by default all.
        devices: devices or their number; by default all of this process.
        make: `make(env, config)` makes the PPO.
        allow_changed: what may differ from what the folder was trained with, see `run_sweep`.
    """
    check_sweep(sweep)
    known = jax.local_devices()
    devices = known if devices is None else choose_devices(devices, known)
    numbers = ALL.gather(str(len(devices)))
    if len(set(numbers)) > 1:
        raise ValueError(f"devices={len(devices)} must be as many in every process, not {', '.join(numbers)}")
    rungs = choose_rungs(sweep, num_rungs, eta)
    num_places = len(sweep.table) if num_places is None else num_places
    check_whole("num_places", num_places, at_most=len(sweep.table), of="the settings")
    (group,) = sweep.groups()
    ppo = make_group(group, make)
    settings_of(find_slices(folder, sweep), sweep)
    identities = {sweep.name_group(group): identify_ppo(ppo, sweep.hyperparams)}
    check_identities(folder, sweep, identities, allow_changed)
    on_cpu = devices[0].platform == "cpu"
    num_threads = num_cores() if on_cpu and len(devices) == 1 else 1
    at_once = num_threads * len(devices) * process_count()
    size = choose_slice_size(sweep, group, ppo, num_places * sweep.num_seeds, rungs[0], devices[0], at_once)
    size = min(map(int, ALL.gather(str(size))))  # of the smallest machine
    sizes = [size] if on_cpu else sizes_of_rungs(size, eta, len(rungs))
    trainers = tuple(compile_trainer(sweep, ppo, size, rungs[0], devices) for size in sizes)
    many, largest = batched(ppo), trainers[0]
    memory = memory_of(many, largest.program.like, bytes_of(largest.program, largest.evaluations) // size)
    return HalvingPlan(
        sweep, rungs, eta, num_places, many, trainers, num_threads, memory, identities, make, allow_changed
    )


def sizes_of_rungs(size: int, eta: int, num_rungs: int) -> list[int]:
    """The slices that an accelerator needs, the largest first: fewer settings train on the higher rungs.

    Slices of one run round differently from others, so there are none unless all are such.
    """
    return sorted({min(size, max(-(-size // eta**i), 2)) for i in range(num_rungs)}, reverse=True)


def successive_halving(
    sweep: Sweep | HalvingPlan,
    folder: str | Path | None = None,
    *,
    num_rungs: int | None = None,
    eta: int | None = None,
    num_places: int | None = None,
    devices: int | Sequence[Any] | None = None,
    progress: bool = True,
    save_every: float = 60.0,
    make: Callable | None = None,
    allow_changed: Sequence[str] = (),
    on_interrupt: Literal["raise", "return"] = "raise",
) -> Halving:
    """Trains the settings of a sweep as long as they are among the best (Li et al., 2020, in rounds of a batch).

    After r, r eta, r eta^2, ... updates (the rungs) a setting is compared with all that have reached the rung before:
    by the interquartile mean over its seeds of the mean return in the last r updates, or of the newest evaluation if
    the sweep has such (`evaluate_every`, which should divide r). It is promoted if it is in the best 1 / `eta` of them.
    A free place goes to the setting on the highest rung that is promoted, or else to the next one that has not started.
    Settings on the last rung train to the end of the run. The same call gives the same result. An interrupt (Ctrl-C,
    SIGTERM) ends the call after the current round, as in `fit`: `Interrupted` is raised with the `result` so far, or
    this result is returned. A warning names the runs that turned nan. Raises ValueError if settings need different
    programs, if there are too few settings or updates, or for a folder of something else.

    Args:
        sweep: the settings and seeds; a `HalvingPlan` of `plan_halving` is compiled already.
        folder: keeps all runs, as that of a sweep. The same call resumes there; another `eta` or number of rungs, or
            more settings, use what it holds.
        num_rungs: how often a setting is compared at most, by default 4, or fewer if there are too few settings.
        eta: the inverse of the fraction that is promoted, by default 3.
        num_places: settings that train side by side, by default all.
        devices: devices or their number; by default all of this process.
        progress: whether to show a progress bar.
        save_every: seconds between two saves of what was trained since; the last one comes at the end.
        make: `make(env, config)` makes the PPO.
        allow_changed: what may differ from what the folder was trained with, see `run_sweep`.
        on_interrupt: what the call does after an interrupt: "raise" or "return".
    """
    check_on_interrupt(on_interrupt)
    check_number("save_every", save_every, 0, np.inf)
    options = {"num_rungs": num_rungs, "eta": eta, "num_places": num_places, "devices": devices, "make": make}
    options = {name: value for name, value in options.items() if value is not None}
    options |= {"allow_changed": allow_changed} if allow_changed else {}
    if isinstance(sweep, HalvingPlan) and options:
        raise ValueError(f"{min(options)} cannot be changed after planning (pass it to plan_halving)")
    plan = sweep if isinstance(sweep, HalvingPlan) else plan_halving(sweep, folder, **options)
    sweep, config = plan.sweep, plan.ppo.config
    ladder = Ladder(plan.rungs, plan.eta, len(sweep.table))
    with ExitStack() as held:
        lock = None
        if folder is not None:
            lock = held.enter_context(ALL.claim_folder(folder, note="successive halving"))
            ALL.check_seen(Path(folder))
            with ALL.together():
                check_idle(Path(folder))
        slices = open_slices(folder, sweep, plan.identities, plan.allow_changed, rungs=plan.rungs)
        pool = held.enter_context(ThreadPoolExecutor(plan.num_threads))
        bar = held.enter_context(step_bar(progress=progress))
        interrupt = held.enter_context(noted_interrupt())
        check = lock.check if lock else None
        training = Training(sweep, plan.ppo, plan.trainers, slices, pool, check)
        timer = Timer(save_every)

        def train(settings: Sequence[int], length: int) -> np.ndarray:
            bar.update(training.train(settings, length) * config.steps_per_update)
            if timer.is_due():
                training.store()
                timer.restart()
            return training.scores(settings, length)

        while (settings := ladder.next_settings(plan.num_places)) and not ALL.any(interrupt.is_set()):
            ladder.climb(settings, train(settings, ladder.rungs[0]))
            bar.set_postfix_str(ladder.progress())
        left = config.num_updates - ladder.rungs[-1]
        while left and ladder.finished() and not ALL.any(interrupt.is_set()):
            length = min(left, ladder.rungs[0])
            train(ladder.finished(), length)
            left -= length
        training.store()
        result = _result(plan, training, ladder, ALL.any(interrupt.is_set()))
    failed = result.failed()
    if failed:
        warn(join_failures(failed, sweep.num_runs))
    reached = f"successive_halving was interrupted; {len(ladder.finished())} settings have reached the last rung"
    reached += f"; the same call resumes from {folder}" if folder else ""
    return end(result, result.interrupted, on_interrupt, reached)


def _result(plan: HalvingPlan, training: Training, ladder: Ladder, interrupted: bool) -> Halving:
    """The result so far, whose metrics are also written to the folder."""
    states = training.states
    found = make_result(plan.sweep, training.slices, training.begun(), plan.make, interrupted=interrupted)
    failed_metric = found.metrics["failed_metric"].values.astype(object).reshape(-1)
    return Halving(
        plan.sweep, plan.ppo, ladder.rungs, ladder.scores, states, int(np.sum(states.num_updates)), failed_metric,
        found.metrics, interrupted, found.unsaved,
    )  # fmt: skip
