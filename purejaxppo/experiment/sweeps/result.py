"""The result of a sweep: labelled metrics, the best setting, and any run's policy out of the batch."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import jax
import numpy as np
import xarray

from purejaxppo.experiment.files import from_arrays
from purejaxppo.experiment.report.metrics import label_metric
from purejaxppo.experiment.report.ranking import best, rank
from purejaxppo.experiment.report.statistics import final_scores
from purejaxppo.experiment.sweeps.slices import Slice, Slices, load_sweep_of
from purejaxppo.experiment.sweeps.sweep import Sweep, name_run
from purejaxppo.ppo import PPO, TrainState, make_ppo
from purejaxppo.rollout import Policy
from purejaxppo.text import show_setting, to_coordinate


@dataclass(frozen=True)
class Result:
    """What a sweep has come to; a run that is not done has nan from there on."""

    sweep: Sweep
    metrics: xarray.Dataset
    """A dimension for every swept field (`setting` where several are paired or sampled), then `seed` and `update`;
    `step` counts the environment steps of one run. `failed_update` is the update in which a run turned nan, 0 if
    none."""
    slices: Slices
    make: Callable = make_ppo
    steps: int = 0
    """Environment steps that this call made, of all runs."""
    run_seconds: float = 0.0

    @cached_property
    def scores(self) -> xarray.DataArray:
        """Mean return of the last 100 training episodes of every run; nan for those that turned nan."""
        return final_scores(self.metrics)

    def ranked(self) -> xarray.Dataset:
        """Settings, best interquartile mean of `scores` first (see `ranking.rank`)."""
        return rank(self.scores)

    def best(self) -> dict:
        """The setting with the highest interquartile mean, field -> value."""
        row = best(self.scores)
        return next((r for r in self.sweep.table.rows() if {n: to_coordinate(v) for n, v in r.items()} == row), row)

    def failed(self) -> list[str]:
        """A sentence for every run that turned nan."""
        rows = self.sweep.table.rows()
        updates = self.metrics["failed_update"].values.reshape(len(rows), self.sweep.num_seeds)
        where = "{} seed={} turned nan in update {}; frozen as before it".format
        return [
            where(show_setting(rows[setting]), seed, updates[setting, seed])
            for setting, seed in self.sweep.runs().values()
            if updates[setting, seed]
        ]

    def ppo(self, **setting) -> PPO:
        """The PPO of a run under a setting, field=value for as many fields as tell it apart."""
        row = self.sweep.table.rows()[self.sweep.table.index(**setting)]
        return self.make(self.sweep.env_of(row), self.sweep.config_of(row))

    def state(self, seed: int = 0, **setting) -> TrainState:
        """The whole state of one run, ready to be trained on. Raises ValueError where it is not there."""
        row = self.sweep.table.rows()[self.sweep.table.index(**setting)]
        if not 0 <= seed < self.sweep.num_seeds:
            raise ValueError(f"seed={seed} must be from 0 to {self.sweep.num_seeds - 1}")
        name = name_run(row, seed)
        part = next((part for part in self.slices.read() if name in part.runs), None)
        if part is None:
            raise ValueError(f"{show_setting(row)} seed={seed} has not been trained yet (run the sweep again)")
        states = self.slices.load(part.name).state
        i = part.runs.index(name)
        keys = jax.eval_shape(partial(jax.random.split, num=1), jax.random.key(0))
        init = partial(self.ppo(**row).init, hyperparams=self.sweep.hyperparams_of(row))
        like = jax.eval_shape(jax.vmap(init), keys)
        return from_arrays({name: x[i : i + 1] for name, x in states.items()}, like)[0]

    def policy(self, seed: int = 0, **setting) -> Policy:
        """The policy of one run, which the `act` and `evaluate` of `ppo(**setting)` take."""
        return self.state(seed, **setting).policy


def make_result(sweep: Sweep, slices: Slices, make: Callable, steps: int, run_seconds: float) -> Result:
    """The result of what is there of a sweep; in its folder the metrics are written too."""
    metrics = label_sweep(sweep, slices.read(), slices.machine())
    if slices.folder and jax.process_index() == 0:
        half = slices.folder / "results.nc.half"
        metrics.to_netcdf(half, engine="scipy")
        os.replace(half, slices.folder / "results.nc")
    return Result(sweep, metrics, slices, make, steps, run_seconds)


def load_sweep(folder, make: Callable = make_ppo) -> Result:
    """Reads a sweep back from its folder, whether it is finished or not.

    Raises ValueError where there is none.
    """
    folder = Path(folder)
    sweep, slices = load_sweep_of(folder), Slices(folder)
    return Result(sweep, label_sweep(sweep, slices.read(), slices.machine()), slices, make)


def label_sweep(sweep: Sweep, slices: list[Slice], machine: dict) -> xarray.Dataset:
    """The metrics of all runs with names to their axes; nan, and no episodes, where nothing is known.

    `machine` says where they were made.
    """
    if not slices:
        raise ValueError("nothing of this sweep is done yet")
    rows = sweep.table.rows()
    runs = sweep.runs()
    configs = [sweep.config_of(row) for row in rows]
    num_updates = max(config.num_updates for config in configs)
    like = {name: x for part in slices for name, x in part.metrics.items()}  # environments may report others
    arrays = {
        name: np.full(
            (len(rows), sweep.num_seeds, num_updates, *_longest(slices, name)),
            0 if x.dtype.kind in "iu" else np.nan,
            x.dtype,
        )
        for name, x in like.items()
    }
    failed = np.zeros((len(rows), sweep.num_seeds), np.int32)
    for part in slices:
        for i, name in enumerate(part.runs):
            if name in runs:
                for metric, x in part.metrics.items():
                    arrays[metric][runs[name]][tuple(map(slice, x.shape[1:]))] = x[i]
                done = part.state["num_updates"][i]
                failed[runs[name]] = done + 1 if done < part.num_updates else 0
    dims, shape, coords = _axes(sweep)
    update = np.arange(1, num_updates + 1)
    steps = np.stack([np.where(update <= c.num_updates, update * float(c.steps_per_update), np.nan) for c in configs])
    # What the schedule makes of a swept field is a metric of the same name.
    names = {name: f"current_{name}" if name in sweep.table.names else name for name in arrays}
    variables = {
        names[n]: label_metric(n, (*dims, "seed", "update"), x.reshape(*shape, *x.shape[1:])) for n, x in arrays.items()
    }
    variables["failed_update"] = (*dims, "seed"), failed.reshape(*shape, -1)
    coords |= {
        "seed": np.arange(sweep.num_seeds, dtype=np.int32),
        "update": update.astype(np.int32),
        "step": _where_it_varies(dims, steps.reshape(*shape, -1)),
    }
    return xarray.Dataset(variables, coords, _attributes(sweep, machine))


def _longest(slices: list[Slice], name: str) -> tuple[int, ...]:
    """The shape of a metric in one update; of vectors, whose length may differ from group to group, the longest."""
    return max(part.metrics[name].shape[2:] for part in slices if name in part.metrics)


def _attributes(sweep: Sweep, machine: dict) -> dict:
    """Where the metrics come from: plain text, and JSON under `sweep` and `machine`."""
    return {
        "env": sweep.env,
        "purejaxppo": machine["versions"]["purejaxppo"],
        "jax": machine["versions"]["jax"],
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


def _where_it_varies(dims, steps: np.ndarray):
    """Steps [*settings, update] along the dimensions in which they differ."""
    for axis in reversed(range(len(dims))):
        first = np.take(steps, [0], axis)
        if np.array_equal(np.broadcast_to(first, steps.shape), steps, equal_nan=True):
            steps, dims = np.take(steps, 0, axis), dims[:axis] + dims[axis + 1 :]
    return (*dims, "update"), steps
