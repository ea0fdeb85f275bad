"""The metrics of all runs of a sweep as labelled arrays, which read the slices that are needed when they are used."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import xarray
from xarray.backends import BackendArray
from xarray.core import indexing

from purejaxppo.experiment.datasets import LARGE
from purejaxppo.experiment.report.failures import METRIC, UPDATE
from purejaxppo.experiment.sweeps.slices import Slice, by_run
from purejaxppo.experiment.sweeps.sweep import Sweep
from purejaxppo.summary import FAILURE
from purejaxppo.text import to_coordinate


def label_sweep(sweep: Sweep, slices: Sequence[Slice], machine: Mapping) -> xarray.Dataset:
    """The metrics of all runs with names to their axes; nan, and 0 episodes, for updates that are not done.

    `machine` is where they were made (see `describe_machine`). Raises ValueError without any slice.
    """
    if not slices:
        raise ValueError("no run of this sweep has been trained yet (run the sweep first)")
    dims, shape, coords = _axes(sweep)
    num_updates = max(config.num_updates for config in sweep.configs)
    places = _find(sweep, slices, shape)
    like = {name: x for slice_ in slices for name, x in slice_.metrics.items() if name != FAILURE}
    variables: dict[str, Any] = {}
    for name, x in like.items():  # groups may report different metrics
        sizes = *shape, sweep.num_seeds, num_updates, *_longest(slices, name)
        array: Any = indexing.LazilyIndexedArray(_Metric(name, places, sizes, x.dtype))
        cached = indexing.MemoryCachedArray(indexing.CopyOnWriteArray(array))  # as `xarray.open_dataset` has them
        # The current value of a swept and scheduled field is a metric of the same name.
        shown = f"current_{name}" if name in sweep.table.names else name
        variables[shown] = (*dims, "seed", "updates", f"{name}_index")[: len(sizes)], cached
    failed, causes = _failures(places)
    variables[UPDATE], variables[METRIC] = ((*dims, "seed"), failed), ((*dims, "seed"), causes)
    update = np.arange(1, num_updates + 1)
    lengths = np.array([[config.num_updates, config.steps_per_update] for config in sweep.configs])
    steps = np.where(update <= lengths[:, :1], update * lengths[:, 1:].astype(float), np.nan)
    coords |= {
        "seed": np.arange(sweep.num_seeds, dtype=np.int32),
        "updates": update.astype(np.int32),
        "step": _where_it_varies(dims, steps.reshape(*shape, -1)),
    }
    labelled = xarray.Dataset(variables, coords, _attributes(sweep, machine))
    return labelled.load() if labelled.nbytes <= LARGE else labelled


class _Places(NamedTuple):
    """Where the runs of a sweep are stored."""

    slices: Sequence[Slice]
    indices: np.ndarray
    """Index of the slice of each run [*settings, seed]; -1 for a run that has none."""
    rows: np.ndarray
    """The row of each run in its slice."""


def _find(sweep: Sweep, slices: Sequence[Slice], shape: Sequence[int]) -> _Places:
    """Raises ValueError if a slice has done more updates than its runs have."""
    runs, index_of = sweep.runs(), {id(slice_): i for i, slice_ in enumerate(slices)}
    indices, rows = np.full((len(sweep.table), sweep.num_seeds), -1), np.zeros((len(sweep.table), sweep.num_seeds), int)
    for name, (slice_, row) in by_run(slices).items():
        if slice_.num_updates > sweep.configs[runs[name][0]].num_updates:
            raise ValueError(f"the slice {slice_.name} has done {slice_.num_updates} updates, more than its runs have")
        indices[runs[name]], rows[runs[name]] = index_of[id(slice_)], row
    return _Places(slices, indices.reshape(*shape, -1), rows.reshape(*shape, -1))


class _Metric(BackendArray):
    """A metric [*settings, seed, updates, ...] of all runs; an index reads the slices of its runs."""

    def __init__(self, name: str, places: _Places, shape: tuple[int, ...], dtype: np.dtype):
        self.name, self.places, self.shape, self.dtype = name, places, shape, dtype

    def __getitem__(self, key: indexing.ExplicitIndexer) -> np.ndarray:
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self._read)

    def _read(self, key: tuple) -> np.ndarray:
        """The numbers at an index of integers, slices and arrays, each of which selects along its own axis."""
        num_axes = self.places.indices.ndim
        indices, rows = (np.asarray(_select(x, key[:num_axes])) for x in (self.places.indices, self.places.rows))
        inner, of_update = key[num_axes:], self.shape[num_axes:]
        shape = _select(np.broadcast_to(0, of_update), inner).shape
        fill = 0 if self.dtype.kind in "iu" else np.nan
        found = np.full((indices.size, *shape), fill, self.dtype)
        order = np.argsort(indices, axis=None, kind="stable")
        which, first = np.unique(indices.ravel()[order], return_index=True)
        for index, runs in zip(which.tolist(), np.split(order, first[1:])):
            metric = self.places.slices[index].metrics.get(self.name) if index >= 0 else None
            if metric is not None:
                values = np.asarray(metric)[rows.ravel()[runs]]
                whole = np.full((len(runs), *of_update), fill, self.dtype)
                whole[tuple(map(slice, values.shape))] = values
                found[runs] = _select(whole, (slice(None), *inner))
        return found.reshape((*indices.shape, *shape))


def _select(x: np.ndarray, key: Sequence) -> np.ndarray:
    """An array indexed along each of its first axes independently."""
    for axis in reversed(range(len(key))):
        x = x[(*[slice(None)] * axis, key[axis])]
    return x


def _failures(places: _Places) -> tuple[np.ndarray, np.ndarray]:
    """The update in which each run turned nan, or 0, and what was not finite first [*settings, seed]."""
    failures = [slice_.failures() for slice_ in places.slices]
    failed, causes = np.zeros(places.indices.shape, np.int32), np.full(places.indices.shape, "", object)
    with_failures = np.isin(places.indices, [i for i, found in enumerate(failures) if found])
    for run in zip(*np.nonzero(with_failures)):
        failed[run], causes[run] = failures[places.indices[run]].get(int(places.rows[run]), (0, ""))
    return failed, causes.astype(str)


def _longest(slices: Sequence[Slice], name: str) -> tuple[int, ...]:
    """The shape of a metric in one update; if groups report vectors of different lengths, the longest."""
    return max(slice_.metrics[name].shape[2:] for slice_ in slices if name in slice_.metrics)


def _attributes(sweep: Sweep, machine: Mapping) -> dict:
    """The origin of the metrics: plain text, and JSON under `sweep` and `machine`."""
    return {
        "env": str(sweep.env),
        **{name: machine["versions"].get(name, "unknown") for name in ("purejaxppo", "jax")},
        "device": machine["device"]["kind"],
        "matmul_precision": sweep.config.matmul_precision,
        "sweep": json.dumps(sweep.to_json()),
        "machine": json.dumps(machine),
    }


def _axes(sweep: Sweep):
    """Names and lengths of the dimensions of settings, and their coordinates."""
    dims, shape, coords = [], [], {}
    joint = sum(len(axis) > 1 for axis in sweep.table.axes)
    for axis in sweep.table.axes:
        columns = {name: np.array([to_coordinate(value) for value in column]) for name, column in axis.items()}
        dim = next(iter(axis)) if len(axis) == 1 else "setting"
        if dim == "setting" and joint > 1:
            dim = f"setting_{sum(name.startswith('setting') for name in dims) + 1}"
        length = len(next(iter(columns.values())))
        dims.append(dim)
        shape.append(length)
        coords |= {name: (dim, column) for name, column in columns.items()}
        coords.setdefault(dim, (dim, np.arange(length, dtype=np.int32)))
    return dims, shape, coords


def _where_it_varies(dims: list[str], steps: np.ndarray) -> tuple[tuple[str, ...], np.ndarray]:
    """Steps [*settings, updates] along the dimensions in which they differ."""
    for axis in reversed(range(len(dims))):
        first = np.take(steps, [0], axis)
        if np.array_equal(np.broadcast_to(first, steps.shape), steps, equal_nan=True):
            steps, dims = np.take(steps, 0, axis), dims[:axis] + dims[axis + 1 :]
    return (*dims, "updates"), steps
