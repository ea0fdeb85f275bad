"""The state and the metrics of a run so far: in memory and, if the run has a folder, in checkpoints there."""

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import xarray

from purejaxppo.experiment.distributed import ALONE, Team, spans_processes, to_host
from purejaxppo.experiment.files import (
    differing_fields,
    from_arrays,
    is_full,
    kind_of,
    refuse_foreign,
    refuse_other,
    remove_halves,
    to_arrays,
)
from purejaxppo.experiment.identity import check_identity
from purejaxppo.experiment.lock import Lock, LockLost
from purejaxppo.experiment.loop import Timer
from purejaxppo.experiment.report.failures import mark_failures
from purejaxppo.experiment.report.metrics import History, label
from purejaxppo.experiment.runs import saved
from purejaxppo.experiment.runs.best import Best, best_like, read_best
from purejaxppo.experiment.runs.checkpoints import Checkpoint, Checkpoints
from purejaxppo.experiment.runs.settings import (
    RunSettings,
    describe_run,
    read_settings,
    write_env_params,
    write_settings,
)
from purejaxppo.ppo import PPO
from purejaxppo.text import count, shorten

TIMING = "compile_seconds", "run_seconds", "steps_per_second"


class Journal:
    """A run's state and all its metrics so far; `open_journal` makes one."""

    def __init__(
        self,
        ppo: PPO,
        state: Any,
        settings: RunSettings,
        save_every: float,
        checkpoints: Checkpoints | None = None,
        lock: Lock | None = None,
        team: Team = ALONE,
    ):
        self.ppo, self.state, self.settings, self.checkpoints, self.lock = ppo, state, settings, checkpoints, lock
        self.team = team
        self.best: Best | None = None
        """The best policies so far, if they are kept."""
        self.num_updates = int(np.max(to_host(state.num_updates)))
        self._history = History(ppo.config, self.num_updates)
        self._saved_updates: int | None = None  # in the newest checkpoint of this session
        self._timer = Timer(save_every)
        self.unsaved = ""
        """What could not be written at the end, and what the folder keeps instead."""
        self._failures: dict[str, Exception] = {}

    @property
    def steps_per_update(self) -> int:
        """Environment steps of one update of all runs."""
        return self.state.num_updates.size * self.ppo.config.steps_per_update

    @property
    def metrics(self) -> xarray.Dataset:
        """The metrics of all updates so far, see `label`."""
        return self._history.to_dataset()

    @property
    def results(self) -> xarray.Dataset:
        """As `metrics`, with the runs that failed, see `mark_failures`."""
        return mark_failures(self.metrics, self.state)

    @property
    def _env_params(self) -> Any:
        return to_host(getattr(self.state, "runs", self.state).env_params)  # of a population those of its runs

    def resume_from(self, checkpoint: Checkpoint, allow_changed: Sequence[str] = ()):
        """Takes state, metrics and settings from a checkpoint, in which this process becomes the newest session.

        `allow_changed` names what may have another identity. Raises ValueError for the checkpoint of another run.
        """
        assert self.checkpoints is not None
        now = self.settings
        if self.num_updates and _is_state_of(self.checkpoints.after(self.num_updates, self.state), self.state):
            # The state is one that this run has reached, perhaps with other numbers than it began with.
            begun = {name: getattr(checkpoint.settings, name) for name in ("hyperparams", "env_params", "first_key")}
            now = replace(now, **begun)
        _check_same(checkpoint.settings, now, self.checkpoints.folder, allow_changed)
        _warn_of_changes(checkpoint.settings, self.settings)
        state = from_arrays(checkpoint.arrays, jax.eval_shape(lambda: self.state), str(checkpoint.path))
        self.state = jax.tree.map(
            lambda new, old: new if new.sharding == old.sharding else jax.device_put(new, old.sharding),
            state,
            self.state,
        )
        self.best = read_best(checkpoint.best, best_like(self.state)) if checkpoint.best else None
        self.num_updates = int(checkpoint.metrics["updates"][-1])
        self._history = History(self.ppo.config, int(checkpoint.metrics["updates"][0]) - 1)
        self._history.append({str(name): x.values for name, x in checkpoint.metrics.items()})
        sessions = (*checkpoint.settings.sessions, *self.settings.sessions)
        self.settings = replace(checkpoint.settings, config=self.settings.config, sessions=sessions)

    def start(self, slice_size: int):
        """Writes the settings of what is about to be trained, and removes what an earlier session left at its end."""
        self.settings = replace(self.settings, slice_size=slice_size)
        if self.checkpoints:
            folder, env_params = self.checkpoints.folder, self._env_params
            try:
                with self.team.together():
                    if self.team.is_first:
                        remove_halves(folder)
                        saved.remove_results(folder)
                        write_env_params(folder, self.settings, env_params)
                        write_settings(folder, self.settings)
            except OSError as error:
                raise ValueError(f"folder={folder} cannot be written: {error.strerror} (name another folder)") from None

    def add(self, state: Any, metrics: dict[str, np.ndarray]) -> xarray.Dataset:
        """Keeps the state after a chunk and the metrics of the chunk, which it returns with labels."""
        labelled = label(metrics, self.ppo.config, self.num_updates)
        self._history.append(metrics)
        self.state = state
        self.num_updates += labelled.sizes["updates"]
        return labelled

    def is_writer(self) -> bool:
        """Whether the run has no folder, or this process is still its writer; warns the first time that it is not."""
        if not self.checkpoints:
            return True
        lost = ""
        if self.lock:
            try:
                self.lock.check()
            except LockLost as error:
                lost = str(error)
            except OSError:  # the disk does not answer; a write will say so, and the next chunk asks again
                pass
        lost = self.team.broadcast(lost)
        if lost:
            self.checkpoints, self.lock = None, None
            self.unsaved = f"{lost}; this process writes nothing more there and stops; the result is in memory"
            warnings.warn(self.unsaved)
        return not lost

    def save_if_due(self):
        """Writes a checkpoint if the last one is old enough."""
        if self.checkpoints and self.team.broadcast(str(self._timer.is_due())) == "True":
            self.save()

    def save(self, last: bool = False):
        """Writes a checkpoint; if it cannot, warns and lets the run continue, unless it is the `last` one."""
        if not self.checkpoints or self._saved_updates == self.num_updates or not self.is_writer():
            return
        try:
            self.checkpoints.save(self.num_updates, self.state, self.metrics, self.settings, self.best)
            self._saved_updates = self.num_updates
        except Exception as error:  # whatever a library raises on a full disk
            if last:
                self._failures["its last checkpoint"] = error
            else:
                folder = self.checkpoints.folder
                warnings.warn(f"could not write a checkpoint to {folder}; the run continues ({_reason(error)})")
        self._timer.restart()

    def finish(self, **timing: float | None):
        """Writes what `load_run` reads into the folder; `timing` are fields of `RunSettings`."""
        self.settings = replace(self.settings, num_updates_done=self.num_updates, **timing)
        if not self.checkpoints or not self.is_writer():
            return
        try:
            try:
                self._save_results(self.checkpoints.folder)
            except OSError as error:
                if not is_full(error) or not self.checkpoints.free_room():
                    raise
                self._save_results(self.checkpoints.folder)
        except Exception as error:
            with contextlib.suppress(OSError):
                if self.team.is_first:
                    saved.remove_results(self.checkpoints.folder)
            self._failures["its results"] = error
        if self._failures:
            self.unsaved = self._describe_failures()
            warnings.warn(self.unsaved)

    def complete(self):
        """Writes the results of a run again that was killed before its end, or whose files were damaged since."""
        if self.checkpoints and self.team.broadcast(str(saved.is_intact(self.checkpoints.folder))) == "False":
            try:
                before = read_settings(self.checkpoints.folder)
            except ValueError:
                before = self.settings
            self.finish(**{name: getattr(before, name) for name in TIMING})

    def _save_results(self, folder: Path):
        env_params, results = self._env_params, self.results
        policy, best = to_host((self.state.policy, self.best))
        with self.team.together():
            if self.team.is_first:
                write_env_params(folder, self.settings, env_params)
                saved.save(folder, self.settings, results, policy, best)

    def _describe_failures(self) -> str:
        """A sentence on what could not be written at the end, and what the folder keeps."""
        assert self.checkpoints is not None
        folder, paths = self.checkpoints.folder, self.checkpoints.paths()
        kept = ["its results"] * ("its results" not in self._failures)
        kept += [f"its checkpoint after {count(int(path.name), 'update')}, from which it resumes" for path in paths[:1]]
        reason = _reason(next(iter(self._failures.values())))
        return (
            f"the run could not write {' and '.join(self._failures)} to {folder} ({reason}) after "
            f"{count(self.num_updates, 'update')}; the folder keeps {' and '.join(kept) or 'nothing of it'}"
        )


@contextlib.contextmanager
def open_journal(
    ppo: PPO,
    state: Any,
    folder: str | Path | Lock | None = None,
    *,
    keep: int = 2,
    save_every: float = 60.0,
    notes: Mapping[str, Any] | None = None,
    allow_changed: Sequence[str] = (),
) -> Iterator[Journal]:
    """The journal of a run that starts from `state`, or resumes from the newest intact checkpoint of its folder.

    Its process is the only writer of the folder until the end of the `with` statement. If the state lies on devices of
    several processes, all call this; all write and read checkpoints, and the first one writes everything else.

    Args:
        ppo: of the run.
        state: the first state.
        folder: of the run, or its lock if the caller holds it; None keeps everything in memory.
        keep: newest checkpoints to keep.
        save_every: seconds between two checkpoints.
        notes: JSON data to keep in settings.json.
        allow_changed: what may have another identity than in the folder, see `identify_ppo`.

    Raises:
        ValueError: if the folder cannot be written, has another writer, holds another run, a sweep or files that the
            results would replace, or if all checkpoints are damaged.
    """
    team = Team(everyone=spans_processes(state))
    if folder is None:
        # Nothing is compared or written: describing a run would copy all its numbers from the device.
        yield Journal(ppo, state, RunSettings(ppo.env.name, ppo.config, {}, {}, None, []), save_every, team=team)
        return
    path, settings = folder.folder if isinstance(folder, Lock) else Path(folder), describe_run(ppo, state, notes)
    checkpoints = Checkpoints(path, keep, team)
    refuse_other(path, "sweep", "study")
    with team.claim_folder(folder) as lock:
        team.check_seen(path)
        journal = Journal(ppo, state, settings, save_every, checkpoints, lock, team)
        checkpoint = checkpoints.newest(state)
        if checkpoint:
            journal.resume_from(checkpoint, allow_changed)
        elif kind_of(path) == "run":  # started, but killed before its first checkpoint
            _check_same(read_settings(path), settings, path, allow_changed)
        else:
            refuse_foreign(path, *saved.LAST_FILES)
        yield journal


def _is_state_of(checkpoint: Checkpoint | None, state: Any) -> bool:
    """Whether a checkpoint holds this state, to the bit."""
    if checkpoint is None:
        return False
    try:
        kept = to_arrays(to_host(from_arrays(checkpoint.arrays, jax.eval_shape(lambda: state))))
    except ValueError:
        return False
    return all(kept[name].tobytes() == x.tobytes() for name, x in to_arrays(to_host(state)).items())


def _check_same(before: RunSettings, now: RunSettings, folder: Path, allow_changed: Sequence[str]):
    """Refuses the folder of another run; the same run with more updates is extended, with a warning."""
    old, new = before.constants(), now.constants()
    differing = differing_fields(old, new)
    extended = "num_updates" in differing and new["num_updates"] > old["num_updates"]
    if extended:
        differing.remove("num_updates")
    if differing:
        fields = [f"{n}={shorten(old.get(n))} instead of {shorten(new.get(n))}" for n in differing]
        raise ValueError(f"folder={folder} holds another run, with {'; '.join(fields)} (name another folder)")
    check_identity(before.identity, now.identity, folder, allow_changed)
    if extended:
        warnings.warn(
            f"the run in {folder} is extended from num_updates={old['num_updates']} to {new['num_updates']}; its "
            "schedules now end at the new last update, so an annealed learning rate continues from a higher value"
        )


def _reason(error: Exception) -> str:
    """The reason of an error in a few words."""
    return error.strerror if isinstance(error, OSError) and error.strerror else shorten(error, 200)


def _warn_of_changes(before: RunSettings, now: RunSettings):
    last, this = before.sessions[-1], now.sessions[-1]
    old, new = (
        {**x["versions"], "device": x["device"]["kind"], "XLA_FLAGS": x.get("xla_flags") or "none"}
        for x in (last, this)
    )
    devices = last.get("num_devices", this.get("num_devices")), this.get("num_devices")
    changed = [f"{name} {old.get(name)} is now {new[name]}" for name in new if old.get(name, new[name]) != new[name]]
    changed += ["num_devices {} is now {}".format(*devices)] if devices[0] != devices[1] else []
    if changed:
        warnings.warn(
            "the run resumes with other devices or versions, so its numbers may differ from those of an uninterrupted "
            f"run: {', '.join(changed)}"
        )
