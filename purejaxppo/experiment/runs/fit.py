"""The host loop over compiled chunks of a run: constant memory, progress, checkpoints, evaluation, logging."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import jax
import numpy as np
import xarray
from tqdm.auto import tqdm

from purejaxppo.checks import check_whole
from purejaxppo.envs.check import metric_names
from purejaxppo.experiment.program import Program, compile, noted_interrupt
from purejaxppo.experiment.runs.journal import Journal
from purejaxppo.experiment.runs.sinks import guarded
from purejaxppo.ppo import PPO, TrainState


@dataclass(frozen=True)
class Fit:
    """What a host loop has done: the state it came to and what it saw on the way."""

    ppo: PPO
    state: TrainState
    metrics: xarray.Dataset
    """Dimensions (`run`,) `update`, with environment steps of one run as the coordinate `step`; of a folder's run all
    of its updates, also those before this call."""
    num_updates: int = 0
    """Made by this call."""
    compile_seconds: float = 0.0
    run_seconds: float = 0.0
    interrupted: bool = False
    """Whether a signal ended it before its time."""

    @property
    def steps_per_second(self) -> float:
        """Environment steps of all runs per second of run time."""
        num_runs = self.metrics.sizes.get("run", 1)
        return num_runs * self.num_updates * self.ppo.config.steps_per_update / max(self.run_seconds, 1e-9)


def fit(
    ppo: PPO,
    state: TrainState,
    *,
    num_updates: int | None = None,
    updates_per_chunk: int | None = None,
    slice_size: int | None = None,
    progress: bool = True,
    folder=None,
    save_every: float = 60.0,
    keep: int = 2,
    evaluate_every: int | None = None,
    sinks: Sequence[Callable] = (),
    settings: dict | None = None,
) -> Fit:
    """Trains from `state`, of one run or of a batch, to the end of the run or for `num_updates` updates.

    The numbers are those of `ppo.train`, in chunks of `updates_per_chunk` (a hundredth of the whole by default), and
    `state` stays usable. A batch of runs goes through in slices of `slice_size` (see `compile`). An interrupt (Ctrl-C,
    SIGTERM) ends the loop after the chunk in flight; what was done is returned.

    With a `folder` the whole run is kept there: the newest `keep` checkpoints, one every `save_every` seconds and at
    the end, then all that `load` reads. The same call goes on from the newest checkpoint that is whole, to the same
    numbers as if nothing had happened, to the bit on the same device and versions; on others it warns. A network, loss
    or optimizer of one's own must be the same again. With more `num_updates` in its config a run is extended.
    `settings` are noted beside what describes the run.

    After every `evaluate_every` updates each policy plays in environments of its own: `evaluation_return` is the mean
    over 128 whole episodes. Every chunk of metrics goes to `sinks` (see `sinks`). Raises ValueError where the folder
    holds another run, or checkpoints of which none is whole.
    """
    numbers = {"num_updates": num_updates, "updates_per_chunk": updates_per_chunk, "evaluate_every": evaluate_every}
    for name, number in numbers.items():
        if number is not None:
            check_whole(name, number)
    first = int(np.max(state.num_updates))
    last = ppo.config.num_updates if num_updates is None else first + num_updates
    if first >= last:
        raise ValueError(f"this run is complete: its state has done all num_updates={last} of its config")
    journal = Journal(ppo, state, folder, keep, save_every, settings)
    if journal.num_updates >= last:
        journal.complete()
        return Fit(ppo, journal.state, journal.metrics)
    chunk = min(updates_per_chunk or -(-(last - first) // 100), evaluate_every or last, last - first)
    with tqdm(
        total=(last - first) * journal.steps_per_update,
        initial=(journal.num_updates - first) * journal.steps_per_update,
        unit=" steps", unit_scale=True, desc="compiling", disable=None if progress else True, mininterval=0.2,
    ) as bar:  # fmt: skip
        program = compile(ppo, journal.state, chunk, slice_size=slice_size or journal.settings.get("slice_size"))
        journal.begin(slice_size=program.slice_size)  # another would give other roundings
        bar.set_description(f"compiled in {program.compile_seconds:.1f} s, training")
        bar.unpause()
        return _train(program, journal, last, evaluate_every, [guarded(sink) for sink in sinks], bar)


def _train(program: Program, journal: Journal, last: int, evaluate_every: int | None, sinks: list, bar) -> Fit:
    """The loop: to `last` updates or an interrupt."""
    ppo, begun = journal.ppo, journal.num_updates
    evaluate, shown = jax.jit(ppo.evaluate), ["episode_return", *metric_names(ppo.env)[:3]]
    latest = dict.fromkeys(shown, np.nan)
    start = time.perf_counter()
    with noted_interrupt() as interrupt:
        for state, metrics in chunks(program, journal.state, begun, last, evaluate_every):
            if evaluate_every:
                due = (journal.num_updates + metrics["learning_rate"].shape[-1]) % evaluate_every == 0
                metrics["evaluation_return"] = _evaluation(evaluate, state, metrics["learning_rate"].shape, due)
            part = journal.add(state, metrics)
            for sink in sinks:
                sink(part)
            latest = {n: _latest(metrics[n], before) if n in metrics else before for n, before in latest.items()}
            bar.set_postfix_str(_progress(latest), refresh=False)
            bar.update(part.sizes["update"] * journal.steps_per_update)
            if interrupt.is_set():
                bar.write("interrupted: the result holds what was done until here")
                break
            journal.save_if_due()
        seconds = time.perf_counter() - start
        journal.save()
    result = Fit(
        ppo=ppo,
        state=journal.state,
        metrics=journal.metrics,
        num_updates=journal.num_updates - begun,
        compile_seconds=program.compile_seconds,
        run_seconds=seconds,
        interrupted=journal.num_updates < last,
    )
    timing = {"compile_seconds": program.compile_seconds, "run_seconds": seconds}
    journal.finish(**timing, steps_per_second=result.steps_per_second)
    return result


def chunks(program: Program, state: TrainState, done: int, last: int, stop_every: int | None = None) -> Iterator:
    """States and metrics (as numpy, [..., updates of the chunk]) after every chunk, from `done` updates to `last`.

    A chunk is as long as the program has it, or ends where `stop_every` divides the number of updates.
    """
    donate = False  # the first state is the caller's
    while done < last:
        length = min(program.num_updates, last - done, stop_every - done % stop_every if stop_every else last)
        state, metrics = program(state, length, donate=donate)
        yield state, metrics
        done, donate = done + length, True


def _evaluation(evaluate, state: TrainState, shape, due: bool):
    """The mean return of every policy in fresh environments, at the last of the chunk's updates if it is due."""
    returns = np.full(shape, np.nan, np.float32)
    if due:
        runs = getattr(state, "runs", state)  # those of a population lie in it
        key, *rest = jax.device_get((jax.random.key_data(runs.key), runs.policy, runs.env_params))
        returns[..., -1] = evaluate(jax.random.wrap_key_data(key), *rest).episode_return.mean(-1)
    return returns


def _progress(latest: dict) -> str:
    """The newest numbers as text, means over runs."""
    there = {name: np.nanmean(x) for name, x in latest.items() if not np.isnan(x).all()}
    return "  ".join(f"{name.removeprefix('episode_')} {mean:.4g}" for name, mean in there.items())


def _latest(values, before):
    """The last value of each run [..., updates] that is a number, or the one from before."""
    for column in np.moveaxis(values, -1, 0):
        before = np.where(np.isnan(column), before, column)
    return before
