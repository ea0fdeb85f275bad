"""Files and folders of results: what a folder holds, atomic writes, states as plain arrays."""

import contextlib
import errno
import hashlib
import io
import json
import math
import os
import re
import shutil
import stat
import struct
import tempfile
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

SETTINGS, SWEEP, DIGESTS = "settings.json", "sweep.json", "files.json"
STUDY, BATCHES = "study.db", "batches"  # of Optuna; one on a server leaves its batches alone in a folder
FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}  # Windows has no quotas
LENGTHS_IN_ZIP = 26  # where the header of a member has those of its name and of what comes before its bytes


def kind_of(folder: str | Path) -> Literal["run", "sweep", "study"] | None:
    """What a folder holds: a run, a sweep, a study of Optuna, or nothing of these."""
    folder = Path(folder)
    if (folder / SETTINGS).exists():
        return "run"
    if (folder / SWEEP).exists():
        return "sweep"
    return "study" if (folder / STUDY).exists() or any(folder.glob(f"{BATCHES}/*/{SWEEP}")) else None


def refuse_other(folder: Path, *kinds: str):
    """Raises ValueError if a folder for new results holds one of some kinds of others already."""
    kind = kind_of(folder)
    if kind in kinds:
        raise ValueError(f"folder={folder} already holds a {kind} (name another folder)")


def refuse_foreign(folder: Path, *names: str):
    """Raises ValueError if a folder that holds no results has files by names that results would replace."""
    found = [name for name in names if (folder / name).exists()]
    if found and kind_of(folder) is None:
        raise ValueError(f"folder={folder} has a {found[0]}, but no run or sweep that it is of (name another folder)")


def refuse_study(folder: str | Path):
    """Raises ValueError if a folder that is to be read holds a study, whose batches are what can be read."""
    if kind_of(folder) == "study":
        batches = [path.parent for path in sorted((Path(folder) / BATCHES).glob(f"*/{SWEEP}"))]
        named = f"such as {batches[-1]}" if batches else "of which there is none yet"
        raise ValueError(f"{folder} holds a study of Optuna: its batches are sweeps that can be read, {named}")


def prepare(folder: Path):
    """Makes a folder for new results. Raises ValueError if it holds a run already or cannot be written."""
    if folder == Path():
        raise ValueError(f"folder={folder} is the current directory (name a folder for the results)")
    if kind_of(folder) == "run":
        raise ValueError(f"folder={folder} already holds a run (resume it, or name another folder)")
    refuse_other(folder, "study")
    make_writable(folder)


def make_writable(folder: Path):
    """Makes a folder if it does not exist. Raises ValueError if it cannot be written."""
    with _refused("folder", folder):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def check_writable(folder: Path):
    """Raises ValueError if a folder, or the one above it that exists, cannot be written; makes no folder."""
    with _refused("folder", folder):
        tempfile.TemporaryFile(dir=existing(folder)).close()


def existing(folder: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def check_file(path: Path):
    """Raises ValueError if a file cannot be written; an existing file stays as it is."""
    existed = path.exists()
    with _refused("path", path):
        path.open("ab").close()
    if not existed:
        path.unlink()


@contextlib.contextmanager
def _refused(argument: str, value: Path) -> Iterator[None]:
    """An OSError as a ValueError that names the argument."""
    try:
        yield
    except OSError as error:
        reason = "it is a file" if argument == "folder" and value.is_file() else error.strerror
        raise ValueError(f"{argument}={value} cannot be written: {reason} (name another {argument})") from None


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


def is_full(error: Exception) -> bool:
    """Whether an error says that a disk, a quota or a file is full; libraries in C++ say so in words."""
    number = re.search(r"os_error_code='(\d+)'", str(error))
    return (error.errno if isinstance(error, OSError) else int(number[1]) if number else None) in FULL


def check_room(folder: Path, size: int):
    """Raises OSError if a file of this many bytes does not fit into a folder; cheaper than finding out by writing it.

    Quotas are not seen.
    """
    if size > shutil.disk_usage(folder).free:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with contextlib.suppress(ImportError):  # Windows has no such limits
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
        if limit != resource.RLIM_INFINITY and size > limit:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))


def write_digests(folder: Path, names: Sequence[str]):
    """Writes the SHA-256 of files of a folder into its files.json, atomically."""
    save_json(folder / DIGESTS, {name: _digest(folder / name) for name in names})


def check_digests(folder: Path, names: Sequence[str], *, others: bool = True):
    """Compares files with their digests in files.json: `names`, and unless `others` is false all that it lists.

    Raises ValueError for the first file that has changed, is missing, or is not listed.
    """
    try:
        expected = json.loads(read_bytes(folder / DIGESTS, at_most=2**24))
        if not isinstance(expected, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{DIGESTS} cannot be read: {error}") from None
    for name in {**dict.fromkeys(names), **(expected if others else {})}:
        if name not in expected:
            raise ValueError(f"{name} is not listed in {DIGESTS}")
        if not (folder / name).is_file():
            raise ValueError(f"{name} is missing")
        if _digest(folder / name) != expected[name]:
            raise ValueError(f"{name} has changed since it was written")


def _digest(path: Path) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_regular(path: Path) -> BufferedReader:
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


class Place(NamedTuple):
    """Where an array is in an .npz file: quicker to read than by its name, as long as the file is the same."""

    start: int
    num_bytes: int
    checksum: int

    def read(self, path: Path) -> np.ndarray | None:
        """The array; None if the bytes there are others by now."""
        with open_regular(path) as file:
            file.seek(self.start)
            data = file.read(self.num_bytes)
        if len(data) != self.num_bytes or zlib.crc32(data) != self.checksum:
            return None
        return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)


@dataclass(frozen=True)
class StoredArray:
    """An array in an `ArrayFile`, which `numpy.asarray` reads."""

    file: "ArrayFile"
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.file.read(self.name).astype(dtype or self.dtype, copy=False)


class ArrayFile(Mapping[str, StoredArray]):
    """The arrays of an .npz file of `save_arrays` by name; their sizes on disk are verified before one is read.

    Raises ValueError for anything else, and for a damaged array, in a sentence that begins with the path.
    """

    def __init__(self, path: Path):
        self.path = path
        with self.damage(), contextlib.ExitStack() as opened:
            file = opened.enter_context(open_regular(path))
            self._num_bytes = os.fstat(file.fileno()).st_size
            self._zip = opened.enter_context(zipfile.ZipFile(file))
            if sum(x.compress_size for x in self._zip.infolist()) > self._num_bytes:
                raise ValueError("its arrays overlap")
            self._opened = opened.pop_all()
        self._members = {x.filename.removesuffix(".npy"): x for x in self._zip.infolist()}

    def __enter__(self) -> "ArrayFile":
        return self

    def __exit__(self, *_):
        self._opened.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, name: str) -> StoredArray:
        member = self._members[name]
        with self.damage():
            if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
                raise ValueError(f"{name} is compressed")
            with self._zip.open(member) as stream:
                version = np.lib.format.read_magic(stream)[0]
                read = np.lib.format.read_array_header_1_0 if version == 1 else np.lib.format.read_array_header_2_0
                shape, _, dtype = read(stream)
                header = stream.tell()
            if dtype.hasobject or header + math.prod(shape) * dtype.itemsize != member.file_size:
                raise ValueError(f"{name} has {member.file_size:,} bytes, which are not {dtype} {list(shape)}")
        return StoredArray(self, name, shape, dtype)

    def place(self, name: str) -> Place:
        """Where the bytes of an array are in the file."""
        member = self._members[name]
        with self.damage():
            assert self._zip.fp
            self._zip.fp.seek(member.header_offset + LENGTHS_IN_ZIP)
            lengths = struct.unpack("<2H", self._zip.fp.read(4))
        return Place(member.header_offset + LENGTHS_IN_ZIP + 4 + sum(lengths), member.file_size, member.CRC)

    def read(self, name: str) -> np.ndarray:
        """One array."""
        with self.damage(), self._zip.open(self._members[name]) as stream:
            return np.lib.format.read_array(stream, allow_pickle=False)

    def verify(self, names: Iterable[str]):
        """Compares arrays with their checksums, without keeping them."""
        for name in names:
            with self.damage(), self._zip.open(self._members[name]) as stream:
                while stream.read(2**20):
                    pass

    @contextlib.contextmanager
    def damage(self) -> Iterator[None]:
        """Turns every error of its block into a ValueError that the file is damaged."""
        try:
            yield
        except Exception as error:  # whatever a library raises for damaged files
            raise ValueError(f"{self.path} is damaged: {error or type(error).__name__}") from None


def save_json(path: Path, data: Any):
    """Writes plain data as JSON, atomically."""
    replace_file(path, lambda half: half.write_text(json.dumps(data, indent=2) + "\n"))


def save_arrays(path: Path, arrays: Mapping[str, Any]):
    """Writes arrays by name as an .npz file, atomically."""

    def write(half: Path):
        with open(half, "wb") as file:
            np.savez(file, **arrays)

    replace_file(path, write)


def differing_fields(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The names whose values differ between two descriptions, those of `now` first."""
    return [name for name in {**now, **before} if before.get(name) != now.get(name)]


def to_arrays(state: Any) -> dict[str, np.ndarray]:
    """The leaves of a pytree as plain arrays by their paths; random keys as their data.

    Numbers of a type that NumPy itself lacks, such as bfloat16, become integers with the same bits.
    """
    leaves = jax.tree_util.tree_leaves_with_path(state)
    arrays = {name_leaf(path): np.asarray(jax.random.key_data(x) if _is_key(x) else x) for path, x in leaves}
    return {name: x.view(_plain(x.dtype)) for name, x in arrays.items()}


def to_device_arrays(state: Any) -> dict[str, jax.Array]:
    """As `to_arrays`, but the arrays stay where they are, on devices of several processes."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    arrays = {name_leaf(path): jax.random.key_data(x) if _is_key(x) else jnp.asarray(x) for path, x in leaves}
    return {name: x.view(_plain(x.dtype)) if x.dtype != _plain(x.dtype) else x for name, x in arrays.items()}


def _plain(dtype: Any) -> np.dtype:
    """A type as files hold it: those of ml_dtypes lose their names there."""
    dtype = np.dtype(dtype)
    return np.dtype(f"uint{8 * dtype.itemsize}") if dtype.kind == "V" else dtype


def shapes_of(like: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of what `to_arrays` returns for a pytree."""
    leaves = jax.tree_util.tree_leaves_with_path(like)
    data = {name_leaf(path): jax.eval_shape(jax.random.key_data, x) if _is_key(x) else x for path, x in leaves}
    return {name: jax.ShapeDtypeStruct(x.shape, _plain(x.dtype)) for name, x in data.items()}


def from_arrays(arrays: Mapping[str, Any], like: Any, what: str = "a state") -> Any:
    """The pytree that `to_arrays` took apart, with the structure of `like`; `arrays` may be an `ArrayFile`.

    Raises ValueError, which begins with `what`, if a leaf is missing or has another shape or dtype.
    """

    shapes = shapes_of(like)

    def read(path, x):
        name = name_leaf(path)
        data = shapes[name]
        found = arrays.get(name, None if data.size else np.zeros(data.shape, data.dtype))  # Orbax keeps no empty arrays
        if found is None or found.shape != data.shape or found.dtype != data.dtype:
            widths = {np.dtype(data.dtype).itemsize, 0 if found is None else np.dtype(found.dtype).itemsize}
            remedy = " (set jax_enable_x64 as it was when this was written)" if widths == {4, 8} else ""
            found = "nothing" if found is None else f"{found.dtype} {list(found.shape)}"
            raise ValueError(
                f"{what} does not fit: {name} should be {data.dtype} {list(data.shape)}, found {found}{remedy}"
            )
        if not isinstance(found, jax.Array):
            found = np.asarray(found)
        return jax.random.wrap_key_data(jnp.asarray(found)) if _is_key(x) else jnp.asarray(found.view(x.dtype))

    return jax.tree_util.tree_map_with_path(read, like)


def name_leaf(path: tuple) -> str:
    """The name of a leaf of a pytree in a file, from its path."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _is_key(x: Any) -> bool:
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
