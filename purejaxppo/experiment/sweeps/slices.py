"""Slices of a sweep: runs that go through a program together, kept in a folder as soon as they are done.

sweep.json       the sweep, and of every session versions, device, command, time
slices/*.npz     numpy.load opens each: names of its runs, metrics [runs, updates], the state of every run
results.nc       all metrics, labelled: xarray.load_dataset opens it
"""

import hashlib
import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from purejaxppo.experiment.files import DAMAGE, prepare
from purejaxppo.experiment.provenance import describe_machine
from purejaxppo.experiment.sweeps.sweep import Sweep, name_run


@dataclass(frozen=True)
class Slice:
    """Some runs and what is known of them so far."""

    runs: tuple[str, ...]
    """Names of the runs (see `name_run`); the last may repeat the first, to fill the slice."""
    metrics: dict[str, np.ndarray]
    """[runs, updates done]"""
    state: dict[str, np.ndarray]
    """Leaves of the TrainState [runs, ...], by their paths."""

    @property
    def num_updates(self) -> int:
        """Updates that are done, also by runs that froze."""
        return next(iter(self.metrics.values())).shape[1] if self.metrics else 0

    @property
    def name(self) -> str:
        """The same for the same runs."""
        return hashlib.sha256("\n".join(self.runs).encode()).hexdigest()[:16]


class Slices:
    """The slices of a sweep, in its folder, or in memory where it has none."""

    def __init__(self, folder: Path | None = None):
        self.folder = folder
        self._in_memory: dict[str, Slice] = {}

    def write(self, part: Slice):
        """Keeps a slice in place of what was known of it; on disk it is whole at any moment."""
        if self.folder is None:
            self._in_memory[part.name] = part
            return
        arrays = {f"metrics/{name}": x for name, x in part.metrics.items()}
        arrays |= {f"state/{name}": x for name, x in part.state.items()}
        path = self.folder / "slices" / f"{part.name}.npz"
        half = path.with_suffix(f".{os.getpid()}.half")
        with open(half, "wb") as file:
            np.savez(file, runs=np.array(part.runs), **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(half, path)

    def machine(self) -> dict:
        """What the last session ran on (see `describe_machine`)."""
        if self.folder is None:
            return describe_machine()
        return json.loads((self.folder / "sweep.json").read_text())["sessions"][-1]

    def read(self) -> list[Slice]:
        """All slices with their metrics; of the states only `num_updates`.

        One that is damaged on disk is named in a warning and left out, so that it is computed anew.
        """
        if self.folder is None:
            return list(self._in_memory.values())
        slices = []
        for path in sorted((self.folder / "slices").glob("*.npz")):
            try:
                slices.append(_read(path, only="num_updates"))
            except DAMAGE as error:
                warnings.warn(f"{path} is damaged and does not count; its runs are computed anew ({error})")
        return slices

    def load(self, name: str) -> Slice:
        """One slice with its whole states. Raises ValueError where it is damaged."""
        if self.folder is None:
            return self._in_memory[name]
        path = self.folder / "slices" / f"{name}.npz"
        try:
            return _read(path)
        except DAMAGE as error:
            raise ValueError(f"{path} is damaged: {error} (remove it and run the sweep again)") from None


def find_slices(folder, sweep: Sweep) -> Slices:
    """What a folder holds of a sweep, perhaps nothing yet. Raises ValueError where it is another's."""
    if folder is None:
        return Slices()
    folder = Path(folder)
    if (folder / "sweep.json").exists():
        _check_same(folder, sweep)
    return Slices(folder)


def open_slices(folder, sweep: Sweep) -> Slices:
    """The slices of a sweep in a folder, which is made ready to take more. Raises ValueError where it cannot be."""
    slices = find_slices(folder, sweep)
    if folder is None:
        return slices
    prepare(slices.folder)
    (slices.folder / "slices").mkdir(exist_ok=True)
    if jax.process_index() == 0:
        path, sessions = slices.folder / "sweep.json", []
        if path.exists():
            sessions = json.loads(path.read_text())["sessions"]
        half = path.with_suffix(".half")
        sessions.append(describe_machine())
        half.write_text(json.dumps({"sweep": sweep.to_json(), "sessions": sessions}, indent=2) + "\n")
        os.replace(half, path)
    return slices


def load_sweep_of(folder) -> Sweep:
    """The sweep that a folder holds. Raises ValueError where it holds none."""
    path = Path(folder) / "sweep.json"
    try:
        return Sweep.from_json(json.loads(path.read_text())["sweep"])
    except FileNotFoundError:
        raise ValueError(f"{folder} holds no sweep: it has no sweep.json") from None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def _read(path: Path, only: str = "") -> Slice:
    """A slice from its file; of the states all leaves, or `only` one."""
    kinds = {"metrics": {}, "state": {}}
    with np.load(path, allow_pickle=False) as file:
        runs = tuple(file["runs"].tolist())
        for name in file.files:
            kind, _, leaf = name.partition("/")
            if kind == "metrics" or (kind == "state" and only in ("", leaf)):
                kinds[kind][leaf] = file[name]
    if not kinds["metrics"] or not kinds["state"]:
        raise ValueError("it lacks metrics or states")
    return Slice(runs, **kinds)


def _check_same(folder: Path, sweep: Sweep):
    there = load_sweep_of(folder)
    mine, theirs = sweep.to_json(), there.to_json()
    flat = [{"env": x["env"], "seed": x["seed"]} | x["config"] | x["hyperparams"] for x in (mine, theirs)]
    differing = [name for name in flat[0] | flat[1] if flat[0].get(name) != flat[1].get(name)]
    if differing:
        name = differing[0]
        raise ValueError(
            f"out={folder} holds another sweep, with {name}={flat[1].get(name)} instead of {flat[0].get(name)} "
            "(name another folder)"
        )
    missing = set(_settings(there)) - set(_settings(sweep))
    if missing:
        raise ValueError(
            f"out={folder} holds another sweep, with the setting {sorted(missing)[0]} (name another folder)"
        )
    if there.num_seeds > sweep.num_seeds:
        raise ValueError(
            f"out={folder} holds {there.num_seeds} seeds of every setting, more than num_seeds={sweep.num_seeds} "
            "(name another folder, or as many seeds)"
        )


def _settings(sweep: Sweep) -> list[str]:
    return [name_run(row, 0) for row in sweep.table.rows()]
