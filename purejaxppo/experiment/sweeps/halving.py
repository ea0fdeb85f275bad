"""Successive halving: settings that score badly early leave their place in the batch to others.

A folder of it is that of a sweep, with one slice for each setting. So what reads, plots or completes a sweep takes it.
A call that resumes repeats all rounds, and takes from the slices what they hold: its result is that of an
uninterrupted call, whatever of the last round was stored.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import xarray
from jax.experimental import multihost_utils

from purejaxppo.batched import batched, reported_failures, seed_keys
from purejaxppo.checks import check_number, check_whole
from purejaxppo.experiment.distributed import ALL, is_first, process_count
from purejaxppo.experiment.evaluations import EVALUATION_RETURN, Evaluations, ends_of_chunks, make_evaluations
from purejaxppo.experiment.files import from_arrays, shapes_of, to_arrays
from purejaxppo.experiment.identity import identify_ppo
from purejaxppo.experiment.jax_setup import num_cores
from purejaxppo.experiment.lock import LockLost
from purejaxppo.experiment.loop import Timer, check_on_interrupt, end, noted_interrupt, step_bar, warn
from purejaxppo.experiment.memory import bytes_of, memory_of, show_memory
from purejaxppo.experiment.program import (
    Program,
    best_slice_size,
    compile_training,
    first_state,
)
from purejaxppo.experiment.report.failures import describe_failure, join_failures, leaves_of
from purejaxppo.experiment.report.statistics import NO_SCORE
from purejaxppo.experiment.sweeps.columns import run_arguments
from purejaxppo.experiment.sweeps.result import make_result
from purejaxppo.experiment.sweeps.rungs import (
    Ladder,
    best_first,
    choose_rungs,
    describe_criterion,
    last_scores,
    score_of,
)
from purejaxppo.experiment.sweeps.slices import Slice, Slices, check_identities, find_slices, open_slices
from purejaxppo.experiment.sweeps.sweep import Sweep, check_sweep, make_group
from purejaxppo.ppo import PPO, TrainState, make_ppo
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
    program: Program
    """Trains a slice of runs for up to as many updates as the first rung."""
    num_threads: int
    """Slices that train side by side."""
    memory: dict[str, int]
    """Bytes of one run, see `memory_of`."""
    identities: dict[str, dict[str, str]]
    """What is plugged in, see `Plan`."""
    make: Callable
    allow_changed: Sequence[str] = ()
    evaluations: Evaluations | None = None
    """Of a slice of runs, if the sweep has such."""

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
            for i, (updates, n) in enumerate(zip(ends, numbers.tolist()))
        ]
        lines = [
            f"{sweep.env}: halving of {len(sweep.table)} settings x {sweep.num_seeds} seeds, one in {self.eta} reaches "
            f"the next rung, {self.num_places} at a time",
            f"compared by {describe_criterion(sweep, self.rungs)}",
            align(rows),
            f"about {steps:,} steps ({100 * steps / whole:.0f} % of those of all settings to the end), compiled in "
            f"{self.program.compile_seconds:.1f} s",
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
        make: `make(env, config)` makes the PPO.
        allow_changed: what may differ from what the folder was trained with, see `run_sweep`.
    """
    check_sweep(sweep)
    rungs = choose_rungs(sweep, num_rungs, eta)
    num_places = len(sweep.table) if num_places is None else num_places
    check_whole("num_places", num_places, at_most=len(sweep.table), of="the settings")
    (group,) = sweep.groups()
    ppo = make_group(group, make)
    _settings_of(find_slices(folder, sweep), sweep)
    identities = {sweep.name_group(group): identify_ppo(ppo, sweep.hyperparams)}
    check_identities(folder, sweep, identities, allow_changed)
    many = batched(ppo)
    on_cpu = jax.devices()[0].platform == "cpu"
    num_threads, num_runs = num_cores() if on_cpu else 1, num_places * sweep.num_seeds
    places = num_threads * process_count()
    size = best_slice_size(num_runs, places, group.config) if on_cpu else -(-num_runs // places)
    size = int(ALL.broadcast(str(size)))  # on machines that differ
    state = jax.eval_shape(lambda: _start(sweep, many, list(sweep.runs().values())[:size]))
    with reported_failures():
        program = compile_training(many, state, rungs[0], slice_size=size)
    evaluations = make_evaluations(many, sweep.evaluate_every, state) if sweep.evaluate_every else None
    memory = memory_of(many, state, bytes_of(program, evaluations) // size)
    return HalvingPlan(
        sweep, rungs, eta, num_places, many, program, num_threads, memory, identities, make, allow_changed, evaluations
    )


def successive_halving(
    sweep: Sweep | HalvingPlan,
    folder: str | Path | None = None,
    *,
    num_rungs: int | None = None,
    eta: int | None = None,
    num_places: int | None = None,
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
        progress: whether to show a progress bar.
        save_every: seconds between two saves of what was trained since; the last one comes at the end.
        make: `make(env, config)` makes the PPO.
        allow_changed: what may differ from what the folder was trained with, see `run_sweep`.
        on_interrupt: what the call does after an interrupt: "raise" or "return".
    """
    check_on_interrupt(on_interrupt)
    check_number("save_every", save_every, 0, np.inf)
    options = {"num_rungs": num_rungs, "eta": eta, "num_places": num_places, "make": make}
    options = {name: value for name, value in options.items() if value is not None}
    options |= {"allow_changed": allow_changed} if allow_changed else {}
    if isinstance(sweep, HalvingPlan) and options:
        raise ValueError(f"{min(options)} cannot be changed after planning (pass it to plan_halving)")
    plan = sweep if isinstance(sweep, HalvingPlan) else plan_halving(sweep, folder, **options)
    sweep, config = plan.sweep, plan.ppo.config
    ladder = Ladder(plan.rungs, plan.eta, len(sweep.table))
    with ExitStack() as held:
        lock = held.enter_context(ALL.claim_folder(folder)) if folder is not None else None
        if folder is not None:
            ALL.check_seen(Path(folder))
        slices = open_slices(folder, sweep, plan.identities, plan.allow_changed, rungs=plan.rungs)
        pool = held.enter_context(ThreadPoolExecutor(plan.num_threads))
        bar = held.enter_context(step_bar(progress=progress))
        interrupt = held.enter_context(noted_interrupt())
        training = Training(plan, slices, pool, lock.check if lock else None)
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
        result = training.result(ladder, ALL.any(interrupt.is_set()))
    failed = result.failed()
    if failed:
        warn(join_failures(failed, sweep.num_runs))
    reached = f"successive_halving was interrupted; {len(ladder.finished())} settings have reached the last rung"
    reached += f"; the same call resumes from {folder}" if folder else ""
    return end(result, result.interrupted, on_interrupt, reached)


class Training:
    """The states of all runs of a sweep and their metrics so far, of which some settings train at a time.

    Updates that the slices hold are not made again.
    """

    def __init__(
        self, plan: HalvingPlan, slices: Slices, pool: ThreadPoolExecutor, check: Callable[[], Any] | None = None
    ):
        self.plan, self.slices, self.pool, self.check = plan, slices, pool, check
        self.names = _names(plan.sweep)
        self.states = _start(plan.sweep, plan.ppo, list(plan.sweep.runs().values()), first_state)
        self.metrics: list[dict[str, np.ndarray]] = [{} for _ in self.names]  # [seeds, updates] of every setting
        self.done = np.zeros(len(self.names), int)  # updates of every setting that this call has made or repeated
        self.changed: set[int] = set()  # settings to store
        self._load()

    def train(self, settings: Sequence[int], length: int) -> int:
        """Trains settings for `length` updates more; returns how many updates of runs were not stored already."""
        self.done[settings] += length
        lacking = {setting: self._lacking(setting) for setting in settings}
        for chunks in sorted(set(lacking.values()) - {()}):
            together = [setting for setting in settings if lacking[setting] == chunks]
            for number, due in chunks:
                self._train_together(together, number, due)
            self.changed.update(together)
        return sum(number for chunks in lacking.values() for number, _ in chunks) * self.plan.sweep.num_seeds

    def _lacking(self, setting: int) -> tuple[tuple[int, bool], ...]:
        """The chunks of a setting that are not stored: the updates of each, and whether an evaluation is due then."""
        begin, evaluations = self.num_stored(setting), self.plan.evaluations
        ends = ends_of_chunks(begin, int(self.done[setting]), self.plan.program.num_updates, evaluations)
        due = [evaluations is not None and evaluations.is_due(end) for end in ends]
        return tuple(zip((end - start for start, end in zip([begin, *ends], ends)), due))

    def _train_together(self, settings: Sequence[int], number: int, due: bool):
        """Trains settings for some updates, and evaluates them then if that is due."""
        measure = partial(self.plan.evaluations.measure, due=due) if self.plan.evaluations else None
        runs, num_seeds = self._runs(settings), self.plan.sweep.num_seeds
        self.states, metrics = train_runs(self.plan.program, self.states, runs, number, self.pool, measure)
        for i, setting in enumerate(settings):
            self._append(setting, {name: x[i * num_seeds : (i + 1) * num_seeds] for name, x in metrics.items()})

    def scores(self, settings: Sequence[int], length: int) -> np.ndarray:
        """The scores [settings] after `length` updates more, see `score_of`."""
        return np.array([score_of(self.metrics[i], int(self.done[i]), length) for i in settings])

    def num_stored(self, setting: int) -> int:
        """Updates of a setting whose metrics are known."""
        return self.slice_of(setting).num_updates

    def slice_of(self, setting: int, state: Mapping[str, np.ndarray] | None = None) -> Slice:
        """The runs of a setting as a slice, with leaves of their states."""
        return Slice(self.names[setting], self.metrics[setting], dict(state or {}), tuple(leaves_of(self.states)))

    def store(self):
        """Writes the settings that were trained since the last time; what a full disk does not take stays in memory."""
        for setting in sorted(self.changed) if self.slices.folder and is_first() else ():
            new = self.slice_of(setting, to_arrays(self.states[self._runs([setting])]))
            try:
                if self.check:
                    self.check()
                self.slices.write(new)
            except (OSError, LockLost) as error:
                self.slices.keep(new, error if isinstance(error, OSError) else OSError(str(error)))
        self.changed.clear()

    def result(self, ladder: "Ladder", interrupted: bool) -> Halving:
        """The result so far, whose metrics are also written to the folder."""
        sweep, num_updates = self.plan.sweep, np.asarray(self.states.num_updates)
        begun = [i for i, metrics in enumerate(self.metrics) if metrics]
        if not begun:
            raise KeyboardInterrupt("successive_halving was interrupted before it trained anything")
        stored = [self.slice_of(i, {"num_updates": num_updates[self._runs([i])]}) for i in begun]
        found = make_result(sweep, self.slices, stored, self.plan.make, interrupted=interrupted)
        failed_metric = found.metrics["failed_metric"].values.astype(object).reshape(-1)
        return Halving(
            sweep, self.plan.ppo, ladder.rungs, ladder.scores, self.states, int(num_updates.sum()), failed_metric,
            found.metrics, interrupted, found.unsaved,
        )  # fmt: skip

    def _runs(self, settings: Sequence[int]) -> np.ndarray:
        """The indices of the runs of some settings."""
        seeds = self.plan.sweep.num_seeds
        return np.add.outer(np.array(settings) * seeds, np.arange(seeds)).ravel()

    def _append(self, setting: int, new: Mapping[str, np.ndarray]):
        old = self.metrics[setting]
        self.metrics[setting] = {name: np.concatenate([old[name], x], 1) if old else x for name, x in new.items()}

    def _load(self):
        """Takes states and metrics from the slices."""
        stored = _settings_of(self.slices, self.plan.sweep)
        if not stored:
            return
        like, like_one = jax.eval_shape(lambda: (self.states, self.states[: self.plan.sweep.num_seeds]))
        arrays = {name: x.copy() for name, x in to_arrays(self.states).items()}
        for setting, slice_ in stored.items():
            runs = self._runs([setting])
            whole = self.slices.load(slice_.name, shapes_of(like))
            from_arrays(whole.state, like_one, f"the slice {slice_.name}")  # raises for another shape
            for name, x in arrays.items():
                x[runs] = whole.state[name]
            self.metrics[setting] = {name: np.asarray(x) for name, x in whole.metrics.items()}
        self.states = from_arrays(arrays, like)


def _names(sweep: Sweep) -> list[tuple[str, ...]]:
    """The names of the runs of every setting."""
    return [tuple(sweep.runs([setting])) for setting in range(len(sweep.table))]


def _settings_of(slices: Slices, sweep: Sweep) -> dict[int, Slice]:
    """The stored slices by their settings. Raises ValueError if a slice holds anything but the seeds of one setting."""
    settings, found = {names: i for i, names in enumerate(_names(sweep))}, {}
    for slice_ in slices.read():
        if slice_.runs not in settings:
            raise ValueError(
                f"folder={slices.folder} holds slices of {count(len(slice_.runs), 'run')}, but halving keeps the "
                f"{count(sweep.num_seeds, 'seed')} of every setting in one (name another folder)"
            )
        found[settings[slice_.runs]] = slice_
    return found


def train_runs(
    program: Program,
    states: TrainState,
    runs: np.ndarray,
    length: int,
    pool: ThreadPoolExecutor,
    measure: Callable | None = None,
) -> tuple[TrainState, dict[str, np.ndarray]]:
    """Trains some runs of a batch in slices of the program's size; the last slice repeats its last run.

    Several processes divide the slices, and give each other what they trained.

    Args:
        program: trains a slice.
        states: of all runs of the batch.
        runs: the indices of those to train.
        length: updates to make.
        pool: the threads that train slices side by side.
        measure: (state, metrics) of a slice -> one more metric, `evaluation_return`.

    Returns:
        The states of all runs, and the metrics of the trained ones, [runs, length].
    """
    size = program.slice_size
    slices = [runs[i : i + size] for i in range(0, len(runs), size)]
    slices = [np.append(indices, np.repeat(indices[-1], size - len(indices))) for indices in slices]

    def train(indices: np.ndarray) -> tuple[TrainState, dict[str, np.ndarray]]:
        state, metrics = program(states[indices], length, donate=True)
        return state, metrics | ({EVALUATION_RETURN: measure(state, metrics)} if measure else {})

    own = slices[jax.process_index() :: process_count()] or slices[-1:]
    trained = list(pool.map(train, own))
    if process_count() > 1:
        trained = _exchange(trained, len(slices), program.like)
    for indices, (new, _) in zip(slices, trained):
        states = jax.tree.map(lambda old, some, indices=indices: old.at[indices].set(some), states, new)
    joined = {name: np.concatenate([metrics[name] for _, metrics in trained])[: len(runs)] for name in trained[0][1]}
    return states, joined


def _exchange(trained: Sequence[tuple[TrainState, dict]], number: int, like: Any) -> list[tuple[TrainState, dict]]:
    """The states and metrics of all slices from those of each process, which has every n-th of the `number` slices."""
    most = -(-number // process_count())
    filled = [(to_arrays(state), metrics) for state, metrics in [*trained, *[trained[-1]] * (most - len(trained))]]
    stacked = jax.tree.map(lambda *x: np.stack(x), *filled)
    found = multihost_utils.process_allgather(stacked)  # [processes, most, ...]
    places = [divmod(i, process_count())[::-1] for i in range(number)]
    slices = [jax.tree.map(lambda x, place=place: x[place], found) for place in places]
    return [(from_arrays(arrays, like), metrics) for arrays, metrics in slices]


def _start(sweep: Sweep, ppo: PPO, runs: Sequence[tuple[int, int]], start: Callable | None = None) -> TrainState:
    """The first states of runs of a sweep, which are pairs (setting, seed); `start` is called as `first_state`."""
    seeds, *columns = run_arguments(sweep, ppo, runs)
    keys = seed_keys(jax.random.key(sweep.seed), jnp.asarray(seeds))
    return start(ppo, keys, *columns) if start else ppo.init(keys, *columns)
