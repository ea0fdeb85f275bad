"""An Optuna study that one machine has, or that several share: who trains which trials, and what is drawn.

Trials on a shared storage have a heartbeat, by the clock of the database. Those of a worker that is gone fail, and
their settings wait in the study to be trained again.
"""

import contextlib
import datetime
import errno
import os
import socket
import threading
import warnings
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

from purejaxppo.experiment.files import STUDY, differing_fields
from purejaxppo.experiment.sweeps.sweep import Sweep
from purejaxppo.text import shorten

# Attributes of trials: of those that do not count, of those that stand for one that failed, and who trains it.
INTERRUPTED, INSTEAD_OF, WORKER = "interrupted", "instead_of", "worker"
SEARCH = "search"  # attribute of a study
HEARTBEAT, GRACE = 30, 120  # seconds: between two signs of life, and without one until a worker is gone
POLL = 1.0  # seconds between two looks at the trials of others


def open_study(folder: Path | None, storage: str | None, name: str, sampler: Any, pruner: Any = None) -> Any:
    """The study of a name, new or not. Raises ValueError for a storage that cannot be opened.

    Args:
        folder: has the study if there is no storage.
        storage: its URL.
        name: of the study.
        sampler: Optuna's.
        pruner: Optuna's.
    """
    import optuna
    from optuna.exceptions import ExperimentalWarning

    default = "sqlite:///purejaxppo.db" if folder is None else f"sqlite:///{folder / STUDY}"
    options = {"study_name": name, "load_if_exists": True, "direction": "maximize"}
    options |= {"sampler": sampler, "pruner": pruner}
    if storage is None:
        return optuna.create_study(storage=default, **options)
    with _refused(storage), warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        shared = optuna.storages.RDBStorage(
            storage, engine_kwargs={"pool_pre_ping": True},
            heartbeat_interval=HEARTBEAT, grace_period=GRACE, heartbeat_stale_trial_callback=_enqueue_again,
        )  # fmt: skip
        return optuna.create_study(storage=shared, **options)


@contextlib.contextmanager
def _refused(storage: str) -> Iterator[None]:
    """Errors of opening a storage as a ValueError, without the password in its URL."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import SQLAlchemyError

    shown = "..."
    try:
        shown = make_url(storage).render_as_string(hide_password=True)
        yield
    except ImportError as error:
        driver = 'pip install "psycopg[binary]" for PostgreSQL' if "psycopg" in str(error) else f"it lacks {error.name}"
        raise ValueError(f"storage={shown} needs the driver of its database ({driver})") from None
    except SQLAlchemyError as error:
        reason = shorten(" ".join(str(error.__cause__ or error).split()), 200)
        raise ValueError(
            f"storage={shown} cannot be opened: {reason} (it is a URL such as "
            "postgresql+psycopg://USER:PASSWORD@HOST/DATABASE)"
        ) from None


@contextlib.contextmanager
def storage_errors() -> Iterator[None]:
    """Turns the error of a study on a full disk, or in a database that is away, into an OSError, as files raise it."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import InterfaceError, OperationalError

    try:
        yield
    except (StorageInternalError, InterfaceError, OperationalError) as error:
        cause = error.__cause__ if isinstance(error, StorageInternalError) else error
        if not isinstance(cause, (InterfaceError, OperationalError)):
            raise
        if "disk is full" in str(cause):  # as sqlite says it
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "the study") from None
        reason = shorten(" ".join(str(cause.orig).split()), 200)
        raise OSError(
            errno.EIO,
            f"its database does not answer: {reason} (what is trained stays, and the same call continues)",
            "the study",
        ) from None


def check_same(study: Any, sweep: Sweep):
    """Refuses a study whose trials train something else; a new one learns what is trained."""
    now = sweep.shared() | {"env": str(sweep.env), "num_seeds": sweep.num_seeds}
    before = study.user_attrs.get(SEARCH, now)
    differing = differing_fields(before, now)
    if differing:
        field = differing[0]
        raise ValueError(
            f"the study {study.study_name} belongs to another search, with {field}={before.get(field)} instead of "
            f"{now.get(field)} (name another folder, or another study)"
        )
    study.set_user_attr(SEARCH, now)


def draw(study: Any, distributions: dict[str, Any]) -> Any:
    """A new trial, or one that waits in the study, which this process trains from now on."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Heartbeat of storage")  # which `signs_of_life` gives
        trial = study.ask(distributions)
    if _is_shared(study):
        study._storage.record_heartbeat(trial._trial_id)
        trial.set_user_attr(WORKER, f"{socket.gethostname()}:{os.getpid()}")
    return trial


@contextlib.contextmanager
def signs_of_life(study: Any, trials: Sequence[Any]) -> Iterator[None]:
    """Gives heartbeats of trials, on a shared storage, as long as a `with` statement lasts."""
    from optuna.exceptions import StorageInternalError

    ended = threading.Event()

    def beat():
        while not ended.is_set():
            with contextlib.suppress(StorageInternalError):  # a database that is away may come back
                for trial in trials:
                    study._storage.record_heartbeat(trial._trial_id)
            ended.wait(HEARTBEAT)

    thread = threading.Thread(target=beat, daemon=True)
    if _is_shared(study):
        thread.start()
    try:
        yield
    finally:
        ended.set()
        if _is_shared(study):
            thread.join()


def take_again(study: Any):
    """Ends the trials of workers that are gone; their settings are the next to train."""
    import optuna
    from optuna.exceptions import ExperimentalWarning

    if _is_shared(study):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            optuna.storages.fail_stale_trials(study)


def _enqueue_again(study: Any, trial: Any):
    if INTERRUPTED not in trial.user_attrs:
        study.enqueue_trial(trial.params, user_attrs={INSTEAD_OF: trial.number})


def _is_shared(study: Any) -> bool:
    return study._storage.get_heartbeat_interval() is not None


def num_finished(study: Any) -> int:
    """Trials that count: they are finished, and their settings are not to train again."""
    return len(_finished(study.trials))


def num_taken(study: Any) -> int:
    """Trials that count or that a worker trains."""
    return len(_taken(study, study.trials))


def surplus(study: Any, trials: Sequence[Any], num_trials: int) -> list[Any]:
    """Those of the trials just drawn that a shared study does not need: `num_trials` with lower numbers are finished,
    running or waiting.

    Every trial with a lower number exists by now, and nobody can add one later. So workers that draw at the same time
    agree.
    """
    if not _is_shared(study):
        return []
    found = study.trials
    waiting = [trial for trial in found if trial.state.name == "WAITING"]
    needed = sorted({trial.number for trial in [*_taken(study, found), *waiting, *trials]})[:num_trials]
    return [trial for trial in trials if trial.number not in needed]


def _taken(study: Any, trials: Sequence[Any]) -> list[Any]:
    running = [x for x in trials if x.state.name == "RUNNING" and INTERRUPTED not in x.user_attrs]
    running = [x for x in running if WORKER in x.user_attrs or _is_new(x)]
    return _finished(trials) + (running if _is_shared(study) else [])


def _is_new(trial: Any) -> bool:
    """Whether a trial began just now, so that its worker may not have named itself yet.

    The clocks of the workers must agree within `GRACE`.
    """
    return (datetime.datetime.now() - trial.datetime_start).total_seconds() < GRACE


def _finished(trials: Sequence[Any]) -> list[Any]:
    replaced = {trial.user_attrs.get(INSTEAD_OF) for trial in trials}
    finished = [trial for trial in trials if trial.state.is_finished() and INTERRUPTED not in trial.user_attrs]
    return [trial for trial in finished if trial.number not in replaced]


def finished_trials(study: Any) -> list[Any]:
    """The trials that count."""
    return _finished(study.trials)


def tell(
    study: Any, trials: Sequence[Any], scores: Iterable[float | None] = repeat(None), pruned: Collection[int] = ()
):
    """Tells the scores of trials. Those that were taken again meanwhile are left as they are.

    Args:
        study: has the trials.
        trials: that end.
        scores: of them; one without a score has failed.
        pruned: indices of those that were pruned, whose scores are what was reported last.
    """
    from optuna.trial import TrialState

    for i, (trial, score) in enumerate(zip(trials, scores)):
        state = TrialState.PRUNED if i in pruned else TrialState.FAIL if score is None else TrialState.COMPLETE
        score = score if state == TrialState.COMPLETE else None
        study.tell(trial.number, score, state=state, skip_if_finished=True)


def withdraw(study: Any, trials: Sequence[Any], *, again: bool):
    """Ends trials that do not count.

    Args:
        study: has the trials.
        trials: that end.
        again: whether their settings are the next to train; those that waited before they were drawn always are.
    """
    for trial in open_trials(study, trials):
        stored = study._storage.get_trial(trial._trial_id)
        study._storage.set_trial_user_attr(trial._trial_id, INTERRUPTED, True)  # a frozen trial does not store it
        if again or "fixed_params" in stored.system_attrs:  # where Optuna keeps the settings of one that waited
            stands_for = {name: x for name, x in stored.user_attrs.items() if name == INSTEAD_OF}
            study.enqueue_trial(trial.params, user_attrs=stands_for)
        tell(study, [trial])


def open_trials(study: Any, trials: Sequence[Any]) -> list[Any]:
    """Those of the trials that have not been told."""
    told = {trial.number for trial in study.trials if trial.state.is_finished()}
    return [trial for trial in trials if trial.number not in told]


def own_sampler(seed: int) -> Any:
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
