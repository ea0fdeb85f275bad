"""Files and folders of results: what a folder holds, atomic writes, states as plain arrays."""

import contextlib
import json
import os
import re
import stat
import tempfile
import uuid
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal

import jax
import jax.numpy as jnp
import numpy as np

# What reading a damaged file of arrays may raise.
DAMAGE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError)
SETTINGS, SWEEP = "settings.json", "sweep.json"


def kind_of(folder: str | Path) -> Literal["run", "sweep"] | None:
    """What a folder holds: a run, a sweep, or neither."""
    if (Path(folder) / SETTINGS).exists():
        return "run"
    return "sweep" if (Path(folder) / SWEEP).exists() else None


def prepare(folder: Path):
    """Makes a folder for new results. Raises ValueError if it holds a run already or cannot be written."""
    if folder == Path():
        raise ValueError(f"folder={folder} is the current directory (name a folder for the results)")
    if kind_of(folder) == "run":
        raise ValueError(f"folder={folder} already holds a run (name another folder)")
    make_writable(folder)


def make_writable(folder: Path):
    """Makes a folder if it does not exist. Raises ValueError if it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"folder={folder} cannot be written: {error.strerror} (name another folder)") from None


def make_new(folder: Path) -> Path:
    """Makes a folder that nobody else has: `folder`, or if that exists `folder-2`, `folder-3` and so on.

    Raises ValueError if the folder above it cannot be written.
    """
    make_writable(folder.parent)
    new, number = folder, 1
    while True:
        try:
            new.mkdir()
            return new
        except FileExistsError:
            number += 1
            new = folder.with_name(f"{folder.name}-{number}")


def replace_file(path: Path, write: Callable[[Path], Any]):
    """Writes a file atomically: beside `path`, then moved there, so that readers find the old file or the new one.

    `write` is given the path of the file beside it, whose name ends in .half. It is new and its name is not known
    before, so no link stands there that would lead elsewhere; a link at `path` is replaced.
    """
    half = path.with_name(f"{path.name}.{uuid.uuid4().hex}.half")
    os.close(os.open(half, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        write(half)
        flush_to_disk(half)
        os.replace(half, path)
    finally:
        half.unlink(missing_ok=True)


def remove_halves(folder: Path, name: str = "*"):
    """Removes what killed processes left of `replace_file` and of locks, for one file or all of a folder.

    Only the writer of these files may call it.
    """
    for half in folder.glob(f"{name}.half"):
        if re.fullmatch(r".+\.([0-9a-f]{32}|\d+)\.half", half.name) and (half.is_symlink() or half.is_file()):
            half.unlink(missing_ok=True)


def flush_to_disk(path: Path):
    """Waits until a file or a folder is on its disk; does nothing for a folder where the system has no such call."""
    if path.is_dir():
        with contextlib.suppress(OSError):
            _flush(path, os.O_RDONLY)
    else:
        _flush(path, os.O_RDWR)  # Windows does not flush what is open for reading


def _flush(path: Path, flags: int):
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_regular(path: Path) -> BinaryIO:
    """Opens a file for reading. Raises ValueError for a folder, a pipe or a device, whose reading might never end."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("it is not a regular file")
    return open(path, "rb")


def read_bytes(path: Path, at_most: int) -> bytes:
    """The contents of a file. Raises ValueError if it is not a regular file, or larger than `at_most` bytes."""
    with open_regular(path) as file:
        data = file.read(at_most + 1)
    if len(data) > at_most:
        raise ValueError(f"it has more than {at_most:,} bytes")
    return data


def save_json(path: Path, data: Any):
    """Writes plain data as JSON, atomically."""
    replace_file(path, lambda half: half.write_text(json.dumps(data, indent=2) + "\n"))


def save_arrays(path: Path, arrays: Mapping[str, Any]):
    """Writes arrays by name as an .npz file, atomically."""

    def write(half: Path):
        with open(half, "wb") as file:
            np.savez(file, **arrays)

    replace_file(path, write)


def save_dataset(path: Path, dataset: Any):
    """Writes an xarray Dataset as a netCDF file, atomically."""
    replace_file(path, lambda half: dataset.to_netcdf(half, engine="scipy"))


def differing_fields(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The names whose values differ between two descriptions, those of `now` first."""
    return [name for name in {**now, **before} if before.get(name) != now.get(name)]


def to_arrays(state: Any) -> dict[str, np.ndarray]:
    """The leaves of a pytree as plain arrays by their paths; random keys as their data."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {name_leaf(path): np.asarray(jax.random.key_data(x) if _is_key(x) else x) for path, x in leaves}


def from_arrays(arrays: Mapping[str, np.ndarray], like: Any, what: str = "a state") -> Any:
    """The pytree that `to_arrays` took apart, with the structure of `like`.

    Raises ValueError, which begins with `what`, if a leaf is missing or has another shape or dtype.
    """

    def read(path, x):
        name = name_leaf(path)
        data = jax.eval_shape(jax.random.key_data, x) if _is_key(x) else x
        found = arrays.get(name, None if data.size else np.zeros(data.shape, data.dtype))  # Orbax keeps no empty arrays
        if found is None or found.shape != data.shape or found.dtype != data.dtype:
            found = "nothing" if found is None else f"{found.dtype} {list(found.shape)}"
            raise ValueError(f"{what} does not fit: {name} should be {data.dtype} {list(data.shape)}, found {found}")
        return jax.random.wrap_key_data(jnp.asarray(found)) if _is_key(x) else jnp.asarray(found)

    return jax.tree_util.tree_map_with_path(read, like)


def name_leaf(path: tuple) -> str:
    """The name of a leaf of a pytree in a file, from its path."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
