"""The host loop over compiled chunks of a run: constant memory, progress, compile time told apart from run time."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import xarray
from tqdm.auto import tqdm

from purejaxppo.experiment.metrics import label
from purejaxppo.experiment.program import Program, compile
from purejaxppo.ppo import PPO, TrainState


@dataclass(frozen=True)
class Fit:
    """What a host loop has done: the state it came to and what it saw on the way."""

    ppo: PPO
    state: TrainState
    metrics: xarray.Dataset
    """Dimensions (`run`,) `update`, with environment steps of one run as the coordinate `step`."""
    compile_seconds: float
    run_seconds: float

    @property
    def steps_per_second(self) -> float:
        """Environment steps of all runs per second of run time."""
        num_runs = self.metrics.sizes.get("run", 1)
        return num_runs * self.metrics.sizes["update"] * self.ppo.config.steps_per_update / max(self.run_seconds, 1e-9)


def fit(
    ppo: PPO,
    state: TrainState,
    *,
    num_updates: int | None = None,
    updates_per_chunk: int | None = None,
    slice_size: int | None = None,
    progress: bool = True,
) -> Fit:
    """Trains from `state`, of one run or of a batch, to the end of the run or for `num_updates` updates.

    The numbers are those of `ppo.train`, in chunks of `updates_per_chunk` (a hundredth of the whole by default), and
    `state` stays usable. A batch of runs goes through in slices of `slice_size` (see `compile`). An interrupt (Ctrl-C)
    ends the loop after the chunk in flight; what was done is returned.
    """
    if num_updates is None:
        num_updates = ppo.config.num_updates - int(np.max(state.num_updates))
        if num_updates < 1:
            raise ValueError(
                f"this run is complete: its state has done all num_updates={ppo.config.num_updates} of its config"
            )
    if num_updates < 1:
        raise ValueError(f"num_updates={num_updates} must be at least 1")
    chunk = min(updates_per_chunk or -(-num_updates // 100), num_updates)
    if chunk < 1:
        raise ValueError(f"updates_per_chunk={updates_per_chunk} must be at least 1")
    num_runs = int(np.prod(state.num_updates.shape))
    done = int(np.max(state.num_updates))
    steps_per_update = num_runs * ppo.config.steps_per_update

    with tqdm(
        total=num_updates * steps_per_update, unit=" steps", unit_scale=True, desc="compiling",
        disable=None if progress else True, mininterval=0.2,
    ) as bar:  # fmt: skip
        program = compile(ppo, state, chunk, slice_size=slice_size)
        bar.set_description(f"compiled in {program.compile_seconds:.1f} s, training")
        bar.unpause()
        collected, last_return = [], np.full(num_runs, np.nan)
        start = time.perf_counter()
        with noted_interrupt() as interrupt:
            for state, metrics in chunks(program, state, num_updates):
                collected.append(metrics)
                last_return = _latest(metrics["episode_return"].reshape(num_runs, -1), last_return)
                if not np.isnan(last_return).all():
                    bar.set_postfix_str(f"return {np.nanmean(last_return):.1f}", refresh=False)
                bar.update(metrics["learning_rate"].shape[-1] * steps_per_update)
                if interrupt.is_set():
                    bar.write("interrupted: the result holds what was done until here")
                    break
        run_seconds = time.perf_counter() - start
    metrics = {name: np.concatenate([m[name] for m in collected], axis=-1) for name in collected[0]}
    return Fit(ppo, state, label(metrics, ppo.config, done), program.compile_seconds, run_seconds)


def chunks(program: Program, state: TrainState, num_updates: int) -> Iterator:
    """States and metrics (as numpy, [..., updates of the chunk]) after every chunk, the last one perhaps shorter."""
    donate = False  # the first state is the caller's
    while num_updates:
        length = min(program.num_updates, num_updates)
        state, metrics = program(state, length, donate=donate)
        yield state, metrics
        num_updates, donate = num_updates - length, True


@contextlib.contextmanager
def noted_interrupt():
    """An event that Ctrl-C sets, instead of raising in the middle of a chunk; the second Ctrl-C raises as ever."""
    interrupt = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    before = signal.getsignal(signal.SIGINT)
    before = signal.default_int_handler if before is None else before

    def note(*_):
        interrupt.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)


def _latest(returns, before):
    """The last return of each run [R, updates] in which an episode ended, or the one from before."""
    for column in returns.T:
        before = np.where(np.isnan(column), before, column)
    return before
