"""What made a result: settings, versions, code, device, command and time, as plain JSON data."""

import datetime
import functools
import importlib.metadata
import os
import platform
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import jax
import numpy as np

import purejaxppo
from purejaxppo.config import Config, Hyperparams

PACKAGES = ("jax", "jaxlib", "flax", "optax", "gymnax", "numpy")
SESSION = ("versions", "code", "device", "cpu_cores", "command", "started")


def describe(env: str, config: Config, hyperparams: Hyperparams, **more) -> dict:
    """Settings of a run about to start, with what it runs on."""
    return {
        "env": env,
        "config": {name: list(x) if isinstance(x, tuple) else x for name, x in asdict(config).items()},
        "hyperparams": {name: as_json(hyperparams.get(name)) for name in hyperparams.names},
        **more,
        **describe_machine(),
    }


def describe_machine() -> dict:
    """Versions, code, device, command and time of what is about to start."""
    device = jax.devices()[0]
    return {
        "versions": {
            "purejaxppo": purejaxppo.__version__,
            "python": platform.python_version(),
            **{package: importlib.metadata.version(package) for package in PACKAGES},
        },
        "code": code_version(),
        "device": {"platform": device.platform, "kind": device.device_kind, "count": jax.device_count()},
        "cpu_cores": os.cpu_count(),
        "command": sys.argv,
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


@functools.cache
def code_version() -> str | None:
    """The commit of the checkout that the package lies in, with "+" if it was changed since; None outside of one."""
    where = Path(purejaxppo.__file__).parent
    git = ["git", "-C", str(where), "describe", "--always", "--dirty=+", "--abbrev=40", "--exclude=*"]
    tracked = ["git", "-C", str(where), "ls-files", "--error-unmatch", "__init__.py"]
    try:
        subprocess.run(tracked, capture_output=True, check=True, timeout=10)
        return subprocess.run(git, capture_output=True, check=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def as_json(value):
    """Numbers as JSON holds them: fractions as short as float32 has them, what is infinite as a word; where all agents
    of a batch have the same, one number; of a schedule its numbers."""
    if callable(value):
        return [as_json(x) for x in jax.tree.leaves(value)]
    value = np.asarray(value)
    if value.ndim and value.size and (value == value.flat[0]).all():
        value = value.flat[0]
    if np.ndim(value):
        return [as_json(x) for x in value]
    if value.dtype.kind != "f":
        return value.item()
    return float(str(np.float32(value))) if np.isfinite(value) else str(value)
