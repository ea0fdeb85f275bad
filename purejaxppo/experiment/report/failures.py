"""Failed runs: which turned nan, in which update, and what was not finite first."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray
from numpy.typing import ArrayLike

from purejaxppo.batched import WATCHED, causes
from purejaxppo.experiment.distributed import to_host
from purejaxppo.experiment.files import name_leaf
from purejaxppo.summary import FAILURE

UPDATE, METRIC = "failed_update", "failed_metric"  # variables of metrics, one value per run
MOST = 5  # failed runs that are named one by one


def mark_failures(metrics: xarray.Dataset, state: Any) -> xarray.Dataset:
    """The metrics of a run or a batch, with the variables `failed_update` and `failed_metric` for each run.

    These are the update in which the run turned nan, 0 if it did not, and what was not finite first: `loss`,
    `grad_norm` or a learned part of the state. They replace the metric `failure` of a batch (see `reported_failures`).

    Args:
        metrics: of updates up to `state`, as `label` makes them.
        state: a TrainState, a population, or their leaves by path.
    """
    leaves = _within_population(state) if isinstance(state, dict) else leaves_of(state)
    names = causes(map(str, metrics), leaves)
    codes = metrics[FAILURE].values if FAILURE in metrics else _codes_of_one(metrics, leaves, names)
    first, code = first_failures(codes)
    dims = metrics["learning_rate"].dims[:-1]
    # The state of a frozen run counts what it did; it may have failed before these metrics begin.
    last = np.asarray(to_host(leaves["num_updates"])) if FAILURE in metrics else metrics["updates"].values[first] - 1
    updates = np.where(code > 0, last + 1, 0).astype(np.int32)
    found = {UPDATE: (dims, updates), METRIC: (dims, name_causes(code, names))}
    return metrics.drop_vars(FAILURE, errors="ignore").assign(found)


def leaves_of(state: Any) -> dict[str, Any]:
    """The leaves of a TrainState, or of that of a population, by path; nothing is copied from the device."""
    runs = getattr(state, "runs", state)
    return {name_leaf(path): x for path, x in jax.tree_util.tree_leaves_with_path(runs)}


def _within_population(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of the runs of a population, if they are of one."""
    return {leaf.removeprefix("runs/"): x for leaf, x in leaves.items()}


def first_failures(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each run the index of the update since which it has failed, and the code of that update, 0 if it has not.

    `codes` [..., U] are 0 in updates that succeeded. A run of a population may fail and continue from another.
    """
    failed = _to_the_end(codes > 0)
    first = failed.argmax(-1)
    code = np.take_along_axis(codes, first[..., None], -1)[..., 0]
    return first, np.where(failed[..., -1], code, 0)


def _to_the_end(failed: np.ndarray) -> np.ndarray:
    """Where an update [..., U] and all after it have failed."""
    return np.flip(np.logical_and.accumulate(np.flip(failed, -1), axis=-1), -1)


def name_causes(codes: ArrayLike, names: Sequence[str]) -> np.ndarray:
    """The names of causes by their places from 1; "" for 0."""
    return np.array(["", *names])[np.asarray(codes)]


def describe_failure(run: str, update: int, metric: str, *, frozen: bool = True) -> str:
    """A sentence on a failed run.

    Args:
        run: what identifies it, such as "run 3".
        update: the update in which it turned nan.
        metric: what was not finite first.
        frozen: whether its state is still that before this update.
    """
    after = "is frozen as it was before" if frozen else "is lost (a run of `batched` stays as it was before)"
    return f"{run} turned nan in update {update}, where {metric or 'a number'} was not finite, and {after}"


def failures_of(metrics: xarray.Dataset) -> dict[int, str]:
    """A sentence for every failed run of a run or a batch, by its number, from the variables of `mark_failures`."""
    if UPDATE not in metrics:
        return {}
    alone = not metrics[UPDATE].dims
    updates, names = (np.atleast_1d(metrics[name].values).tolist() for name in (UPDATE, METRIC))
    return {
        run: describe_failure("the run" if alone else f"run {run}", update, name, frozen=not alone)
        for run, (update, name) in enumerate(zip(updates, names))
        if update
    }


def join_failures(sentences: Sequence[str], num_runs: int) -> str:
    """The sentences on failed runs as one text, the first few of them."""
    more = [f"{len(sentences) - MOST} more runs turned nan"] if len(sentences) > MOST else []
    every = [f"all {num_runs} runs have failed"] if len(sentences) == num_runs > 1 else []
    return "; ".join([*sentences[:MOST], *more, *every])


def _codes_of_one(metrics: xarray.Dataset, leaves: Mapping[str, Any], names: Sequence[str]) -> np.ndarray:
    """The codes [..., U] of a run that nothing freezes: its metrics tell the cause, or else the state that is left."""
    shape = metrics["learning_rate"].shape
    finite = {
        name: np.isfinite(metrics[name].values).reshape(*shape, -1).all(-1) for name in WATCHED if name in metrics
    }
    codes = np.where(finite["loss"], 0, 1) if "loss" in metrics else np.zeros(shape, int)
    lost = [part for part in names if len(shape) == 1 and part not in metrics and not _is_finite(leaves, part)]
    if lost and not codes[-1]:
        codes[-1] = names.index(lost[0]) + 1
    if "grad_norm" in metrics:  # it names a failure that follows; by itself it may overflow where the update is finite
        failed = codes > 0
        if "loss" not in metrics:  # nothing else tells of the updates before the last
            failed = _to_the_end(failed | ~finite["grad_norm"]) & failed[..., -1:]
        follows = np.append(failed[..., 1:], failed[..., -1:], -1)
        codes[~finite["grad_norm"] & follows & (codes != 1)] = names.index("grad_norm") + 1
    return codes


def _is_finite(leaves: Mapping[str, Any], part: str) -> bool:
    """Whether all numbers of a learned part of a state are finite."""
    own = [x for leaf, x in leaves.items() if causes((), [leaf]) == [part]]
    return all(np.isfinite(np.asarray(x)).all() for x in own if jnp.issubdtype(x.dtype, jnp.inexact))
