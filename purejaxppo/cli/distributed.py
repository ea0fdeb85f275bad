"""`--distributed`: a process that trains, and its parent, which says what happened where JAX can only abort."""

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Annotated, Any

import jax
import tyro

from purejaxppo.experiment.distributed import HEARTBEAT, PATIENCE, begin, is_first, leave, process_count, read_processes

Distributed = Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="[I/N] [HOST:PORT]")]
FLAG, CHILD = "--distributed", "PUREJAXPPO_CHILD"
LOST = 5  # the exit status if a process was lost
SIGNALS = signal.SIGINT, signal.SIGTERM
ENTRY = re.compile(r"[IWEF]\d{4} ")  # of a log in C++; the lines until the next one belong to it
# Entries on a process that was lost, which JAX makes before it aborts; and lines that Gloo prints at any time.
NOISE, GLOO = re.compile(r"coordination|distributed service|preemption_sync", re.IGNORECASE), "peer ranks"
ABORTED = "the JAX distributed service detected fatal errors"
UNHEALTHY = re.compile(r"stopped sending heartbeats\):\s*(\d+)|Task (\d+) heartbeat timeout")


def words_of(arguments: Sequence[str]) -> list[str] | None:
    """The words that follow `--distributed`; None without the flag, or if the command only shows its help."""
    place = next((i for i, word in enumerate(arguments) if word.partition("=")[0] == FLAG), None)
    if place is None or {"--help", "-h"} & set(arguments):
        return None
    words = [word for word in [arguments[place].partition("=")[2]] if word]
    for word in arguments[place + 1 :]:
        if word.startswith("-"):
            break
        words.append(word)
    return words


def join_others(arguments: Sequence[str]):
    """Begins `jax.distributed` if the command is distributed; then only the first process prints."""
    words = words_of(arguments)
    if words is None:
        return
    begin(read_processes(words))
    if not is_first():
        sys.stdout = open(os.devnull, "w")


def check_folder(options: Any):
    """Refuses a command of several processes without a folder that all of them see."""
    if options.distributed is not None and options.out is None:
        raise ValueError(
            f"distributed{'=' * bool(options.distributed)}{' '.join(options.distributed)} needs --out FOLDER, one that "
            "all processes see"
        )


@contextlib.contextmanager
def first_speaks() -> Iterator[None]:
    """Keeps all processes but the first from writing what all would write to standard error."""
    with contextlib.nullcontext() if is_first() else contextlib.redirect_stderr(io.StringIO()):
        yield


def run(command: Callable[[], int], arguments: Sequence[str]) -> int:
    """Runs a command in a child process, and returns the exit status; in the child, runs the command itself."""
    if words_of(arguments) is None:
        return command()
    terminal = os.environ.pop(CHILD, None)
    return _supervise(arguments) if terminal is None else _train(command, int(terminal))


def _supervise(arguments: Sequence[str]) -> int:
    """Starts the child, passes signals on to it, and says in one sentence which process was lost.

    Python writes to the standard output and error of the child as to those of this process. What C++ writes there
    comes through a pipe, so that the sentence can replace what JAX logs before it aborts.
    """
    terminal = os.dup(2)
    child = subprocess.Popen(
        [sys.executable, "-m", "purejaxppo", *arguments],
        env=os.environ | {CHILD: str(terminal)},
        pass_fds=[terminal],
        stdin=subprocess.PIPE,  # its end tells the child of the end of this process
        stderr=subprocess.PIPE,
        process_group=0,  # so that Ctrl-C reaches the child only once
    )
    for number in SIGNALS:
        signal.signal(number, lambda number, _: child.send_signal(number))
    held: list[str] = []
    reader = threading.Thread(target=_pass_on, args=(child.stderr, held), daemon=True)
    reader.start()
    status = child.wait()
    reader.join(timeout=5)
    if status >= 0:
        return status
    if -status in SIGNALS:  # before the child noted signals
        return 128 + signal.SIGINT
    log = "".join(held)
    if ABORTED not in log:
        sys.stderr.write(log)
    print("purejaxppo:", _describe_end(status, log, arguments), file=sys.stderr, flush=True)
    return LOST


def _pass_on(log: IO[bytes], held: list[str]):
    """Writes the lines of a log to standard error, but those on a process that was lost, which are held."""
    noisy = False
    for line in log:
        text = line.decode(errors="replace")
        noisy = bool(NOISE.search(text)) if ENTRY.match(text) else noisy
        if noisy or GLOO in text:
            held.append(text)
        else:
            os.write(2, line)


def _describe_end(status: int, log: str, arguments: Sequence[str]) -> str:
    """One sentence on why a child was ended by a signal, from what JAX logged, and what to do."""
    this, number = "this process", ""
    with contextlib.suppress(ValueError):
        place = read_processes(words_of(arguments) or [])
        this, number = f"process {place.index}", "" if place.number is None else f" of {place.number}"
    if "RegisterTask" in log:
        return (
            f"{this}{number} did not meet the others within {PATIENCE} seconds (start the same command in all of them, "
            "with the same address, which they can reach)"
        )
    unhealthy = UNHEALTHY.search(log)
    if unhealthy or ABORTED in log:
        lost = next(filter(None, unhealthy.groups()), "0") if unhealthy else "0"
        what = f"process {lost}{number} was lost (killed, preempted or cut off), which ended {this}"
    else:
        what = f"{this}{number} was ended by {signal.Signals(-status).name}"
        what += ", perhaps for lack of memory" if status == -signal.SIGKILL else ""
    folder = _folder_of(arguments)
    return f"{what}; what {folder} holds stays, and the same command in every process resumes from it"


def _folder_of(arguments: Sequence[str]) -> str:
    """The folder of the results that a command names."""
    for word, following in zip(arguments, [*arguments[1:], ""]):
        if word.partition("=")[0] == "--out":
            return word.partition("=")[2] or following
    return arguments[1] if arguments[0] == "resume" else "its folder"


def _train(command: Callable[[], int], terminal: int) -> int:
    """Runs the command of a child, which ends with the others."""
    sys.stderr = os.fdopen(terminal, "w", buffering=1)
    sys.stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # C++ writes there too
    threading.Thread(target=_end_with_parent, daemon=True).start()
    status = 1
    try:
        status = command()
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    except jax.errors.JaxRuntimeError:
        # Perhaps another process was lost while this one waited for its numbers. JAX notices soon, and aborts.
        time.sleep(2 * HEARTBEAT if process_count() > 1 else 0)
        traceback.print_exc()
    except Exception:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    if process_count() > 1 and not leave(status):
        if status == 0:  # another process was lost at the end: JAX notices soon, and aborts
            time.sleep(2 * HEARTBEAT)
            os.abort()
        os._exit(status)  # a call that waits for the others would not return
    return status


def _end_with_parent():
    """Ends this process at once when its parent has ended, whatever ended it."""
    os.read(sys.stdin.fileno(), 1)  # returns at the end of the pipe; a buffered read would hold up the exit of Python
    os.kill(os.getpid(), signal.SIGKILL)
