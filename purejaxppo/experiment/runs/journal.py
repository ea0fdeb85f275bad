"""What a run has come to, in memory and, if it has a folder, in checkpoints there from which it goes on."""

import time
import warnings
from pathlib import Path

import jax
import numpy as np
import xarray

from purejaxppo.experiment.files import from_arrays, make_writable, to_arrays
from purejaxppo.experiment.provenance import SESSION, as_json, describe
from purejaxppo.experiment.report.metrics import label
from purejaxppo.experiment.runs import saved
from purejaxppo.experiment.runs.checkpoints import Checkpoint, Checkpoints
from purejaxppo.ppo import PPO, TrainState


class Journal:
    """A run's state and all its metrics so far, from the newest whole checkpoint of its folder if there is one.

    Raises ValueError where the folder holds another run, or checkpoints of which none is whole.
    """

    def __init__(self, ppo: PPO, state: TrainState, folder=None, keep=2, save_every=60.0, settings=None):
        self.ppo, self.state, self.save_every = ppo, state, save_every
        self.num_updates = int(np.max(state.num_updates))
        self.checkpoints = None if folder is None else Checkpoints(Path(folder), keep)
        self.settings = {}
        self._kept = None  # updates in the newest checkpoint of this session
        self._chunks: list[xarray.Dataset] = []
        if self.checkpoints:
            self.settings = describe_run(ppo, state) | (settings or {})
            self._look_into(self.checkpoints.folder)
        self._saved = time.perf_counter()

    @property
    def steps_per_update(self) -> int:
        """Environment steps of one update of all runs."""
        return self.state.num_updates.size * self.ppo.config.steps_per_update

    def begin(self, **how):
        """Notes in the folder what is about to be trained, and `how`; what an earlier session left at its end goes."""
        self.settings |= how
        if self.checkpoints:
            saved.remove_results(self.checkpoints.folder)
            saved.write_settings(self.checkpoints.folder, self.settings)

    @property
    def metrics(self) -> xarray.Dataset:
        """Of all updates so far, see `label`."""
        if len(self._chunks) > 1:
            self._chunks = [xarray.concat(self._chunks, "update", data_vars="minimal")]
        return self._chunks[0]

    def add(self, state: TrainState, metrics: dict) -> xarray.Dataset:
        """Notes the state after a chunk and the chunk's metrics, which it returns with labels."""
        self.state = state
        self._chunks.append(label(metrics, self.ppo.config, self.num_updates))
        self.num_updates += self._chunks[-1].sizes["update"]
        return self._chunks[-1]

    def save_if_due(self):
        """Writes a checkpoint if the last one is old enough."""
        if time.perf_counter() - self._saved >= self.save_every:
            self.save()

    def save(self):
        """Writes a checkpoint; where it cannot, warns and lets the run go on."""
        if not self.checkpoints or self._kept == self.num_updates:
            return
        try:
            self.checkpoints.save(self.num_updates, self.state, self.metrics, self.settings)
            self._kept = self.num_updates
        except Exception as error:  # whatever a library says of a full disk
            warnings.warn(f"no checkpoint could be saved in {self.checkpoints.folder}, the run goes on ({error})")
        self._saved = time.perf_counter()

    def finish(self, **timing):
        """Leaves all that `load` reads in the folder."""
        if self.checkpoints:
            self.settings |= timing | {"num_updates_done": self.num_updates}
            saved.save(self.checkpoints.folder, self.settings, self.metrics, self.state.policy)

    def complete(self):
        """Finishes a run that was killed between its last checkpoint and its end."""
        if self.checkpoints and not (self.checkpoints.folder / "policy.npz").exists():
            self.finish()

    def _look_into(self, folder: Path):
        if (folder / "sweep.json").exists():
            raise ValueError(f"{folder} holds a sweep (name another folder)")
        make_writable(folder)
        checkpoint = self.checkpoints.newest()
        if checkpoint:
            self._go_on_from(checkpoint)
        elif (folder / "settings.json").exists():  # begun, but killed before its first checkpoint
            _check_same(saved.read_settings(folder), self.settings, folder)

    def _go_on_from(self, checkpoint: Checkpoint):
        before, now = checkpoint.settings, self.settings
        _check_same(before, now, self.checkpoints.folder)
        _warn_of_changes(before, now)
        empty = {name: x for name, x in to_arrays(self.state).items() if not x.size}
        state = from_arrays(empty | checkpoint.arrays, jax.eval_shape(lambda: self.state), str(checkpoint.path))
        self.state = jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), state, self.state)
        self.num_updates = int(checkpoint.metrics["update"][-1])
        self._chunks = [checkpoint.metrics]
        session = {name: now[name] for name in SESSION}
        self.settings = before | {"config": now["config"], "sessions": [*before.get("sessions", []), session]}


def describe_run(ppo: PPO, state: TrainState) -> dict:
    """What a run is, its first state's key included, and what it runs on, as plain JSON data."""
    key = np.asarray(jax.random.key_data(state.key)).tolist()
    num_runs = state.num_updates.size if state.num_updates.ndim else None
    runs = getattr(state, "runs", state)  # those of a population lie in it
    env_params = {name: as_json(x) for name, x in to_arrays(runs.env_params).items()}
    more = {"num_runs": num_runs, "env_params": env_params, "first_key": key}
    return describe(ppo.env.name, ppo.config, runs.hyperparams, **more)


def _check_same(before: dict, now: dict, folder: Path):
    """Refuses the checkpoint of another run; one of the same run with fewer updates is extended, with a warning."""
    flat = [
        {"env": x["env"]}
        | x["config"]
        | x["hyperparams"]
        | {f"env.{name}": value for name, value in x["env_params"].items()}
        | {"first_key": x["first_key"]}
        for x in (before, now)
    ]
    differing = [name for name in flat[1] | flat[0] if flat[0].get(name) != flat[1].get(name)]
    extended = "num_updates" in differing and flat[1]["num_updates"] > flat[0]["num_updates"]
    if extended:
        differing.remove("num_updates")
    if differing:
        fields = [f"{n}={_short(flat[0].get(n))} instead of {_short(flat[1].get(n))}" for n in differing]
        raise ValueError(f"{folder} holds another run, with {'; '.join(fields)} (name another folder)")
    if extended:
        warnings.warn(
            f"the run in {folder} is extended from num_updates={flat[0]['num_updates']} to {flat[1]['num_updates']}; "
            "schedules end there now, so what is annealed, such as the learning rate, goes on from a higher value than "
            "it had come to"
        )


def _warn_of_changes(before: dict, now: dict):
    last = (before.get("sessions") or [before])[-1]
    old, new = ({**x["versions"], "device": x["device"]["kind"]} for x in (last, now))
    changed = [f"{name} {old.get(name)} is now {new[name]}" for name in new if old.get(name) != new[name]]
    if changed:
        warnings.warn(f"the run goes on under other conditions and may differ in its roundings: {', '.join(changed)}")


def _short(value) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
