"""The runs of successive halving: their states and metrics so far, of which some train at a time."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from purejaxppo.batched import AXIS, batched, reported_failures, seed_keys
from purejaxppo.experiment.distributed import is_first, process_count
from purejaxppo.experiment.evaluations import EVALUATION_RETURN, Evaluations, ends_of_chunks, make_evaluations
from purejaxppo.experiment.files import from_arrays, shapes_of, to_arrays
from purejaxppo.experiment.lock import LockLost
from purejaxppo.experiment.program import Program, compile_training, first_state
from purejaxppo.experiment.report.failures import leaves_of
from purejaxppo.experiment.sweeps.columns import run_arguments
from purejaxppo.experiment.sweeps.rungs import score_of
from purejaxppo.experiment.sweeps.slices import Slice, Slices
from purejaxppo.experiment.sweeps.sweep import Sweep
from purejaxppo.ppo import PPO, TrainState
from purejaxppo.text import count


class Trainer(NamedTuple):
    """Trains and evaluates slices of some number of runs, one on every device; compiled for them."""

    program: Program
    evaluations: Evaluations | None
    """If the sweep has such."""
    sharding: Any
    """Of the leaves of a state."""
    device: Any
    """The first of the devices, where the states of all runs lie."""

    def train(self, states: TrainState, length: int, due: bool) -> tuple[TrainState, dict[str, np.ndarray]]:
        """States of its number of runs, and their metrics [R, length], after an evaluation if that is due."""
        new, metrics = self.program(jax.device_put(states, self.sharding), length, donate=True)
        if self.evaluations:
            metrics |= {EVALUATION_RETURN: self.evaluations.measure(new, metrics, due)}
        return jax.device_put(new, states.num_updates.sharding), metrics


def compile_trainer(sweep: Sweep, ppo: PPO, slice_size: int, num_updates: int, devices: Sequence[Any]) -> Trainer:
    """Compiles a trainer.

    Args:
        sweep: has the runs.
        ppo: of one run.
        slice_size: runs on every device.
        num_updates: that it makes at most at a time.
        devices: which train slices side by side.
    """
    many, sharding = batched(ppo), SingleDeviceSharding(devices[0])
    if len(devices) > 1:
        many = batched(ppo, devices)
        sharding = NamedSharding(many.mesh, PartitionSpec(AXIS))
    shapes = jax.eval_shape(lambda: begin(sweep, many, [(0, 0)] * (slice_size * len(devices))))
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)
    with reported_failures():
        program = compile_training(many, state, num_updates, slice_size=slice_size * len(devices))
    every = sweep.evaluate_every
    return Trainer(program, make_evaluations(many, every, state) if every else None, sharding, devices[0])


class Training:
    """The states of all runs of a sweep and their metrics so far, of which some settings train at a time.

    Updates that the slices hold are not made again.
    """

    def __init__(
        self,
        sweep: Sweep,
        ppo: PPO,
        trainers: Sequence[Trainer],
        slices: Slices,
        pool: ThreadPoolExecutor,
        check: Callable[[], Any] | None = None,
    ):
        self.sweep, self.trainers = sweep, trainers
        self.slices, self.pool, self.check = slices, pool, check
        self.names = _names(sweep)
        self.metrics: list[dict[str, np.ndarray]] = [{} for _ in self.names]  # [seeds, updates] of every setting
        self.done = np.zeros(len(self.names), int)  # updates of every setting that this call has made or repeated
        self.changed: set[int] = set()  # settings to store
        with jax.default_device(trainers[0].device):
            self.states = begin(sweep, ppo, list(sweep.runs().values()), first_state)
            self._load()

    def train(self, settings: Sequence[int], length: int) -> int:
        """Trains settings for `length` updates more; returns how many updates of runs were not stored already."""
        self.done[settings] += length
        # Of all settings of the round, not of those that lack updates: a call that resumes rounds alike.
        trainer = _smallest(self.trainers, len(settings) * self.sweep.num_seeds)
        lacking = {setting: self._lacking(setting) for setting in settings}
        for chunks in sorted(set(lacking.values()) - {()}):
            together = [setting for setting in settings if lacking[setting] == chunks]
            for number, due in chunks:
                self._train_together(trainer, together, number, due)
            self.changed.update(together)
        return sum(number for chunks in lacking.values() for number, _ in chunks) * self.sweep.num_seeds

    def _lacking(self, setting: int) -> tuple[tuple[int, bool], ...]:
        """The chunks of a setting that are not stored: the updates of each, and whether an evaluation is due then."""
        begin, evaluations = self.num_stored(setting), self.trainers[0].evaluations
        ends = ends_of_chunks(begin, int(self.done[setting]), self.trainers[0].program.num_updates, evaluations)
        due = [evaluations is not None and evaluations.is_due(end) for end in ends]
        return tuple(zip((end - start for start, end in zip([begin, *ends], ends)), due))

    def _train_together(self, trainer: Trainer, settings: Sequence[int], number: int, due: bool):
        """Trains settings for some updates, and evaluates them then if that is due."""
        runs, num_seeds = self._runs(settings), self.sweep.num_seeds
        self.states, metrics = train_runs(trainer, self.states, runs, number, self.pool, due)
        for i, setting in enumerate(settings):
            self._append(setting, {name: x[i * num_seeds : (i + 1) * num_seeds] for name, x in metrics.items()})

    def scores(self, settings: Sequence[int], length: int) -> np.ndarray:
        """The scores [settings] after `length` updates more, see `score_of`."""
        return np.array([score_of(self.metrics[i], int(self.done[i]), length) for i in settings])

    def num_stored(self, setting: int) -> int:
        """Updates of a setting whose metrics are known."""
        return self.slice_of(setting).num_updates

    def slice_of(self, setting: int, state: Mapping[str, np.ndarray] | None = None) -> Slice:
        """The runs of a setting as a slice, with leaves of their states."""
        return Slice(self.names[setting], self.metrics[setting], dict(state or {}), tuple(leaves_of(self.states)))

    def store(self):
        """Writes the settings that were trained since the last time; what a full disk does not take stays in memory."""
        for setting in sorted(self.changed) if self.slices.folder and is_first() else ():
            new = self.slice_of(setting, to_arrays(self.states[self._runs([setting])]))
            try:
                if self.check:
                    self.check()
                self.slices.write(new)
            except (OSError, LockLost) as error:
                self.slices.keep(new, error if isinstance(error, OSError) else OSError(str(error)))
        self.changed.clear()

    def begun(self) -> list[Slice]:
        """The settings that have trained, as slices. Raises KeyboardInterrupt if none has."""
        num_updates, begun = np.asarray(self.states.num_updates), [i for i, x in enumerate(self.metrics) if x]
        if not begun:
            raise KeyboardInterrupt("successive_halving was interrupted before it trained anything")
        return [self.slice_of(i, {"num_updates": num_updates[self._runs([i])]}) for i in begun]

    def _runs(self, settings: Sequence[int]) -> np.ndarray:
        """The indices of the runs of some settings."""
        seeds = self.sweep.num_seeds
        return np.add.outer(np.array(settings) * seeds, np.arange(seeds)).ravel()

    def _append(self, setting: int, new: Mapping[str, np.ndarray]):
        old = self.metrics[setting]
        self.metrics[setting] = {name: np.concatenate([old[name], x], 1) if old else x for name, x in new.items()}

    def _load(self):
        """Takes states and metrics from the slices."""
        stored = settings_of(self.slices, self.sweep)
        if not stored:
            return
        like, like_one = jax.eval_shape(lambda: (self.states, self.states[: self.sweep.num_seeds]))
        arrays = {name: x.copy() for name, x in to_arrays(self.states).items()}
        for setting, slice_ in stored.items():
            runs = self._runs([setting])
            whole = self.slices.load(slice_.name, shapes_of(like))
            from_arrays(whole.state, like_one, f"the slice {slice_.name}")  # raises for another shape
            for name, x in arrays.items():
                x[runs] = whole.state[name]
            self.metrics[setting] = {name: np.asarray(x) for name, x in whole.metrics.items()}
        self.states = from_arrays(arrays, like)


def _names(sweep: Sweep) -> list[tuple[str, ...]]:
    """The names of the runs of every setting."""
    return [tuple(sweep.runs([setting])) for setting in range(len(sweep.table))]


def settings_of(slices: Slices, sweep: Sweep) -> dict[int, Slice]:
    """The stored slices by their settings. Raises ValueError if a slice holds anything but the seeds of one setting."""
    settings, found = {names: i for i, names in enumerate(_names(sweep))}, {}
    for slice_ in slices.read():
        if slice_.runs not in settings:
            raise ValueError(
                f"folder={slices.folder} holds slices of {count(len(slice_.runs), 'run')}, but halving keeps the "
                f"{count(sweep.num_seeds, 'seed')} of every setting in one (name another folder)"
            )
        found[settings[slice_.runs]] = slice_
    return found


def _smallest(trainers: Sequence[Trainer], num_runs: int) -> Trainer:
    """The smallest trainer that takes so many runs at once, in all processes together, or else the largest."""
    sizes = [trainer.program.slice_size * process_count() for trainer in trainers]
    return next((x for x, size in zip(trainers[::-1], sizes[::-1]) if size >= num_runs), trainers[0])


def train_runs(
    trainer: Trainer, states: TrainState, runs: np.ndarray, length: int, pool: ThreadPoolExecutor, due: bool = False
) -> tuple[TrainState, dict[str, np.ndarray]]:
    """Trains some runs of a batch, as many at a time as the trainer takes; the last of them fills up what is free.

    Several processes divide them, and give each other what they trained.

    Args:
        trainer: trains as many.
        states: of all runs of the batch.
        runs: the indices of those to train.
        length: updates to make.
        pool: the threads that train side by side.
        due: whether they are evaluated then.

    Returns:
        The states of all runs, and the metrics of the trained ones, [runs, length].
    """
    size = trainer.program.slice_size
    slices = [runs[i : i + size] for i in range(0, len(runs), size)]
    slices = [np.append(indices, np.repeat(indices[-1], size - len(indices))) for indices in slices]

    own = slices[jax.process_index() :: process_count()] or slices[-1:]
    trained = list(pool.map(lambda indices: trainer.train(states[indices], length, due), own))
    if process_count() > 1:
        trained = _exchange(trained, len(slices), trainer.program.like)
    for indices, (new, _) in zip(slices, trained):
        states = jax.tree.map(lambda old, some, indices=indices: old.at[indices].set(some), states, new)
    joined = {name: np.concatenate([metrics[name] for _, metrics in trained])[: len(runs)] for name in trained[0][1]}
    return states, joined


def _exchange(trained: Sequence[tuple[TrainState, dict]], number: int, like: Any) -> list[tuple[TrainState, dict]]:
    """The states and metrics of all slices from those of each process, which has every n-th of the `number` slices."""
    most = -(-number // process_count())
    filled = [(to_arrays(state), metrics) for state, metrics in [*trained, *[trained[-1]] * (most - len(trained))]]
    stacked = jax.tree.map(lambda *x: np.stack(x), *filled)
    found = multihost_utils.process_allgather(stacked)  # [processes, most, ...]
    places = [divmod(i, process_count())[::-1] for i in range(number)]
    slices = [jax.tree.map(lambda x, place=place: x[place], found) for place in places]
    return [(from_arrays(arrays, like), metrics) for arrays, metrics in slices]


def begin(sweep: Sweep, ppo: PPO, runs: Sequence[tuple[int, int]], start: Callable | None = None) -> TrainState:
    """The first states of runs of a sweep, which are pairs (setting, seed); `start` is called as `first_state`."""
    seeds, *columns = run_arguments(sweep, ppo, runs)
    keys = seed_keys(jax.random.key(sweep.seed), jnp.asarray(seeds))
    return start(ppo, keys, *columns) if start else ppo.init(keys, *columns)
