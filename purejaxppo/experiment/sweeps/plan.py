"""What a sweep will cost, told before it runs: groups that share a program, slices that fit the device, memory."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax

from purejaxppo.batched import batched, seed_keys
from purejaxppo.checks import check_whole
from purejaxppo.experiment.program import SELDOM, Program, best_slice_size, compile, num_cores
from purejaxppo.experiment.sweeps.columns import env_columns, wave_arguments
from purejaxppo.experiment.sweeps.sweep import CONFIG_FIELDS, Group, Sweep
from purejaxppo.ppo import PPO, TrainState, make_ppo
from purejaxppo.sharded import choose_devices
from purejaxppo.text import align, show

SHARE_OF_MEMORY = 0.8


@dataclass(frozen=True)
class Part:
    """A group of settings with its compiled programs."""

    group: Group
    ppo: PPO
    """Batched, over the devices if there are several."""
    start: Callable
    """(seeds [R], hyperparams [R], env_params [R]) -> TrainState of a wave: as many slices as there are devices."""
    like: TrainState
    """Shapes and places of a state of a wave."""
    program: Program
    """Of a wave."""
    num_runs: int
    slice_size: int
    """Runs that stay together: a device takes one slice at a time, and so the numbers do not hang on how many devices
    there are."""
    num_devices: int
    num_threads: int
    """Waves at work side by side."""
    device_bytes: int
    """Of one run while it trains, by the compiler's own analysis."""
    stored_bytes: int
    """Of one run on disk."""
    compile_seconds: float

    @property
    def num_slices(self) -> int:
        """Slices of all runs."""
        return -(-self.num_runs // self.slice_size)


@dataclass(frozen=True)
class Plan:
    """A sweep with everything compiled that it needs; printing it shows what it will do."""

    sweep: Sweep
    parts: list[Part]
    make: Callable

    @property
    def total_steps(self) -> int:
        """Environment steps of all runs."""
        return sum(part.num_runs * part.group.config.total_steps for part in self.parts)

    @property
    def stored_bytes(self) -> int:
        """What all runs leave on disk, about."""
        return sum(part.num_runs * part.stored_bytes for part in self.parts)

    def __str__(self) -> str:
        sweep = self.sweep
        if not self.parts:
            return f"{sweep.env}: all {sweep.num_runs} runs are done"
        lines = [
            f"{sweep.env}: {len(sweep.table)} settings x {sweep.num_seeds} seeds = {sweep.num_runs} runs, "
            f"{self.total_steps:,} steps, {len(self.parts)} compiled in "
            f"{sum(part.compile_seconds for part in self.parts):.1f} s, "
            f"{self.stored_bytes / 2**20:,.1f} MiB of results"
        ]
        rows = [
            _static(sweep, part)
            | {
                "settings": len(part.group.settings),
                "runs": part.num_runs,
                "steps each": f"{part.group.config.total_steps:,}",
                "slices": f"{part.num_slices} of {part.slice_size}",
                "at a time": part.num_threads * part.num_devices,
                "memory per run": f"{part.device_bytes / 2**20:.2f} MiB",
            }
            for part in self.parts
        ]
        return "\n".join([*lines, align(rows)])


def plan_sweep(
    sweep: Sweep,
    *,
    slice_size: int | dict[Group, int] | None = None,
    updates_per_chunk: int | None = None,
    devices=None,
    make: Callable = make_ppo,
    only: list[Group] | None = None,
) -> Plan:
    """Compiles what a sweep needs, one training program for all settings that differ in nothing static.

    `slice_size` is the number of runs that a device takes at a time (chosen to fit its caches or its memory by
    default; a dict has it for some groups). `devices`, a list or how many, are all of this process by
    default. `make(env, config)` gives the PPO of a group, where it is not `make_ppo`. `only` are the groups to be
    planned, where not all are. Raises ValueError, before anything compiles, for an environment or a parameter of it
    that does not exist.
    """
    devices = jax.local_devices() if devices is None else choose_devices(devices, jax.local_devices())
    groups = sweep.groups()
    ppos = [make(group.env, group.config) for group in groups]
    for group, ppo in zip(groups, ppos):
        env_columns(sweep, group.settings, ppo)
    sizes = slice_size if isinstance(slice_size, dict) else dict.fromkeys(groups, slice_size)
    parts = [
        _plan_group(sweep, group, ppo, devices, sizes.get(group), updates_per_chunk)
        for group, ppo in zip(groups, ppos)
        if only is None or group in only
    ]
    return Plan(sweep, parts, make)


def _plan_group(sweep, group: Group, ppo: PPO, devices, slice_size, updates_per_chunk) -> Part:
    begun = time.perf_counter()
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

    def compile_slices(size):
        runs = [(group.settings[0], 0)] * (size * len(devices))
        arguments = wave_arguments(sweep, ppo, runs)
        with jax.default_device(devices[0]):
            start = jax.jit(partial(_start, many, sweep.seed), compiler_options=SELDOM).lower(*arguments).compile()
            state = start(*arguments)
            return start, state, compile(many, state, chunk, slice_size=len(runs))

    size = slice_size or _slice_size(num_runs, num_threads * len(devices), group.config, on_cpu)
    start, state, program = compile_slices(size)
    most = int(SHARE_OF_MEMORY * _memory_of(devices[0]) / num_threads / max(_bytes_of(program) / size, 1))
    if slice_size is None and size > most >= 1:
        size = -(-num_runs // -(-num_runs // most))
        start, state, program = compile_slices(size)
    num_metrics = len(jax.eval_shape(many.step, state)[1])
    return Part(
        group=group,
        ppo=many,
        start=start,
        like=jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state),
        program=program,
        num_runs=num_runs,
        slice_size=size,
        num_devices=len(devices),
        num_threads=min(num_threads, -(-num_runs // size)),
        device_bytes=_bytes_of(program) // size,
        stored_bytes=_size_of(state) // (size * len(devices)) + 4 * num_metrics * group.config.num_updates,
        compile_seconds=time.perf_counter() - begun,
    )


def _start(ppo: PPO, seed: int, seeds, hyperparams, env_params) -> TrainState:
    return ppo.init(seed_keys(jax.random.key(seed), seeds), hyperparams, env_params)


def _slice_size(num_runs: int, at_once: int, config, on_cpu: bool) -> int:
    return best_slice_size(num_runs, at_once, config) if on_cpu else -(-num_runs // at_once)


def _static(sweep: Sweep, part: Part) -> dict:
    row = sweep.table.rows()[part.group.settings[0]]
    return {name: show(value) for name, value in row.items() if name == "env" or name in CONFIG_FIELDS}


def _bytes_of(program: Program) -> int:
    """Memory of a compiled program on one device: what goes in, what comes out in other places, what is between."""
    analysis = program.executable.memory_analysis()
    if analysis is None:
        return 0
    held = analysis.argument_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return held + analysis.temp_size_in_bytes


def _size_of(state) -> int:
    return sum(x.size * (x.dtype.itemsize if hasattr(x.dtype, "itemsize") else 8) for x in jax.tree.leaves(state))


def _memory_of(device) -> int:
    """Bytes that a device has; of a CPU those of the machine."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 2**33
