"""How a sweep is divided: into slices, which all calls cut alike, and the slices into shares of processes."""

import operator
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from purejaxppo.experiment.sweeps.slices import Division, Slice, by_run
from purejaxppo.experiment.sweeps.sweep import Group, Sweep
from purejaxppo.text import count, quote, show_setting

SLURM_ID, SLURM_MIN = "SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN"
SLURM_STEP, SLURM_COUNT = "SLURM_ARRAY_TASK_STEP", "SLURM_ARRAY_TASK_COUNT"


class Share(NamedTuple):
    """The part of a sweep that one of several processes trains."""

    index: int
    """From 0."""
    number: int
    """Shares of the sweep."""

    def __str__(self) -> str:
        return f"{self.index}/{self.number}"


def read_share(share: Any, environment: Mapping[str, str] = os.environ) -> Share:
    """A share from a pair (index, number), from text such as "0/4", or for "slurm" from the variables of a job array.

    Args:
        share: what the user gave.
        environment: variables by their names.

    Raises:
        ValueError: for anything else, or if a variable is missing.
    """
    if isinstance(share, str) and share == "slurm":
        return _slurm_share(environment)
    try:
        index, number = map(int, share.split("/")) if isinstance(share, str) else map(operator.index, share)
    except (TypeError, ValueError):
        index, number = 0, 0
    if not 0 <= index < number:
        shown = share if isinstance(share, str) else quote(share)
        raise ValueError(
            f"share={shown} must be the index of a share, from 0, and their number: (0, 4) or '0/4' is the first of "
            "four ('slurm' reads them from a job array)"
        )
    return Share(index, number)


def _slurm_share(environment: Mapping[str, str]) -> Share:
    """The share of a task of a job array: its place among the tasks."""
    names = (SLURM_ID, SLURM_MIN, SLURM_COUNT)
    missing = [name for name in names if not environment.get(name, "").isdecimal()]
    if missing:
        raise ValueError(
            f"share=slurm needs the variables of a job array, but {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not set (submit with sbatch --array=0-3, or name the share: 0/4)"
        )
    task, first, number = (int(environment[name]) for name in names)
    step = environment.get(SLURM_STEP, "")
    index, rest = divmod(task - first, max(int(step), 1) if step.isdecimal() else 1)
    if rest or not 0 <= index < number:
        raise ValueError(
            f"share=slurm needs a job array without gaps, but task {task} is none of {number} from {first} on "
            "(submit with sbatch --array=0-3, or name the share: 0/4)"
        )
    return Share(index, number)


def divide(
    sweep: Sweep, stored: Sequence[Slice], kept: Division | None, slice_sizes: Mapping[str, int] | None = None
) -> Division:
    """How a sweep is divided: as its folder says, or else as its slices are, or else as wanted.

    Args:
        sweep: has the runs.
        stored: all slices so far.
        kept: the division in the folder, perhaps of the same sweep with fewer runs.
        slice_sizes: those wanted, by `Sweep.name_program`.
    """
    found, trained = {}, []
    for group in sweep.groups():
        of_group = _among(sweep.runs(group.settings), stored)
        found |= {sweep.name_program(group): len(slice_.runs) for slice_ in of_group[:1]}
        trained += [slice_.name for slice_ in of_group if slice_.num_updates >= group.config.num_updates]
    if kept and kept.num_runs == sweep.num_runs:
        trained = kept.trained
    sizes = {**(slice_sizes or {}), **found, **(kept.slice_sizes if kept else {})}
    return Division(sizes, sweep.num_runs, sorted(trained))


def own_slices(
    sweep: Sweep, stored: Sequence[Slice], division: Division, share: Share | None = None
) -> dict[Group, list[Slice]]:
    """The slices that a process is to train yet, by group.

    A share has every n-th slice of the sweep, group after group, whether it is stored or not. So the shares are as
    equal as can be, also where groups have few slices, and the same at any time. Slices that were complete before the
    sweep got more runs do not count.

    Args:
        sweep: has the runs.
        stored: all slices so far.
        division: of the sweep; slices have one run where it has no size.
        share: of the process; None for the whole sweep.
    """
    (index, number), counted = share or Share(0, 1), 0
    own: dict[Group, list[Slice]] = {}
    for group in sweep.groups():
        size = division.slice_sizes.get(sweep.name_program(group), 1)
        pending = {slice_.name: slice_ for slice_ in pending_slices(sweep, group, stored, size)}
        place = {name: i for i, name in enumerate(sweep.runs(group.settings))}
        complete = {slice_.name: slice_ for slice_ in _among(place, stored) if slice_.name not in pending}
        counting = pending | {name: complete[name] for name in complete.keys() - set(division.trained)}
        ordered = sorted(counting, key=lambda name: (place[counting[name].runs[0]], name))
        names = set(ordered[(index - counted) % number :: number])
        counted += len(ordered)
        own |= {group: [slice_ for name, slice_ in pending.items() if name in names]}
    return {group: slices for group, slices in own.items() if slices}


def pending_slices(sweep: Sweep, group: Group, stored: Sequence[Slice], slice_size: int) -> list[Slice]:
    """The slices of a group that are still to train: unfinished ones, then those of runs that have none yet.

    Args:
        sweep: has the runs.
        group: of its settings.
        stored: all slices so far.
        slice_size: runs of a new slice.
    """
    names = sweep.runs(group.settings)
    of_group = _among(names, stored)
    unfinished = [slice_ for slice_ in of_group if slice_.num_updates < group.config.num_updates]
    covered = {name for slice_ in of_group for name in slice_.runs}
    missing = [name for name in names if name not in covered]
    batches = [missing[i : i + slice_size] for i in range(0, len(missing), slice_size)]
    return unfinished + [Slice((*runs, *runs[-1:] * (slice_size - len(runs))), {}, {}) for runs in batches]


def _among(names: Collection[str], slices: Sequence[Slice]) -> list[Slice]:
    """The slices whose runs have some names."""
    return [slice_ for slice_ in slices if slice_.runs[0] in names]


def describe_missing(sweep: Sweep, stored: Sequence[Slice]) -> str:
    """How many runs of a sweep are not finished, and the first of them."""
    found, rows = by_run(stored), sweep.table.rows()
    missing = [
        (setting, seed)
        for group in sweep.groups()
        for name, (setting, seed) in sweep.runs(group.settings).items()
        if name not in found or found[name][0].num_updates < group.config.num_updates
    ]
    if not missing:
        return f"none of {count(sweep.num_runs, 'run')}"
    setting, seed = min(missing)
    return f"{len(missing)} of {count(sweep.num_runs, 'run')}, such as {show_setting(rows[setting])} seed={seed}"
