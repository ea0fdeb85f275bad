"""Metrics on disk: xarray datasets as netCDF files, small ones of version 3, large ones of version 4 (HDF5).

`xarray.open_dataset` opens both and reads what is used. Version 3 holds at most 4 GiB of a variable, and is written
from memory as a whole.
"""

import math
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path

import numpy as np
import xarray

from purejaxppo.experiment.files import check_room, open_regular, replace_file

LARGE = 2**28  # bytes of a dataset that is not kept in memory as a whole
BLOCK = 2**26  # bytes that are copied at a time
SMALL = 2**20  # bytes of a variable that xarray writes as a whole


def read_dataset(path: Path) -> xarray.Dataset:
    """An xarray Dataset that `write_dataset` wrote. Raises ValueError for anything else."""
    try:
        with open_regular(path) as file:
            engine = "h5netcdf" if file.read(4) == b"\x89HDF" else "scipy"
        return xarray.load_dataset(path, engine=engine)
    except Exception as error:  # whatever a library raises for damaged files
        raise ValueError(f"{path} is damaged: {error or type(error).__name__}") from None


def save_dataset(path: Path, dataset: xarray.Dataset):
    """Writes an xarray Dataset as a netCDF file, atomically. Raises OSError if it cannot be written."""
    replace_file(path, lambda half: write_dataset(half, dataset))


def write_dataset(path: Path, dataset: xarray.Dataset):
    """Writes an xarray Dataset as a netCDF file. Raises OSError if it cannot be written."""
    if dataset.nbytes <= LARGE:
        dataset.to_netcdf(path, engine="scipy")
        return
    check_room(path.parent, dataset.nbytes)
    path.write_bytes(bytes(SMALL))  # a quota shows here: HDF5 would end the process
    large = [name for name, x in dataset.data_vars.items() if x.nbytes > SMALL and x.dtype.kind in "iuf"]
    starts = _write_frame(path, dataset, large)
    with open(path, "r+b") as file:
        for name, start in starts.items():
            file.seek(start)
            values = dataset[name].variable
            for block in blocks_of(values.shape, values.dtype.itemsize):
                file.write(np.ascontiguousarray(values[block].values).data)


def _write_frame(path: Path, dataset: xarray.Dataset, large: Sequence[Hashable]) -> dict[Hashable, int]:
    """Writes a dataset as HDF5 without the numbers of its large variables; returns where in the file they belong.

    HDF5 does not survive a disk that is full, so that it writes as little as possible.
    """
    import h5netcdf
    import h5py

    dataset.drop_vars(large).to_netcdf(path, engine="h5netcdf")
    with h5netcdf.File(path, "a") as file:
        for dim in dataset.dims - file.dimensions.keys():
            file.dimensions[dim] = dataset.sizes[dim]
        for name in large:
            x = dataset[name]
            stored = file.create_variable(str(name), x.dims, x.dtype.newbyteorder("="))
            stored[(0,) * x.ndim] = 0  # which allocates all of it
    with h5py.File(path) as file:
        return {name: file[str(name)].id.get_offset() for name in large}  # pyright: ignore[reportAttributeAccessIssue]


def blocks_of(shape: tuple[int, ...], itemsize: int) -> Iterator[tuple[int | slice, ...]]:
    """The indices of blocks of at most `BLOCK` bytes which make up an array, in the order of its memory."""
    sizes = [math.prod(shape[axis + 1 :]) * itemsize for axis in range(len(shape))]
    axis = next(axis for axis, size in enumerate(sizes) if size <= BLOCK)
    step = BLOCK // max(sizes[axis], 1)
    for before in np.ndindex(shape[:axis]):
        for start in range(0, shape[axis], step):
            yield (*before, slice(start, start + step))
