"""The result of a sweep: labelled metrics, the best setting, the state and the policy of any run."""

import contextlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import pandas
import xarray

from purejaxppo.experiment.datasets import save_dataset
from purejaxppo.experiment.files import from_arrays, shapes_of
from purejaxppo.experiment.identity import check_loaded, identify_ppo
from purejaxppo.experiment.report.failures import METRIC, UPDATE, describe_failure
from purejaxppo.experiment.report.metrics import to_dataframe
from purejaxppo.experiment.report.ranking import best, rank
from purejaxppo.experiment.report.statistics import NO_SCORE, scores_of, unfinished
from purejaxppo.experiment.sweeps.metrics import label_sweep
from purejaxppo.experiment.sweeps.rungs import best_first, last_scores, scores_on_rungs
from purejaxppo.experiment.sweeps.slices import RESULTS, Slice, Slices, by_run, read_identities, read_rungs, read_sweep
from purejaxppo.experiment.sweeps.sweep import Sweep, make_group, name_run
from purejaxppo.ppo import PPO, TrainState, make_ppo
from purejaxppo.rollout import Policy
from purejaxppo.text import count, shorten, show_setting, to_coordinate

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class SweepResult:
    """The result of a sweep so far; the metrics of an unfinished run are nan from there on."""

    sweep: Sweep
    metrics: xarray.Dataset
    """A dimension for every swept field (`setting` for fields that are paired or sampled), then `seed` and `updates`;
    the coordinate `step` counts the environment steps of one run. `failed_update` is the update in which a run turned
    nan, or 0, and `failed_metric` what was not finite first."""
    slices: Slices
    make: Callable = make_ppo
    allow_changed: Sequence[str] = ()
    """What may differ from what the folder was trained with."""
    steps: int = 0
    """Environment steps of all runs that this call made, with those of the processes that joined it."""
    run_seconds: float = 0.0
    interrupted: bool = False
    """Whether a signal ended the call."""
    unsaved: str = ""
    """What could not be written to the folder, as one sentence; it is in memory, and the same call later trains it
    again."""
    rungs: Sequence[int] = ()
    """Of successive halving, if that trained the folder: its ranking then counts, by the highest rung of a setting and
    its score there."""

    @property
    def num_unfinished(self) -> int:
        """Runs that have updates to make yet; their scores are of what they have done."""
        rate = self._learning_rate
        return int(unfinished(self.metrics[["episode_return", rate, UPDATE]]).sum())  # one metric tells, not all

    def __repr__(self) -> str:
        metrics = shorten(", ".join(map(str, self.metrics)), 90)
        return "\n".join(
            [
                f"SweepResult of {len(self.sweep.table)} settings x {self.sweep.num_seeds} seeds on {self.sweep.env}",
                f"  steps    {self.steps:,} in {self.run_seconds:.1f} s",
                f"  metrics  {dict(self.metrics.sizes)}: {metrics}",
                f"  folder   {self.slices.folder}",
            ]
        )

    @cached_property
    def scores(self) -> xarray.DataArray:
        """The score of every run: the mean return of its newest evaluation, or without any of its last 100 training
        episodes; nan for runs that turned nan."""
        return scores_of(self.metrics)

    def ranked(self) -> xarray.Dataset:
        """The settings by the interquartile mean of `scores`, best first (see `ranking.rank`).

        Those of successive halving are in its order, with the variables `rung`, the updates of the highest rung, and
        `rung_score`.
        """
        ranked = rank(self.scores)
        if not self.rungs:
            return ranked
        reached, last = last_scores(self.rung_scores)
        updates = np.array([0, *self.rungs])[reached]
        order = best_first(self.rung_scores)
        ranked = ranked.isel(setting=np.argsort(ranked["setting"].values)[order])
        return ranked.assign(rung=("setting", updates[order]), rung_score=("setting", last[order]))

    @cached_property
    def rung_scores(self) -> np.ndarray:
        """The score of every setting on every rung of successive halving, [settings, rungs]: nan where a setting did
        not get to the rung, -inf where it failed."""
        return scores_on_rungs(self.sweep, self.slices.read(warn=False), self.rungs)

    @property
    def rung_steps(self) -> list[int]:
        """Environment steps of a run at each rung."""
        return [updates * self.sweep.groups()[0].config.steps_per_update for updates in self.rungs]

    def plots(self, title: str = "", **options: Any) -> "dict[str, Figure]":
        """All plots that suit the swept fields, by name, see `plot_sweep` for the options; of halving its rungs too."""
        from purejaxppo.experiment.report.search_plots import plot_rungs
        from purejaxppo.experiment.report.sweep_plots import plot_sweep

        figures = plot_sweep(self.metrics, title=title, **options)
        if self.rungs:
            figures["rungs"] = plot_rungs(self.rung_scores, self.rung_steps, self.sweep.table.rows(), title)
        return figures

    def best(self) -> dict:
        """The first setting of `ranked`, field -> value.

        Raises ValueError if no run has a score, or if the files of some runs were ignored, so that their settings
        cannot be compared.
        """
        untrained = self._untrained()
        if self.slices.ignored and untrained:
            raise ValueError(
                f"the best setting is unknown: {untrained[0]} is missing, since {self.slices.ignored[0]} "
                "(run the sweep again, which trains what is missing)"
            )
        if untrained:
            warnings.warn(
                f"{len(untrained)} of {self.sweep.num_runs} runs have not been trained yet, such as {untrained[0]}; "
                "the best setting is that of the others"
            )
        if self.rungs:
            first = best_first(self.rung_scores)[0]
            if np.isnan(last_scores(self.rung_scores)[1][first]):
                raise ValueError(NO_SCORE)
            return self.sweep.table.rows()[first]
        row = best(self.scores)
        return next((r for r in self.sweep.table.rows() if {n: to_coordinate(v) for n, v in r.items()} == row), row)

    def _untrained(self) -> list[str]:
        """The runs without any update, as text."""
        nothing = self.metrics[self._learning_rate].isel(updates=0).isnull() & (self.metrics[UPDATE] == 0)
        nothing = nothing.values.reshape(len(self.sweep.table), self.sweep.num_seeds)
        rows = self.sweep.table.rows()
        return [f"{show_setting(rows[setting])} seed={seed}".strip() for setting, seed in np.argwhere(nothing)]

    @property
    def _learning_rate(self) -> str:
        """The metric that every update of a run has."""
        return f"{'current_' * ('learning_rate' in self.sweep.table.names)}learning_rate"

    def failed(self) -> list[str]:
        """A sentence for every run that turned nan."""
        rows = enumerate(self.sweep.table.rows())
        return [sentence for index, row in rows for sentence in self._failures(index, row).values()]

    def failures(self, **setting: Any) -> dict[int, str]:
        """A sentence for every run of one setting that turned nan, by its seed."""
        index = self.sweep.table.index(**setting)
        return self._failures(index, self.sweep.table.rows()[index])

    def _failures(self, index: int, row: Mapping[str, Any]) -> dict[int, str]:
        """As `failures`, for a row of the table and its index."""
        updates, names = (self.metrics[x].values.reshape(-1, self.sweep.num_seeds)[index] for x in (UPDATE, METRIC))
        return {
            seed: describe_failure(f"{show_setting(row)} seed={seed}".strip(), update, str(name))
            for seed, (update, name) in enumerate(zip(updates.tolist(), names))
            if update
        }

    def ppo(self, **setting: Any) -> PPO:
        """The PPO of one setting, which is given by the values of as many fields as single it out."""
        group = self.sweep.group_of(self.sweep.table.rows()[self.sweep.table.index(**setting)])
        ppo = make_group(group, self.make, loaded=True)
        before = read_identities(self.slices.folder, self.sweep).get(self.sweep.name_group(group), {})
        now, folder = identify_ppo(ppo, self.sweep.hyperparams), str(self.slices.folder)
        check_loaded(before, now, folder, self.allow_changed, remedy="give what was trained as make= or values=")
        return ppo

    def state(self, seed: int = 0, **setting: Any) -> TrainState:
        """The whole state of one run, ready to train further. Raises ValueError if it has not been trained."""
        row = self.sweep.table.rows()[self.sweep.table.index(**setting)]
        if not 0 <= seed < self.sweep.num_seeds:
            raise ValueError(f"seed={seed} must be from 0 to {self.sweep.num_seeds - 1}")
        found = by_run(self.slices.read(warn=False)).get(name_run(row, seed))
        if found is None:
            why = f" or is lost, since {self.slices.ignored[0]}" if self.slices.ignored else ""
            raise ValueError(f"{show_setting(row)} seed={seed} has not been trained yet{why} (run the sweep again)")
        name, i = found[0].name, found[1]
        keys = jax.eval_shape(partial(jax.random.split, num=1), jax.random.key(0))
        init = partial(self.ppo(**row).init, hyperparams=self.sweep.hyperparams_of(row))
        like = jax.eval_shape(jax.vmap(init), keys)
        states = self.slices.load(name, shapes_of(like)).state
        return from_arrays({name: x[i : i + 1] for name, x in states.items()}, like, f"the slice {name}")[0]

    def policy(self, seed: int = 0, **setting: Any) -> Policy:
        """The policy of one run, for `act` and `evaluate` of `ppo(**setting)`."""
        return self.state(seed, **setting).policy

    def to_dataframe(self) -> pandas.DataFrame:
        """The metrics as a table, one row per run and update, with a column for every swept field."""
        return to_dataframe(self.metrics)


def make_result(
    sweep: Sweep,
    slices: Slices,
    stored: Sequence[Slice],
    make: Callable,
    *,
    steps: int = 0,
    run_seconds: float = 0.0,
    interrupted: bool = False,
) -> SweepResult:
    """The result of the stored slices of a sweep, whose metrics are also written to its folder; warns if they cannot.

    Args:
        sweep: what was trained.
        slices: where the slices are kept.
        stored: the slices, as `slices.read()` gives them.
        make: `make(env, config)` makes the PPO of a group.
        steps: environment steps that this call made.
        run_seconds: the time that it took.
        interrupted: whether a signal ended it.
    """
    metrics = label_sweep(sweep, stored, slices.machine())
    lost = [count(len(slices.in_memory), "slice")] * bool(slices.folder and slices.in_memory)
    if slices.folder and jax.process_index() == 0:
        try:
            save_dataset(slices.folder / RESULTS, metrics)
        except OSError as error:
            slices.error = error.strerror or str(error)
            with contextlib.suppress(OSError):
                (slices.folder / RESULTS).unlink(missing_ok=True)  # it would be of an earlier state
            lost.append(RESULTS)
    unsaved = ""
    if lost:
        unsaved = f"{' and '.join(lost)} could not be written to {slices.folder} ({slices.error})"
        warnings.warn(f"{unsaved}; the result holds all, and the same call later trains what the folder lacks")
    return SweepResult(
        sweep, metrics, slices, make,
        steps=steps, run_seconds=run_seconds, interrupted=interrupted, unsaved=unsaved,
    )  # fmt: skip


def load_sweep(
    folder: str | Path,
    make: Callable = make_ppo,
    *,
    values: Mapping[str, Mapping[str, Any]] | None = None,
    allow_changed: Sequence[str] = (),
) -> SweepResult:
    """Reads a sweep back from its folder, whether it is finished or not.

    Args:
        folder: what `run_sweep` wrote.
        make: makes the PPO of a group, see `make_group`.
        values: what swept names stand for, see `Sweep.with_values`; only the PPOs need them.
        allow_changed: what may differ from what the folder was trained with.

    Raises:
        ValueError: if the folder holds no sweep.
    """
    sweep = read_sweep(folder).with_values(values or {})
    slices = Slices(sweep, Path(folder))
    metrics = label_sweep(sweep, slices.read(), slices.machine())
    return SweepResult(sweep, metrics, slices, make, allow_changed, rungs=read_rungs(folder))
