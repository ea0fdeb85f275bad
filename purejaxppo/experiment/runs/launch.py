"""Runs that can be rebuilt from their folder alone: those that `purejaxppo train` starts."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import jax

from purejaxppo.batched import runs
from purejaxppo.checks import check_whole
from purejaxppo.config import Config, Hyperparams
from purejaxppo.experiment.distributed import ALL, is_first, process_count
from purejaxppo.experiment.files import SETTINGS
from purejaxppo.experiment.lock import Lock
from purejaxppo.experiment.program import first_state
from purejaxppo.experiment.provenance import as_json
from purejaxppo.experiment.records import OtherVersion, as_record
from purejaxppo.experiment.runs.checkpoints import Checkpoints
from purejaxppo.experiment.runs.fit import Fit, fit
from purejaxppo.experiment.runs.saved import read_intact_settings, remake
from purejaxppo.experiment.runs.settings import SEARCH, RunSettings
from purejaxppo.experiment.runs.sinks import make_sink
from purejaxppo.ppo import PPO, make_ppo
from purejaxppo.sharded import can_divide


@dataclass(frozen=True)
class Launch:
    """How a run is started, besides its environment, `Config` and `Hyperparams`; kept in the notes of its settings."""

    num_seeds: int = 1
    """Agents that train side by side."""
    seed: int = 0
    """Random seed; the key of every agent comes from it."""
    num_devices: int = 1
    """Devices that share the environments of every agent."""
    save_every: float = 60.0
    """Seconds between two checkpoints."""
    keep: int = 2
    """Newest checkpoints to keep."""
    evaluate_every: int | None = None
    """Updates between two evaluations; None for none."""
    keep_best: bool = False
    """Whether to keep the policies of the best evaluations."""
    log: tuple[str, ...] = ()
    """Names of sinks, see `make_sink`."""
    plugged: dict[str, str] = field(default_factory=dict)
    """Where the custom parts came from, as {"loss": "module:name"}; nothing imports them by what is written here."""

    def __post_init__(self):
        for name, least in (("num_seeds", 1), ("seed", 0), ("num_devices", 1), ("keep", 1), ("evaluate_every", 1)):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name), at_least=least)
        if not self.save_every >= 0:
            raise ValueError(f"save_every={self.save_every} must be a number of seconds, at least 0")
        if self.keep_best and self.evaluate_every is None:
            raise ValueError("keep_best=True needs evaluations to compare (give evaluate_every too)")


def launch_run(
    ppo: PPO,
    hyperparams: Hyperparams,
    launch: Launch,
    folder: str | Path | Lock,
    *,
    progress: bool = True,
    allow_changed: Sequence[str] = (),
) -> Fit:
    """Trains a batched PPO in a folder, from its newest checkpoint if it has one.

    Args:
        ppo: batched, over the agents.
        hyperparams: shared by all agents.
        launch: how many agents, from which seed, saved and logged how.
        folder: where everything is written, see `fit`.
        progress: whether to show a progress bar.
        allow_changed: see `fit`.
    """
    numbers = {name: as_json(hyperparams.get(name)) for name in hyperparams.names}
    settings = {"env": ppo.env.name, **asdict(ppo.config), **numbers, **asdict(launch)}
    with ALL.claim_folder(folder) as lock:
        path = folder.folder if isinstance(folder, Lock) else Path(folder)
        keys, hyperparams = runs(jax.random.key(launch.seed), num_seeds=launch.num_seeds, hyperparams=hyperparams)
        return fit(
            ppo,
            first_state(ppo, keys, hyperparams),
            folder=lock or path,
            save_every=launch.save_every,
            keep=launch.keep,
            evaluate_every=launch.evaluate_every,
            keep_best=launch.keep_best,
            sinks=[make_sink(name, path, settings) for name in launch.log] if is_first() else [],
            notes={"launch": asdict(launch)},
            progress=progress,
            allow_changed=allow_changed,
        )


def resume(
    folder: str | Path | Lock,
    *,
    num_updates: int | None = None,
    progress: bool = True,
    make: Callable[..., PPO] = make_ppo,
    allow_changed: Sequence[str] = (),
) -> Fit:
    """Resumes the run that `purejaxppo train` started in a folder; the result is that of an uninterrupted run.

    Args:
        folder: of the run.
        num_updates: updates of the whole run, to extend it: its schedules then end there, as a warning says.
        progress: whether to show a progress bar.
        make: `make(env, config)` makes the PPO of one agent.
        allow_changed: see `fit`.

    Raises:
        Interrupted: as `fit` does.
        ValueError: if the folder holds no run, one that was started in Python (call `fit` again to continue it), or one
            with other custom parts, or if all its checkpoints are damaged.
    """
    path = folder.folder if isinstance(folder, Lock) else Path(folder)
    settings = read_newest_settings(path)
    launch, config = read_launch(settings, path), settings.config
    if num_updates is not None:
        if num_updates < config.num_updates:
            raise ValueError(f"num_updates={num_updates} must be at least the {config.num_updates} of the run")
        config = replace(config, num_updates=num_updates)
    ppo = remake(settings, choose_num_devices(launch, config), config, make)
    return launch_run(ppo, settings.to_hyperparams(), launch, folder, progress=progress, allow_changed=allow_changed)


def choose_num_devices(launch: Launch, config: Config) -> int:
    """The devices that a run resumes on: as many as it began on, or the most of those here that divide it evenly.

    Several processes use all devices that they have.
    """
    if process_count() > 1:
        return jax.device_count()
    most = min(launch.num_devices, jax.device_count())
    return next((number for number in range(most, 1, -1) if can_divide(config, number)), 1)


def read_newest_settings(folder: Path) -> RunSettings:
    """The settings of a run; if settings.json is damaged, those of the newest intact checkpoint, with a warning."""
    try:
        return read_intact_settings(folder, only=SETTINGS)
    except OtherVersion:
        raise
    except ValueError as error:
        checkpoint = Checkpoints(folder).newest()
        if checkpoint is None:
            raise
        warnings.warn(f"{error}; the settings of {checkpoint.path} are used")
        return checkpoint.settings


def read_launch(settings: RunSettings, folder: str | Path) -> Launch:
    """How a run was started. Raises ValueError if a call or a search started it, or if its settings are damaged."""
    if SEARCH in settings.notes:
        raise ValueError(f"the run in {folder} belongs to a search: repeat the command or the call that started it")
    if "launch" not in settings.notes:
        raise ValueError(f"the run in {folder} was started in Python: call fit(..., folder=...) again to continue it")
    try:
        launch = as_record(Launch, settings.notes["launch"], name="notes.launch")
        if launch.num_seeds != settings.num_runs:
            raise ValueError(f"num_seeds={launch.num_seeds} does not fit num_runs={settings.num_runs}")
    except ValueError as error:
        raise ValueError(f"{Path(folder) / SETTINGS} is damaged: {error} (every checkpoint has a copy of it)") from None
    return launch
