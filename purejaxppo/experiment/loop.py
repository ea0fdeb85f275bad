"""What the loops of the host share: chunks of compiled updates, a progress bar, interrupts, saving at intervals."""

import contextlib
import signal
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from purejaxppo.experiment.distributed import is_first
from purejaxppo.experiment.evaluations import EVALUATION_RETURN, Evaluations, ends_of_chunks
from purejaxppo.experiment.program import Program
from purejaxppo.text import quote


class Interrupted(KeyboardInterrupt):
    """Raised after Ctrl-C or SIGTERM by `fit`, `run_sweep` and the searches.

    They finish the current chunk and keep everything first. So a loop over them ends too, and nothing is lost.
    """

    def __init__(self, sentence: str, result: Any):
        super().__init__(sentence)
        self.result = result
        """What the call would have returned, up to the interrupt."""


def end(result: Any, interrupted: bool, on_interrupt: str, what: str) -> Any:
    """Returns the result of a loop, or raises `Interrupted` with it.

    Args:
        result: of the loop.
        interrupted: whether a signal came.
        on_interrupt: "raise" or "return".
        what: the call and what it did, for the error.
    """
    if interrupted and on_interrupt == "raise":
        raise Interrupted(f"{what} (the error's .result holds everything up to here)", result)
    return result


def check_on_interrupt(on_interrupt: str):
    """Raises ValueError unless it is "raise" or "return"."""
    if on_interrupt not in ("raise", "return"):
        raise ValueError(f"on_interrupt={quote(on_interrupt)} must be 'raise' or 'return'")


def chunks(
    program: Program,
    state: Any,
    done: int,
    last: int,
    interrupt: threading.Event,
    *,
    evaluations: Evaluations | None = None,
    donate: bool = False,
) -> Iterator[tuple[Any, dict[str, np.ndarray]]]:
    """States and metrics [(R,) updates of the chunk, ...] after every chunk.

    A device starts the next chunk, from a copy of the state, before the metrics of the last are read. So two states
    take memory at a time, or three if the caller keeps one.

    Args:
        program: trains a chunk.
        state: the state to start from.
        done: the updates that it has done.
        last: the updates to end at.
        interrupt: once it is set, no further chunk is started ahead.
        evaluations: a chunk also ends where one is due, and has its returns as one more metric.
        donate: whether the memory of `state` may be reused; if not, it stays usable.
    """
    ends = ends_of_chunks(done, last, program.num_updates, evaluations)
    lengths = [end - begin for begin, end in zip([done, *ends], ends)]
    ahead, started = program.num_slices == 1, None  # several slices use all cores of a CPU
    for done, length, following in zip_longest(ends, lengths, lengths[1:]):
        state, rows = started or program.start(state, length, donate=donate)
        started = program.start(state, following) if following and ahead and not interrupt.is_set() else None
        metrics = program.read(rows, length)
        if evaluations:
            metrics[EVALUATION_RETURN] = evaluations.measure(state, metrics, evaluations.is_due(done))
        yield state, metrics
        donate = True


def step_bar(*, total: int | None = None, initial: int = 0, description: str = "", progress: bool = True) -> tqdm:
    """A progress bar that counts environment steps; silent without a terminal, and in all processes but the first.

    Args:
        total: steps in the end.
        initial: steps at the start.
        description: text before the bar.
        progress: whether to show it.
    """
    return tqdm(
        total=total, initial=initial, desc=description or None, unit=" steps", unit_scale=True, mininterval=0.2,
        disable=None if progress and is_first() else True,
    )  # fmt: skip


def newest(values: np.ndarray, before: Any) -> np.ndarray:
    """The last value of each run [(R,) U] that is a number, or else the one `before`."""
    for column in np.moveaxis(values, -1, 0):
        before = np.where(np.isnan(column), before, column)
    return before


def show_newest(latest: Mapping[str, Any]) -> str:
    """The newest numbers of runs as text for a progress bar: their means, and the return of the best of several."""
    known = {name: x for name, x in latest.items() if not np.isnan(x).all()}
    returns = known.get("episode_return", np.nan)
    best = [f"best {np.nanmax(returns):.4g}"] if np.size(returns) > 1 else []
    return "  ".join([f"{name.removeprefix('episode_')} {np.nanmean(x):.4g}" for name, x in known.items()] + best)


def warn(sentence: str):
    """Warns each time: `warnings.warn` is silent if the same line said the same before, as in a loop over runs."""
    warnings.warn_explicit(sentence, UserWarning, "purejaxppo", 1)


class Timer:
    """Says when to save: every `seconds`."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.restart()

    def restart(self):
        """Starts a new interval."""
        self._started = time.monotonic()

    def is_due(self) -> bool:
        """Whether the interval is over."""
        return time.monotonic() - self._started >= self.seconds


@contextlib.contextmanager
def noted_interrupt() -> Iterator[threading.Event]:
    """Sets an event on the first Ctrl-C or SIGTERM, so that the current chunk can finish.

    A second signal acts as usual. Outside the main thread, where Python delivers no signals, the event is never set.
    """
    interrupt = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    before = {number: signal.getsignal(number) or signal.SIG_DFL for number in (signal.SIGINT, signal.SIGTERM)}

    def note(*_):
        interrupt.set()
        restore()

    def restore():
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in before:
        signal.signal(number, note)
    try:
        yield interrupt
    finally:
        restore()
