"""Checkpoints of a run: its state, its metrics so far and its settings, written atomically and verified before use.

checkpoints/0000000585/     after 585 updates; a name that ends in .half is incomplete, all other names are ignored
    state/                  Orbax opens it: the leaves of the TrainState by their paths, random keys as their data
    metrics.nc              xarray.load_dataset opens it
    settings.json           what the run is and what made it, see `RunSettings`
    best_policy.npz         with `fit(keep_best=True)`: numpy.load opens it, see `Best`
    files.json              SHA-256 of every file above; a file that it does not list makes the checkpoint a damaged one
"""

import json
import os
import re
import shutil
import uuid
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import xarray

from purejaxppo.checks import check_whole
from purejaxppo.experiment.datasets import read_dataset, write_dataset
from purejaxppo.experiment.distributed import ALONE, Team, process_count, spans_processes, to_host
from purejaxppo.experiment.files import (
    check_digests,
    check_room,
    flush_to_disk,
    is_full,
    save_arrays,
    to_arrays,
    to_device_arrays,
    write_digests,
)
from purejaxppo.experiment.records import OtherVersion, read_record
from purejaxppo.experiment.runs.best import BEST, Best
from purejaxppo.experiment.runs.settings import RunSettings

BYTES_PER_LEAF = 2048  # that Orbax writes to describe an array


class Checkpoint(NamedTuple):
    """The contents of one checkpoint."""

    arrays: dict[str, np.ndarray]  # of the state, see `to_arrays`
    metrics: xarray.Dataset  # of all updates so far
    settings: RunSettings
    path: Path
    best: Path | None = None  # the file with the best policies so far, see `read_best`


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints in the folder of a run, of which the newest `keep` are kept."""

    folder: Path
    keep: int = 2
    team: Team = ALONE
    """The processes that write and read them together."""

    def __post_init__(self):
        check_whole("keep", self.keep)

    def paths(self) -> list[Path]:
        """The complete checkpoints, newest first: folders whose names are ten digits, and not links."""
        found = (self.folder / "checkpoints").glob("[0-9]" * 10)
        return sorted((path for path in found if path.is_dir() and not path.is_symlink()), reverse=True)

    def save(
        self,
        num_updates: int,
        state: Any,
        metrics: xarray.Dataset,
        settings: RunSettings,
        best: Best | None = None,
    ):
        """Writes a checkpoint and removes the oldest; a kill at any moment is safe.

        On a full disk, those before the newest intact one are removed first; what does not fit then leaves nothing
        behind, and raises what the system or a library raises.

        Args:
            num_updates: updates that the state has done.
            state: of the run.
            metrics: of all updates so far.
            settings: of the run.
            best: its best policies so far, if they are kept.
        """
        path = self.folder / "checkpoints" / f"{num_updates:010d}"
        if self.team.is_first:
            remove_unfinished(path.parent)
        try:
            self._write(path, state, metrics, settings, best)
        except Exception as error:
            if not is_full(error) or not self.free_room():
                raise
            self._write(path, state, metrics, settings, best)
        if not self.team.is_first:
            return
        complete = self.paths()
        later = [old for old in complete if old.name > path.name]  # damaged, or the run would have resumed from them
        for old in (*later, *complete[len(later) + self.keep :]):
            _remove(old)

    def free_room(self) -> bool:
        """Removes the checkpoints before the newest intact one; says whether there were any."""
        return self.team.broadcast(str(self.team.is_first and self._free_room())) == "True"

    def _free_room(self) -> bool:
        for i, path in enumerate(paths := self.paths()):
            try:
                _check(path)
            except (OSError, ValueError):
                continue
            for old in paths[i + 1 :]:
                _remove(old)
            return bool(paths[i + 1 :])
        return False

    def after(self, num_updates: int, like: Any = None) -> Checkpoint | None:
        """The checkpoint after so many updates, None if there is none or it is damaged; `like` as for `newest`."""
        path = next((path for path in self._agreed_paths() if int(path.name) == num_updates), None)
        try:
            return self._read(path, like) if path else None
        except Exception:  # whatever a library raises for damaged files
            return None

    def newest(self, like: Any = None) -> Checkpoint | None:
        """The newest intact checkpoint; a warning names every damaged one that is skipped.

        None if there has never been one. Raises ValueError if all are damaged.

        Args:
            like: a state on devices of several processes, of which each reads its part.
        """
        damaged = []
        for path in self._agreed_paths():
            try:
                return self._read(path, like)
            except OtherVersion:
                raise
            except Exception as error:  # whatever a library raises for damaged files
                damaged.append(f"{path} is damaged ({error})")
                warnings.warn(f"{damaged[-1]} and is skipped")
        if damaged:
            raise ValueError(f"no checkpoint in {self.folder} is whole: {'; '.join(damaged)}")
        return None

    def _agreed_paths(self) -> list[Path]:
        """As `paths`, as the first process finds them."""
        names = self.team.broadcast(" ".join(path.name for path in self.paths())).split()
        return [self.folder / "checkpoints" / name for name in names]

    def _write(self, path: Path, state: Any, metrics: xarray.Dataset, settings: RunSettings, best: Best | None):
        """Writes a checkpoint atomically; what cannot be finished is removed."""
        half, team = path.with_name(self.team.broadcast(_half_of(path).name)), self.team
        try:
            # Orbax does not store empty arrays; `from_arrays` adds them again.
            arrays = to_device_arrays(state) if spans_processes(state) else to_arrays(state)
            arrays = {name: x for name, x in arrays.items() if x.size}
            best_arrays = {} if best is None else to_arrays(to_host(best))
            with team.together():
                if team.is_first:
                    half.mkdir(parents=True)
                    # Orbax would answer a full disk with a traceback from every thread, on standard error.
                    sizes = [x.nbytes + BYTES_PER_LEAF for x in (*arrays.values(), *best_arrays.values())]
                    check_room(half, metrics.nbytes + sum(sizes))
            import orbax.checkpoint as ocp

            with team.together(), ocp.StandardCheckpointer(**_options(team)) as checkpointer:
                checkpointer.save((half / "state").absolute(), arrays)
            with team.together():
                if team.is_first:
                    _complete(half, path, metrics, settings, best_arrays)
        except BaseException:
            if team.is_first:
                shutil.rmtree(half, ignore_errors=True)
            raise
        if team.is_first:
            remove_unfinished(path.parent)

    def _read(self, path: Path, like: Any) -> Checkpoint:
        with self.team.together():
            if self.team.is_first:
                _check(path)
        with self.team.together():
            arrays = _restore((path / "state").absolute(), like, self.team)
            metrics = read_dataset(path / "metrics.nc")
            settings = read_record(path / "settings.json", RunSettings.from_json)
        return Checkpoint(arrays, metrics, settings, path, path / BEST if (path / BEST).exists() else None)


def remove_unfinished(folder: Path):
    """Removes what killed processes left in the folder of checkpoints."""
    for half in folder.glob("*.half"):
        if re.fullmatch(r"\d{10}(\.old|\.[0-9a-f]{32})?\.half", half.name) and half.is_dir() and not half.is_symlink():
            shutil.rmtree(half)


def _complete(half: Path, path: Path, metrics: xarray.Dataset, settings: RunSettings, best: dict[str, np.ndarray]):
    """Adds what belongs to the state that Orbax wrote, and moves the checkpoint to its place."""
    write_dataset(half / "metrics.nc", metrics)
    (half / "settings.json").write_text(json.dumps(settings.to_json(), indent=2) + "\n")
    if best:
        save_arrays(half / BEST, best)
    write_digests(half, ["metrics.nc", "settings.json", *[BEST] * bool(best), *_files_of_state(half)])
    for file in (*half.rglob("*"), half):
        flush_to_disk(file)
    _move_away(path)
    half.rename(path)
    flush_to_disk(path.parent)


def _move_away(path: Path):
    """Makes room for a checkpoint where a damaged one is, which becomes unfinished, or anything else, which is kept."""
    if path.is_dir() and not path.is_symlink():
        path.rename(_half_of(path))
    elif os.path.lexists(path):
        path.rename(path.with_name(f"{path.name}.{uuid.uuid4().hex}"))


def _remove(path: Path):
    """Removes a checkpoint; a kill leaves no checkpoint of which a part is missing."""
    shutil.rmtree(path.rename(_half_of(path)))


def _half_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.{uuid.uuid4().hex}.half")


def _check(path: Path):
    """Raises ValueError if a file of a checkpoint has changed, is missing, or is not listed in files.json."""
    files = _files_of_state(path)
    if not files:
        raise ValueError("state is missing")
    check_digests(path, ["metrics.nc", "settings.json", *files])


def _files_of_state(path: Path) -> list[str]:
    return sorted(file.relative_to(path).as_posix() for file in (path / "state").rglob("*") if file.is_file())


def _restore(path: Path, like: Any, team: Team) -> dict[str, Any]:
    """The arrays of a state: whole, but those that lie on devices of several processes, as in `like`."""
    import orbax.checkpoint as ocp

    spread = to_device_arrays(like) if spans_processes(like) else {}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**_options(team)), **_options(team)) as checkpointer:
        known = checkpointer.metadata(path).item_metadata
        arguments = {
            name: ocp.ArrayRestoreArgs(sharding=spread[name].sharding)
            if name in spread and spread[name].shape == array.shape
            else ocp.RestoreArgs(restore_type=np.ndarray)
            for name, array in known.items()
        }
        return checkpointer.restore(path, restore_args=arguments)


def _options(team: Team) -> dict[str, Any]:
    """Which processes Orbax waits for."""
    import orbax.checkpoint as ocp

    if team.everyone or process_count() == 1:
        return {}
    own = jax.process_index()
    options = ocp.options.MultiprocessingOptions(
        primary_host=own, active_processes={own}, barrier_sync_key_prefix=str(own)
    )
    return {"multiprocessing_options": options}
