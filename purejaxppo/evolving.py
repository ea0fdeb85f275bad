"""Population-based training inside the program: poor runs continue from copies of good ones, slightly changed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import partial, wraps
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from purejaxppo.batched import AXIS, batched
from purejaxppo.checks import check_whole
from purejaxppo.config import Hyperparams, spec_of, suggest
from purejaxppo.ppo import PPO, TrainState, replace_step
from purejaxppo.record import Record
from purejaxppo.text import quote
from purejaxppo.validate import as_key, check_hyperparams, check_type, check_typed_key

KEPT = ("key", "env_params", "actors")  # by a run that is replaced; the other fields of a state were learned


class Population(Record):
    """The state of R runs that train together and are compared at intervals: everything that the next step needs."""

    runs: TrainState  # [R, ...]
    key: jax.Array  # [], of the evolution; every run has its own too
    fitness: jax.Array  # [R], see `evolving`; -inf: none
    num_episodes: jax.Array  # [R] int32, ended since the last evolution

    @property
    def num_updates(self) -> jax.Array:
        """Updates that each run has done, [R] int32."""
        return self.runs.num_updates

    @property
    def policy(self) -> Any:
        """The policies of all runs, [R, ...]."""
        return self.runs.policy


def evolving(
    ppo: PPO,
    *,
    every: int,
    explore: str | Sequence[str] | Mapping[str, tuple[float, float]] = ("learning_rate", "entropy_coefficient"),
    fraction: float = 0.25,
    factors: Sequence[float] = (0.8, 1.25),
    evaluate: bool = False,
    devices: int | Sequence[Any] | None = None,
) -> PPO:
    """The same PPO over R runs that evolve after every `every` updates: again a PPO, whose state is a `Population`.

        >>> ppo = pjp.make_ppo("CartPole-v1", pjp.Config(num_envs=8, num_updates=2))
        >>> many = pjp.evolving(ppo, every=1)
        >>> population = jax.jit(many.init)(jax.random.split(jax.random.key(0), 4))
        >>> population, metrics = jax.eval_shape(many.train, population)  # shapes alone; jax.jit(many.train) trains
        >>> metrics["parent"].shape
        (4, 2)

    A run's fitness is the mean return of the episodes that ended since the last evolution. If none has ended, it keeps
    its fitness from before, so an interval should span several episodes. An episode during which a run was replaced
    counts in full. With `evaluate`, fitness is instead the mean return of 128 fresh episodes (`PPO.evaluate`), which
    every run plays when an evolution is due. A run that `batched` froze has no fitness, so it is replaced before
    others. See `evolve` for how.

    The metrics are those of `batched`, and: `parent`, [R] int32, the run from which each run continues after this
    update (itself if nothing was copied), and each field in `explore` as it was in this update. If `batched` reports
    such a field, its value after schedules and annealing is `current_<field>`.

    Args:
        ppo: the PPO of one run.
        every: updates between two evolutions.
        explore: hyperparameters to change, by name, or with their ranges as {name: (lowest, highest)}.
        fraction: of the runs, at most replaced by one evolution, in (0, 0.5].
        factors: positive numbers, one of which multiplies an explored hyperparameter.
        evaluate: whether fresh episodes are compared, which cost time, instead of those of training.
        devices: distributes the runs, as in `batched`; only copies pass between devices.

    Raises:
        ValueError: before anything compiles.
    """
    check_type("ppo", ppo, PPO, "as make_ppo returns it")
    if ppo.many:
        raise ValueError(
            "evolving takes the PPO of one run, and this one is batched already (leave out batched, and pass its "
            "devices= to evolving)"
        )
    check_whole("every", every)
    ranges = explored_ranges(explore, factors)
    _check_fraction(fraction)
    if "target_kl" in ranges and not ppo.config.stop_on_kl:
        raise ValueError("explore names 'target_kl', which has no effect while stop_on_kl=False (set it to True)")
    many = batched(ppo, devices)
    place = partial(_place, None if devices is None else many.mesh)
    freeze = many.freeze
    assert freeze is not None
    select = partial(evolve, explore=explore, fraction=fraction, factors=factors)

    @wraps(many.init)
    def init(key: jax.Array, hyperparams: Hyperparams = Hyperparams(), env_params: Any = None):
        key = as_key(key, axes=1)
        num_replaced(fraction, key.size)
        check_hyperparams(hyperparams, key.size)
        _check_plain(hyperparams, ranges)
        population = Population(
            runs=many.init(key, hyperparams, env_params),
            key=jax.random.fold_in(key[0], 2**32 - 1),  # differs from the keys that the run splits from it
            fitness=jnp.full(key.shape, -jnp.inf, jnp.float32),  # not nan, which stops a program under jax_debug_nans
            num_episodes=jnp.zeros(key.shape, jnp.int32),
        )
        return place(population)

    @wraps(many.collect)
    def collect(state: Population):
        _check_population(state)
        runs, rollout = many.collect(state.runs)
        return state.replace(runs=runs), rollout

    @wraps(many.learn)
    def learn(state: Population, rollout: Any):
        _check_population(state)
        # A run that became nan must not be compared, so it is frozen here, before the population evolves.
        return finish(state, *freeze(state.runs, *many.learn(state.runs, rollout)))

    @wraps(many.step)
    def step(state: Population):
        _check_population(state)
        return finish(state, *many.step(state.runs))

    def play(runs: TrainState):
        return many.evaluate(runs.key, runs.policy, runs.env_params).episode_return.mean(1)

    def finish(state: Population, runs: TrainState, metrics: dict):
        """The population after an update of its runs, evolved if an evolution is due."""
        key, evolve_key = jax.random.split(state.key)
        if "parent" in metrics:
            raise ValueError("metric 'parent' is reported by evolving itself (report yours under another name)")
        metrics |= {f"current_{name}": metrics[name] for name in ranges if name in metrics}
        metrics |= {name: runs.hyperparams.get(name) for name in ranges}
        due = runs.num_updates.max() % every == 0
        fitness, num_episodes = count_episodes(state, metrics)
        if evaluate:
            fitness = jax.lax.cond(due, play, lambda _: state.fitness, runs)
        frozen = runs.num_updates == state.num_updates
        # Without any fitness nothing is copied.
        runs, parent = select(evolve_key, runs, jnp.where(due & ~frozen, fitness, -jnp.inf))
        fitness = fitness[parent]  # a copy has the fitness of its parent until its own episodes end
        num_episodes = jnp.where(due, 0, num_episodes)
        population = Population(runs=runs, key=key, fitness=fitness, num_episodes=num_episodes)
        return place(population), metrics | {"parent": parent}

    changes = (
        *many.changes,
        partial(evolving, every=every, explore=explore, fraction=fraction, factors=factors, evaluate=evaluate),
    )
    return replace_step(many, step)._replace(init=init, collect=collect, learn=learn, freeze=None, changes=changes)


def _place(mesh: Mesh | None, population: Population) -> Population:
    """The population with all that has an axis R distributed across a mesh, as each step leaves it."""
    if mesh is None:
        return population
    share = NamedSharding(mesh, PartitionSpec(AXIS))
    where = jax.tree.map(lambda _: share, population).replace(key=NamedSharding(mesh, PartitionSpec()))
    return jax.lax.with_sharding_constraint(population, where)


def count_episodes(state: Population, metrics: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Fitness and number of episodes since the last evolution, [R] each, after one more update with these metrics."""
    ended = metrics["num_episodes"]
    num_episodes = state.num_episodes + ended
    share = ended / jnp.maximum(num_episodes, 1)
    before = jnp.where(state.num_episodes > 0, state.fitness, 0)
    mean = (1 - share) * before + share * metrics["episode_return"]
    return jnp.where(ended > 0, mean, state.fitness), num_episodes


def evolve(
    key: jax.Array,
    state: TrainState,
    fitness: jax.Array,
    *,
    explore: str | Sequence[str] | Mapping[str, tuple[float, float]] = ("learning_rate", "entropy_coefficient"),
    fraction: float = 0.25,
    factors: Sequence[float] = (0.8, 1.25),
) -> tuple[TrainState, jax.Array]:
    """Exploits and explores once (Jaderberg et al., 2017): the least fit runs become changed copies of the fittest.

    Each of the `fraction` of the runs with the lowest fitness draws one of the `fraction` with the highest, and
    continues from it if that one is strictly fitter. It copies what was learned (parameters, normalisers, the
    optimizer's state, fields of a subclass of the state), the number of updates, which schedules depend on, and the
    hyperparameters. Each hyperparameter in `explore` is then multiplied by one of `factors` and clipped to its range;
    for a decay x such as the discount, 1 - x is multiplied. So a coefficient of 0 and a discount of 1 do not change.

    A replaced run keeps its key and its environments, with their unfinished episodes. Its memory is reset, because it
    came from the old network. So is its discounted return, because it is a sum under the old discount and would distort
    the moments that scale rewards.

    Args:
        key: of this evolution.
        state: R runs.
        fitness: [R], higher is better; -inf or nan is no fitness, below any number.
        explore: hyperparameters to change, by name, or with their ranges as {name: (lowest, highest)}.
        fraction: of the runs, at most replaced, in (0, 0.5].
        factors: positive numbers, one of which multiplies an explored hyperparameter.

    Returns:
        The R runs after it, and the parent from which each continues, [R] int32.

    Raises:
        ValueError: at tracing.
    """
    ranges = explored_ranges(explore, factors)
    _check_plain(state.hyperparams, ranges)
    num_runs = len(fitness)
    parent_key, factor_key = jax.random.split(key)
    parent = choose_parents(parent_key, fitness, num_replaced(fraction, num_runs))
    copied = parent != jnp.arange(num_runs)
    learned = {field.name: getattr(state, field.name) for field in fields(state) if field.name not in KEPT}
    learned = jax.tree.map(lambda x: x[parent], learned)
    hyperparams = learned["hyperparams"]
    chosen = jax.random.choice(factor_key, jnp.array(factors, jnp.float32), (len(ranges), num_runs))
    explored = {}
    for (name, (low, high)), factor in zip(ranges.items(), chosen):
        value = hyperparams.get(name)
        spec = spec_of(name)
        moved = 1 - factor * (1 - value) if spec and spec.decay else factor * value
        explored[name] = jnp.where(copied, jnp.clip(moved, low, high), value)
    actors = state.actors.replace(
        first=state.actors.first | copied[:, None],  # its only effect is to reset the memory
        discounted_return=jnp.where(copied[:, None], 0, state.actors.discounted_return),
    )
    return state.replace(**learned | {"hyperparams": hyperparams.set(explored), "actors": actors}), parent


def choose_parents(key: jax.Array, fitness: jax.Array, num_copies: int) -> jax.Array:
    """The run from which each of R runs continues, [R] int32.

    The `num_copies` with the lowest fitness [R] draw among as many with the highest; all others continue from
    themselves.
    """
    order = jnp.argsort(-fitness).astype(jnp.int32)  # the fittest first, nan last
    worst = order[-num_copies:]
    known = fitness > -jnp.inf  # false for nan too
    num_highest = jnp.clip(known.sum(), 1, num_copies)
    drawn = order[jax.random.randint(key, (num_copies,), 0, num_highest)]
    fitter = known[drawn] & ~(fitness[worst] >= fitness[drawn])
    return jnp.arange(len(fitness), dtype=jnp.int32).at[worst].set(jnp.where(fitter, drawn, worst))


def num_replaced(fraction: float, num_runs: int) -> int:
    """The largest number of runs that an evolution replaces. Raises ValueError if it is 0."""
    _check_fraction(fraction)
    number = math.floor(fraction * num_runs + 1e-6)
    if number < 1:
        enough = f"try {math.ceil(1 / fraction)} runs"
        enough += f", or fraction={math.ceil(100 / num_runs) / 100}" if 2 <= num_runs <= 100 else ""
        raise ValueError(f"fraction={fraction} of {num_runs} runs rounds down to 0 runs to replace ({enough})")
    return number


def explored_ranges(
    explore: str | Sequence[str] | Mapping[str, tuple[float, float]], factors: Sequence[float]
) -> dict[str, tuple[float, float]]:
    """The lowest and the highest value of every field to explore, by name.

    Raises ValueError for a name that is not a hyperparameter, a range outside the values that it may have, or factors
    that are not positive.
    """
    if not _are_numbers(factors) or not len(factors) or not all(0 < factor < math.inf for factor in factors):
        raise ValueError(f"factors={quote(factors)} must be numbers above 0, such as (0.8, 1.25)")
    if not isinstance(explore, (str, Sequence, Mapping)):
        raise ValueError(
            f"explore={quote(explore)} must be names of hyperparameters, such as ('learning_rate', 'clip')"
        )
    names = (explore,) if isinstance(explore, str) else tuple(explore)
    wanted = explore if isinstance(explore, Mapping) else {}
    ranges = {}
    for name in names:
        spec = spec_of(str(name))
        if spec is None:
            near = suggest(str(name), Hyperparams().names)
            raise ValueError(f"explore names {name!r}, which is not a hyperparameter ({near})")
        bounds = wanted.get(name, (spec.low, spec.high))
        if not _are_numbers(bounds) or len(bounds) != 2:
            raise ValueError(f"explore={{{name!r}: {quote(bounds)}}} must be a pair of numbers, (lowest, highest)")
        low, high = bounds
        if not spec.low <= low <= high <= spec.high:
            raise ValueError(f"explore={{{name!r}: ({low}, {high})}} must ascend within [{spec.low:g}, {spec.high:g}]")
        if spec.open_high:
            high = min(high, float(np.nextafter(np.float32(spec.high), np.float32(0))))
        ranges[name] = low, high
    return ranges


def _are_numbers(values: Any) -> bool:
    """Whether `values` are a sequence of numbers."""
    try:
        array = np.asarray(values)
    except (TypeError, ValueError):  # of unequal lengths
        return False
    return array.ndim == 1 and array.dtype.kind in "iuf"


def _check_population(state: Any) -> None:
    check_type("state", state, Population, "from the init of this PPO, or from an earlier step")
    check_typed_key("state.key", state.key)


def _check_fraction(fraction: float) -> None:
    if not _are_numbers([fraction]) or not 0 < fraction <= 0.5:
        raise ValueError(
            f"fraction={quote(fraction)} must be a number in (0, 0.5], so that no run is both replaced and copied"
        )


def _check_plain(hyperparams: Hyperparams, ranges: Mapping[str, Any]) -> None:
    """Refuses to explore hyperparameters that have no value, or a schedule."""
    for name in ranges:
        if name not in hyperparams.names:
            raise ValueError(f"explore names {name!r}, which the hyperparameters lack (give it an initial value)")
        if callable(hyperparams.get(name)):
            raise ValueError(f"{name} is a schedule, which cannot be explored (give a number, or explore other fields)")
