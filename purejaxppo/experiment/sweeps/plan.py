"""The plan of a sweep before it runs: groups that share a program, slices that fit the device, memory, disk."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax

from purejaxppo.batched import batched, reported_failures, seed_keys
from purejaxppo.checks import check_whole
from purejaxppo.evaluate import EPISODES
from purejaxppo.experiment.evaluations import Evaluations, make_evaluations
from purejaxppo.experiment.identity import identify_ppo
from purejaxppo.experiment.jax_setup import num_cores
from purejaxppo.experiment.memory import bytes_of, memory_of, show_memory
from purejaxppo.experiment.program import SELDOM, Program, best_slice_size, compile_training
from purejaxppo.experiment.sweeps.columns import env_columns, run_arguments
from purejaxppo.experiment.sweeps.division import (
    Share,
    describe_missing,
    divide,
    own_slices,
    read_share,
)
from purejaxppo.experiment.sweeps.slices import Division, check_identities, find_slices, read_division
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
    evaluations: Evaluations | None = None
    """Of a wave, if the sweep has such."""

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
    division: Division = field(default_factory=lambda: Division({}, 0, []))
    """The sizes of slices, and which slices are shared."""
    share: Share | None = None
    """The part of the sweep that is trained; None for all."""
    num_slices: int = 0
    """Slices that are to train."""
    total_steps: int = 0
    """Environment steps that are to make."""
    stored_bytes: int = 0
    """Approximate size on disk of the results of the runs that are to train."""
    missing: str = ""
    """The runs of the whole sweep that are not finished, in words; empty if nothing is stored yet."""
    again: "Callable[[Any], Plan] | None" = None
    """Makes the plan again, for the sizes of slices that a folder has."""

    def __repr__(self) -> str:
        sweep = self.sweep
        if not self.groups and not self.share:
            return f"{sweep.env}: all {sweep.num_runs} runs are done"
        whose = f"share {self.share}" if self.share else "to train"
        missing = f"{whose}: {count(self.num_slices, 'slice')}; missing so far: {self.missing}"
        if not self.groups:
            return f"{sweep.env}: {missing}"
        lines = [
            f"{sweep.env}: {sweep.describe_size()}, "
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
        lines += [missing] if self.missing else []
        if sweep.evaluate_every:
            lines.append(
                f"every {count(sweep.evaluate_every, 'update')} and at the end each run plays {EPISODES} fresh "
                "episodes, by which the settings are ranked"
            )
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
    share: tuple[int, int] | str | None = None,
) -> Plan:
    """Compiles what a sweep needs: one program for all settings with the same environment and `Config`.

    Raises ValueError before anything compiles, for an unknown environment or parameter of it, or a folder of another
    sweep.

    Args:
        sweep: what to train.
        folder: results so far; what it holds is not planned again.
        slice_size: runs that a device trains at a time, in each group; by default as many as fit its caches or its
            memory. A folder keeps the sizes of the call that opened it first, since others would round differently.
        updates_per_chunk: updates between two saves or interrupts; by default a fiftieth of the run.
        devices: devices or their number; by default all of this process.
        make: `make(env, config)` makes the PPO of a group, see `make_group`.
        allow_changed: what may differ from what the folder was trained with: names such as "loss" and "optimizer".
        share: trains a part of the sweep, as one of several processes that share the folder and need not know each
            other: (0, 4) or "0/4" is the first of four shares, every fourth slice of the whole sweep; "slurm" reads the
            share from the variables of a job array. The same call without a share trains what is missing then.
    """
    check_sweep(sweep)
    part = None if share is None else read_share(share)
    if part and folder is None:
        raise ValueError(f"share={part} needs a folder, the same for all shares (folder=...)")
    known = jax.local_devices()
    devices = known if devices is None else choose_devices(devices, known)
    stored = find_slices(folder, sweep).read(verify=True)
    kept = read_division(folder)
    sizes = _sizes(sweep, divide(sweep, stored, kept), slice_size)
    ppos = {group: make_group(group, make) for group in sizes}
    identities = {sweep.name_group(group): identify_ppo(ppo, sweep.hyperparams) for group, ppo in ppos.items()}
    check_identities(folder, sweep, identities, allow_changed)
    for group, ppo in ppos.items():
        env_columns(sweep, group.settings, ppo)
    compile_one = partial(
        _compile, sweep, devices=devices, updates_per_chunk=updates_per_chunk, num_shares=part.number if part else 1
    )
    # A share is counted over all slices of the sweep: all sizes must be known, and compiling tells what fits.
    pending = own_slices(sweep, stored, divide(sweep, stored, kept))
    compiled = {group: compile_one(group, ppos[group], slice_size=None) for group in pending if sizes[group] is None}
    sizes |= {group: program.slice_size for group, program in compiled.items()}
    division = divide(sweep, stored, kept, {sweep.name_program(group): size for group, size in sizes.items() if size})
    own = own_slices(sweep, stored, division, part)
    for group in (group for group in own if group not in compiled):
        compiled[group] = compile_one(group, ppos[group], slice_size=sizes[group])
    options = {"updates_per_chunk": updates_per_chunk, "devices": devices, "make": make, "share": part}
    return Plan(
        sweep, [compiled[group] for group in own], make, identities, allow_changed,
        division=division, share=part, num_slices=sum(map(len, own.values())),
        total_steps=sum(
            (group.config.num_updates - x.num_updates) * group.config.steps_per_update * len(x.runs)
            for group in own
            for x in own[group]
        ),
        stored_bytes=sum(compiled[group].stored_bytes * len(x.runs) for group in own for x in own[group]),
        missing=describe_missing(sweep, stored) if part or stored else "",
        again=partial(plan_sweep, sweep, allow_changed=allow_changed, **options),
    )  # fmt: skip


def _sizes(sweep: Sweep, division: Division, wanted: int | None) -> dict[Group, int | None]:
    """The slice size of every group: that of the folder, or else the one that is wanted.

    Raises ValueError for one that the group is too small for, or if another one is wanted than the folder has.
    """
    sizes = {group: division.slice_sizes.get(sweep.name_program(group), wanted) for group in sweep.groups()}
    differing = [size for size in sizes.values() if wanted not in (None, size)]
    if differing:
        raise ValueError(
            f"slice_size={wanted} differs from the {differing[0]} of the slices in the folder "
            "(leave it out, or name another folder)"
        )
    for group, size in sizes.items():
        if size is not None:
            at_most = len(group.settings) * sweep.num_seeds
            check_whole("slice_size", size, at_most=at_most, of="the runs of its group")
    return sizes


def _compile(
    sweep: Sweep,
    group: Group,
    ppo: PPO,
    devices: Sequence[Any],
    slice_size: int | None,
    updates_per_chunk: int | None,
    num_shares: int,  # that may train at once
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

    def compile_slices(size: int) -> tuple[Callable, TrainState, Program, Evaluations | None]:
        runs = [(group.settings[0], 0)] * (size * len(devices))
        arguments = run_arguments(sweep, ppo, runs)
        with jax.default_device(devices[0]):
            start = jax.jit(partial(_start, many, sweep.seed), compiler_options=SELDOM).lower(*arguments).compile()
            state = start(*arguments)
            with reported_failures():
                program = compile_training(many, state, chunk, slice_size=len(runs))
            every = sweep.evaluate_every
            return start, state, program, make_evaluations(many, every, state) if every else None

    size = slice_size or choose_slice_size(
        sweep, group, ppo, num_runs, chunk, devices[0], num_threads * len(devices) * num_shares
    )
    start, state, program, evaluations = compile_slices(size)
    memory = usable_memory(devices[0]) // num_threads
    fitting = _even_size(num_runs, size, size * memory // max(bytes_of(program, evaluations), 1))
    if slice_size is None and fitting < size:
        size = fitting
        start, state, program, evaluations = compile_slices(size)
    _, rows = program.executable.out_info  # metrics [R, chunk, F]
    bytes_per_update = size_of(rows) // (size * len(devices) * chunk) + 4 * bool(evaluations)
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
        device_bytes=bytes_of(program, evaluations) // size,
        memory=memory_of(many, state, bytes_of(program, evaluations) // size),
        stored_bytes=size_of(state) // (size * len(devices)) + bytes_per_update * group.config.num_updates,
        compile_seconds=time.perf_counter() - started,
        evaluations=evaluations,
    )


def choose_slice_size(
    sweep: Sweep, group: Group, ppo: PPO, num_runs: int, num_updates: int, device: Any, at_once: int
) -> int:
    """Runs of a slice: few enough for a core's cache; on an accelerator as many as there are, if they fit its memory.

    Args:
        sweep: has the runs.
        group: of its settings.
        ppo: of the group, of one run.
        num_runs: to be divided.
        num_updates: of a call of the program.
        device: one of those that train.
        at_once: slices that train at the same time.
    """
    if device.platform == "cpu":
        return best_slice_size(num_runs, at_once, group.config)
    size = -(-num_runs // at_once)
    if size <= 2 * PROBE:
        return size
    return _even_size(num_runs, size, runs_that_fit(sweep, group, ppo, num_updates, usable_memory(device)))


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


def _static(sweep: Sweep, group: Group) -> dict[str, str]:
    """The swept fields that make a group, as text."""
    row = sweep.table.rows()[group.settings[0]]
    return {name: show(value) for name, value in row.items() if name in ("env", *PLUGGED, *CONFIG_FIELDS)}


def usable_memory(device: Any) -> int:
    """Bytes that programs may take of the memory of a device; for a CPU of that of the machine."""
    stats, whole = device.memory_stats() or {}, 2**33
    if "bytes_limit" in stats:
        whole = stats["bytes_limit"]
    elif hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(SHARE_OF_MEMORY * whole)
