"""What a run is and what made it, as settings.json holds it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from purejaxppo.checks import check_whole
from purejaxppo.config import Config, Hyperparams
from purejaxppo.experiment.files import SETTINGS, kind_of, name_leaf, save_json, to_arrays
from purejaxppo.experiment.identity import identify_ppo
from purejaxppo.experiment.provenance import Machine, as_json, describe_machine
from purejaxppo.experiment.records import Numbers, as_record, complete_hyperparams, read_record
from purejaxppo.ppo import PPO


class RunSession(Machine, total=False):
    """One process that trained a run."""

    identity: dict[str, str]
    """What was plugged in, see `identify_ppo`; older versions lack it."""


@dataclass(frozen=True)
class RunSettings:
    """What a run is, the sessions that trained it, and its progress. All fields except `config` are plain JSON data."""

    env: str
    """The name of the environment."""
    config: Config
    hyperparams: dict[str, Numbers]
    """Name -> a number, or a list of one per agent if they differ; of a schedule its numbers."""
    env_params: dict[str, Numbers]
    """The environment's parameters by their paths in the pytree."""
    num_runs: int | None
    """Agents of a batch; None for a run without a batch axis."""
    first_key: Numbers
    """The random key of the first state, as its data."""
    notes: dict[str, Any] = field(default_factory=dict)
    """What the caller of `fit` wanted to keep; `launch` holds the options of `purejaxppo train`."""
    slice_size: int | None = None
    """Agents that train together in one program: another size would round differently."""
    sessions: tuple[RunSession, ...] = ()
    """Versions, code, device, command, time and plug-ins of every process that trained the run."""
    num_updates_done: int | None = None
    """Updates at the end of the last session that ended; None before."""
    compile_seconds: float | None = None
    run_seconds: float | None = None
    steps_per_second: float | None = None
    """Environment steps of all agents per second of the last session."""

    def to_json(self) -> dict:
        """Plain data that `from_json` reads back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any, lacking: list[str] | None = None) -> "RunSettings":
        """The settings that `to_json` wrote. Raises ValueError for other data.

        `lacking` receives the names of fields that the data lack, which have their defaults.
        """
        lacking = [] if lacking is None else lacking
        settings = as_record(cls, data, lacking)
        for name, least in (("num_runs", 1), ("slice_size", 1), ("num_updates_done", 0)):
            if getattr(settings, name) is not None:
                check_whole(name, getattr(settings, name), at_least=least)
        num_runs, key = settings.num_runs, np.shape(settings.first_key)
        if len(key) != 1 and (num_runs is None or key[:-1] != (num_runs,)):
            raise ValueError(f"first_key of shape {key} does not fit num_runs={num_runs}")
        if not settings.sessions:
            raise ValueError("sessions=[] must have one entry or more")
        return replace(settings, hyperparams=complete_hyperparams(settings.hyperparams, lacking))

    @property
    def identity(self) -> dict[str, str]:
        """What the newest session plugged in, see `identify_ppo`; empty in folders of older versions."""
        return self.sessions[-1].get("identity", {}) if self.sessions else {}

    def constants(self) -> dict[str, Any]:
        """The numbers and words that must not change when a run resumes, flat: name -> value."""
        config = {name: list(x) if isinstance(x, tuple) else x for name, x in asdict(self.config).items()}
        env_params = {f"env.{name}": value for name, value in self.env_params.items()}
        return {"env": self.env} | config | self.hyperparams | env_params | {"first_key": self.first_key}

    def to_hyperparams(self) -> Hyperparams:
        """The hyperparameters, as arrays if agents differ in them."""
        values = self.hyperparams.items()
        return Hyperparams().set({n: np.asarray(x, np.float32) if isinstance(x, list) else float(x) for n, x in values})

    def to_env_params(self, like: Any) -> Any:
        """The environment's parameters as a pytree with the structure and the shapes of `like`."""

        def read(path, x):
            return jnp.broadcast_to(jnp.asarray(np.asarray(self.env_params[name_leaf(path)], x.dtype)), x.shape)

        return jax.tree_util.tree_map_with_path(read, like)


def describe_run(ppo: PPO, state: Any, notes: Mapping[str, Any] | None = None) -> RunSettings:
    """The settings of a run that starts from `state`, with this process as its session."""
    runs = getattr(state, "runs", state)  # those of a population
    hyperparams = runs.hyperparams
    return RunSettings(
        env=ppo.env.name,
        config=ppo.config,
        hyperparams={name: as_json(hyperparams.get(name)) for name in hyperparams.names},
        env_params={name: as_json(x) for name, x in to_arrays(runs.env_params).items()},
        num_runs=state.num_updates.size if state.num_updates.ndim else None,
        first_key=np.asarray(jax.random.key_data(state.key)).tolist(),
        notes=dict(notes or {}),
        sessions=({**describe_machine(), "identity": identify_ppo(ppo, hyperparams)},),
    )


def read_settings(folder: str | Path) -> RunSettings:
    """The settings of the run in a folder. Raises ValueError if it holds no run, or damaged settings."""
    path = Path(folder) / SETTINGS
    kind = kind_of(folder)
    if kind == "sweep":
        raise ValueError(f"{folder} holds a sweep: to continue it, repeat the command or the call that started it")
    if kind is None:
        raise ValueError(f"{folder} holds no run: it has no {SETTINGS}")
    return read_record(path, RunSettings.from_json, "every checkpoint has a copy of it")


def write_settings(folder: Path, settings: RunSettings):
    """Writes settings.json, atomically."""
    save_json(folder / SETTINGS, settings.to_json())
