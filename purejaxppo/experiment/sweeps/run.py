"""Running a sweep: waves of slices through compiled programs, kept as soon as they are done."""

import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm.auto import tqdm

from purejaxppo.experiment.files import from_arrays, to_arrays
from purejaxppo.experiment.program import noted_interrupt
from purejaxppo.experiment.sweeps.columns import wave_arguments
from purejaxppo.experiment.sweeps.plan import Part, Plan, plan_sweep
from purejaxppo.experiment.sweeps.result import Result, make_result
from purejaxppo.experiment.sweeps.slices import Slice, Slices, find_slices, open_slices
from purejaxppo.experiment.sweeps.sweep import Group, Sweep


def run_sweep(
    sweep: Sweep | Plan,
    folder=None,
    *,
    progress: bool = True,
    save_every: float = 60.0,
    **options,
) -> Result:
    """Trains every run of a sweep, or of a plan, and returns the result, which `folder` holds too if one is named.

    A slice of runs is on disk as soon as it is done, and one at work every `save_every` seconds. Called again with the
    same folder, a sweep skips what is there, and one with more seeds or settings adds them. Ctrl-C ends it after
    the chunks in flight and keeps all that was done. With `jax.distributed` every process takes its share of the
    slices; the folder must then be one that all see. `options` are those of `plan_missing`. Raises ValueError for a
    folder of another sweep, or a disk that cannot hold the results.
    """
    if folder is None and jax.process_count() > 1:
        raise ValueError(f"{jax.process_count()} processes need a folder that all of them see (folder=...)")
    if isinstance(sweep, Plan) and options:
        raise ValueError(f"{min(options)} is settled in the plan (give it to plan_sweep, or a sweep to run_sweep)")
    plan = sweep if isinstance(sweep, Plan) else plan_missing(sweep, folder, **options)
    sweep = plan.sweep
    begun = find_slices(folder, sweep).read()
    _check_disk(folder, plan)
    slices = open_slices(folder, sweep)
    _wait_for_all_processes("begin")

    start = time.perf_counter()
    total, done = _steps(sweep, begun)
    with (
        tqdm(
            total=total, initial=done, unit=" steps", unit_scale=True, desc=f"{sweep.num_runs} runs",
            disable=None if progress else True,
        ) as bar,
        noted_interrupt() as interrupt,
    ):  # fmt: skip
        session = Session(sweep, slices, save_every, bar, interrupt)
        for part in plan.parts:
            session.run(part, pending_slices(sweep, part.group, begun, part.slice_size))
        if interrupt.is_set():
            bar.write(
                "interrupted: the result holds what was done until here"
                + (f", and the same sweep in {folder} goes on from there" if folder else "")
            )
    _wait_for_all_processes("end")
    seconds = time.perf_counter() - start
    return make_result(sweep, slices, plan.make, _steps(sweep, slices.read())[1] - done, seconds)


def plan_missing(sweep: Sweep, folder=None, *, slice_size: int | None = None, **options) -> Plan:
    """The plan of what a folder does not hold yet of a sweep; `options` are those of `plan_sweep`.

    Slices are as large as those in the folder, since others would give other roundings.
    """
    begun = find_slices(folder, sweep).read()
    sizes = {group: _size_begun(sweep, group, begun, slice_size) for group in sweep.groups()}
    unfinished = [group for group in sizes if pending_slices(sweep, group, begun, 1)]
    return plan_sweep(sweep, slice_size=sizes, only=unfinished, **options)


def pending_slices(sweep: Sweep, group: Group, begun: list[Slice], slice_size: int) -> list[Slice]:
    """What is still to be done of a group: slices that are unfinished, then those of runs that have none yet."""
    names = sweep.runs(group.settings)
    mine = [part for part in begun if part.runs[0] in names]
    unfinished = [part for part in mine if part.num_updates < group.config.num_updates]
    covered = {name for part in mine for name in part.runs}
    missing = [name for name in names if name not in covered]
    parts = [missing[i : i + slice_size] for i in range(0, len(missing), slice_size)]
    return unfinished + [Slice((*part, *part[-1:] * (slice_size - len(part))), {}, {}) for part in parts]


@dataclass
class Session:
    """One call of `run_sweep` at work: what its threads share."""

    sweep: Sweep
    slices: Slices
    save_every: float
    bar: tqdm
    interrupt: threading.Event
    lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, part: Part, pending: list[Slice]):
        """Trains the slices of a group that fall to this process."""
        mine = pending[jax.process_index() :: jax.process_count()]
        waves = []
        for done in sorted({one.num_updates for one in mine}, reverse=True):
            alike = [one for one in mine if one.num_updates == done]
            waves += [alike[i : i + part.num_devices] for i in range(0, len(alike), part.num_devices)]
        with ThreadPoolExecutor(part.num_threads) as pool:
            list(pool.map(partial(self.run_wave, part), waves))

    def run_wave(self, part: Part, wave: list[Slice]):
        """Trains one slice on every device to the end, or until an interrupt or an error elsewhere."""
        if self.interrupt.is_set():
            return
        try:
            done, config = wave[0].num_updates, part.group.config
            wave, state, collected = self.begin(part, wave)
            num_runs = len({name for one in wave for name in one.runs})
            saved = time.monotonic()
            while done < config.num_updates and not self.interrupt.is_set():
                length = min(part.program.num_updates, config.num_updates - done)
                state, metrics = part.program(state, length, donate=True)
                collected.append(metrics)
                done += length
                with self.lock:
                    self.bar.update(length * config.steps_per_update * num_runs)
                if time.monotonic() - saved > self.save_every:
                    self.keep(part, wave, state, collected)
                    saved = time.monotonic()
            if collected:
                self.keep(part, wave, state, collected)
        except BaseException:
            self.interrupt.set()  # the other threads keep what they have and end
            raise

    def begin(self, part: Part, wave: list[Slice]):
        """The slices of a wave as they are on disk, their state on the devices, and their metrics so far."""
        if wave[0].num_updates:
            wave = [self.slices.load(one.name) for one in wave]
        filled = wave + wave[-1:] * (part.num_devices - len(wave))
        if not wave[0].num_updates:
            runs = self.sweep.runs(part.group.settings)
            members = [runs[name] for one in filled for name in one.runs]
            return wave, part.start(*wave_arguments(self.sweep, part.ppo, members)), []
        arrays = {name: np.concatenate([one.state[name] for one in filled]) for name in wave[0].state}
        state = jax.device_put(from_arrays(arrays, part.like), jax.tree.map(lambda x: x.sharding, part.like))
        return wave, state, [{n: np.concatenate([one.metrics[n] for one in filled]) for n in wave[0].metrics}]

    def keep(self, part: Part, wave: list[Slice], state, collected: list[dict]):
        """Writes every slice of a wave as it is now."""
        arrays = to_arrays(state)
        collected[:] = [{name: np.concatenate([m[name] for m in collected], axis=1) for name in collected[0]}]
        for i, one in enumerate(wave):
            here = slice(i * part.slice_size, (i + 1) * part.slice_size)
            metrics, state = ({name: x[here] for name, x in kind.items()} for kind in (collected[0], arrays))
            self.slices.write(Slice(one.runs, metrics, state))


def _size_begun(sweep: Sweep, group: Group, begun: list[Slice], wanted: int | None) -> int | None:
    """The slice size of a group: as wanted, or as in the folder, since another would give other roundings."""
    names = sweep.runs(group.settings)
    size = next((len(part.runs) for part in begun if part.runs[0] in names), wanted)
    if wanted not in (None, size):
        raise ValueError(f"slice_size={wanted} differs from the {size} of the slices in the folder (leave it out)")
    return size


def _steps(sweep: Sweep, begun: list[Slice]) -> tuple[int, int]:
    """Environment steps of the whole sweep, and of what was found of it."""
    done = {name: part.num_updates for part in begun for name in part.runs}
    parts = [(group.config, sweep.runs(group.settings)) for group in sweep.groups()]
    total = sum(config.total_steps * len(names) for config, names in parts)
    return total, sum(config.steps_per_update * done.get(name, 0) for config, names in parts for name in names)


def _check_disk(folder, plan: Plan):
    if folder is None:
        return
    there = next(path for path in (Path(folder).absolute(), *Path(folder).absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if plan.stored_bytes > free:
        raise ValueError(
            f"out={folder} has {free / 2**30:.1f} GiB free, but the results of {plan.sweep.num_runs} runs take "
            f"about {plan.stored_bytes / 2**30:.1f} GiB (name a folder on another disk, or sweep less)"
        )


def _wait_for_all_processes(where: str):
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"sweep {where}")
