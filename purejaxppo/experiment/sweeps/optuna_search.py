"""Search by Optuna, a whole batch of settings at a time, which trains as one sweep.

study.db         the study, if the storage is not another: sqlite
batches/NUMBER/  the sweep of the batch that begins with this trial, see `slices`
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from tqdm.auto import tqdm

from purejaxppo.checks import check_whole
from purejaxppo.experiment.files import BATCHES, kind_of, refuse_other
from purejaxppo.experiment.lock import claim_folder
from purejaxppo.experiment.loop import check_on_interrupt, end
from purejaxppo.experiment.report.statistics import NO_SCORE, aggregate, filled
from purejaxppo.experiment.sweeps.plan import Plan, plan_sweep
from purejaxppo.experiment.sweeps.run import run_sweep
from purejaxppo.experiment.sweeps.studies import (
    INTERRUPTED,
    POLL,
    check_same,
    draw,
    finished_trials,
    num_finished,
    num_taken,
    open_study,
    open_trials,
    own_sampler,
    signs_of_life,
    storage_errors,
    surplus,
    take_again,
    tell,
    withdraw,
)
from purejaxppo.experiment.sweeps.sweep import Sweep
from purejaxppo.experiment.sweeps.watch import Watch
from purejaxppo.ppo import make_ppo
from purejaxppo.table import Distribution, Named, Table, paired, sample
from purejaxppo.text import quote, show_setting, to_coordinate

BATCH = "batch"  # attribute of a trial: the name of its batch in the folder


@dataclass(frozen=True)
class SearchPlan:
    """An Optuna search with the programs of its first batch, compiled; printing it shows what it will do."""

    space: dict[str, Distribution]
    num_trials: int
    batch: Plan
    """Of settings that are drawn from the space; those of the same shape need no other program."""

    def __repr__(self) -> str:
        sweep = self.batch.sweep
        num_batches = -(-self.num_trials // len(sweep.table))
        fields = {name: f"{x.kind}({', '.join(map(str, x.values))})" for name, x in self.space.items()}
        return "\n".join(
            [
                f"{sweep.env}: {self.num_trials} trials in {num_batches} batch{'es' * (num_batches > 1)} of "
                f"{len(sweep.table)}, over {show_setting(fields)}",
                f"about {num_batches * self.batch.total_steps:,} steps; a batch is a sweep:",
                str(self.batch),
            ]
        )


def plan_trials(
    env: Any,
    space: Mapping[str, Distribution],
    *,
    num_trials: int,
    batch_size: int,
    num_seeds: int = 1,
    make: Callable = make_ppo,
    prunes: bool = False,
    **shared: Any,
) -> SearchPlan:
    """Compiles what the first batch of `optuna_search` needs, and says what it will do; see there for the errors.

    Args:
        env: the environment, as `Sweep` takes it.
        space: the distribution of every field, as `sample` takes them.
        num_trials: trials of the study in the end.
        batch_size: settings that train together.
        num_seeds: seeds of every setting.
        prunes: whether every setting trains by itself, so that it can stop, as it does with a `pruner`.
        make: `make(env, config)` makes the PPO of a group.
        shared: the other fields of `Sweep`.
    """
    _check_space(space)
    check_whole("num_trials", num_trials)
    check_whole("batch_size", batch_size)
    table = sample(jax.random.key(shared.get("seed", 0)), batch_size, sobol=False, **space)
    table = paired(**table.columns())
    sweep, slice_size = Sweep(env, table, num_seeds, **shared), num_seeds if prunes else None
    return SearchPlan(dict(space), num_trials, plan_sweep(sweep, make=make, slice_size=slice_size))


def optuna_search(
    env: Any,
    space: Mapping[str, Distribution],
    *,
    num_trials: int,
    batch_size: int,
    num_seeds: int = 1,
    folder: str | Path | None = None,
    storage: str | None = None,
    name: str = "purejaxppo",
    sampler: Any = None,
    pruner: Any = None,
    progress: bool = True,
    save_every: float = 60.0,
    make: Callable = make_ppo,
    plan: SearchPlan | None = None,
    allow_changed: Sequence[str] = (),
    on_interrupt: Literal["raise", "return"] = "raise",
    **shared: Any,
) -> Any:
    """Asks an Optuna study for batches of settings, trains each batch as one sweep, and reports the scores.

    The score of a setting is the interquartile mean over its seeds of the last 100 episodes, or of the newest
    evaluation with `evaluate_every`, a field of `Sweep`; if all its runs turned nan, its trial has failed. An interrupt
    (Ctrl-C, SIGTERM) ends the search after the current chunk, as in `fit`: `Interrupted` is raised with the study as
    `result`, or the study is returned. No score of the interrupted batch is told. With a folder, the next call resumes
    its training, also after a kill; without, its settings wait in the study and are the next to train. Needs `pip
    install optuna`. Raises ValueError for a study of another search, or a storage that cannot be opened.

    Args:
        env: the environment, as `Sweep` takes it.
        space: the distribution of every field, as `sample` takes them.
        num_trials: trials of the study in the end, with those of earlier calls and of other machines, rounded up to
            whole batches; machines that draw the last ones at the same time train a part of a batch each. A call ends
            when all are finished.
        batch_size: settings that train together.
        num_seeds: seeds of every setting.
        folder: keeps the sweep of every batch, in `batches/`, and the study unless there is a `storage`.
        storage: a URL that machines share, as `postgresql+psycopg://USER:PASSWORD@HOST/DATABASE`, each with a folder of
            its own; by default `study.db` in the folder, or `sqlite:///purejaxppo.db` without one. Trials of a machine
            that gives no sign of life for two minutes fail, and another one trains their settings.
        name: the name of the study; an existing one continues.
        sampler: Optuna's; by default TPE that accounts for running trials, with random numbers from the `seed` of the
            sweep and the number of the trial. So a study that continues, or that machines share, draws new settings.
        pruner: Optuna's, such as `optuna.pruners.MedianPruner()`: it is told the interquartile mean over seeds of the
            returns in every chunk, by updates, and settings that it prunes stop. Every setting trains by itself then.
        progress: whether to show a progress bar.
        save_every: seconds between two saves of a batch that is training, see `run_sweep`.
        make: `make(env, config)` makes the PPO of a group.
        plan: of `plan_trials` for the same search, whose programs are then used.
        allow_changed: what may differ from what an unfinished batch was trained with, see `run_sweep`.
        on_interrupt: what the call does after an interrupt: "raise" or "return".
        shared: the other fields of `Sweep`.

    Returns:
        The `optuna.Study`; its attribute `unsaved` says what of a batch could not be written, as on a full disk, after
        which the search ends.
    """
    _check_space(space)
    check_whole("num_trials", num_trials)
    check_whole("batch_size", batch_size)
    check_on_interrupt(on_interrupt)
    if folder is not None:
        refuse_other(Path(folder), "run", "sweep")
    with nullcontext() if folder is None else claim_folder(folder), storage_errors():
        folder = None if folder is None else Path(folder)
        study = open_study(folder, storage, name, sampler or own_sampler(shared.get("seed", 0)), pruner)
        check_same(study, Sweep(env, Table(), num_seeds, **shared))
        batches = _Batches(
            study, space, num_trials, batch_size, folder, save_every, make, plan and plan.batch, pruner, allow_changed
        )
        interrupted = False
        with tqdm(
            total=num_trials, initial=num_finished(study), unit=" trials", disable=None if progress else True
        ) as bar:
            while num_finished(study) < num_trials and not (interrupted or batches.unsaved):
                _show_best(bar, study)
                before = num_finished(study)
                interrupted = batches.train(lambda table: Sweep(env, table, num_seeds, **shared), bar)
                bar.update(num_finished(study) - before)
            _show_best(bar, study)
    study.unsaved = batches.unsaved
    done = f"optuna_search was interrupted after {num_finished(study)} of {num_trials} trials; the same call continues"
    return end(study, interrupted, on_interrupt, done)


def rank_trials(study: Any) -> list[dict[str, Any]]:
    """The finished trials of a study as rows: `trial`, its number, the fields, and `score`; best first.

    If some were pruned, `updates` says after how many; they come after those that were not. Trials that failed have nan
    as their score and come last.
    """
    trials = sorted(finished_trials(study), key=lambda t: (t.state.name == "COMPLETE", t.value or 0.0), reverse=True)
    trials = [t for t in trials if t.value is not None] + [t for t in trials if t.value is None]
    pruned = any(t.state.name == "PRUNED" for t in trials)
    ended = {t.number: "all" if t.state.name == "COMPLETE" else t.last_step or "" for t in trials}
    return [
        {"trial": t.number, **t.params, **({"updates": ended[t.number]} if pruned else {})}
        | {"score": np.nan if t.value is None else t.value}
        for t in trials
    ]


def best_setting(study: Any, space: Mapping[str, Distribution]) -> dict[str, Any]:
    """The setting of the best trial of a study. Raises ValueError if none has a score."""
    first = next(iter(rank_trials(study)), {"score": np.nan})
    if np.isnan(first["score"]):
        raise ValueError(NO_SCORE)
    return {name: _from_optuna(distribution, first[name]) for name, distribution in space.items()}


class _Batches:
    """Trains a study batch by batch. With a folder, the trials of a batch stay open until its sweep is complete."""

    def __init__(
        self,
        study: Any,
        space: Mapping[str, Distribution],
        num_trials: int,
        batch_size: int,
        folder: Path | None,
        save_every: float,
        make: Callable,
        plan: Plan | None,
        pruner: Any,
        allow_changed: Sequence[str],
    ):
        self.allow_changed = allow_changed
        self.study, self.space, self.num_trials, self.batch_size = study, space, num_trials, batch_size
        self.save_every, self.prunes, self.unsaved = save_every, pruner is not None, ""
        self.folder, self.make, self.plan = folder and folder / BATCHES, make, plan
        self.distributions: dict[str, Any] = {field: _to_optuna(distribution) for field, distribution in space.items()}

    def train(self, make_sweep: Callable[[Table], Sweep], bar: tqdm) -> bool:
        """Trains one batch and tells its scores, or waits while others train what is left; whether it was
        interrupted."""
        trials: list[Any] = []
        path = None
        try:
            path = self._next(trials)
            if not trials:
                time.sleep(POLL)
                return False
            with signs_of_life(self.study, open_trials(self.study, trials)):
                self._train(trials, path, make_sweep, bar)
        except KeyboardInterrupt:
            if self.folder is None:
                withdraw(self.study, trials, again=True)
            return True
        except Exception:
            if not (path and kind_of(path)):  # with a sweep in its folder the next call resumes it
                tell(self.study, open_trials(self.study, trials))
            raise
        return False

    def _train(self, trials: list, path: Path | None, make_sweep: Callable[[Table], Sweep], bar: tqdm):
        columns = {f: [_from_optuna(self.space[f], trial.params[f]) for trial in trials] for f in self.space}
        sweep = make_sweep(paired(**columns))
        if path is not None and kind_of(path):  # its slices may have another size, and some may be complete
            plan = plan_sweep(sweep, path, make=self.make, allow_changed=self.allow_changed)
        elif self.plan is None or sweep.groups() != self.plan.sweep.groups():
            slice_size = sweep.num_seeds if self.prunes else None
            plan = self.plan = plan_sweep(sweep, make=self.make, slice_size=slice_size)
        else:
            plan = replace(self.plan, sweep=sweep)  # a batch of the same shape: nothing compiles
        watch = Watch(self.study, trials, sweep, bar, self.prunes)
        result = run_sweep(plan, path, save_every=self.save_every, progress=False, watch=watch)
        self.unsaved, scores = self.unsaved or result.unsaved, result.scores
        values = aggregate(filled(scores), num_resamples=0)["value"].values
        failed = scores.isnull().all("seed").values
        values = [None if lost else float(value) for value, lost in zip(values, failed)]
        tell(self.study, trials, values, watch.pruned)

    def _next(self, trials: list) -> Path | None:
        """Fills `trials` with the next batch, one that was not finished before any new one; returns its folder.

        There are none if others train all that is left. Of workers that draw the last batch at the same time, each
        trains those that are needed, and withdraws the rest.
        """
        unfinished = self._unfinished()
        path = self.folder and self.folder / min(unfinished) if unfinished and self.folder else None
        trials += unfinished.get(path.name, []) if path else []
        if path and kind_of(path):
            return path  # its sweep has begun
        if not trials:
            take_again(self.study)
            if num_taken(self.study) >= self.num_trials:
                return None
        while len(trials) < self.batch_size:
            trials.append(draw(self.study, self.distributions))
            if self.folder:
                path = path or self.folder / f"{trials[0].number:06d}"
                path.mkdir(parents=True, exist_ok=True)
                trials[-1].set_user_attr(BATCH, path.name)
        whole_batches = -(-self.num_trials // self.batch_size) * self.batch_size
        withdrawn = surplus(self.study, trials, whole_batches)
        withdraw(self.study, withdrawn, again=False)
        trials[:] = [trial for trial in trials if trial not in withdrawn]
        if path and not trials:
            path.rmdir()
        return path

    def _unfinished(self) -> dict[str, list]:
        """The trials of batches that lie in this folder and have open ones, by the names of these.

        Nobody else trains them. Once its sweep has begun, those that were told before a kill are part of it, too.
        """
        found: dict[str, list] = {}
        for trial in self.study.trials if self.folder else ():
            if BATCH in trial.user_attrs and INTERRUPTED not in trial.user_attrs:
                found.setdefault(trial.user_attrs[BATCH], []).append(trial)
        unfinished = {}
        for batch, trials in found.items():
            left = [trial for trial in trials if not trial.state.is_finished()]
            if left and self.folder and (self.folder / batch).is_dir():
                unfinished[batch] = trials if kind_of(self.folder / batch) else left
        return unfinished


def _check_space(space: Any):
    if not isinstance(space, Mapping):
        raise ValueError(f"space={quote(space)} must be a dictionary of distributions by field, as sample takes them")
    for field, distribution in space.items():
        if not isinstance(distribution, Distribution):
            raise ValueError(f"{field}={quote(distribution)} must be a distribution, such as log_uniform(1e-4, 1e-2)")


def _show_best(bar: tqdm, study: Any):
    if any(trial.state.name == "COMPLETE" for trial in study.trials):
        bar.set_postfix_str(f"best {study.best_value:.4g}")


def _to_optuna(distribution: Distribution):
    from optuna import distributions

    values = distribution.values
    if distribution.kind == "choice":
        plain = [str(value) if isinstance(value, Named) else to_coordinate(value) for value in values]
        return distributions.CategoricalDistribution(plain)
    if distribution.kind == "integers":
        return distributions.IntDistribution(*values)
    return distributions.FloatDistribution(*values, log=distribution.kind == "log_uniform")


def _from_optuna(distribution: Distribution, value):
    """The value as it was given: Optuna stores a tuple as text."""
    if distribution.kind != "choice":
        return value
    found = [chosen for chosen in distribution.values if to_coordinate(chosen) == value]
    if not found:
        raise ValueError(f"a trial of the study has the value {value}, which choice{distribution.values} lacks")
    return found[0]
