"""Checkpoints of a run: its state, metrics so far and settings, complete at any moment and checked before use.

checkpoints/0000000585/     after 585 updates; a name that ends in .half is not complete and does not count
    state/                  Orbax opens it: the leaves of the TrainState by their paths, random keys as their data
    metrics.nc              xarray.load_dataset opens it
    settings.json           what the run is and what made it
    files.json              SHA-256 of every file above
"""

import hashlib
import json
import os
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xarray

from purejaxppo.checks import check_whole
from purejaxppo.experiment.files import to_arrays


class Checkpoint(NamedTuple):
    """What one checkpoint holds."""

    arrays: dict[str, np.ndarray]  # of the state, see `to_arrays`
    metrics: xarray.Dataset  # of all updates so far
    settings: dict
    path: Path


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints in the folder of a run, the newest `keep` of them."""

    folder: Path
    keep: int = 2

    def __post_init__(self):
        check_whole("keep", self.keep)

    def paths(self) -> list[Path]:
        """Those that were written to their end, the newest first."""
        found = (self.folder / "checkpoints").glob("[0-9]*")
        return sorted((path for path in found if path.suffix != ".half"), reverse=True)

    def save(self, num_updates: int, state, metrics: xarray.Dataset, settings: dict):
        """Writes what there is after `num_updates` updates and removes the oldest; a kill at any moment harms none."""
        import orbax.checkpoint as ocp

        path = self.folder / "checkpoints" / f"{num_updates:010d}"
        half = path.with_suffix(".half")
        for left in path.parent.glob("*.half"):
            shutil.rmtree(left)
        half.mkdir(parents=True)
        # Orbax knows no empty arrays; whoever has the state's shapes puts them back.
        arrays = {name: x for name, x in to_arrays(state).items() if x.size}
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save((half / "state").absolute(), arrays)
        metrics.to_netcdf(half / "metrics.nc", engine="scipy")
        (half / "settings.json").write_text(json.dumps(settings, indent=2) + "\n")
        (half / "files.json").write_text(json.dumps(_hash_files(half), indent=2) + "\n")
        for file in (*half.rglob("*"), half):
            _to_disk(file)
        if path.exists():
            path.rename(half.with_name(f"{path.name}.old.half"))
        half.rename(path)
        _to_disk(path.parent)
        shutil.rmtree(half.with_name(f"{path.name}.old.half"), ignore_errors=True)
        there = self.paths()
        later = [old for old in there if old.name > path.name]  # damaged, or the run would have gone on from them
        for old in (*later, *there[len(later) + self.keep :]):
            old = old.rename(old.with_suffix(".half"))
            shutil.rmtree(old)

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole; a warning names every damaged one before it.

        None where there has never been one. Raises ValueError where all are damaged.
        """
        damaged = []
        for path in self.paths():
            try:
                return _read(path)
            except Exception as error:  # whatever a library says of damaged files
                damaged.append(f"{path} is damaged ({error})")
                warnings.warn(f"{damaged[-1]}; the one before it is tried")
        if damaged:
            raise ValueError(f"no checkpoint in {self.folder} is whole: {'; '.join(damaged)}")
        return None


def _read(path: Path) -> Checkpoint:
    import orbax.checkpoint as ocp

    expected = json.loads((path / "files.json").read_text())
    found = _hash_files(path)
    for name, digest in expected.items():
        if found.get(name) != digest:
            raise ValueError(f"{name} is {'not as it was written' if name in found else 'missing'}")
    arrays = ocp.PyTreeCheckpointer().restore((path / "state").absolute())
    metrics = xarray.load_dataset(path / "metrics.nc", engine="scipy")
    return Checkpoint(arrays, metrics, json.loads((path / "settings.json").read_text()), path)


def _hash_files(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in a folder but the list of them, by its path in the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "files.json")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _to_disk(path: Path):
    """Has the system write a file or a folder to its disk, where it lets folders be opened."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
