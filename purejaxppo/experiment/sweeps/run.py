"""Running a sweep: waves of slices through compiled programs; every slice is stored as soon as it is done."""

import shutil
import threading
import time
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from tqdm.auto import tqdm

from purejaxppo.checks import check_number
from purejaxppo.experiment.distributed import ALL, process_count
from purejaxppo.experiment.files import check_writable, existing, from_arrays, to_arrays
from purejaxppo.experiment.lock import LockLost
from purejaxppo.experiment.loop import (
    Timer,
    check_on_interrupt,
    chunks,
    end,
    newest,
    noted_interrupt,
    show_newest,
    step_bar,
    warn,
)
from purejaxppo.experiment.report.failures import join_failures
from purejaxppo.experiment.sweeps.claims import Claims, turn
from purejaxppo.experiment.sweeps.columns import run_arguments
from purejaxppo.experiment.sweeps.division import divide, own_slices
from purejaxppo.experiment.sweeps.plan import CompiledGroup, Plan, plan_sweep
from purejaxppo.experiment.sweeps.result import SweepResult, make_result
from purejaxppo.experiment.sweeps.slices import (
    Division,
    Slice,
    Slices,
    by_run,
    find_slices,
    open_slices,
    read_division,
)
from purejaxppo.experiment.sweeps.sweep import Group, Sweep
from purejaxppo.text import count

RETURN = "episode_return"
Watcher = Callable[[Sequence[str], int, Mapping[str, np.ndarray]], bool]


def run_sweep(
    sweep: Sweep | Plan,
    folder: str | Path | None = None,
    *,
    progress: bool = True,
    save_every: float = 60.0,
    slice_size: int | None = None,
    updates_per_chunk: int | None = None,
    devices: int | Sequence[Any] | None = None,
    make: Callable | None = None,
    allow_changed: Sequence[str] = (),
    share: tuple[int, int] | str | None = None,
    watch: Watcher | None = None,
    on_interrupt: Literal["raise", "return"] = "raise",
) -> SweepResult:
    """Trains every run of a sweep, or of a plan, and returns the result.

    An interrupt (Ctrl-C, SIGTERM) ends the call after the current chunks, as in `fit`: everything up to there is kept,
    then `Interrupted` is raised with the `result`, or the result is returned; before the first chunk there is none, and
    KeyboardInterrupt is raised. A warning names the runs that turned nan. What a full disk does not take is kept in the
    result, whose `unsaved` says so.
    With `jax.distributed` every process trains a part of the slices; all must see the folder. Calls that share a folder
    at the same time divide the slices: each leaves out those that another trains, and a warning says whose they are.
    Raises ValueError for a folder of another sweep, or a disk that is too small for the results.

        >>> sweep = pjp.Sweep("CartPole-v1", pjp.grid(learning_rate=[1e-3, 1e-2]), config=pjp.Config(num_updates=2))
        >>> result = pjp.run_sweep(sweep, progress=False)
        >>> result.metrics["episode_return"].sizes
        Frozen({'learning_rate': 2, 'seed': 1, 'updates': 2})

    Args:
        sweep: what to train; a `Plan` is compiled already.
        folder: keeps all results. The same call resumes there, and a sweep with more seeds or settings trains what is
            missing.
        progress: whether to show a progress bar.
        save_every: seconds between two saves of a slice that is training; a finished slice is saved at once.
        slice_size: see `plan_sweep`.
        updates_per_chunk: see `plan_sweep`.
        devices: see `plan_sweep`.
        make: see `plan_sweep`.
        allow_changed: see `plan_sweep`.
        share: see `plan_sweep`.
        watch: is called with the names of runs that train together, the updates that they have made and the metrics
            [runs, updates] of each chunk, from several threads; where it returns True, these runs stop.
        on_interrupt: what the call does after an interrupt: "raise" or "return".
    """
    check_on_interrupt(on_interrupt)
    check_number("save_every", save_every, 0, np.inf)
    if folder is None and process_count() > 1:
        raise ValueError(f"{process_count()} processes need a folder that all of them see (folder=...)")
    options = {
        "slice_size": slice_size, "updates_per_chunk": updates_per_chunk, "devices": devices, "make": make,
        "share": share,
    }  # fmt: skip
    options = {name: value for name, value in options.items() if value is not None}
    options |= {"allow_changed": allow_changed} if allow_changed else {}
    if isinstance(sweep, Plan) and options:
        raise ValueError(f"{min(options)} cannot be changed after planning (pass it to plan_sweep)")
    if folder is not None:
        check_writable(Path(folder))
    plan = sweep if isinstance(sweep, Plan) else plan_sweep(sweep, folder, **options)
    sweep = plan.sweep
    _check_disk(folder, plan)
    with turn(folder, new=True):
        stored = find_slices(folder, sweep).read()
        division = divide(sweep, stored, read_division(folder), plan.division.slice_sizes)
        slices = open_slices(folder, sweep, plan.identities, plan.allow_changed, division)
    ALL.gather()
    if folder is not None:
        ALL.check_seen(Path(folder))
    division = read_division(folder) or division  # that of the first process
    plan, own = _as_divided(plan, folder, stored, division)

    start = time.perf_counter()
    with _bar(plan, own, stored, progress) as bar, noted_interrupt() as interrupt:
        session = Session(sweep, slices, save_every, bar, interrupt, Claims(slices), watch)
        session.claims.expect(stored)
        for slices_of_group in own_slices(sweep, stored, division).values():
            session.claims.expect(slices_of_group)
        for compiled in plan.groups:
            session.run(compiled, own[compiled.group])
        session.claims.await_writers(interrupt)  # they may have been killed
        for compiled in plan.groups:
            session.run(compiled, [slice_ for slice_ in own[compiled.group] if slice_.name in session.claims.left])
    steps = sum(map(int, ALL.gather(str(session.steps))))
    seconds = time.perf_counter() - start
    with turn(folder):  # of calls that end at the same time, the last writes the results of all
        stored, left = slices.read(), session.claims.describe_left() if session.claims.left else ""
        if interrupt.is_set() and not stored:
            raise KeyboardInterrupt("run_sweep was interrupted before it trained anything")
        if left and not stored:
            raise ValueError(f"{left}; nothing is stored yet (the same call later resumes)")
        if plan.share and not stored:
            raise ValueError(f"share={plan.share} has no slice, and nothing is stored yet (run the other shares first)")
        slices.note_work(steps, seconds)
        result = make_result(
            sweep, slices, stored, plan.make,
            steps=steps, run_seconds=seconds, interrupted=interrupt.is_set(),
        )  # fmt: skip
    if left:
        warnings.warn(f"{left}; the result holds what is stored of them so far, and the same call later the rest")
    failed = result.failed()
    if failed:
        warn(join_failures(failed, sweep.num_runs))
    unfinished = f"run_sweep was interrupted with {result.num_unfinished} of {sweep.num_runs} runs unfinished"
    unfinished += f"; the same call resumes from {folder}" if folder else ""
    return end(result, result.interrupted, on_interrupt, unfinished)


@dataclass
class Session:
    """One call of `run_sweep` at work: what its threads share."""

    sweep: Sweep
    slices: Slices
    save_every: float
    bar: tqdm
    interrupt: threading.Event
    claims: Claims
    watch: Watcher | None = None
    """See `run_sweep`."""
    steps: int = 0
    """Environment steps of all runs that this process made."""
    returns: dict[str, np.ndarray] = field(default_factory=dict)
    """The newest mean return [runs] of each wave that is training, by the name of its first slice."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, compiled: CompiledGroup, slices: Sequence[Slice]):
        """Trains slices of a group, but those that another call trains or has finished."""
        waves = []
        for done in sorted({slice_.num_updates for slice_ in slices}, reverse=True):
            together = [slice_ for slice_ in slices if slice_.num_updates == done]
            size = compiled.num_devices
            waves += [together[i : i + size] for i in range(0, len(together), size)]
        run_wave = partial(self.run_wave, compiled, threading.Semaphore(compiled.num_threads))
        with ThreadPoolExecutor(compiled.num_threads + 1) as pool:  # one more begins its wave while another stores one
            list(pool.map(run_wave, waves))

    def run_wave(self, compiled: CompiledGroup, devices: threading.Semaphore, wave: Sequence[Slice]):
        """Trains one slice on every device, but those that another call trains or has finished.

        Args:
            compiled: the group.
            devices: held while the wave is on the devices.
            wave: the slices.
        """
        try:
            with ExitStack() as held:
                held.enter_context(devices)
                if self.interrupt.is_set():
                    return
                with self.claims.claim(wave) as claimed:
                    unfinished = [x for x in claimed if x.num_updates < compiled.group.config.num_updates]
                    progress = sorted({slice_.num_updates for slice_ in unfinished})
                    for done in progress:
                        together = [slice_ for slice_ in unfinished if slice_.num_updates == done]
                        self.train_wave(compiled, together, held if done == progress[-1] else ExitStack())
        except LockLost as error:
            warnings.warn(f"{error}; this call leaves its slices to that process")
        except BaseException:
            self.interrupt.set()  # so that the other threads store what they have and stop
            raise

    def train_wave(self, compiled: CompiledGroup, wave: Sequence[Slice], held: ExitStack):
        """Trains slices to the end, or until an interrupt or an error elsewhere, and stores them.

        Args:
            compiled: the group.
            wave: the slices.
            held: what is left once nothing of the wave is on the devices, before it is stored.
        """
        done, config = wave[0].num_updates, compiled.group.config
        first_state, metrics = self.load_wave(compiled, wave)
        if self.interrupt.is_set():
            return
        rows = list({name: i for i, name in enumerate(name for slice_ in wave for name in slice_.runs)}.values())
        latest = np.nan
        timer = Timer(self.save_every)
        updates = chunks(
            compiled.program, first_state, done, config.num_updates, self.interrupt,
            evaluations=compiled.evaluations, donate=True,
        )  # fmt: skip
        for state, new in updates:
            metrics.append(new)
            length = next(iter(new.values())).shape[1]
            done += length
            with self.lock:
                steps = length * config.steps_per_update * len(rows)
                self.steps += steps
                if RETURN in new:
                    self.returns[wave[0].name] = latest = newest(new[RETURN][rows], latest)
                    returns = np.concatenate(list(self.returns.values()))
                    self.bar.set_postfix_str(show_newest({RETURN: returns}), refresh=False)
                self.bar.update(steps)
            stops = self.watch is not None and self.watch([name for x in wave for name in x.runs], done, new)
            if stops or done == config.num_updates or self.interrupt.is_set():
                break
            if timer.is_due():
                metrics = [self.store_wave(compiled, wave, to_arrays(state), metrics)]
                timer.restart()
            state = None  # its memory is free for the chunk after the next one
        with self.lock:
            self.returns.pop(wave[0].name, None)
        arrays = to_arrays(state)
        del state
        held.close()
        self.store_wave(compiled, wave, arrays, metrics)

    def load_wave(self, compiled: CompiledGroup, wave: Sequence[Slice]) -> tuple[Any, list[dict]]:
        """The state of a wave on the devices, stored or new, and its metrics so far; its last slice fills it up."""
        filled = [*wave, *[wave[-1]] * (compiled.num_devices - len(wave))]
        if not wave[0].num_updates:
            runs = self.sweep.runs(compiled.group.settings)
            members = [runs[name] for slice_ in filled for name in slice_.runs]
            return compiled.start(*run_arguments(self.sweep, compiled.ppo, members)), []
        arrays = {name: np.concatenate([slice_.state[name] for slice_ in filled]) for name in wave[0].state}
        shardings = jax.tree.map(lambda x: x.sharding, compiled.like)
        state = jax.device_put(from_arrays(arrays, compiled.like), shardings)
        return state, [{n: np.concatenate([slice_.metrics[n] for slice_ in filled]) for n in wave[0].metrics}]

    def store_wave(self, compiled: CompiledGroup, wave: Sequence[Slice], arrays: dict, metrics: list[dict]) -> dict:
        """Stores every slice of a wave as it is now.

        Args:
            compiled: the group.
            wave: the slices.
            arrays: the state of the wave, see `to_arrays`.
            metrics: of its chunks so far.

        Returns:
            The metrics of all chunks as one.
        """
        joined = {name: np.concatenate([chunk[name] for chunk in metrics], axis=1) for name in metrics[0]}
        for i, slice_ in enumerate(wave):
            rows = slice(i * compiled.slice_size, (i + 1) * compiled.slice_size)
            own_metrics, own_state = ({name: x[rows] for name, x in kind.items()} for kind in (joined, arrays))
            new = Slice(slice_.runs, own_metrics, own_state)
            try:
                self.claims.check(slice_)
                self.slices.write(new)
            except OSError as error:  # a full disk, or one that does not answer
                self.slices.keep(new, error)
        return joined


def _as_divided(
    plan: Plan, folder: str | Path | None, stored: Sequence[Slice], division: Division
) -> tuple[Plan, dict[Group, list[Slice]]]:
    """The plan for the division that its folder has, and the slices of this process by group.

    Another process may have opened the folder, with slices of other sizes, since the plan was made.
    """
    sizes = {compiled.group: compiled.slice_size for compiled in plan.groups}
    own = own_slices(plan.sweep, stored, division, plan.share)
    if plan.again and any(sizes.get(x) != division.slice_sizes[plan.sweep.name_program(x)] for x in own):
        warnings.warn(f"folder={folder} divides the sweep in another way than the plan, which is compiled again for it")
        plan = plan.again(folder)
    own = {x.group: own.get(x.group, [])[jax.process_index() :: jax.process_count()] for x in plan.groups}
    return plan, own


def _bar(plan: Plan, own: Mapping[Group, Sequence[Slice]], stored: Sequence[Slice], progress: bool) -> tqdm:
    """The bar of the whole sweep, or of the slices of a share or a process; it begins with what is stored."""
    runs: dict[Group, Collection[str]] = {group: {name for x in own[group] for name in x.runs} for group in own}
    part = f"process {jax.process_index()} of {process_count()}: " if process_count() > 1 else ""
    part = f"share {plan.share}: " if plan.share else part
    if not part:
        runs = {group: plan.sweep.runs(group.settings) for group in plan.sweep.groups()}
    updates = {name: slice_.num_updates for name, (slice_, _) in by_run(stored).items()}
    done = sum(group.config.steps_per_update * updates.get(name, 0) for group in runs for name in runs[group])
    return step_bar(
        total=sum(group.config.total_steps * len(names) for group, names in runs.items()),
        initial=done,
        description=part + count(sum(map(len, runs.values())), "run"),
        progress=progress,
    )


def _check_disk(folder: str | Path | None, plan: Plan):
    if folder is None:
        return
    free = shutil.disk_usage(existing(Path(folder))).free
    if plan.stored_bytes > free:
        raise ValueError(
            f"folder={folder} has {free / 2**20:,.1f} MiB free, but the results of what is to train take about "
            f"{plan.stored_bytes / 2**20:,.1f} MiB (name a folder on another disk, or sweep less)"
        )
