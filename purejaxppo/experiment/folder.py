"""The folder that a run leaves: settings as JSON, metrics as netCDF, the policy as plain arrays, a picture.

settings.json        environment, config, hyperparams, seeds, versions, device, precision, command, time
metrics.nc           xarray.load_dataset opens it: dimensions seed, update; coordinate step
policy.npz           numpy.load opens it: one array per parameter, the seed in front
learning_curve.png
"""

import datetime
import importlib.metadata
import json
import os
import platform
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import xarray

import purejaxppo
from purejaxppo.config import Config, Hyperparams
from purejaxppo.ppo import PPO, make_ppo
from purejaxppo.rollout import Policy
from purejaxppo.sweep import batched

PACKAGES = ("jax", "jaxlib", "flax", "optax", "gymnax", "numpy")


class Saved(NamedTuple):
    """A run read back from its folder; `ppo` is batched over the seeds as it was when it was trained."""

    ppo: PPO
    hyperparams: Hyperparams
    policy: Policy
    metrics: xarray.Dataset
    settings: dict


def prepare(folder: Path):
    """Makes a folder ready to take results. Raises ValueError where it holds a run already or cannot be written."""
    if folder == Path():
        raise ValueError(f"out={folder} is where you are: name a folder for this run")
    if (folder / "settings.json").exists():
        raise ValueError(f"out={folder} already holds a run (name another folder)")
    make_writable(folder)


def make_writable(folder: Path):
    """Makes a folder if there is none. Raises ValueError where it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise ValueError(f"out={folder} cannot be written: {error.strerror} (name another folder)") from None


def describe(env: str, config: Config, hyperparams: Hyperparams, **more) -> dict:
    """Settings of a run about to start as plain JSON data, with what it runs on."""
    return {
        "env": env,
        "config": asdict(config),
        "hyperparams": {f.name: _json_number(getattr(hyperparams, f.name)) for f in fields(hyperparams)},
        **more,
        **describe_machine(),
    }


def describe_machine() -> dict:
    """Versions, device, command and time of what is about to start, as plain JSON data."""
    device = jax.devices()[0]
    return {
        "versions": {
            "purejaxppo": purejaxppo.__version__,
            "python": platform.python_version(),
            **{package: importlib.metadata.version(package) for package in PACKAGES},
        },
        "device": {"platform": device.platform, "kind": device.device_kind, "count": jax.device_count()},
        "cpu_cores": os.cpu_count(),
        "command": sys.argv,
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def save(folder: Path, settings: dict, metrics: xarray.Dataset, policy: Policy):
    """Writes a run; the settings come last, so that a folder with them is whole."""
    metrics.to_netcdf(folder / "metrics.nc", engine="scipy")
    leaves = jax.tree_util.tree_leaves_with_path(policy)
    np.savez(folder / "policy.npz", **{name_leaf(path): np.asarray(x) for path, x in leaves})
    (folder / "settings.json").write_text(json.dumps(settings, indent=2) + "\n")


def load(folder) -> Saved:
    """Reads a run back: `ppo`, `hyperparams`, `policy` with the seed in front, `metrics`, `settings`.

    Nothing is unpickled. Raises ValueError where the folder holds no run, or one of another shape.
    """
    folder = Path(folder)
    if not (folder / "settings.json").exists():
        raise ValueError(f"{folder} holds no run: it has no settings.json")
    settings = json.loads((folder / "settings.json").read_text())
    config = Config(**settings["config"] | {"widths": tuple(settings["config"]["widths"])})
    ppo = batched(make_ppo(settings["env"], config))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), settings["num_seeds"]))
    like = jax.eval_shape(ppo.init, keys).policy
    metrics = xarray.load_dataset(folder / "metrics.nc", engine="scipy")
    hyperparams = Hyperparams(**{name: float(value) for name, value in settings["hyperparams"].items()})
    return Saved(ppo, hyperparams, _load_arrays(folder / "policy.npz", like), metrics, settings)


def _load_arrays(path: Path, like):
    with np.load(path, allow_pickle=False) as arrays:

        def read(where, x):
            name = name_leaf(where)
            if name not in arrays or arrays[name].shape != x.shape:
                found = arrays[name].shape if name in arrays else "nothing"
                raise ValueError(f"{path} does not fit its settings: {name} should be {x.shape}, found {found}")
            return jnp.asarray(arrays[name], x.dtype)

        return jax.tree_util.tree_map_with_path(read, like)


def name_leaf(path) -> str:
    """The name of a leaf of a pytree in a file, from its path."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _json_number(value):
    value = float(value)
    return value if np.isfinite(value) else str(value)
