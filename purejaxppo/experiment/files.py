"""Files of results: folders made ready to take them, and states as plain arrays by name, and back."""

import zipfile
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

# What reading a damaged file of arrays may raise.
DAMAGE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError)


def to_arrays(state) -> dict[str, np.ndarray]:
    """The leaves of a pytree as plain arrays by their paths; random keys as their data."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {name_leaf(path): np.asarray(jax.random.key_data(x) if _is_key(x) else x) for path, x in leaves}


def from_arrays(arrays: dict[str, np.ndarray], like, what: str = "a state"):
    """The pytree that `to_arrays` took apart, with the structure of `like`.

    Raises ValueError, which begins with `what`, where a leaf is missing or has another shape or type.
    """

    def read(path, x):
        name = name_leaf(path)
        data = jax.eval_shape(jax.random.key_data, x) if _is_key(x) else x
        found = arrays.get(name)
        if found is None or found.shape != data.shape or found.dtype != data.dtype:
            found = "nothing" if found is None else f"{found.dtype} {list(found.shape)}"
            raise ValueError(f"{what} does not fit: {name} should be {data.dtype} {list(data.shape)}, found {found}")
        return jax.random.wrap_key_data(found) if _is_key(x) else jnp.asarray(found)

    return jax.tree_util.tree_map_with_path(read, like)


def name_leaf(path) -> str:
    """The name of a leaf of a pytree in a file, from its path."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _is_key(x) -> bool:
    return jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


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
