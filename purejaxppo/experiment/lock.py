"""One writer per place: a lock file that names its holder, is renewed while it is held, and expires when it is not.

A lock is taken by creating its file exclusively, which holds on disks that are shared over a network too; `flock` does
not. Whether a lock is old is told by the clock of the disk alone, so that clocks of machines may differ.
"""

import atexit
import contextlib
import datetime
import functools
import json
import os
import socket
import stat
import tempfile
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from purejaxppo.experiment.files import make_writable, prepare

LOCK = "writer.lock"
RENEW_EVERY = 20.0  # seconds
STALE_AFTER = 120.0  # seconds without renewal; disks over a network may show files as they were a minute ago
LONGEST = 4096  # bytes that are read of a lock file to find its holder


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock, as the lock file says."""

    host: str
    pid: int
    process_start: int | None
    """Clock ticks from the start of the machine to that of the process; None where the system does not tell."""
    machine: str
    """Tells apart machines and containers that share a host name, as far as the system does."""
    since: str
    """The time at which the lock was taken."""
    token: str
    """Differs for every lock that was ever taken."""

    @property
    def process(self) -> str:
        """The process in words."""
        if (self.machine, self.pid) == (_machine(), os.getpid()):
            return "this process"
        return f"process {self.pid} on {self.host}" if self.pid else "an unknown process"

    def __str__(self) -> str:
        return f"{self.process} since {self.since}" if self.pid else self.process


class LockHeld(ValueError):
    """Another writer holds the lock; `holder` says which."""

    def __init__(self, holder: Holder, sentence: str = ""):
        super().__init__(sentence or f"held by {holder}")
        self.holder = holder


class LockLost(RuntimeError):
    """A lock was removed, or another process took it because it was not renewed for two minutes."""


class Lock:
    """A lock that this process holds until `release`; a thread renews it. Use it in a `with` statement."""

    def __init__(self, path: Path, holder: Holder):
        self.path, self.holder = path, holder
        self._released = threading.Event()
        threading.Thread(target=self._renew, name=f"renew {path}", daemon=True).start()
        atexit.register(self.release)

    @property
    def folder(self) -> Path:
        """The folder of the lock file."""
        return self.path.parent

    def check(self):
        """Call it before every write. Raises LockLost if the lock is lost, so that two processes never write.

        Raises OSError if the lock cannot be read.
        """
        found = read_holder(self.path)
        if found is None or found.token != self.holder.token:
            what = "was removed" if found is None else f"was not renewed for two minutes and is now held by {found}"
            raise LockLost(f"the lock {self.path} {what}")

    def release(self):
        """Removes the lock if this process holds it. Does nothing the second time."""
        if os.getpid() != self.holder.pid or self._released.is_set():  # a fork does not hold the locks of its parent
            return
        self._released.set()
        atexit.unregister(self.release)
        with contextlib.suppress(OSError, LockHeld):
            _remove(self.path, self.holder)

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_):
        self.release()

    def _renew(self):
        while not self._released.wait(RENEW_EVERY):
            with contextlib.suppress(OSError):  # the disk may answer the next time
                found = read_holder(self.path)
                if found is None or found.token != self.holder.token:
                    return
                os.utime(self.path)


@contextlib.contextmanager
def claim_folder(folder: str | Path | Lock, *, new: bool = False, wait: float = 0.0, note: str = "") -> Iterator[Lock]:
    """Makes a folder and holds its lock; a lock that the caller holds already is passed through, and stays held.

    Args:
        folder: to make, or a lock that `claim_folder` gave.
        new: whether the folder must not hold a run yet.
        wait: seconds to wait for another writer.
        note: what others may want to know of the lock, see `claim`.

    Raises:
        ValueError: if another writer has the folder (the message says who), if it cannot be written, or if it is to be
            new and holds a run, or is the current directory.
    """
    if isinstance(folder, Lock):
        yield folder
        return
    folder = Path(folder)
    make_writable(folder)
    try:
        lock = claim(folder / LOCK, wait=wait, note=note)
    except LockHeld as error:
        sentence = f"folder={folder} is being written by {error.holder} (wait for its end, or name another folder)"
        raise LockHeld(error.holder, sentence) from None
    except OSError as error:
        raise ValueError(f"folder={folder} cannot be written: {error.strerror} (name another folder)") from None
    with lock:
        if new:
            prepare(folder)
        yield lock


def claim(path: Path, *, wait: float = 0.0, note: str = "") -> Lock:
    """Takes a lock; that of a process that is gone, or that was not renewed for two minutes, is taken over.

    Raises LockHeld if another writer holds it, in this process or in any other, and OSError if it cannot be written.

    Args:
        path: of the lock file, in a folder that exists.
        wait: seconds to wait for another writer, unless its lock has a note.
        note: what others may want to know of a lock that is held for long, see `read_note`.
    """
    deadline = time.monotonic() + wait
    while True:
        try:
            return _claim(path, note)
        except LockHeld:
            if time.monotonic() >= deadline or read_note(path):
                raise
        time.sleep(0.05)


def read_holder(path: Path) -> Holder | None:
    """Who holds a lock, by its file; None if there is no such file. Raises OSError if it cannot be read."""
    with contextlib.suppress(FileNotFoundError):
        for wait in (0.1, 0):  # its creator may not have written it yet
            status = os.lstat(path)
            text = _read(path) if stat.S_ISREG(status.st_mode) else ""
            if holder := _parse(text):
                return holder
            time.sleep(wait)
        return Holder("", 0, None, "", "", f"{status.st_mtime_ns:x}")
    return None


def read_note(path: Path) -> str:
    """The note of a lock whose holder is not gone; empty if there is none. Raises OSError if it cannot be read."""
    holder = read_holder(path)
    if holder and not is_stale(path, holder):
        with contextlib.suppress(FileNotFoundError):  # released meanwhile
            return _read(path, longest=-1).partition("\n")[2]
    return ""


def is_stale(path: Path, holder: Holder) -> bool:
    """Whether the holder of a lock is gone: its process has ended, or has not renewed the lock for two minutes.

    A process can only be asked for on the machine, and in the container, that it runs on.
    """
    if holder.machine == _machine() and not _runs(holder):
        return True
    try:
        return _now_on_disk_of(path) - os.lstat(path).st_mtime > STALE_AFTER
    except FileNotFoundError:
        return True


def await_signs(paths: Iterable[Path], interrupt: threading.Event):
    """Waits until every lock is certain to have a writer at work, or none.

    A process on another machine is at work once it renews its lock, which it does three times a minute, and gone if it
    has not done so for two minutes.

    Args:
        paths: of lock files, which may have been removed.
        interrupt: ends the wait.
    """
    times = {path: _renewed(path) for path in paths}
    while not interrupt.is_set() and any(_is_uncertain(path, time) for path, time in times.items()):
        interrupt.wait(1.0)


def _is_uncertain(path: Path, before: float) -> bool:
    """Whether a lock of another machine was not renewed since a time, but may be yet."""
    holder = read_holder(path)
    known = holder is None or holder.machine == _machine() or is_stale(path, holder)
    return not known and _renewed(path) == before


def _renewed(path: Path) -> float:
    """The time of the disk at which a lock was renewed; 0 without a lock."""
    with contextlib.suppress(FileNotFoundError):
        return os.lstat(path).st_mtime
    return 0.0


def _claim(path: Path, note: str) -> Lock:
    while True:
        mine = _this_process()
        if _create(path, mine, note):
            return Lock(path, mine)
        holder = read_holder(path)
        if holder and not is_stale(path, holder):
            raise LockHeld(holder)
        if holder:
            _remove(path, holder)


def _create(path: Path, holder: Holder, note: str = "") -> bool:
    """Writes a lock file; False if there is one."""
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    try:
        with open(descriptor, "w") as file:
            file.write(f"{json.dumps(asdict(holder))}\n{note}")
    except OSError:  # a full disk
        path.unlink(missing_ok=True)
        raise
    return True


def _remove(path: Path, holder: Holder):
    """Removes the lock of a holder, unless another has it by now.

    A lock changes hands in the time between reading whose it is and removing it, if two processes do so at once. So
    whoever removes a lock first creates, exclusively, a file named after it. Raises LockHeld if another has done so.
    """
    gate = path.with_name(f"{path.name}.{holder.token}.half")
    if not _create(gate, _this_process()):
        other = read_holder(gate)
        if other and not is_stale(gate, other):
            raise LockHeld(other)
        if other:
            _remove(gate, other)
        return _remove(path, holder)
    try:
        found = read_holder(path)
        if found and found.token == holder.token:
            path.unlink(missing_ok=True)
    finally:
        gate.unlink(missing_ok=True)


def _read(path: Path, longest: int = LONGEST) -> str:
    with open(path, "rb") as file:
        return file.read(longest).decode(errors="replace")


def _parse(text: str) -> Holder | None:
    """The holder that a lock file describes; None if it is damaged."""
    try:
        holder = Holder(**json.loads(text.partition("\n")[0]))
    except (ValueError, TypeError):
        return None
    words = holder.host, holder.machine, holder.since, holder.token
    sound = all(isinstance(word, str) and word.isprintable() for word in words) and holder.token.isalnum()
    return holder if sound and isinstance(holder.pid, int) else None


def _this_process() -> Holder:
    """This process as the holder of a new lock."""
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    pid = os.getpid()
    return Holder(socket.gethostname(), pid, _start_of(pid), _machine(), now, uuid.uuid4().hex)


def _runs(holder: Holder) -> bool:
    """Whether the process of a holder on this machine still runs; True where the system does not tell."""
    if Path("/proc/self/stat").exists():
        start = _start_of(holder.pid)
        return start is not None and holder.process_start in (None, start)
    if os.name != "posix":  # there, signal 0 is not a question
        return True
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        pass
    return True


def _start_of(pid: int) -> int | None:
    """Clock ticks from the start of the machine to that of a process; None if it has ended, or without /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])  # killed, and its parent has not asked for it yet


@functools.cache
def _machine() -> str:
    """The start of this machine and the processes that this one sees, or the host name alone."""
    words = [socket.gethostname()]
    with contextlib.suppress(OSError):
        words += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(words)


def _now_on_disk_of(path: Path) -> float:
    """The time of a file that is written now."""
    with tempfile.TemporaryFile(dir=path.parent) as file:
        file.write(b"now")
        file.flush()
        return os.fstat(file.fileno()).st_mtime
