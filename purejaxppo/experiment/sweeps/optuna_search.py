"""Search by Optuna, a whole batch of settings at a time, which trains as one sweep."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from tqdm.auto import tqdm

from purejaxppo.checks import check_whole
from purejaxppo.experiment.report.statistics import aggregate, filled
from purejaxppo.experiment.sweeps.plan import plan_sweep
from purejaxppo.experiment.sweeps.run import run_sweep
from purejaxppo.experiment.sweeps.sweep import Sweep
from purejaxppo.ppo import make_ppo
from purejaxppo.table import Distribution, paired
from purejaxppo.text import to_coordinate


def optuna_search(
    env: str,
    space: Mapping[str, Distribution],
    *,
    num_trials: int,
    batch_size: int,
    num_seeds: int = 1,
    storage: str | None = None,
    name: str = "purejaxppo",
    sampler: Any = None,
    progress: bool = True,
    make: Callable = make_ppo,
    **shared: Any,
) -> Any:
    """Asks an Optuna study for batches of settings, trains each batch as one sweep, and reports the scores.

    The score of a setting is the interquartile mean over its seeds of the last 100 episodes; if all its runs turned
    nan, its trial has failed. Needs `pip install optuna`.

    Args:
        env: the name of the environment.
        space: the distribution of every field, as `sample` takes them.
        num_trials: trials of the study in the end, those of earlier calls included.
        batch_size: settings that train together.
        num_seeds: seeds of every setting.
        storage: a URL such as `sqlite:///study.db` or one of PostgreSQL, by default `sqlite:///purejaxppo.db`; machines
            with the same storage share the study.
        name: the name of the study; an existing one continues.
        sampler: Optuna's; by default TPE that accounts for running trials.
        progress: whether to show a progress bar.
        make: `make(env, config)` makes the PPO of a group.
        shared: the other fields of `Sweep`.

    Returns:
        The `optuna.Study`.
    """
    import optuna

    for field, distribution in space.items():
        if not isinstance(distribution, Distribution):
            raise ValueError(f"{field}={distribution!r} must be a distribution, such as log_uniform(1e-4, 1e-2)")
    check_whole("num_trials", num_trials)
    check_whole("batch_size", batch_size)
    distributions: dict[str, Any] = {field: _to_optuna(distribution) for field, distribution in space.items()}
    study = optuna.create_study(
        storage=storage or "sqlite:///purejaxppo.db",
        study_name=name,
        load_if_exists=True,
        direction="maximize",
        sampler=sampler or optuna.samplers.TPESampler(seed=shared.get("seed", 0), constant_liar=True),
    )
    plan = None
    with tqdm(
        total=num_trials, initial=_num_finished(study), unit=" trials", disable=None if progress else True
    ) as bar:
        while _num_finished(study) < num_trials:
            trials = [study.ask(distributions) for _ in range(batch_size)]
            columns = {field: [_from_optuna(space[field], trial.params[field]) for trial in trials] for field in space}
            sweep = Sweep(env, paired(**columns), num_seeds, **shared)
            if plan is None or sweep.groups() != plan.sweep.groups():
                plan = plan_sweep(sweep, make=make)
            plan = replace(plan, sweep=sweep)  # a batch of the same shape: nothing compiles
            scores = run_sweep(plan, progress=False).scores
            values = aggregate(filled(scores), num_resamples=0)["value"].values
            for trial, score, failed in zip(trials, values, scores.isnull().all("seed").values):
                state = optuna.trial.TrialState.FAIL if failed else optuna.trial.TrialState.COMPLETE
                study.tell(trial, None if failed else float(score), state=state)
            bar.update(len(trials))
            done = [trial for trial in study.trials if trial.value is not None]
            if done:
                bar.set_postfix_str(f"best {study.best_value:.1f}")
    return study


def _num_finished(study) -> int:
    return sum(trial.state.is_finished() for trial in study.trials)


def _to_optuna(distribution: Distribution):
    from optuna import distributions

    values = distribution.values
    if distribution.kind == "choice":
        return distributions.CategoricalDistribution([to_coordinate(value) for value in values])
    if distribution.kind == "integers":
        return distributions.IntDistribution(*values)
    return distributions.FloatDistribution(*values, log=distribution.kind == "log_uniform")


def _from_optuna(distribution: Distribution, value):
    """The value as it was given: Optuna stores a tuple as text."""
    if distribution.kind != "choice":
        return value
    return next(chosen for chosen in distribution.values if to_coordinate(chosen) == value)
