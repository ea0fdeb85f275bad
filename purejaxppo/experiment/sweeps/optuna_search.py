"""Search by Optuna, a whole batch of settings at a time, which trains as one sweep."""

import itertools
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from tqdm.auto import tqdm

from purejaxppo.checks import check_whole
from purejaxppo.experiment.loop import check_on_interrupt, end
from purejaxppo.experiment.report.statistics import aggregate, filled
from purejaxppo.experiment.sweeps.plan import plan_sweep
from purejaxppo.experiment.sweeps.run import run_sweep
from purejaxppo.experiment.sweeps.sweep import Sweep
from purejaxppo.ppo import make_ppo
from purejaxppo.table import Distribution, paired
from purejaxppo.text import quote, to_coordinate

INTERRUPTED = "interrupted"  # an attribute of trials


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
    on_interrupt: Literal["raise", "return"] = "raise",
    **shared: Any,
) -> Any:
    """Asks an Optuna study for batches of settings, trains each batch as one sweep, and reports the scores.

    The score of a setting is the interquartile mean over its seeds of the last 100 episodes; if all its runs turned
    nan, its trial has failed. An interrupt (Ctrl-C, SIGTERM) ends the search after the current chunk, as in `fit`:
    `Interrupted` is raised with the study as `result`, or the study is returned. No score of the interrupted batch is
    told; its settings wait in the study and are the next to train. Needs `pip install optuna`.

    Args:
        env: the name of the environment.
        space: the distribution of every field, as `sample` takes them.
        num_trials: trials of the study in the end, those of earlier calls included.
        batch_size: settings that train together.
        num_seeds: seeds of every setting.
        storage: a URL such as `sqlite:///study.db` or one of PostgreSQL, by default `sqlite:///purejaxppo.db`; machines
            with the same storage share the study.
        name: the name of the study; an existing one continues.
        sampler: Optuna's; by default TPE that accounts for running trials, with random numbers from the `seed` of the
            sweep and the number of the trial. So a study that continues, or that machines share, draws new settings.
        progress: whether to show a progress bar.
        make: `make(env, config)` makes the PPO of a group.
        on_interrupt: what the call does after an interrupt: "raise" or "return".
        shared: the other fields of `Sweep`.

    Returns:
        The `optuna.Study`.
    """
    import optuna

    if not isinstance(space, Mapping):
        raise ValueError(f"space={quote(space)} must be a dictionary of distributions by field, as sample takes them")
    for field, distribution in space.items():
        if not isinstance(distribution, Distribution):
            raise ValueError(f"{field}={quote(distribution)} must be a distribution, such as log_uniform(1e-4, 1e-2)")
    check_whole("num_trials", num_trials)
    check_whole("batch_size", batch_size)
    check_on_interrupt(on_interrupt)
    distributions: dict[str, Any] = {field: _to_optuna(distribution) for field, distribution in space.items()}
    study = optuna.create_study(
        storage=storage or "sqlite:///purejaxppo.db",
        study_name=name,
        load_if_exists=True,
        direction="maximize",
        sampler=sampler or _sampler(shared.get("seed", 0)),
    )
    plan, interrupted = None, False
    with tqdm(
        total=num_trials, initial=_num_finished(study), unit=" trials", disable=None if progress else True
    ) as bar:
        while _num_finished(study) < num_trials and not interrupted:
            trials = []
            try:
                trials += (study.ask(distributions) for _ in range(batch_size))
                columns = {f: [_from_optuna(space[f], trial.params[f]) for trial in trials] for f in space}
                sweep = Sweep(env, paired(**columns), num_seeds, **shared)
                if plan is None or sweep.groups() != plan.sweep.groups():
                    plan = plan_sweep(sweep, make=make)
                plan = replace(plan, sweep=sweep)  # a batch of the same shape: nothing compiles
                scores = run_sweep(plan, progress=False).scores
                values = aggregate(filled(scores), num_resamples=0)["value"].values
                failed = scores.isnull().all("seed").values
                _tell(study, trials, [None if lost else float(value) for value, lost in zip(values, failed)])
            except KeyboardInterrupt:
                interrupted = True
                _put_back(study, trials)
            except Exception:
                _tell(study, _open(study, trials))
                raise
            bar.update(len(trials))
            done = [trial for trial in study.trials if trial.value is not None]
            if done:
                bar.set_postfix_str(f"best {study.best_value:.1f}")
    done = f"optuna_search was interrupted after {_num_finished(study)} of {num_trials} trials; the same call continues"
    return end(study, interrupted, on_interrupt, done)


def _sampler(seed: int) -> Any:
    """TPE whose random numbers are those of the trial, whichever machine and call it belongs to."""
    from optuna.samplers import BaseSampler, TPESampler

    class Sampler(BaseSampler):
        def infer_relative_search_space(self, study, trial):
            return {}

        def sample_relative(self, study, trial, search_space):
            return {}

        def sample_independent(self, study, trial, param_name, param_distribution):
            entropy = [seed, trial.number, zlib.crc32(param_name.encode())]
            own_seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
            tpe = TPESampler(seed=own_seed, constant_liar=True)
            return tpe.sample_independent(study, trial, param_name, param_distribution)

    return Sampler()


def _tell(study: Any, trials: Sequence[Any], scores: Iterable[float | None] = itertools.repeat(None)):
    """Tells the scores of trials; a trial without one has failed."""
    from optuna.trial import TrialState

    for trial, score in zip(trials, scores):
        study.tell(trial, score, state=TrialState.FAIL if score is None else TrialState.COMPLETE)


def _put_back(study: Any, trials: Sequence[Any]):
    """Ends trials that were interrupted: they do not count, and their settings are the next to train."""
    for trial in _open(study, trials):
        trial.set_user_attr(INTERRUPTED, True)
        study.enqueue_trial(trial.params)
        _tell(study, [trial])


def _open(study: Any, trials: Sequence[Any]) -> list[Any]:
    """Those of the trials that have not been told."""
    told = {trial.number for trial in study.trials if trial.state.is_finished()}
    return [trial for trial in trials if trial.number not in told]


def _num_finished(study) -> int:
    return sum(trial.state.is_finished() and INTERRUPTED not in trial.user_attrs for trial in study.trials)


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
