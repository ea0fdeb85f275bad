"""The folder of a run; an ordinary library opens every file in it.

settings.json        what the run is and what made it, see `RunSettings`
env_params.npz       numpy.load opens it: the environment's parameters of more than 64 numbers, if it has such
checkpoints/         whole states, see `checkpoints`
metrics.nc           xarray.load_dataset opens it: dimensions seed, updates; coordinate step
policy.npz           numpy.load opens it: one array per parameter, with the seed as first axis
best_policy.npz      with `fit(keep_best=True)`: the policies of the best evaluations, see `Best`
files.json           SHA-256 of all files above but the checkpoints; older versions wrote none
learning_curve.png
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import xarray

from purejaxppo.batched import batched
from purejaxppo.config import Config, Hyperparams
from purejaxppo.experiment.datasets import read_dataset, save_dataset
from purejaxppo.experiment.files import (
    DIGESTS,
    SETTINGS,
    ArrayFile,
    check_digests,
    from_arrays,
    save_arrays,
    to_arrays,
    write_digests,
)
from purejaxppo.experiment.identity import DEFAULTS, check_loaded, identify_ppo
from purejaxppo.experiment.report.failures import failures_of, mark_failures
from purejaxppo.experiment.runs.best import BEST, Best, best_like, read_best
from purejaxppo.experiment.runs.checkpoints import Checkpoints
from purejaxppo.experiment.runs.settings import ENV_PARAMS, RunSettings, read_settings, write_settings
from purejaxppo.ppo import PPO, TrainState, make_ppo
from purejaxppo.rollout import Policy
from purejaxppo.sharded import sharded
from purejaxppo.text import count, shorten

METRICS, POLICY = "metrics.nc", "policy.npz"
FILES = (SETTINGS, METRICS, POLICY)
LAST_FILES = (METRICS, POLICY, BEST)  # what only the end of a session writes


@dataclass(frozen=True)
class SavedRun:
    """A run read back from its folder."""

    folder: Path
    settings: RunSettings
    ppo: PPO
    """As it was trained: batched if the run was."""
    hyperparams: Hyperparams
    env_params: Any
    policy: Policy
    """With the seed as leading axis if the run was a batch."""
    metrics: xarray.Dataset
    best: Best | None = None
    """With `best=True`: where each policy comes from."""

    def __repr__(self) -> str:
        title, *_ = repr(self.ppo).splitlines()
        return "\n".join(
            [
                f"SavedRun of {title}",
                f"  folder   {self.folder}",
                f"  updates  {self.settings.num_updates_done} of {self.settings.config.num_updates}",
                f"  metrics  {dict(self.metrics.sizes)}: {shorten(', '.join(map(str, self.metrics)), 90)}",
                f"  fields   {', '.join(vars(self))}",
            ]
        )

    def failed(self) -> list[str]:
        """A sentence for every agent that turned nan."""
        return list(failures_of(self.metrics).values())

    def state(self, hyperparams: Hyperparams | None = None) -> TrainState:
        """The whole state of the newest intact checkpoint, ready to train further.

        `hyperparams` must be given if some are schedules, of which settings.json keeps only the numbers. Raises
        ValueError if they are not, or if every checkpoint is damaged or none is left.
        """
        if self.settings.schedules and hyperparams is None:
            name = min(self.settings.schedules)
            raise ValueError(f"{name} was a schedule, of which {self.folder} keeps only numbers (give hyperparams=)")
        checkpoint = Checkpoints(self.folder).newest()
        if checkpoint is None:
            raise ValueError(
                f"{self.folder} has no checkpoint, so the whole state is lost (policy and metrics can still be loaded)"
            )
        return from_arrays(checkpoint.arrays, _state_like(self.ppo, self.settings, hyperparams), str(checkpoint.path))


def save(folder: Path, settings: RunSettings, metrics: xarray.Dataset, policy: Policy, best: Best | None = None):
    """Writes what `load_run` reads; the dimension `run` of a batch is named `seed` there.

    Args:
        folder: of the run.
        settings: at its end.
        metrics: of all updates.
        policy: at its end.
        best: the best policies, if they are kept.
    """
    metrics = metrics.rename(run="seed") if "run" in metrics.dims else metrics
    (folder / DIGESTS).unlink(missing_ok=True)
    save_dataset(folder / METRICS, metrics)
    write_settings(folder, settings)
    if best is not None:
        save_arrays(folder / BEST, to_arrays(best))
    save_arrays(folder / POLICY, to_arrays(policy))  # a folder that has it is complete
    write_digests(folder, [name for name in (ENV_PARAMS, BEST, *FILES) if (folder / name).exists()])


def is_complete(folder: Path) -> bool:
    """Whether `save` wrote everything."""
    return (folder / POLICY).exists()


def is_intact(folder: Path) -> bool:
    """Whether `save` wrote everything and nothing has changed since; False for folders of older versions."""
    try:
        check_digests(folder, FILES)
    except ValueError:
        return False
    return True


def remove_results(folder: Path):
    """Removes what `save` wrote but the settings; the checkpoints hold it too."""
    for name in (DIGESTS, *LAST_FILES):
        (folder / name).unlink(missing_ok=True)


def read_intact_settings(folder: str | Path, only: str | None = None) -> RunSettings:
    """As `read_settings`, but also raises ValueError if a file of a complete run has changed since it was written.

    With the name of a file in `only`, the others are not verified.
    """
    settings = read_settings(folder)
    if (Path(folder) / DIGESTS).exists():
        try:
            check_digests(Path(folder), FILES if only is None else [only], others=only is None)
        except ValueError as error:
            raise ValueError(
                f"the run in {folder} is damaged: {error} (the call or command that resumes it writes it again)"
            ) from None
    return settings


def load_run(
    folder: str | Path, ppo: PPO | None = None, *, best: bool = False, allow_changed: Sequence[str] = ()
) -> SavedRun:
    """Reads a run back from its folder; nothing is unpickled, and no code is imported.

    Args:
        folder: what `fit` wrote.
        ppo: the PPO that the run was trained with; it must be given unless that was `make_ppo(name, config)`.
        best: whether to read the policies of the best evaluations in place of the last ones, see `Best`.
        allow_changed: "env" or "network", if it may be another one than in the training.

    Raises:
        ValueError: if the folder holds no run, an unfinished one, one of another shape, one with another environment or
            network, or damaged files.
    """
    folder = Path(folder)
    _check_complete(folder)
    if best and not (folder / BEST).exists():
        remedy = "train with evaluate_every and keep_best, or leave out best"
        raise ValueError(f"{folder} keeps no best policies ({remedy})")
    settings, metrics = read_intact_settings(folder), read_dataset(folder / METRICS)
    # Without a PPO a name that is no environment of this package should not be looked up.
    now = DEFAULTS | {"env": settings.env} if ppo is None else identify_ppo(ppo)
    before = {name: x for name, x in settings.identity.items() if name not in settings.schedules}
    check_loaded(before, now, folder, allow_changed, remedy="give the PPO that was trained as ppo=")
    if ppo is not None and ppo.many != bool(settings.num_runs):
        remedy = "batched(ppo)" if settings.num_runs else "the PPO of one agent"
        raise ValueError(
            f"ppo is {'batched' if ppo.many else 'of one run'}, but {folder} holds "
            f"{count(settings.num_runs, 'run') + ' of a batch' if settings.num_runs else 'one run'} (give {remedy})"
        )
    ppo = remake(settings) if ppo is None else ppo
    # Policy and parameters have the same shapes under any hyperparameters, and schedules cannot be made from numbers.
    constant = {name: getattr(Hyperparams(), name, 0.0) for name in settings.schedules}
    like = _state_like(ppo, settings, settings.to_hyperparams().set(constant))
    with ArrayFile(folder / POLICY) as arrays:
        policy = from_arrays(arrays, like.policy, str(folder / POLICY))
    found = read_best(folder / BEST, best_like(like)) if best else None
    policy = jax.tree.map(jax.numpy.asarray, found.policy) if found else policy
    env_params = settings.to_env_params(like.env_params, folder)
    return SavedRun(folder, settings, ppo, settings.to_hyperparams(), env_params, policy, metrics, found)


def read_metrics(folder: Path) -> xarray.Dataset:
    """The metrics of a run. Raises ValueError if the folder holds no run, an unfinished one, or damaged files."""
    _check_complete(folder)
    read_intact_settings(folder, only=METRICS)
    return read_dataset(folder / METRICS)


def _check_complete(folder: Path):
    settings = read_settings(folder)  # raises if there is no run
    if not is_complete(folder):
        call = f"`purejaxppo resume {folder}`" if "launch" in settings.notes else f"fit(..., folder={str(folder)!r})"
        raise ValueError(f"the run in {folder} is not finished ({call} continues it)")


def read_failures(folder: Path) -> dict[int, str]:
    """A sentence for every agent that turned nan, by its number, as far as the run in a folder is saved."""
    try:
        if is_complete(folder):
            return failures_of(read_metrics(folder))
        checkpoint = Checkpoints(folder).newest()
    except ValueError:  # damaged
        return {}
    return failures_of(mark_failures(checkpoint.metrics, checkpoint.arrays)) if checkpoint else {}


def remake(
    settings: RunSettings, num_devices: int = 1, config: Config | None = None, make: Callable[..., PPO] = make_ppo
) -> PPO:
    """The PPO of a run, from its settings.

    Args:
        settings: of the run.
        num_devices: across which its environments are distributed.
        config: replaces the one in the settings.
        make: `make(env, config)` makes the PPO of one agent from the name of its environment.
    """
    ppo = make(settings.env, config or settings.config)
    ppo = sharded(ppo, num_devices) if num_devices > 1 else ppo
    return ppo if settings.num_runs is None else batched(ppo)


def _state_like(ppo: PPO, settings: RunSettings, hyperparams: Hyperparams | None = None):
    """Shapes of the state of a run."""
    split = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), settings.num_runs or 1))
    keys = split if settings.num_runs else jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(ppo.init, keys, hyperparams or settings.to_hyperparams())
