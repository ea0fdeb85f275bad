"""The folder that a run leaves; an ordinary library opens every file in it.

settings.json        environment, config, hyperparams, seeds, and of every session versions, code, device, command, time
checkpoints/         whole states to go on from, see `checkpoints`
metrics.nc           xarray.load_dataset opens it: dimensions seed, update; coordinate step
policy.npz           numpy.load opens it: one array per parameter, the seed in front
learning_curve.png
"""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import xarray

from purejaxppo.batched import batched
from purejaxppo.config import Config, Hyperparams
from purejaxppo.experiment.files import DAMAGE, from_arrays, name_leaf, to_arrays
from purejaxppo.ppo import PPO, make_ppo
from purejaxppo.rollout import Policy
from purejaxppo.sharded import sharded


class Saved(NamedTuple):
    """A run read back from its folder; `ppo` is batched over the seeds as it was when it was trained."""

    ppo: PPO
    hyperparams: Hyperparams
    env_params: Any
    policy: Policy
    metrics: xarray.Dataset
    settings: dict


def save(folder: Path, settings: dict, metrics: xarray.Dataset, policy: Policy):
    """Writes what `load` reads of a run; of a batch the dimension `run` is named `seed` there."""
    metrics = metrics.rename(run="seed") if "run" in metrics.dims else metrics
    half = folder / "metrics.nc.half"
    metrics.to_netcdf(half, engine="scipy")
    os.replace(half, folder / "metrics.nc")
    write_settings(folder, settings)
    half = folder / "policy.npz.half"
    with open(half, "wb") as file:
        np.savez(file, **to_arrays(policy))
    os.replace(half, folder / "policy.npz")  # last: a folder that has it is complete


def remove_results(folder: Path):
    """Removes what `save` wrote but the settings; checkpoints hold it too."""
    for name in ("policy.npz", "metrics.nc"):
        (folder / name).unlink(missing_ok=True)


def write_settings(folder: Path, settings: dict):
    """Writes settings.json, whole at any moment."""
    half = folder / "settings.json.half"
    half.write_text(json.dumps(settings, indent=2) + "\n")
    os.replace(half, folder / "settings.json")


def read_settings(folder) -> dict:
    """The settings of a run. Raises ValueError where the folder holds none, or damaged ones."""
    path = Path(folder) / "settings.json"
    try:
        settings = json.loads(path.read_text())
    except FileNotFoundError:
        if (path.parent / "sweep.json").exists():
            raise ValueError(f"{folder} holds a sweep: the command that began it goes on with it") from None
        raise ValueError(f"{folder} holds no run: it has no settings.json") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error} (checkpoints have a copy of it)") from None
    missing = {"env", "config", "hyperparams", "env_params", "num_runs", "first_key"} - settings.keys()
    if missing:
        raise ValueError(f"{path} is none of a run: it lacks {min(missing)}")
    return settings


def load(folder, ppo: PPO | None = None) -> Saved:
    """Reads a run back: `ppo`, `hyperparams`, `env_params`, `policy` with the seed in front, `metrics`, `settings`.

    `ppo` is the one that the run was trained with; it must be given where that is not `make_ppo` of a name and a
    config. Nothing is unpickled. Raises ValueError where the folder holds no run, one of another shape, or damage.
    """
    folder = Path(folder)
    settings = read_settings(folder)
    if not (folder / "policy.npz").exists():
        raise ValueError(f"the run in {folder} has not come to its end (`purejaxppo resume {folder}` goes on with it)")
    ppo = remake(settings) if ppo is None else ppo
    hyperparams = hyperparams_of(settings)
    like = jax.eval_shape(ppo.init, keys_like(settings), hyperparams)
    try:
        metrics = xarray.load_dataset(folder / "metrics.nc", engine="scipy")
        with np.load(folder / "policy.npz", allow_pickle=False) as file:
            arrays = dict(file)
    except (*DAMAGE, TypeError) as error:
        raise ValueError(f"metrics.nc or policy.npz in {folder} is damaged: {error}") from None
    policy = from_arrays(arrays, like.policy, f"{folder / 'policy.npz'}")
    return Saved(ppo, hyperparams, env_params_of(settings, like.env_params), policy, metrics, settings)


def remake(settings: dict, num_devices: int = 1) -> PPO:
    """The PPO of a run, of a name and a config, with the environments of each agent on several devices if need be."""
    ppo = make_ppo(settings["env"], Config(**settings["config"]))
    ppo = sharded(ppo, num_devices) if num_devices > 1 else ppo
    return ppo if settings["num_runs"] is None else batched(ppo)


def keys_like(settings: dict):
    """Shapes of the keys that the `init` of a run takes."""
    num_runs = settings["num_runs"]
    split = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), num_runs or 1))
    return split if num_runs else jax.eval_shape(lambda: jax.random.key(0))


def hyperparams_of(settings: dict) -> Hyperparams:
    """The hyperparameters of a run, arrays where its agents differ in them."""
    values = settings["hyperparams"].items()
    return Hyperparams().set({n: np.float32(x) if isinstance(x, list) else float(x) for n, x in values})


def env_params_of(settings: dict, like):
    """The environment parameters that a run was trained with, in the shapes of `like`."""

    def read(path, x):
        return jnp.broadcast_to(jnp.asarray(np.asarray(settings["env_params"][name_leaf(path)], x.dtype)), x.shape)

    return jax.tree_util.tree_map_with_path(read, like)
