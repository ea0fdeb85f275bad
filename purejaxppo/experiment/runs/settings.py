"""What a run is and what made it, as settings.json holds it."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import numpy as np

from purejaxppo.checks import check_whole
from purejaxppo.config import Config, Hyperparams
from purejaxppo.experiment.distributed import to_host
from purejaxppo.experiment.files import (
    SETTINGS,
    ArrayFile,
    kind_of,
    name_leaf,
    refuse_study,
    save_arrays,
    save_json,
    to_arrays,
)
from purejaxppo.experiment.identity import identify_ppo
from purejaxppo.experiment.provenance import Machine, as_json, describe_machine
from purejaxppo.experiment.records import Numbers, as_record, complete_hyperparams, read_record
from purejaxppo.ppo import PPO
from purejaxppo.text import shorten

ENV_PARAMS = "env_params.npz"
SEARCH = "search"  # among the notes of a run: how the members of a population evolve
MOST = 64  # numbers of one parameter that settings.json holds itself, for each run


class LargeParam(TypedDict):
    """A parameter of the environment whose numbers lie in env_params.npz, under the same name."""

    shape: list[int]
    """Without the axis of runs if all share the numbers."""
    dtype: str
    sha256: str
    """Of its bytes."""


class RunSession(Machine, total=False):
    """One process that trained a run."""

    num_devices: int
    """Devices that shared the run, or its batch; older versions lack it."""
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
    env_params: dict[str, Numbers | LargeParam]
    """The environment's parameters by their paths in the pytree, see `describe_param`."""
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
        env_params = {f"env.{name}": self._summary(value) for name, value in self.env_params.items()}
        return {"env": self.env} | config | self.hyperparams | env_params | {"first_key": self.first_key}

    def to_hyperparams(self) -> Hyperparams:
        """The hyperparameters, as arrays if agents differ in them."""
        values = self.hyperparams.items()
        return Hyperparams().set({n: np.asarray(x, np.float32) if isinstance(x, list) else float(x) for n, x in values})

    @property
    def schedules(self) -> set[str]:
        """The hyperparameters that were schedules, of which the file keeps only the numbers."""
        lists = {name for name, x in self.hyperparams.items() if isinstance(x, list) and len(x) != self.num_runs}
        return lists | (self.identity.keys() & self.hyperparams.keys())

    def _summary(self, param: Any) -> Any:
        """A parameter as `describe_param` has it; folders of older versions hold all numbers."""
        if not isinstance(param, list):
            return param
        return describe_param(np.asarray(jnp.asarray(np.asarray(param))), self.num_runs)

    def to_env_params(self, like: Any, folder: Path) -> Any:
        """The environment's parameters as a pytree with the structure and the shapes of `like`.

        Raises ValueError if they are damaged, or if `like` has others.
        """
        path, large = folder / ENV_PARAMS, {}
        names = [name for name, param in self.env_params.items() if isinstance(param, dict)]
        if names:
            with ArrayFile(path) as arrays:
                for name in names:
                    large[name] = np.asarray(arrays[name]) if name in arrays else np.zeros(0)
                    if describe_param(large[name], None) != self.env_params[name]:
                        raise ValueError(f"{path} is damaged: {name} is not what {SETTINGS} says")

        def read(path, x):
            name, dtype, shape = name_leaf(path), jnp.result_type(x), np.shape(x)
            try:
                found = np.asarray(large.get(name, self.env_params.get(name)), None if name in large else np.float64)
                with np.errstate(all="ignore"):
                    values = np.broadcast_to(found.astype(dtype), shape)
                if not np.issubdtype(dtype, np.inexact) and (values != found).any():
                    raise ValueError
            except (TypeError, ValueError, OverflowError):
                raise ValueError(
                    f"{folder / SETTINGS} does not fit: the environment's parameter {name} should be {dtype} "
                    f"{list(shape)}, found {shorten(self.env_params.get(name))}"
                ) from None
            return jnp.asarray(values)

        return jax.tree_util.tree_map_with_path(read, like)


def describe_run(ppo: PPO, state: Any, notes: Mapping[str, Any] | None = None) -> RunSettings:
    """The settings of a run that starts from `state`, with this process as its session."""
    runs = getattr(state, "runs", state)  # those of a population
    session: RunSession = {
        **describe_machine(),
        "num_devices": ppo.mesh.size if ppo.mesh else 1,
        "identity": identify_ppo(ppo, runs.hyperparams),
    }
    hyperparams, num_runs = runs.hyperparams, state.num_updates.size if state.num_updates.ndim else None
    return RunSettings(
        env=ppo.env.name,
        config=ppo.config,
        hyperparams={name: as_json(to_host(hyperparams.get(name))) for name in hyperparams.names},
        env_params={name: describe_param(x, num_runs) for name, x in to_arrays(to_host(runs.env_params)).items()},
        num_runs=num_runs,
        first_key=np.asarray(jax.random.key_data(to_host(state.key))).tolist(),
        notes=dict(notes or {}),
        sessions=(session,),
    )


def describe_param(param: np.ndarray, num_runs: int | None) -> Any:
    """A parameter of an environment as JSON: its numbers (see `as_json`), or a `LargeParam` of more than `MOST`."""
    param = param[0] if _is_shared(param, num_runs) and param[0].size > MOST else param
    most = MOST * (num_runs or 1) if param.ndim and len(param) == num_runs else MOST
    if param.size <= most or (param == param.flat[0]).all():
        return as_json(param)
    digest = hashlib.sha256(param.tobytes()).hexdigest()
    return {"shape": list(param.shape), "dtype": str(param.dtype), "sha256": digest}


def _is_shared(param: np.ndarray, num_runs: int | None) -> bool:
    """Whether all runs have the same numbers."""
    return bool(num_runs and param.ndim and len(param) == num_runs and (param == param[:1]).all())


def write_env_params(folder: Path, settings: RunSettings, env_params: Any):
    """Writes the parameters of the environment that are too large for settings.json, atomically."""
    arrays = to_arrays(env_params)
    large = {name: arrays[name] for name, param in settings.env_params.items() if isinstance(param, dict)}
    if large:
        shared = {name: _is_shared(x, settings.num_runs) for name, x in large.items()}
        save_arrays(folder / ENV_PARAMS, {name: x[0] if shared[name] else x for name, x in large.items()})


def read_settings(folder: str | Path) -> RunSettings:
    """The settings of the run in a folder. Raises ValueError if it holds no run, or damaged settings."""
    refuse_study(folder)
    path = Path(folder) / SETTINGS
    kind = kind_of(folder)
    if kind == "sweep":
        raise ValueError(f"{folder} holds a sweep: to continue it, repeat the command or the call that started it")
    if kind is None:
        lacking = f"it has no {SETTINGS}" if Path(folder).is_dir() else "there is no such folder"
        raise ValueError(f"{folder} holds no run: {lacking} (training writes it before the first update)")
    return read_record(path, RunSettings.from_json, "every checkpoint has a copy of it")


def write_settings(folder: Path, settings: RunSettings):
    """Writes settings.json, atomically."""
    save_json(folder / SETTINGS, settings.to_json())
