"""Slices of a sweep: runs that train together in one program and are stored together as soon as they are done.

sweep.json       the sweep, how it is divided, and versions, device, command and time of every session
slices/*.npz     numpy.load opens each: what its sweep is, the names of its runs, metrics [runs, updates], the state of
                 every run; the name of the file is a digest of its runs
results.nc       all metrics, labelled: xarray.load_dataset opens it
"""

import contextlib
import hashlib
import json
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import jax
import numpy as np

from purejaxppo.batched import causes
from purejaxppo.checks import check_whole
from purejaxppo.experiment.datasets import LARGE
from purejaxppo.experiment.files import (
    SWEEP,
    ArrayFile,
    Place,
    differing_fields,
    kind_of,
    prepare,
    refuse_foreign,
    refuse_other,
    refuse_study,
    save_arrays,
    save_json,
)
from purejaxppo.experiment.identity import check_identity
from purejaxppo.experiment.provenance import Machine, describe_machine
from purejaxppo.experiment.records import as_record, read_record
from purejaxppo.experiment.report.failures import name_causes
from purejaxppo.experiment.sweeps.sweep import Sweep, name_run
from purejaxppo.summary import FAILURE
from purejaxppo.text import shorten, show_setting

RESULTS = "results.nc"


@dataclass(frozen=True)
class StoredMetric:
    """A metric [runs, updates] in the file of a slice, which `numpy.asarray` opens and reads.

    Raises ValueError then if it is damaged. If the slice has been trained further, the later updates are left out.
    """

    path: Path
    name: str
    place: Place
    shape: tuple[int, ...]
    dtype: np.dtype

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        found = self.place.read(self.path)
        if found is None:  # written again, or damaged
            with ArrayFile(self.path) as arrays:
                found = np.asarray(arrays[f"metrics/{self.name}"])[:, : self.shape[1]]
        if found.shape != self.shape or found.dtype != self.dtype:
            raise ValueError(f"{self.path} has changed: {self.name} is another metric (read the sweep again)")
        return found.astype(dtype or self.dtype, copy=False)


@dataclass(frozen=True)
class Slice:
    """Some runs, their metrics so far and their states."""

    runs: tuple[str, ...]
    """Names of the runs (see `name_run`); the last may repeat, to fill the slice."""
    metrics: Mapping[str, np.ndarray] | Mapping[str, StoredMetric]
    """[runs, updates done]; `Slices.read` leaves them in their files."""
    state: dict[str, np.ndarray]
    """Leaves of the TrainState [runs, ...], by their paths; `Slices.read` leaves out most of them."""
    leaves: tuple[str, ...] = ()
    """The paths of all leaves in the file."""

    @property
    def num_updates(self) -> int:
        """Updates done, including those of runs that are frozen."""
        return next(iter(self.metrics.values())).shape[1] if self.metrics else 0

    def failures(self) -> dict[int, tuple[int, str]]:
        """The runs that turned nan: row -> the update in which it did, and what was not finite first."""
        done = self.state["num_updates"]
        rows = np.flatnonzero(done != self.num_updates).tolist()
        if not rows:
            return {}
        codes = np.asarray(self.metrics[FAILURE])[:, -1] if FAILURE in self.metrics else np.zeros_like(done)
        known = causes(self.metrics, self.leaves or self.state)
        return {row: (int(done[row]) + 1, str(name_causes(codes[row], known))) for row in rows}

    @property
    def name(self) -> str:
        """A digest of the names of the runs."""
        return hashlib.sha256("\n".join(self.runs).encode()).hexdigest()[:16]


class Foreign(ValueError):
    """A file in the folder of slices that is intact, but not the slice of its name in this sweep."""


class Slices:
    """The slices of a sweep: in its folder; in memory if it has none, or if its disk is full."""

    def __init__(self, sweep: Sweep, folder: Path | None = None):
        self.sweep, self.folder = sweep, folder
        self.ignored: list[str] = []
        """Sentences on the files that the last `read` ignored."""
        self.in_memory: dict[str, Slice] = {}
        self.error = ""
        """Why slices that have a folder are in memory."""
        self.session: SweepSession | None = None
        """The entry of this call in sweep.json."""
        self._runs = sweep.runs()

    def write(self, slice_: Slice):
        """Replaces the stored version of a slice, atomically on disk. Raises OSError if it cannot be written."""
        if self.folder is None:
            self.in_memory[slice_.name] = slice_
            return
        arrays = {f"metrics/{name}": x for name, x in slice_.metrics.items()}
        arrays |= {f"state/{name}": x for name, x in slice_.state.items()}
        described = {"sweep": np.array(json.dumps(self.sweep.shared())), "runs": np.array(slice_.runs)}
        save_arrays(self._path(slice_.name), described | arrays)
        self.in_memory.pop(slice_.name, None)

    def keep(self, slice_: Slice, error: OSError):
        """Keeps a slice in memory that could not be written, and warns of the error."""
        self.in_memory[slice_.name] = slice_
        self.error = error.strerror or str(error)
        warnings.warn(
            f"could not write a slice to {self.folder}; it is kept in memory, and the sweep continues ({self.error})"
        )

    def machine(self) -> Machine:
        """The machine of the last session, see `describe_machine`."""
        if self.folder is None:
            return describe_machine()
        return read_sessions(self.folder)[-1]

    def note_work(self, steps: int, run_seconds: float):
        """Adds what this session did to its entry in sweep.json, if it can; the caller holds the folder's lock.

        Args:
            steps: environment steps of all runs.
            run_seconds: the time that they took.
        """
        if self.folder is None or self.session is None:
            return
        with contextlib.suppress(OSError, ValueError):  # a full or damaged disk is no reason to fail at the end
            data = json.loads((self.folder / SWEEP).read_text())
            data["sessions"][data["sessions"].index(self.session)] |= {"steps": steps, "run_seconds": run_seconds}
            save_json(self.folder / SWEEP, data)

    def read(self, warn: bool = True, verify: bool = False) -> list[Slice]:
        """All slices, with metrics that are read when they are used; of the states only `num_updates`.

        Files that are damaged or are not slices of this sweep are `ignored`, and a warning names each. The numbers in
        large files are only verified when they are used, unless `verify` is set.
        """
        slices, self.ignored = list(self.in_memory.values()), []
        paths = sorted((self.folder / "slices").glob("*.npz")) if self.folder else []
        verify = verify or sum(path.stat().st_size for path in paths) <= LARGE
        for path in paths:
            if path.stem in self.in_memory:
                continue
            try:
                slices.append(self._read(path, ("num_updates",), verify))
            except ValueError as error:
                self.ignored.append(str(error))
                if warn:
                    then = "" if isinstance(error, Foreign) else "; running the sweep again trains its runs again"
                    warnings.warn(f"{error}, and is ignored{then}")
        return sorted(slices, key=lambda slice_: -slice_.num_updates)

    def load(self, name: str, leaves: Collection[str] | None = None) -> Slice:
        """One slice with all leaves of its states, or those of some paths. Raises ValueError if its file is damaged."""
        if name in self.in_memory:
            return self.in_memory[name]
        slice_ = self._read(self._path(name), leaves)
        return replace(slice_, metrics={name: np.asarray(x) for name, x in slice_.metrics.items()})

    def _path(self, name: str) -> Path:
        assert self.folder
        return self.folder / "slices" / f"{name}.npz"

    def _read(self, path: Path, leaves: Collection[str] | None, verify: bool = False) -> Slice:
        """A slice from its file, with some leaves of its states. Raises ValueError if it is not one of this sweep."""
        with ArrayFile(path) as arrays:
            if leaves is None:
                leaves = [name.removeprefix("state/") for name in arrays if name.startswith("state/")]
            missing = {"runs", *(f"state/{leaf}" for leaf in leaves)} - arrays.keys()
            if missing:
                raise ValueError(f"{path} is damaged: it lacks {min(missing)}")
            unknown = [name for name in arrays if not name.startswith(("metrics/", "state/", "runs", "sweep"))]
            if unknown:  # perhaps a name that is damaged
                raise ValueError(f"{path} is damaged: {shorten(repr(unknown[0]))} does not belong there")
            runs = tuple(np.asarray(arrays["runs"]).tolist())
            slice_ = Slice(runs, {}, {})
            if slice_.name != path.stem:
                raise Foreign(f"{path} holds the runs of {slice_.name}.npz")
            self._check_sweep(path, slice_, arrays)
            metrics = {name: arrays[name] for name in arrays if name.startswith("metrics/")}
            num_updates = {x.shape[1:2] for x in metrics.values()}
            found = [*metrics.values(), *(arrays[f"state/{leaf}"] for leaf in leaves)]
            if len(num_updates) != 1 or any(x.shape[:1] != (len(runs),) for x in found):
                raise ValueError(f"{path} is damaged: its arrays do not fit its {len(runs)} runs")
            if verify:
                arrays.verify(metrics)
            names = [name.removeprefix("metrics/") for name in metrics]
            return Slice(
                runs,
                {
                    name: StoredMetric(path, name, arrays.place(x.name), x.shape, x.dtype)
                    for name, x in zip(names, metrics.values())
                },
                {leaf: np.asarray(arrays[f"state/{leaf}"]) for leaf in leaves},
                tuple(name.removeprefix("state/") for name in arrays if name.startswith("state/")),
            )

    def _check_sweep(self, path: Path, slice_: Slice, arrays: ArrayFile):
        """Refuses the slice of another sweep."""
        now = self.sweep.shared()
        with arrays.damage():
            before = json.loads(str(np.asarray(arrays["sweep"]))) if "sweep" in arrays else now  # older ones lack it
            differing = [name for name in now if before.get(name, now[name]) != now[name]]
        if differing:
            name = differing[0]
            raise Foreign(
                f"{path} belongs to another sweep, with {name}={shorten(before[name])} instead of {shorten(now[name])}"
            )
        missing = [name for name in slice_.runs if name not in self._runs]
        if missing:
            raise Foreign(f"{path} belongs to another sweep, with the run {missing[0]}")


def by_run(slices: Iterable[Slice]) -> dict[str, tuple[Slice, int]]:
    """Name of a run -> the slice that has it, and its row there; if several have it, the first."""
    found: dict[str, tuple[Slice, int]] = {}
    for slice_ in slices:
        for row, name in enumerate(slice_.runs):
            found.setdefault(name, (slice_, row))
    return found


def find_slices(folder: str | Path | None, sweep: Sweep) -> Slices:
    """The slices that a folder holds of a sweep, perhaps none. Raises ValueError if it holds another sweep or a run."""
    if folder is None:
        return Slices(sweep)
    folder = Path(folder)
    refuse_other(folder, "run", "study")  # whose writer may be at work for long, so that nobody should wait for it
    if kind_of(folder) == "sweep":
        _check_same(folder, sweep)
    refuse_foreign(folder, RESULTS)
    return Slices(sweep, folder)


def open_slices(
    folder: str | Path | None,
    sweep: Sweep,
    identities: Mapping[str, Mapping[str, str]] | None = None,
    allow_changed: Sequence[str] = (),
    division: "Division | None" = None,
    rungs: Sequence[int] = (),
) -> Slices:
    """As `find_slices`, in a folder that is made ready for more.

    Raises ValueError if it cannot be written, or if something else was plugged in before.

    Args:
        folder: of the sweep; None keeps everything in memory.
        sweep: what is trained.
        identities: what is plugged in, see `Plan`; kept with this session.
        allow_changed: what may differ from what the folder was trained with.
        division: to keep; by default that of the folder stays.
        rungs: of successive halving, whose ranking the folder then has; by default that of a sweep.
    """
    slices = find_slices(folder, sweep)
    if slices.folder is None:
        return slices
    prepare(slices.folder)
    check_identities(slices.folder, sweep, identities or {}, allow_changed)
    (slices.folder / "slices").mkdir(exist_ok=True)
    if jax.process_index() == 0:
        sessions = read_sessions(slices.folder) if kind_of(slices.folder) == "sweep" else []
        slices.session = {**describe_machine(), "identities": {name: dict(x) for name, x in (identities or {}).items()}}
        division = division or read_division(slices.folder)
        data = {
            "sweep": sweep.to_json(),
            "sessions": [*sessions, slices.session],
            **({"division": asdict(division)} if division else {}),
            **({"rungs": list(rungs)} if rungs else {}),
        }
        save_json(slices.folder / SWEEP, data)
    return slices


class SweepSession(Machine, total=False):
    """One call that trained a sweep."""

    identities: dict[str, dict[str, str]]
    """What was plugged in, see `Plan`; older versions lack it."""
    steps: int
    """Environment steps that the first process of the session made; lacking until it ends, and in older versions."""
    run_seconds: float
    """The time that they took."""


@dataclass(frozen=True)
class Division:
    """How the runs of a sweep are divided, which its folder keeps so that all calls divide them alike (`divide`)."""

    slice_sizes: dict[str, int]
    """Runs of a slice, by `Sweep.name_program`."""
    num_runs: int
    """Runs of the sweep that is divided so; it may get more."""
    trained: list[str]
    """Slices that were complete when it got as many runs. Shares divide the others."""


class SweepRecord(TypedDict):
    """The contents of sweep.json."""

    sweep: Any
    """See `Sweep.to_json`."""
    sessions: list[SweepSession]
    division: NotRequired[Division]
    """Older versions lack it."""
    rungs: NotRequired[list[int]]
    """Updates after which successive halving compared the settings; lacking if a sweep has trained them."""


def read_sweep(folder: str | Path) -> Sweep:
    """The sweep that a folder holds. Raises ValueError if it holds none."""
    return _read(folder)[0]


def read_sessions(folder: str | Path) -> list[SweepSession]:
    """The machines that trained the sweep in a folder, one entry per call (see `describe_machine`)."""
    return _read(folder)[1]


def read_division(folder: str | Path | None) -> Division | None:
    """How the sweep in a folder is divided; None if there is no sweep, or if it was not divided yet."""
    return _read(folder)[2] if folder is not None and kind_of(folder) == "sweep" else None


def read_rungs(folder: str | Path) -> tuple[int, ...]:
    """The rungs of successive halving, if that trained the sweep in a folder; empty if a sweep did."""
    return _read(folder)[3]


def _read(folder: str | Path) -> tuple[Sweep, list[SweepSession], Division | None, tuple[int, ...]]:
    refuse_study(folder)
    if kind_of(folder) != "sweep":
        raise ValueError(f"{folder} holds no sweep: it has no {SWEEP}")
    return read_record(Path(folder) / SWEEP, _from_json, "results.nc has a copy of the sweep in its attributes")


def _from_json(data: Any, lacking: list[str]) -> tuple[Sweep, list[SweepSession], Division | None, tuple[int, ...]]:
    record, division = as_record(SweepRecord, data, lacking), None
    if not record["sessions"]:
        raise ValueError("sessions=[] must have one entry or more")
    if "division" in record:
        division = record["division"]
        for name, size in division.slice_sizes.items():
            check_whole(f"division.slice_sizes.{shorten(name)}", size)
    rungs = tuple(record.get("rungs", ()))
    for updates in rungs:
        check_whole("rungs", updates)
    if list(rungs) != sorted(set(rungs)):
        raise ValueError(f"rungs={shorten(rungs)} must ascend")
    return Sweep.from_json(record["sweep"], lacking), record["sessions"], division, rungs


def read_identities(folder: str | Path | None, sweep: Sweep) -> dict[str, dict[str, str]]:
    """What the sweep in a folder was trained with, by `Sweep.name_group`; no groups that have not been planned before.

    Args:
        folder: perhaps without a sweep.
        sweep: that of the folder, perhaps with more settings.
    """
    sessions = read_sessions(folder) if folder is not None and kind_of(folder) == "sweep" else []
    found = {name: identity for session in sessions for name, identity in session.get("identities", {}).items()}
    names = {sweep.name_group(group): group.old_name() for group in sweep.groups()}
    return {name: found[key] for name, old in names.items() for key in (old, name) if key in found}


def check_identities(
    folder: str | Path | None, sweep: Sweep, now: Mapping[str, Mapping[str, str]], allow_changed: Sequence[str]
) -> None:
    """Raises ValueError if a sweep was trained with something else than now, see `check_identity`."""
    before = read_identities(folder, sweep)
    for name, identity in now.items():
        check_identity(before.get(name, {}), identity, str(folder), allow_changed)


def _check_same(folder: Path, sweep: Sweep):
    """Refuses the folder of a sweep that is not this one with fewer settings or seeds."""
    stored = read_sweep(folder)
    old, new = stored.shared(), sweep.shared()
    differing = differing_fields(old, new)
    if differing:
        name = differing[0]
        raise ValueError(
            f"folder={folder} holds another sweep, with {name}={old.get(name)} instead of {new.get(name)} "
            "(name another folder)"
        )
    wanted = {name_run(row, 0) for row in sweep.table.rows()}
    missing = [row for row in stored.table.rows() if name_run(row, 0) not in wanted]
    if missing:
        raise ValueError(
            f"folder={folder} holds another sweep, with the setting {show_setting(missing[0])} (name another folder)"
        )
    if stored.num_seeds > sweep.num_seeds:
        raise ValueError(
            f"folder={folder} holds {stored.num_seeds} seeds of every setting, more than num_seeds={sweep.num_seeds} "
            "(name another folder, or as many seeds)"
        )
