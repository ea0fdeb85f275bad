"""Compiled training: a run, or a batch of runs in slices that suit the machine, for any number of updates."""

import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from purejaxppo.checks import check_whole
from purejaxppo.config import Config
from purejaxppo.evolving import Population
from purejaxppo.experiment.distributed import to_host
from purejaxppo.experiment.identity import changed_names, identify_ppo
from purejaxppo.experiment.jax_setup import num_cores, warn_of_idle_gpu
from purejaxppo.ppo import PPO, TrainState
from purejaxppo.record import Row, pack
from purejaxppo.text import count
from purejaxppo.validate import check_is_state, check_one_run, check_type, refuse_difference

# Transitions of a rollout, over all runs of a slice, that fit the cache of a CPU core.
TRANSITIONS_PER_SLICE = 4096
# Compiler options for programs that run once or seldom: they compile in a quarter less time and run as fast (measured
# up to widths of 512). Training keeps the options of `jax.jit`: others change the bits of `ppo.train`.
SELDOM = {"xla_backend_optimization_level": 1}
# Loops in CUDA graphs, too: the whole training is then one launch. Off by default until it has run on a GPU: XLA
# crashed in the second run of such loops until December 2025 (openxla/xla#35760).
ONE_GRAPH: dict[str, str | bool] = {
    "xla_gpu_enable_command_buffer": (
        "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE"
    ),
}


@dataclass(frozen=True)
class Program:
    """Training compiled ahead of time; call it with a state of the shape that it was compiled for."""

    executable: Callable  # (state of one slice, length) -> state, metrics as rows [(R,) num_updates, F]
    take: Callable  # (state, first run) -> the state of the slice that starts there
    put: Callable  # (state, state of a slice, first run) -> state
    num_updates: int
    """Maximum updates per call."""
    slice_size: int
    """Runs that train together in the program."""
    num_slices: int
    num_threads: int
    """Slices that train side by side."""
    threads: ThreadPoolExecutor
    """Kept between calls: memory of finished threads is not reused by new ones."""
    compile_seconds: float
    like: TrainState | Population
    """Shapes of the state."""
    step: weakref.ref
    """The step of the PPO that it trains."""
    identity: dict[str, str]
    """What was plugged in when it was compiled, see `identify_ppo`."""

    def __repr__(self) -> str:
        return (
            f"Program of up to {count(self.num_updates, 'update')}, compiled in {self.compile_seconds:.1f} s: "
            f"{count(self.num_slices, 'slice')} of {count(self.slice_size, 'run')}, {self.num_threads} at a time"
        )

    def __call__(self, state: TrainState, length: int | None = None, *, donate: bool = False):
        """The state after `length` updates (all `num_updates` by default) and metrics as numpy, [(R,) length, ...].

        With `donate` the memory of `state` is reused; without, it stays usable. Raises ValueError for a state of other
        shapes.
        """
        state, rows = jax.block_until_ready(self.start(state, length, donate=donate))
        return state, self.read(rows, length)

    def start(self, state: TrainState, length: int | None = None, *, donate: bool = False):
        """As a call, but returns before the device is done, with rows for `read`; several slices run to the end."""
        length = self.num_updates if length is None else length
        if list(map(np.shape, jax.tree.leaves(state))) != list(map(np.shape, jax.tree.leaves(self.like))):
            if not isinstance(state, Population):
                check_is_state(state)
            refuse_difference("state", state, self.like, "PPO than this program")
        check_whole("length", length, at_most=self.num_updates, of="the num_updates of this program")
        state = state if donate else copy_state(state)
        run = self.executable if self.num_slices == 1 else self._run_slices
        return run(state, np.int32(length))

    def read(self, rows: Row, length: int | None = None) -> dict[str, np.ndarray]:
        """The metrics of a `start` as numpy, once the device is done."""
        return jax.tree.map(lambda x: np.asarray(to_host(x))[..., :length, :], rows).unpack()

    def _run_slices(self, state, length):
        # If the runs do not divide evenly, the last slice overlaps the one before; both compute the same.
        num_runs, size = len(state.num_updates), self.slice_size
        firsts = [np.int32(min(first, num_runs - size)) for first in range(0, num_runs, size)]

        def run(first):
            return jax.block_until_ready(self.executable(self.take(state, first), length))

        slices = list(self.threads.map(run, firsts))
        stacked = jax.tree.map(lambda x: np.empty((num_runs, *x.shape[1:]), x.dtype), slices[0][1])
        for first, (part, rows) in zip(firsts, slices):
            state = self.put(state, part, first)
            for dtype, values in rows.vectors.items():
                stacked.vectors[dtype][first : first + size] = values
        return state, stacked


def compile_training(
    ppo: PPO, state: Any, num_updates: int | None = None, *, slice_size: int | None = None, one_graph: bool = False
) -> Program:
    """Compiles training ahead of time; the numbers are those of `ppo.train`, to rounding for any slice size.

    Args:
        ppo: what to train.
        state: a state, or its shapes.
        num_updates: maximum updates per call, by default those of the config.
        slice_size: runs of a batch that train together. By default all on an accelerator; on a CPU few enough to stay
            in a core's cache, with the slices side by side on the cores: one large batch leaves the caches, and its
            threads wait for each other.
        one_graph: whether an NVIDIA GPU runs the whole program as one CUDA graph. Compiled so, but not yet run on one.

    Raises:
        ValueError: before anything compiles, for a state that the PPO cannot train.
    """
    if jax.config.jax_disable_jit:  # pyright: ignore[reportAttributeAccessIssue]
        raise ValueError("training is compiled, which jax.disable_jit() forbids (leave it, or call ppo.train)")
    check_training(ppo, state)
    num_updates = ppo.config.num_updates if num_updates is None else num_updates
    check_whole("num_updates", num_updates)
    num_runs = state.num_updates.size
    if slice_size is not None:
        check_whole("slice_size", slice_size, at_most=num_runs, of="the runs of the state")
    if ppo.mesh is not None:
        _check_shards(ppo, state, slice_size)
    together = not isinstance(state, TrainState) or ppo.custom is not None  # runs that may read each other
    if together and slice_size not in (None, num_runs):
        raise ValueError(f"slice_size={slice_size} is not possible: the {num_runs} runs of this PPO train together")
    on_one_cpu = [device.platform for device in _devices(state)] == ["cpu"]
    in_slices = on_one_cpu and ppo.mesh is None and not together
    num_threads = num_cores() if in_slices else 1
    size = slice_size or (best_slice_size(num_runs, num_threads, ppo.config) if in_slices else num_runs)
    num_slices = -(-num_runs // size)
    num_threads = min(num_threads, num_slices)
    # Traced once, for its shapes and for the loop. A function of its own: JAX may have traced `ppo.step` before, and
    # without `reported_failures`.
    step = jax.jit(lambda state: ppo.step(state))

    def train(state, length):
        def one(i, carry):
            state, rows = carry
            state, metrics = step(state)
            return state, jax.tree.map(lambda x, row: x.at[..., i, :].set(row), rows, pack(metrics, np.ndim(runs)))

        runs = state.num_updates
        row = jax.eval_shape(lambda state: pack(step(state)[1], np.ndim(runs)), state)
        rows = jax.tree.map(lambda x: jnp.zeros((*x.shape[:-1], num_updates, *x.shape[-1:]), x.dtype), row)
        return jax.lax.fori_loop(0, length, one, (state, rows))

    warn_of_idle_gpu()
    identity = identify_ppo(ppo, getattr(state, "runs", state).hyperparams)
    start = time.perf_counter()
    take = jax.jit(partial(_take, size=size), compiler_options=SELDOM)
    put = jax.jit(_put, donate_argnums=0, compiler_options=SELDOM)
    part = state
    if num_slices > 1:
        part = _placed_as(state, jax.eval_shape(take, state, np.int32(0)))
        take, put = (f.lower(*x, np.int32(0)).compile() for f, x in ((take, (state,)), (put, (state, part))))
    options = ONE_GRAPH if one_graph and "gpu" in {device.platform for device in _devices(state)} else None
    executable = jax.jit(train, donate_argnums=0).lower(part, np.int32(num_updates)).compile(options)
    return Program(
        executable=executable,
        take=take,
        put=put,
        num_updates=num_updates,
        slice_size=size,
        num_slices=num_slices,
        num_threads=num_threads,
        threads=ThreadPoolExecutor(num_threads),
        compile_seconds=time.perf_counter() - start,
        like=jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x)), state),
        step=weakref.ref(ppo.step),
        identity=identity,
    )


# The newest program of `kept_program` and what it was compiled for, by the step of its PPO; forgotten with the PPO.
_kept: weakref.WeakKeyDictionary[Callable, tuple[Any, Program]] = weakref.WeakKeyDictionary()


def kept_program(ppo: PPO, state: Any, num_updates: int, slice_size: int | None = None) -> Program:
    """The result of `compile_training`, which is kept until a call with other arguments, or as long as the PPO lives.

    It is not kept if the code of the PPO reads something else now, such as a variable of a notebook.

    Args:
        ppo: see `compile_training`.
        state: a state, of which only shapes and devices matter.
        num_updates: see `compile_training`.
        slice_size: see `compile_training`.
    """
    leaves = [(np.shape(x), jnp.result_type(x), getattr(x, "sharding", None)) for x in jax.tree.leaves(state)]
    modes = tuple(getattr(jax.config, name) for name in ("jax_enable_x64", "jax_debug_nans"))
    wanted = jax.tree.structure(state), leaves, num_updates, slice_size, modes
    found, program = _kept.get(ppo.step, (None, None))
    changed = program and changed_names(program.identity, identify_ppo(ppo, getattr(state, "runs", state).hyperparams))
    if program is None or found != wanted or changed:
        _kept.clear()
        if changed:
            jax.clear_caches()  # functions under `jax.jit` that it calls would stay as they were traced
        program = compile_training(ppo, state, num_updates, slice_size=slice_size)
        _kept[ppo.step] = wanted, program
    return program


def check_training(ppo: Any, state: Any) -> None:
    """Refuses what is not a PPO and a state; tracing a step refuses the state of another PPO."""
    check_type("ppo", ppo, PPO, "give the PPO first, then its state")
    if not isinstance(state, Population):
        check_is_state(state)
        if not ppo.many:
            check_one_run(state)
    if np.ndim(state.num_updates) > 1:
        raise ValueError("a state of a batch of batches cannot be trained; give runs one leading axis")


@jax.jit
def copy_state(state: Any) -> Any:
    """A copy of a state, in memory of its own."""
    return jax.tree.map(jnp.copy, state)


def first_state(ppo: PPO, *args: Any, **kwargs: Any) -> Any:
    """The state that `ppo.init` returns for these arguments; compiles in a quarter less time than `jax.jit`."""
    check_type("ppo", ppo, PPO, "first_state(ppo, key, ...)")
    return jax.jit(ppo.init, compiler_options=SELDOM)(*args, **kwargs)


def best_slice_size(num_runs: int, num_cores: int, config: Config) -> int:
    """Runs per slice on a CPU: few enough for a core's cache, and if possible a slice for every core."""
    most = max(1, TRANSITIONS_PER_SLICE // config.steps_per_update)
    rounds = -(-num_runs // (most * num_cores))
    return -(-num_runs // (rounds * num_cores))


def _check_shards(ppo: PPO, state, slice_size):
    devices = _devices(state)
    if devices != set(ppo.mesh.devices.flat):
        raise ValueError(
            f"the state must lie on the {ppo.mesh.size} devices that share the run, not on {len(devices)} "
            "(start with the init of the sharded PPO)"
        )
    if slice_size not in (None, state.num_updates.size):
        raise ValueError(f"slice_size={slice_size} is not possible: all runs on {ppo.mesh.size} devices train together")


def _take(state, first, size: int):
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, size), state)


def _put(state, part, first):
    return jax.tree.map(lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, first, 0), state, part)


def _placed_as(state, shapes):
    """Shapes with the device of a state."""
    device = state.num_updates.sharding if isinstance(state.num_updates, jax.Array) else None
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes)


def _devices(state: Any) -> set:
    """The devices that hold a state, or for which its shapes are meant."""
    sharding = getattr(state.num_updates, "sharding", None)
    return sharding.device_set if sharding else {jax.devices()[0]}
