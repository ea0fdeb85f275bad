"""Processes that know each other, by `jax.distributed`: they begin together, agree, and end if one of them is lost."""

import contextlib
import hashlib
import importlib.util
import itertools
import os
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax._src import distributed  # its client has no public name; Orbax takes it from here too
from jax.experimental import multihost_utils

from purejaxppo.experiment.lock import Lock, claim_folder
from purejaxppo.text import quote

HEARTBEAT = 10  # seconds without a sign after which JAX takes a process for dead and ends the others
PATIENCE = 300  # seconds to wait for the others at the start
SILENT = 5  # seconds of these without a word
LONGEST = 7 * 24 * 3600  # seconds that a process waits at the end for others, which JAX ends if one of them dies

SHOWN_AFTER = 60  # seconds in which a disk over a network shows what another machine has written
FOLDER = "purejaxppo"  # of our keys in the store of the first process
EXAMPLE = "0/2 10.0.0.1:1234 is the first of two processes, at whose address they meet"

# The cluster -> the variables that tell the index of a process, their number, and its place on its machine.
VARIABLES = {
    "ompi": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),  # set by SLURM too where it started mpirun
    "k8s": ("JOB_COMPLETION_INDEX", "", ""),
}
# What JAX needs to find the address of the first process -> the remedy without.
NEEDED = {
    "ompi": ("OMPI_MCA_orte_hnp_uri", "from version 5 on, Open MPI tells no address: give it, HOST:PORT"),
    "slurm": ("SLURM_STEP_NODELIST", "start the command with srun, or give the address, HOST:PORT"),
    "k8s": ("KUBERNETES_SERVICE_HOST", f"run it as an indexed job of Kubernetes, or give all: {EXAMPLE}"),
}


class Processes(NamedTuple):
    """Where this process stands among those that train together."""

    index: int
    """From 0; the first one writes what all share, and shows progress."""
    number: int | None = None
    """None if JAX finds it out."""
    address: str | None = None
    """HOST:PORT of the first process; None if JAX finds it out."""
    device: int | None = None
    """The GPU that the process uses, by its number on the machine; None for all of the machine."""
    cluster: str | None = None
    """The cluster that tells the rest."""


def read_processes(words: Sequence[str], environment: Mapping[str, str] = os.environ) -> Processes:
    """Reads "I/N" and "HOST:PORT"; what is not given comes from the variables of SLURM, Open MPI or Kubernetes.

    Args:
        words: what the user gave, in any order.
        environment: variables by their names.

    Raises:
        ValueError: for anything else, or if variables are missing.
    """
    places, addresses = [x for x in words if "/" in x], [x for x in words if "/" not in x]
    index, number = _read_place(*places, words=words) if places else (None, None)
    address = _read_address(*addresses, words=words) if addresses else None
    if index is not None and address is not None:
        return Processes(index, number, address)
    cluster = next((name for name, variables in VARIABLES.items() if variables[0] in environment), None)
    if cluster is None:
        raise ValueError(
            f"distributed{'=' + ' '.join(words) if words else ''} finds no variables of SLURM, Open MPI or Kubernetes "
            f"(give all: {EXAMPLE})"
        )
    told = [int(value) if (value := environment.get(name, "")).isdecimal() else None for name in VARIABLES[cluster]]
    index, number = (told[0], told[1]) if index is None else (index, number)
    needed, remedy = NEEDED[cluster]
    if index is None or (address is None or number is None) and needed not in environment:
        missing = VARIABLES[cluster][0] if index is None else needed
        raise ValueError(f"distributed needs the variable {missing}, which is not set here ({remedy})")
    device = None if environment.get("JAX_LOCAL_DEVICE_IDS") else told[2]
    return Processes(index, number, address, device, cluster if address is None or number is None else None)


def _read_place(*places: str, words: Sequence[str]) -> tuple[int, int]:
    with contextlib.suppress(ValueError):
        (place,) = places
        index, number = map(int, place.split("/"))
        if 0 <= index < number:
            return index, number
    raise ValueError(f"distributed={' '.join(words)} must say the index of this process and their number: {EXAMPLE}")


def _read_address(*addresses: str, words: Sequence[str]) -> str:
    with contextlib.suppress(ValueError):
        (address,) = addresses
        host, _, port = address.rpartition(":")
        if host and 0 < int(port) < 2**16:
            return address
    raise ValueError(f"distributed={' '.join(words)} must say the host and the port of the first process: {EXAMPLE}")


def join_processes(place: str | None = None, address: str | None = None):
    """Begins `jax.distributed`: `jax.devices()` are then those of all processes, and `run_sweep` and `fit` use them.

    Call it first, before JAX computes anything, in every process. If one of them dies, JAX ends the others after about
    ten seconds. Raises ValueError if the processes do not find each other. A process whose wait for the others was
    interrupted cannot join any more: start it again.

    Args:
        place: the index of this process, from 0, and the number of all, as "0/2". By default the variables of SLURM,
            Open MPI or Kubernetes tell.
        address: host and port of the first process, as "10.0.0.1:1234"; by default the cluster tells.
    """
    for name, value in (("place", place), ("address", address)):
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{name}={quote(value)} must be text ({EXAMPLE})")
    begin(read_processes([word for word in (place, address) if word is not None]))


def begin(processes: Processes):
    """As `join_processes`, from what `read_processes` returned."""
    if processes.cluster == "k8s" and importlib.util.find_spec("kubernetes") is None:
        raise ValueError("distributed needs the package kubernetes here (pip install kubernetes)")
    initialize = partial(
        jax.distributed.initialize,
        processes.address, processes.number, processes.index, processes.device,
        # JAX has no name for Kubernetes, which it finds by itself.
        cluster_detection_method=(processes.cluster or "deactivate").replace("k8s", "") or None,
        initialization_timeout=PATIENCE, heartbeat_timeout_seconds=HEARTBEAT, shutdown_timeout_seconds=LONGEST,
    )  # fmt: skip
    where = f"at {processes.address} " if processes.address else ""
    try:
        _await_others(initialize, f"waiting {where}for the other processes, for up to {PATIENCE} seconds")
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"the processes did not find each other {where}({reason})") from None


def _await_others(initialize: Callable[[], None], sentence: str):
    """Calls a function that waits in C++, in a thread so that a signal ends the wait; prints why if it takes long."""
    errors = []

    def call():
        try:
            initialize()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    try:
        thread.join(SILENT)
        if thread.is_alive():
            print(sentence, file=sys.stderr, flush=True)
        thread.join()
    except KeyboardInterrupt:
        distributed.global_state.num_processes = 1  # there is nobody to agree with
        raise
    if errors:
        raise errors[0]


def is_first() -> bool:
    """Whether this process writes what all share, and speaks for all; true if it is alone."""
    return distributed.global_state.process_id == 0


def process_count() -> int:
    """How many processes have joined; 1 without `jax.distributed`."""
    return distributed.global_state.num_processes


def spans_processes(tree: Any) -> bool:
    """Whether arrays of a pytree lie on devices of several processes."""
    return any(isinstance(x, jax.Array) and not x.is_fully_addressable for x in jax.tree.leaves(tree))


def to_host(tree: Any) -> Any:
    """A pytree with its arrays whole in the memory of every process; all must call it if it spans processes."""

    def whole(x):
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return x
        if jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(whole(jax.random.key_data(x)))
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(whole, tree)


_rounds = itertools.count()
_times_said: Counter[str] = Counter()


class Team(NamedTuple):
    """The processes that do something together. All must call its methods, equally often and in the same order.

    They need no device, so what devices compute meanwhile does not hold them up.
    """

    everyone: bool = True
    """Whether it has all processes; else each one is a team by itself."""

    @property
    def is_first(self) -> bool:
        """Whether this process writes for the team."""
        return not self.everyone or is_first()

    def gather(self, word: str = "") -> list[str]:
        """What every process says, in their order; waits for the last of them."""
        if not self.everyone or process_count() == 1:
            return [word]
        number = next(_rounds)
        said = _meet(f"{number:012d}", word)
        if number:
            _store().key_value_delete(_key(f"{number - 1:012d}"))  # which all have read, since all are here
        return said

    def any(self, flag: bool) -> bool:
        """Whether the flag of any process is set."""
        return "True" in self.gather(str(flag))

    def broadcast(self, word: str) -> str:
        """What the first process says."""
        return self.gather(word)[0]

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A block of a `with` statement that ends in all processes, or in none: an error in one is raised in all."""
        try:
            yield
        except Exception as error:
            number = error.errno or "" if isinstance(error, OSError) else type(error).__name__
            self.gather(f"{number} {error}")
            raise
        said = next(filter(None, self.gather()), "")
        if said:
            kind, _, sentence = said.partition(" ")
            raise OSError(int(kind), sentence) if kind.isdecimal() else ValueError(sentence)

    def check_seen(self, folder: Path):
        """Raises ValueError unless all see what the first process writes into a folder, which exists there."""
        if not self.everyone or process_count() == 1:
            return
        probe = folder / f"seen.{uuid.uuid4().hex}.half"
        if self.is_first:
            probe.touch()
        probe = folder / self.broadcast(probe.name)
        deadline = time.monotonic() + SHOWN_AFTER
        while not (seen := probe.exists()) and time.monotonic() < deadline:
            time.sleep(0.1)
        blind = [index for index, said in enumerate(self.gather(str(seen))) if said == "False"]
        if self.is_first:
            probe.unlink(missing_ok=True)
        if blind:
            raise ValueError(
                f"folder={folder} is another one in process {blind[0]} than in process 0 (name one on a disk that all "
                "of them see)"
            )

    @contextlib.contextmanager
    def claim_folder(self, folder: str | Path | Lock, *, new: bool = False, note: str = "") -> Iterator[Lock | None]:
        """As the function of this name, by the first process for all; yields the lock there, and None elsewhere."""
        with contextlib.ExitStack() as held:
            with self.together():
                lock = held.enter_context(claim_folder(folder, new=new, note=note)) if self.is_first else None
            yield lock


ALL, ALONE = Team(), Team(everyone=False)


def _meet(place: str, word: str, seconds: float = LONGEST) -> list[str]:
    """What every process says at a place where they meet once. Raises TimeoutError if not all come."""
    wait, deadline = 0.001, time.monotonic() + seconds
    _store().key_value_set(_key(place), word)
    while len(found := _store().key_value_dir_get(f"{FOLDER}/{place}/")) < process_count():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{len(found)} of {process_count()} processes came to {place}")
        time.sleep(wait)  # in Python, so that a signal ends it
        wait = min(2 * wait, 0.2)
    return [said for _, said in sorted(found)]


def _store() -> Any:
    """The store of words that the first process keeps for all."""
    return distributed.global_state.client


def _key(place: str) -> str:
    """The key of what this process says at a place."""
    return f"{FOLDER}/{place}/{distributed.global_state.process_id:06d}"


def is_news(sentence: str) -> bool:
    """Whether no other process has said a sentence; true if this one is alone, or the first one does not answer."""
    if process_count() == 1:
        return True
    _times_said[sentence] += 1
    digest = hashlib.sha256(sentence.encode()).hexdigest()
    try:
        key = f"{FOLDER}/said/{digest}/{_times_said[sentence]}"
        return _store().key_value_increment(key, 1) == 1
    except Exception:  # whatever the client raises
        return True


def leave(status: int) -> bool:
    """Ends `jax.distributed` with the others; says whether all came.

    After success it waits for those that still work; after a failure for a moment, in which others fail alike.
    """
    try:
        _meet("end", "", HEARTBEAT if status else LONGEST)
        jax.distributed.shutdown()
    except Exception:  # whatever the client raises
        return False
    return True
