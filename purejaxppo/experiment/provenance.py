"""The provenance of a result: versions, code, device, command and time, as plain JSON data."""

import datetime
import functools
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import jax
import numpy as np

import purejaxppo
from purejaxppo.envs.suite import suite_versions

PASSWORD = re.compile(r"(://[^:/@\s]*:)[^@\s]*@")  # in a URL
PACKAGES = ("jax", "jaxlib", "flax", "optax", "gymnax", "numpy")


class Device(TypedDict):
    """The devices of a process, which are of one kind."""

    platform: str
    kind: str
    count: int


class Machine(TypedDict):
    """What made a result: one process."""

    versions: dict[str, str]
    """Of purejaxppo, Python, `PACKAGES`, and the suites of environments in use."""
    code: str | None
    """See `code_version`."""
    device: Device
    cpu_cores: int | None
    xla_flags: NotRequired[str]
    """The environment variable XLA_FLAGS; folders that were written before it was recorded lack it."""
    command: list[str]
    started: str
    """The time in UTC."""


def describe_machine() -> Machine:
    """Versions, code, device, command and time of this process."""
    device = jax.devices()[0]
    return {
        "versions": {
            "purejaxppo": purejaxppo.__version__,
            "python": platform.python_version(),
            **{package: importlib.metadata.version(package) for package in PACKAGES},
            **suite_versions(),
        },
        "code": code_version(),
        "device": {"platform": device.platform, "kind": device.device_kind, "count": jax.device_count()},
        "cpu_cores": os.cpu_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "command": _command(),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _command() -> list[str]:
    """The words of the command, without passwords in URLs.

    The kernel of a notebook was given the names of temporary files, which say nothing.
    """
    in_notebook = [Path(word).name for word in sys.argv[:1]] == ["ipykernel_launcher.py"]
    return ["notebook"] if in_notebook else [PASSWORD.sub(r"\1***@", word) for word in sys.argv]


@functools.cache
def code_version() -> str | None:
    """The commit of the checkout with the package, with "+" if it has changes; None outside a checkout."""
    where = Path(purejaxppo.__file__).parent
    git = ["git", "-C", str(where), "describe", "--always", "--dirty=+", "--abbrev=40", "--exclude=*"]
    tracked = ["git", "-C", str(where), "ls-files", "--error-unmatch", "__init__.py"]
    try:
        subprocess.run(tracked, capture_output=True, check=True, timeout=10)
        return subprocess.run(git, capture_output=True, check=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def as_json(value: Any) -> Any:
    """Numbers as JSON holds them.

    Fractions are as short as float32 allows, infinities are words. An array with equal entries becomes one number, a
    schedule the list of its numbers.
    """
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
