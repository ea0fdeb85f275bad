"""The host loop of one run: compiled chunks, metrics after each of them, checkpoints, sinks."""

import json
import threading
import time
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import pandas
import xarray
from tqdm.auto import tqdm

from purejaxppo.batched import reported_failures
from purejaxppo.checks import check_number, check_whole
from purejaxppo.envs.check import metric_names
from purejaxppo.experiment.distributed import to_host
from purejaxppo.experiment.evaluations import EVALUATION_RETURN, Evaluations, make_evaluations
from purejaxppo.experiment.identity import changed_names, identify_ppo
from purejaxppo.experiment.lock import Lock
from purejaxppo.experiment.loop import (
    check_on_interrupt,
    chunks,
    end,
    newest,
    noted_interrupt,
    show_newest,
    step_bar,
    warn,
)
from purejaxppo.experiment.program import Program, check_training, kept_program
from purejaxppo.experiment.report.failures import METRIC, UPDATE, failures_of, join_failures, mark_failures
from purejaxppo.experiment.report.metrics import to_dataframe
from purejaxppo.experiment.runs.best import Best, better_of
from purejaxppo.experiment.runs.journal import Journal, open_journal
from purejaxppo.experiment.runs.sinks import guarded
from purejaxppo.ppo import PPO
from purejaxppo.text import shorten
from purejaxppo.validate import check_target_kl, check_type


@dataclass(frozen=True)
class Fit:
    """The result of `fit`: the state that training reached, and its metrics."""

    ppo: PPO
    state: Any
    """A TrainState, of a batch [R, ...]."""
    metrics: xarray.Dataset
    """Dimensions (`run`,) `updates`, with the environment steps of one run as the coordinate `step`; if the run has a
    folder, of all its updates, earlier calls included. For each run, `failed_update` is the update in which it turned
    nan, or 0, and `failed_metric` what was not finite first."""
    num_updates: int = 0
    """Updates made by this call."""
    compile_seconds: float = 0.0
    run_seconds: float = 0.0
    interrupted: bool = False
    """Whether the call ended early: by a signal, or because another process took over the folder."""
    unsaved: str = ""
    """What could not be written to the folder, and what is kept there instead, as one sentence; empty if all was."""
    best: Best | None = None
    """With `keep_best` the policies of the best evaluations, None before the first."""

    def __repr__(self) -> str:
        title, *_ = repr(self.ppo).splitlines()
        return "\n".join(
            [
                f"Fit of {title}",
                f"  updates  {self.num_updates:,} in {self.run_seconds:.1f} s, compiled in {self.compile_seconds:.1f} s"
                + (", interrupted" if self.interrupted else ""),
                f"  metrics  {dict(self.metrics.sizes)}: {shorten(', '.join(map(str, self.metrics)), 90)}",
                "  fields   ppo, state, metrics, num_updates, compile_seconds, run_seconds, interrupted",
            ]
        )

    @property
    def steps_per_second(self) -> float:
        """Environment steps of all runs per second of run time."""
        num_runs = self.metrics.sizes.get("run", 1)
        return num_runs * self.num_updates * self.ppo.config.steps_per_update / max(self.run_seconds, 1e-9)

    def failed(self) -> list[str]:
        """A sentence for every run that turned nan."""
        return list(failures_of(self.metrics).values())

    def to_dataframe(self) -> pandas.DataFrame:
        """The metrics as a table, one row per run and update."""
        return to_dataframe(self.metrics)


def fit(
    ppo: PPO,
    state: Any,
    *,
    num_updates: int | None = None,
    updates_per_chunk: int | None = None,
    slice_size: int | None = None,
    program: Program | None = None,
    progress: bool = True,
    folder: str | Path | Lock | None = None,
    save_every: float = 60.0,
    keep: int = 2,
    evaluate_every: int | None = None,
    keep_best: bool = False,
    sinks: Sequence[Callable[[xarray.Dataset], Any]] = (),
    notes: Mapping[str, Any] | None = None,
    allow_changed: Sequence[str] = (),
    on_interrupt: Literal["raise", "return"] = "raise",
) -> Fit:
    """Trains a run or a batch of runs from `state`, to the end of the run or for `num_updates` updates.

    The numbers are those of `ppo.train`, in compiled chunks, and `state` stays usable. A warning names every run that
    turns nan, as does `failed()` of the result.

    An interrupt (Ctrl-C, SIGTERM) ends the call after the current chunk; one that a device has begun after it runs to
    its end there. Everything up to there is kept, then
    `Interrupted` is raised, a KeyboardInterrupt with the `result`, so that a loop over calls ends too. With
    `on_interrupt="return"`, which suits a notebook, the call returns this result, whose `interrupted` is true.

    Raises ValueError before it compiles: for arguments that do not fit, or a folder that holds another run, has a
    writer, or has only damaged checkpoints.

        >>> ppo = pjp.make_ppo("CartPole-v1", pjp.Config(num_updates=2))
        >>> result = pjp.fit(ppo, ppo.init(jax.random.key(0)), progress=False)
        >>> result.metrics["episode_return"].sizes
        Frozen({'updates': 2})

    Args:
        ppo: what to train.
        state: from `ppo.init`, or from an earlier call.
        num_updates: updates to make; by default up to `config.num_updates`.
        updates_per_chunk: updates between two reads of the metrics; by default a hundredth of the whole.
        slice_size: runs of a batch that train together in one program, see `compile_training`.
        program: from `compile_training(ppo, state, num_updates)`, whose `num_updates` is then the length of a chunk. By
            default it compiles, or takes the program of the call before if that was for the same.
        progress: whether to show a progress bar.
        folder: keeps the whole run: checkpoints, and at the end all that `load` reads. The same call resumes from the
            newest intact checkpoint; the result is that of an uninterrupted run, bit for bit on the same device and
            package versions, otherwise it warns. What was plugged in (environment, network, loss, optimizer, step) must
            be the same again. The `state` is the one that the run began with, or a result of it that the folder still
            keeps; where the folder is empty, the run begins with it. More updates in the config extend the run. A
            folder has one writer; a second call is told who that is.
        save_every: seconds between two checkpoints; one is written at the end too.
        keep: newest checkpoints to keep.
        evaluate_every: updates between two evaluations, in which each policy plays 128 whole episodes in fresh
            environments; there is one more after the last update of the config. Their mean return is the metric
            `evaluation_return`.
        keep_best: whether to keep the policy of the best evaluation, for every agent of a batch its own, as `best` of
            the result and in the folder, where `load(folder, best=True)` reads it. The best of several evaluations was
            lucky too, so its return is too high on average: play fresh episodes with the policy to report one.
        sinks: functions that are given the metrics of every chunk, see `pjp.sinks`; of several processes, in the first.
        notes: JSON data to keep in the folder's settings.json.
        allow_changed: what may differ from what the folder was trained with: names such as "loss" and "optimizer".
        on_interrupt: what the call does after an interrupt: "raise" or "return".
    """
    check_on_interrupt(on_interrupt)
    check_training(ppo, state)
    # Refuses the state of another PPO, and a custom step of a batch with bad metrics, before anything is written.
    jax.eval_shape(ppo.step if ppo.custom and ppo.many else ppo.collect, state)
    _check_arrays(state)
    target_kl = getattr(state, "runs", state).hyperparams.target_kl  # which was traced until here
    check_target_kl(to_host(target_kl), ppo.config)
    numbers = {"num_updates": num_updates, "updates_per_chunk": updates_per_chunk, "evaluate_every": evaluate_every}
    for name, number in (numbers | {"slice_size": slice_size}).items():
        if number is not None:
            check_whole(name, number)
    check_number("save_every", save_every, 0, np.inf)
    if keep_best and evaluate_every is None:
        raise ValueError("keep_best=True needs evaluations to compare (give evaluate_every too)")
    _check_options(folder, sinks, notes)
    first = int(np.max(to_host(state.num_updates)))
    last = ppo.config.num_updates if num_updates is None else first + num_updates
    if first >= last:
        raise ValueError(
            f"this run is complete: its state has done all num_updates={last} of its config (raise it to extend)"
        )
    if program is not None:
        _check_program(program, ppo, state, updates_per_chunk, slice_size)
        updates_per_chunk = updates_per_chunk or program.num_updates
    _warn_of_ended_schedules(ppo, state, first, last)
    chunk = min(updates_per_chunk or -(-(last - first) // 100), evaluate_every or last, last - first)
    with open_journal(
        ppo, state, folder, keep=keep, save_every=save_every, notes=notes, allow_changed=allow_changed
    ) as journal:
        failed = _warn_of_failures(journal.results) if journal.num_updates > first else {}
        if journal.num_updates >= last:
            journal.complete()
            return Fit(ppo, journal.state, journal.results, unsaved=journal.unsaved, best=journal.best)
        with step_bar(
            total=(last - first) * journal.steps_per_update,
            initial=(journal.num_updates - first) * journal.steps_per_update,
            description="compiling",
            progress=progress,
        ) as bar:
            size = slice_size or journal.settings.slice_size  # another size would round differently
            with reported_failures():
                program = _chunk_program(program, ppo, journal.state, chunk, size)
            journal.start(program.slice_size)
            bar.set_description(f"compiled in {program.compile_seconds:.1f} s, training")
            bar.unpause()
            guards = [guarded(sink) for sink in sinks]
            evaluations = make_evaluations(ppo, evaluate_every) if evaluate_every else None
            return _train(program, journal, last, evaluations, keep_best, guards, bar, failed, on_interrupt)


def _chunk_program(program: Program | None, ppo: PPO, state: Any, chunk: int, slice_size: int | None) -> Program:
    """The program of a chunk, with the seconds that this call compiled."""
    start = time.perf_counter()
    if program is None:
        program = kept_program(ppo, state, chunk, slice_size)
    if program.slice_size != (slice_size or program.slice_size):
        raise ValueError(
            f"program trains slices of {program.slice_size} runs, but the run began with slices of {slice_size} "
            f"(compile_training(..., slice_size={slice_size}))"
        )
    return replace(program, num_updates=chunk, compile_seconds=time.perf_counter() - start)


def _check_arrays(state: Any):
    """Refuses shapes, and a state whose memory was given away."""
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        where = f"state{jax.tree_util.keystr(path)}"
        if isinstance(x, jax.ShapeDtypeStruct):
            raise ValueError(f"{where} is a shape, not an array (make the state with ppo.init itself)")
        if isinstance(x, jax.Array) and x.is_deleted():
            raise ValueError(f"{where} was donated to another call and is gone (use the state that the call returned)")


def _check_options(folder: Any, sinks: Any, notes: Any):
    if folder is not None and not isinstance(folder, (str, Path, Lock)):
        raise ValueError(f"folder={shorten(repr(folder))} must be a path")
    if isinstance(sinks, str) or not isinstance(sinks, Sequence) or not all(map(callable, sinks)):
        raise ValueError(
            f"sinks={shorten(repr(sinks))} must be a list of functions, such as [pjp.sinks.csv_file('log.csv')]"
        )
    try:
        json.dumps({} if notes is None else dict(notes))
    except (TypeError, ValueError) as error:
        raise ValueError(f"notes={shorten(repr(notes))} must be a dictionary of JSON data: {error}") from None


def _check_program(program: Any, ppo: PPO, state: Any, updates_per_chunk: int | None, slice_size: int | None):
    check_type("program", program, Program, "from compile_training(ppo, state)")
    if program.step() is not ppo.step:
        raise ValueError("program was compiled for another PPO (compile_training(ppo, state) makes one for this)")
    changed = changed_names(program.identity, identify_ppo(ppo, getattr(state, "runs", state).hyperparams))
    if changed:
        name = changed[0]
        raise ValueError(
            f"program was compiled with another {name}, {program.identity.get(name)} before its code or what it reads "
            "changed (make it again with compile_training(ppo, state))"
        )
    if updates_per_chunk is not None:
        check_whole(
            "updates_per_chunk", updates_per_chunk, at_most=program.num_updates, of="the updates of the program"
        )
    if slice_size not in (None, program.slice_size):
        raise ValueError(f"slice_size={slice_size} differs from the {program.slice_size} of the program (leave it out)")


def _warn_of_ended_schedules(ppo: PPO, state: Any, first: int, last: int):
    """Warns if training goes past the end of schedules, where they stay as they are at the end."""
    config, hyperparams = ppo.config, to_host(getattr(state, "runs", state).hyperparams)
    scheduled = {name for name in hyperparams.names if callable(hyperparams.get(name))}
    scheduled |= {"learning_rate"} if np.any(hyperparams.learning_rate_annealing) else set()
    if last <= config.num_updates or not scheduled:
        return
    end = hyperparams.at(config.num_updates, config)
    values = ", ".join(f"{name}={np.max(end.get(name)):.3g}" for name in sorted(scheduled))
    warn(
        f"num_updates={last - first} leads to update {last}, but schedules end at num_updates={config.num_updates} of "
        f"the config: from update {config.num_updates + 1} on, {values} (make the PPO with Config(num_updates={last}), "
        "or set learning_rate_annealing=0 and give constants)"
    )


def _train(
    program: Program,
    journal: Journal,
    last: int,
    evaluations: Evaluations | None,
    keep_best: bool,
    sinks: list[Callable],
    bar: tqdm,
    failed: dict[int, str],
    on_interrupt: str,
) -> Fit:
    """The loop: to `last` updates or an interrupt. Of runs in `failed` it has warned."""
    ppo, first = journal.ppo, journal.num_updates
    shown = ["episode_return", *metric_names(ppo.env)[:3]]
    latest = dict.fromkeys(shown, np.nan)
    start = time.perf_counter()
    with noted_interrupt() as noted:
        interrupt = threading.Event() if journal.team.everyone else noted  # all processes end after the same chunk
        for state, metrics in chunks(program, journal.state, first, last, interrupt, evaluations=evaluations):
            labelled = mark_failures(journal.add(state, metrics), state)
            if keep_best:
                returns = metrics[EVALUATION_RETURN][..., -1]
                journal.best = better_of(journal.best, state.policy, returns, journal.num_updates)
            if not journal.is_writer():
                break
            failed |= _warn_of_failures(labelled, failed)
            for sink in sinks if journal.team.is_first else ():
                sink(labelled.drop_vars([UPDATE, METRIC]))
            latest = {n: newest(metrics[n], before) if n in metrics else before for n, before in latest.items()}
            bar.set_postfix_str(show_newest(latest), refresh=False)
            bar.update(labelled.sizes["updates"] * journal.steps_per_update)
            if journal.team.any(noted.is_set()):
                interrupt.set()
                break
            journal.save_if_due()
        seconds = time.perf_counter() - start
        journal.save(last=True)
    result = Fit(
        ppo=ppo,
        state=journal.state,
        metrics=journal.results,
        num_updates=journal.num_updates - first,
        compile_seconds=program.compile_seconds,
        run_seconds=seconds,
        interrupted=interrupt.is_set() or journal.num_updates < last,
        best=journal.best,
    )
    journal.finish(
        compile_seconds=program.compile_seconds, run_seconds=seconds, steps_per_second=result.steps_per_second
    )
    done = f"fit was interrupted after {journal.num_updates} of {last} updates"
    done += f"; the same call resumes from {journal.checkpoints.folder}" if journal.checkpoints else ""
    return end(replace(result, unsaved=journal.unsaved), interrupt.is_set(), on_interrupt, done)


def _warn_of_failures(metrics: xarray.Dataset, known: Container[int] = ()) -> dict[int, str]:
    """The sentences of `failures_of`; warns of runs that are not known to have failed."""
    found = failures_of(metrics)
    new = [sentence for run, sentence in found.items() if run not in known]
    if new:
        warn(join_failures(new, metrics[UPDATE].size))
    return found
