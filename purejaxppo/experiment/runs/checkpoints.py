"""Checkpoints of a run: its state, its metrics so far and its settings, written atomically and verified before use.

checkpoints/0000000585/     after 585 updates; a name that ends in .half is incomplete and is ignored
    state/                  Orbax opens it: the leaves of the TrainState by their paths, random keys as their data
    metrics.nc              xarray.load_dataset opens it
    settings.json           what the run is and what made it, see `RunSettings`
    files.json              SHA-256 of every file above
"""

import hashlib
import json
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xarray

from purejaxppo.checks import check_whole
from purejaxppo.experiment.files import flush_to_disk, to_arrays
from purejaxppo.experiment.records import OtherVersion, read_record
from purejaxppo.experiment.runs.settings import RunSettings


class Checkpoint(NamedTuple):
    """The contents of one checkpoint."""

    arrays: dict[str, np.ndarray]  # of the state, see `to_arrays`
    metrics: xarray.Dataset  # of all updates so far
    settings: RunSettings
    path: Path


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints in the folder of a run, of which the newest `keep` are kept."""

    folder: Path
    keep: int = 2

    def __post_init__(self):
        check_whole("keep", self.keep)

    def paths(self) -> list[Path]:
        """The complete checkpoints, newest first."""
        found = (self.folder / "checkpoints").glob("[0-9]*")
        return sorted((path for path in found if path.suffix != ".half"), reverse=True)

    def save(self, num_updates: int, state: Any, metrics: xarray.Dataset, settings: RunSettings):
        """Writes a checkpoint and removes the oldest; a kill at any moment is safe.

        Args:
            num_updates: updates that the state has done.
            state: of the run.
            metrics: of all updates so far.
            settings: of the run.
        """
        import orbax.checkpoint as ocp

        path = self.folder / "checkpoints" / f"{num_updates:010d}"
        half = path.with_suffix(".half")
        for leftover in path.parent.glob("*.half"):
            shutil.rmtree(leftover)
        half.mkdir(parents=True)
        # Orbax does not store empty arrays; `from_arrays` adds them again.
        arrays = {name: x for name, x in to_arrays(state).items() if x.size}
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save((half / "state").absolute(), arrays)
        metrics.to_netcdf(half / "metrics.nc", engine="scipy")
        (half / "settings.json").write_text(json.dumps(settings.to_json(), indent=2) + "\n")
        (half / "files.json").write_text(json.dumps(_hash_files(half), indent=2) + "\n")
        for file in (*half.rglob("*"), half):
            flush_to_disk(file)
        if path.exists():
            path.rename(half.with_name(f"{path.name}.old.half"))
        half.rename(path)
        flush_to_disk(path.parent)
        shutil.rmtree(half.with_name(f"{path.name}.old.half"), ignore_errors=True)
        complete = self.paths()
        later = [old for old in complete if old.name > path.name]  # damaged, or the run would have resumed from them
        for old in (*later, *complete[len(later) + self.keep :]):
            old = old.rename(old.with_suffix(".half"))
            shutil.rmtree(old)

    def newest(self) -> Checkpoint | None:
        """The newest intact checkpoint; a warning names every damaged one that is skipped.

        None if there has never been one. Raises ValueError if all are damaged.
        """
        damaged = []
        for path in self.paths():
            try:
                return _read(path)
            except OtherVersion:
                raise
            except Exception as error:  # whatever a library raises for damaged files
                damaged.append(f"{path} is damaged ({error})")
                warnings.warn(f"{damaged[-1]} and is skipped")
        if damaged:
            raise ValueError(f"no checkpoint in {self.folder} is whole: {'; '.join(damaged)}")
        return None


def _read(path: Path) -> Checkpoint:
    import orbax.checkpoint as ocp

    expected = json.loads((path / "files.json").read_text())
    found = _hash_files(path)
    for name, digest in expected.items():
        if found.get(name) != digest:
            raise ValueError(f"{name} {'has changed since it was written' if name in found else 'is missing'}")
    arrays = ocp.PyTreeCheckpointer().restore((path / "state").absolute())
    metrics = xarray.load_dataset(path / "metrics.nc", engine="scipy")
    settings = read_record(path / "settings.json", RunSettings.from_json)
    return Checkpoint(arrays, metrics, settings, path)


def _hash_files(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in a folder by its path there; files.json itself is left out."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "files.json")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
