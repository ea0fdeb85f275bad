"""The slices that each of several calls trains that share the folder of a sweep: one writer per slice."""

import contextlib
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from purejaxppo.experiment.files import is_full, remove_halves
from purejaxppo.experiment.lock import (
    Holder,
    Lock,
    LockHeld,
    await_signs,
    claim,
    claim_folder,
    is_stale,
    read_holder,
    read_note,
)
from purejaxppo.experiment.sweeps.slices import Foreign, Slice, Slices
from purejaxppo.text import count

WAIT = 600.0  # seconds for others to read or write what all share; they take a moment


class Claims:
    """The slices that one call of `run_sweep` trains; without a folder all of them.

    Every slice has a lock beside its file, with the names of its runs as a note: a call may have divided the runs into
    slices of another size.
    """

    def __init__(self, slices: Slices):
        self.slices = slices
        self.left: dict[str, Holder | None] = {}
        """Slices that this call left out, and who trains their runs; None if they are stored in slices of another
        size."""
        self._known: set[str] = set()
        self._others: dict[str, tuple[str, ...]] = {}
        self._locks: dict[str, Lock] = {}

    def expect(self, slices: Iterable[Slice]):
        """Names slices that are stored, or that this call may train: all others divide the runs in another way."""
        self._known |= {slice_.name for slice_ in slices}

    @contextlib.contextmanager
    def claim(self, wave: Sequence[Slice]) -> Iterator[list[Slice]]:
        """Claims slices for the time of a `with` statement; yields those that no other call has, as stored now."""
        folder = self.slices.folder
        if folder is None:
            yield list(wave)
            return
        with contextlib.ExitStack() as locks:
            with turn(folder):
                taken = self._runs_of_others(folder / "slices")
                claimed = [self._claim(slice_, folder / "slices", taken, locks) for slice_ in wave]
            yield [slice_ for slice_ in claimed if slice_]

    def await_writers(self, interrupt: threading.Event):
        """Waits until it is certain whether those who train slices that were left are at work, or have been killed."""
        if self.slices.folder and self.left:
            await_signs([self.slices.folder / "slices" / f"{name}.lock" for name in self.left], interrupt)

    def check(self, slice_: Slice):
        """Call it before a slice is stored. Raises LockLost if another call trains it by now."""
        if slice_.name in self._locks:
            self._locks[slice_.name].check()

    def describe_left(self) -> str:
        """A sentence on the slices that were left out, and to whom."""
        holders = sorted((holder for holder in self.left.values() if holder), key=lambda holder: holder.since)
        first = {holder.process: holder for holder in reversed(holders)}  # a process takes its slices one after another
        numbers = Counter(holder.process for holder in holders)
        parts = [f"{count(number, 'slice')} to {first[process]}" for process, number in numbers.items()]
        if None in self.left.values():
            number = list(self.left.values()).count(None)
            parts.append(f"{count(number, 'slice')} whose runs lie in slices of another size")
        return f"folder={self.slices.folder} is shared with other calls: this one left {' and '.join(parts)}"

    def _claim(
        self, slice_: Slice, folder: Path, taken: dict[str, Holder | None], locks: contextlib.ExitStack
    ) -> Slice | None:
        """The slice as it is stored now, with its lock held; None if another call has it."""
        name = slice_.name
        try:
            for run in set(slice_.runs) & taken.keys():
                self.left[name] = taken[run]
                return None
            self._locks[name] = locks.enter_context(claim(folder / f"{name}.lock", note="\n".join(slice_.runs)))
        except LockHeld as error:
            self.left[name] = error.holder
            return None
        except OSError as error:
            if not is_full(error):
                raise
        self.left.pop(name, None)
        remove_halves(folder, f"{name}.npz.*")
        if slice_.num_updates or (folder / f"{name}.npz").exists():
            try:
                return self.slices.load(name)
            except Foreign as error:
                raise ValueError(f"{error}, and would be replaced (move it to another folder)") from None
            except ValueError:
                if slice_.num_updates:
                    raise
        return slice_  # new, or stored in a damaged file, of which there was a warning

    def _runs_of_others(self, folder: Path) -> dict[str, Holder | None]:
        """The runs in slices that divide the runs in another way, and who trains them."""
        unknown = {path.stem for path in folder.glob("*.npz")} - self._known - self._others.keys()
        if unknown:
            self._others |= dict.fromkeys(unknown, ()) | {x.name: x.runs for x in self.slices.read()}
        runs: dict[str, Holder | None] = {
            run: None for name in self._others.keys() - self._known for run in self._others[name]
        }
        for path in folder.glob("*.lock"):
            if path.stem not in self._known:
                runs |= dict.fromkeys(read_note(path).splitlines(), read_holder(path))
        return runs


def check_idle(folder: Path):
    """Raises ValueError if a call trains slices of a folder, whose lock the caller holds, so that no other begins."""
    for path in sorted((folder / "slices").glob("*.lock")):
        holder = read_holder(path)
        if holder and not is_stale(path, holder):
            raise ValueError(
                f"folder={folder} is being written by {holder}, which trains a sweep there (wait for its end, or name "
                "another folder)"
            )


@contextlib.contextmanager
def turn(folder: str | Path | None, new: bool = False) -> Iterator[None]:
    """Holds the lock of a folder for a moment, to read or write what all calls share; nothing without a folder.

    A disk without room for a lock has none for results, so what was trained is kept in memory without one.

    Args:
        folder: of the sweep.
        new: whether nothing is trained yet, so that a folder that cannot be written is refused.
    """
    with contextlib.ExitStack() as lock:
        if folder is not None:
            try:
                lock.enter_context(claim_folder(folder, wait=WAIT))
            except LockHeld:
                raise
            except ValueError:
                if new:
                    raise
        yield
