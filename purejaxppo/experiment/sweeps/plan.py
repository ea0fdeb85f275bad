"""The plan of a sweep before it runs: groups that share a program, slices that fit the device, memory, disk."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax

from purejaxppo.batched import batched, reported_failures, seed_keys
from purejaxppo.checks import check_whole
from purejaxppo.config import Config
from purejaxppo.experiment.identity import identify_ppo
from purejaxppo.experiment.jax_setup import num_cores
from purejaxppo.experiment.memory import bytes_of, memory_of, show_memory
from purejaxppo.experiment.program import SELDOM, Program, best_slice_size, compile_training
from purejaxppo.experiment.sweeps.columns import env_columns, run_arguments
from purejaxppo.experiment.sweeps.slices import Slice, check_identities, find_slices
from purejaxppo.experiment.sweeps.sweep import CONFIG_FIELDS, Group, Sweep, check_sweep, make_group
from purejaxppo.ppo import PPO, TrainState, make_ppo
from purejaxppo.record import size_of
from purejaxppo.sharded import choose_devices
from purejaxppo.table import PLUGGED
from purejaxppo.text import align, count, show

SHARE_OF_MEMORY = 0.8
PROBE = 8  # runs of the smaller of two programs that tell what a run takes


@dataclass(frozen=True)
class CompiledGroup:
    """The settings of a group with their compiled programs. A wave is one slice on every device."""

    group: Group
    ppo: PPO
    """Batched, over the devices if there are several."""
    start: Callable
    """(seeds [R], hyperparams [R], env_params [R]) -> the first state of a wave of R runs."""
    like: TrainState
    """Shapes and shardings of the state of a wave."""
    program: Program
    """Trains a wave."""
    num_runs: int
    slice_size: int
    """Runs of a slice. A device trains one slice at a time, so results do not depend on the number of devices."""
    num_devices: int
    num_threads: int
    """Waves that train side by side."""
    device_bytes: int
    """Memory of one run while it trains, by the compiler's analysis."""
    memory: dict[str, int]
    """What these bytes hold, see `memory_of`."""
    stored_bytes: int
    """Size of one run on disk."""
    compile_seconds: float

    def __repr__(self) -> str:
        title, *_ = repr(self.ppo).splitlines()
        return f"CompiledGroup of {count(self.num_runs, 'run')} in slices of {self.slice_size}: {title}"

    @property
    def num_slices(self) -> int:
        """Slices of all runs."""
        return -(-self.num_runs // self.slice_size)


@dataclass(frozen=True)
class Plan:
    """A sweep with every program that it needs, compiled; printing it shows what it will do."""

    sweep: Sweep
    groups: list[CompiledGroup]
    """Those with runs that are not finished yet."""
    make: Callable
    identities: dict[str, dict[str, str]]
    """What is plugged in, by `Sweep.name_group`, see `identify_ppo`."""
    allow_changed: Sequence[str] = ()
    """What may differ from what the folder was trained with."""

    @property
    def total_steps(self) -> int:
        """Environment steps of all runs of the groups."""
        return sum(compiled.num_runs * compiled.group.config.total_steps for compiled in self.groups)

    @property
    def stored_bytes(self) -> int:
        """Approximate size of the results of these groups on disk."""
        return sum(compiled.num_runs * compiled.stored_bytes for compiled in self.groups)

    def __repr__(self) -> str:
        sweep = self.sweep
        if not self.groups:
            return f"{sweep.env}: all {sweep.num_runs} runs are done"
        lines = [
            f"{sweep.env}: {len(sweep.table)} settings x {sweep.num_seeds} seeds = {sweep.num_runs} runs, "
            f"{self.total_steps:,} steps, {len(self.groups)} compiled in "
            f"{sum(compiled.compile_seconds for compiled in self.groups):.1f} s, "
            f"{self.stored_bytes / 2**20:,.1f} MiB of results"
        ]
        rows = [
            _static(sweep, compiled.group)
            | {
                "settings": len(compiled.group.settings),
                "runs": compiled.num_runs,
                "steps each": f"{compiled.group.config.total_steps:,}",
                "slices": f"{compiled.num_slices} of {compiled.slice_size}",
                "at a time": compiled.num_threads * compiled.num_devices,
                "memory per run": f"{compiled.device_bytes / 2**20:.2f} MiB",
            }
            for compiled in self.groups
        ]
        memory = show_memory([compiled.memory for compiled in self.groups])
        return "\n".join([*lines, align(rows), "memory of a run, in MiB:", memory])


def plan_sweep(
    sweep: Sweep,
    folder: str | Path | None = None,
    *,
    slice_size: int | None = None,
    updates_per_chunk: int | None = None,
    devices: int | Sequence[Any] | None = None,
    make: Callable = make_ppo,
    allow_changed: Sequence[str] = (),
) -> Plan:
    """Compiles what a sweep needs: one program for all settings with the same environment and `Config`.

    Raises ValueError before anything compiles, for an unknown environment or parameter of it, or a folder of another
    sweep.

    Args:
        sweep: what to train.
        folder: results so far; what it holds is not planned again.
        slice_size: runs that a device trains at a time, in each group; by default as many as fit its caches or its
            memory. If the folder holds slices, their size is used, since another would round differently.
        updates_per_chunk: updates between two saves or interrupts; by default a fiftieth of the run.
        devices: devices or their number; by default all of this process.
        make: `make(env, config)` makes the PPO of a group, see `make_group`.
        allow_changed: what may differ from what the folder was trained with: names such as "loss" and "optimizer".
    """
    check_sweep(sweep)
    known = jax.local_devices()
    devices = known if devices is None else choose_devices(devices, known)
    stored = find_slices(folder, sweep).read()
    groups = sweep.groups()
    sizes = {group: _stored_size(sweep, group, stored, slice_size) for group in groups}
    ppos = {group: make_group(group, make) for group in groups}
    identities = {sweep.name_group(group): identify_ppo(ppo, sweep.hyperparams) for group, ppo in ppos.items()}
    check_identities(folder, sweep, identities, allow_changed)
    for group, ppo in ppos.items():
        env_columns(sweep, group.settings, ppo)
    missing = [group for group in groups if pending_slices(sweep, group, stored, 1)]
    compiled = [_compile(sweep, group, ppos[group], devices, sizes[group], updates_per_chunk) for group in missing]
    return Plan(sweep, compiled, make, identities, allow_changed)


def pending_slices(sweep: Sweep, group: Group, stored: Sequence[Slice], slice_size: int) -> list[Slice]:
    """The slices of a group that are still to train: unfinished ones, then those of runs that have none yet.

    Args:
        sweep: has the runs.
        group: of its settings.
        stored: all slices so far.
        slice_size: runs of a new slice.
    """
    names = sweep.runs(group.settings)
    of_group = [slice_ for slice_ in stored if slice_.runs[0] in names]
    unfinished = [slice_ for slice_ in of_group if slice_.num_updates < group.config.num_updates]
    covered = {name for slice_ in of_group for name in slice_.runs}
    missing = [name for name in names if name not in covered]
    batches = [missing[i : i + slice_size] for i in range(0, len(missing), slice_size)]
    return unfinished + [Slice((*runs, *runs[-1:] * (slice_size - len(runs))), {}, {}) for runs in batches]


def _stored_size(sweep: Sweep, group: Group, stored: Sequence[Slice], wanted: int | None) -> int | None:
    """The size of a group's slices in the folder, or the one that is wanted."""
    names = sweep.runs(group.settings)
    size = next((len(slice_.runs) for slice_ in stored if slice_.runs[0] in names), wanted)
    if wanted not in (None, size):
        raise ValueError(f"slice_size={wanted} differs from the {size} of the slices in the folder (leave it out)")
    return size


def _compile(
    sweep: Sweep,
    group: Group,
    ppo: PPO,
    devices: Sequence[Any],
    slice_size: int | None,
    updates_per_chunk: int | None,
) -> CompiledGroup:
    started = time.perf_counter()
    num_runs = len(group.settings) * sweep.num_seeds
    on_cpu = devices[0].platform == "cpu"
    num_threads = num_cores() if on_cpu and len(devices) == 1 else 1
    many = batched(ppo) if len(devices) == 1 else batched(ppo, devices)
    if updates_per_chunk is None:
        updates_per_chunk = -(-group.config.num_updates // 50)
    check_whole("updates_per_chunk", updates_per_chunk)
    chunk = min(updates_per_chunk, group.config.num_updates)
    if slice_size is not None:
        check_whole("slice_size", slice_size, at_most=num_runs, of="the runs of its group")

    def compile_slices(size: int):
        runs = [(group.settings[0], 0)] * (size * len(devices))
        arguments = run_arguments(sweep, ppo, runs)
        with jax.default_device(devices[0]):
            start = jax.jit(partial(_start, many, sweep.seed), compiler_options=SELDOM).lower(*arguments).compile()
            state = start(*arguments)
            with reported_failures():
                return start, state, compile_training(many, state, chunk, slice_size=len(runs))

    size = slice_size or _slice_size(num_runs, num_threads * len(devices), group.config, on_cpu)
    memory = int(SHARE_OF_MEMORY * _device_memory(devices[0]) / num_threads)
    if slice_size is None and not on_cpu and size > 2 * PROBE:
        size = _even_size(num_runs, size, runs_that_fit(sweep, group, ppo, chunk, memory))
    start, state, program = compile_slices(size)
    fitting = _even_size(num_runs, size, size * memory // max(bytes_of(program), 1))
    if slice_size is None and fitting < size:
        size = fitting
        start, state, program = compile_slices(size)
    num_metrics = len(jax.eval_shape(many.step, state)[1])
    return CompiledGroup(
        group=group,
        ppo=many,
        start=start,
        like=jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state),
        program=program,
        num_runs=num_runs,
        slice_size=size,
        num_devices=len(devices),
        num_threads=min(num_threads, -(-num_runs // size)),
        device_bytes=bytes_of(program) // size,
        memory=memory_of(many, state, bytes_of(program) // size),
        stored_bytes=size_of(state) // (size * len(devices)) + 4 * num_metrics * group.config.num_updates,
        compile_seconds=time.perf_counter() - started,
    )


def runs_that_fit(sweep: Sweep, group: Group, ppo: PPO, num_updates: int, memory: int) -> int:
    """How many runs of a group can train at a time in so many bytes of a device.

    Memory is linear in the number of runs, so two small programs tell it, compiled for the shapes of a state: nothing
    is compiled or started that does not fit.

    Args:
        sweep: has the runs.
        group: of its settings.
        ppo: of the group, of one run.
        num_updates: of a call of the program.
        memory: bytes.
    """
    many, sizes = batched(ppo), []
    for number in (PROBE, 2 * PROBE):
        arguments = run_arguments(sweep, ppo, [(group.settings[0], 0)] * number)
        state = jax.eval_shape(partial(_start, many, sweep.seed), *arguments)
        with reported_failures():
            sizes.append(bytes_of(compile_training(many, state, num_updates, slice_size=number)))
    of_a_run = max((sizes[1] - sizes[0]) / PROBE, 1)
    return max(int((memory - sizes[0]) / of_a_run) + PROBE, 1)


def _even_size(num_runs: int, wanted: int, most: int) -> int:
    """Runs of slices that are about equally large: as many as are wanted, if that is not more than fit."""
    most = max(most, 1)
    return wanted if wanted <= most else -(-num_runs // -(-num_runs // most))


def _start(ppo: PPO, seed: int, seeds, hyperparams, env_params) -> TrainState:
    return ppo.init(seed_keys(jax.random.key(seed), seeds), hyperparams, env_params)


def _slice_size(num_runs: int, at_once: int, config: Config, on_cpu: bool) -> int:
    return best_slice_size(num_runs, at_once, config) if on_cpu else -(-num_runs // at_once)


def _static(sweep: Sweep, group: Group) -> dict[str, str]:
    """The swept fields that make a group, as text."""
    row = sweep.table.rows()[group.settings[0]]
    return {name: show(value) for name, value in row.items() if name in ("env", *PLUGGED, *CONFIG_FIELDS)}


def _device_memory(device: Any) -> int:
    """Bytes of memory of a device; for a CPU that of the machine."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 2**33
