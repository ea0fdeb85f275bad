"""Population-based training inside the program: runs that do badly go on from runs that do well, slightly changed."""

import difflib
import math
from collections.abc import Mapping
from dataclasses import fields
from functools import partial, wraps

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from purejaxppo.batched import batched
from purejaxppo.checks import check_whole
from purejaxppo.config import Hyperparams, spec_of
from purejaxppo.ppo import PPO, TrainState, replace_step

KEPT = ("key", "env_params", "actors")  # by a run that is replaced; all else of a state was learned


class Population(struct.PyTreeNode):
    """R runs that learn side by side and are compared now and then: everything that the next step needs."""

    runs: TrainState  # [R, ...]
    key: jax.Array  # [] of the evolution; every run has its own besides
    fitness: jax.Array  # [R] mean return of the episodes since the last evolution, or before it while none has ended
    num_episodes: jax.Array  # [R] int32, ended since the last evolution

    @property
    def num_updates(self):
        """Updates that every run has done, [R] int32."""
        return self.runs.num_updates

    @property
    def policy(self):
        """The policies of all runs, [R, ...]."""
        return self.runs.policy


def evolving(
    ppo: PPO,
    *,
    every: int,
    explore=("learning_rate", "entropy_coefficient"),
    fraction: float = 0.25,
    factors=(0.8, 1.25),
) -> PPO:
    """The same PPO over R runs that evolve after every `every` updates: again a PPO, whose state is a `Population`.

    A run's fitness is the mean return of the episodes that ended since the last evolution, and what it was before
    where none has, so an interval should span several episodes. An episode during which a run was replaced counts
    whole. A run that `batched` froze has no fitness, and so is replaced before others. `evolve` tells the rest.

    Metrics have besides those of `batched` `parent`, [R] int32, the run from which each run goes on after this update
    (itself, where nothing was copied), and the fields in `explore` as this update had them; what it made of such a
    field, by a schedule or annealing, is `current_<field>`. Raises ValueError before anything compiles.
    """
    check_whole("every", every)
    ranges = explored_ranges(explore, factors)
    _check_fraction(fraction)
    many = batched(ppo)
    select = partial(evolve, explore=explore, fraction=fraction, factors=factors)

    @wraps(many.init)
    def init(key, hyperparams=Hyperparams(), env_params=None):
        num_replaced(fraction, key.size)
        _check_plain(hyperparams, ranges)
        return Population(
            runs=many.init(key, hyperparams, env_params),
            key=jax.random.fold_in(key[0], 2**32 - 1),  # none of the few keys that the run splits this one into
            fitness=jnp.full(key.shape, jnp.nan, jnp.float32),
            num_episodes=jnp.zeros(key.shape, jnp.int32),
        )

    @wraps(many.collect)
    def collect(state: Population):
        runs, rollout = many.collect(state.runs)
        return state.replace(runs=runs), rollout

    @wraps(many.learn)
    def learn(state: Population, rollout):
        # A run that turned nan must not be compared: a population freezes it here, before it evolves.
        return finish(state, *many.freeze(state.runs, *many.learn(state.runs, rollout)))

    @wraps(many.step)
    def step(state: Population):
        return finish(state, *many.step(state.runs))

    def finish(state: Population, runs: TrainState, metrics: dict):
        """The population after an update of its runs, evolved if it is due."""
        key, evolve_key = jax.random.split(state.key)
        metrics |= {f"current_{name}": metrics[name] for name in ranges if name in metrics}
        metrics |= {name: runs.hyperparams.get(name) for name in ranges}
        fitness, num_episodes = count_episodes(state, metrics)
        due = runs.num_updates.max() % every == 0
        frozen = runs.num_updates == state.num_updates
        # Without any fitness nothing is copied.
        runs, parent = select(evolve_key, runs, jnp.where(due & ~frozen, fitness, jnp.nan))
        fitness = fitness[parent]  # a copy counts as fit as its parent until its own episodes end
        num_episodes = jnp.where(due, 0, num_episodes)
        return Population(runs=runs, key=key, fitness=fitness, num_episodes=num_episodes), metrics | {"parent": parent}

    return replace_step(many, step)._replace(init=init, collect=collect, learn=learn, freeze=None)


def count_episodes(state: Population, metrics: dict):
    """Fitness and episodes since the last evolution, [R] each, with those of one more update counted in."""
    ended = metrics["num_episodes"]
    num_episodes = state.num_episodes + ended
    share = ended / jnp.maximum(num_episodes, 1)
    before = jnp.where(state.num_episodes > 0, state.fitness, 0)
    mean = (1 - share) * before + share * metrics["episode_return"]
    return jnp.where(ended > 0, mean, state.fitness), num_episodes


def evolve(
    key,
    state: TrainState,
    fitness,
    *,
    explore=("learning_rate", "entropy_coefficient"),
    fraction: float = 0.25,
    factors=(0.8, 1.25),
):
    """Exploit and explore once (Jaderberg et al., 2017): R runs after it, and whom each goes on from, [R] int32.

    Each of the `fraction` of the runs with the lowest fitness [R] draws one of the `fraction` with the highest, and
    goes on from it if that one is truly fitter; nan, no fitness, is below any other. It takes over what was learned
    (parameters, normalisers, the optimizer's state, fields of a subclass of the state), how far its schedules are, and
    the hyperparameters. Of these, each one in `explore`, names or {name: (lowest, highest)}, is multiplied by one of
    `factors`, a decay such as the discount in 1 - x, and clipped to its range. So a coefficient of 0 and a discount of
    1 stay what they are.

    A run that is replaced keeps its key and its environments, with the episodes under way. But what the old network
    remembered means nothing to the new one, so its memory begins anew; so does the discounted return, a sum under
    another discount, which would leave its mark in the moments that scale rewards. Raises ValueError at tracing.
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
        moved = 1 - factor * (1 - value) if spec_of(name).decay else factor * value
        explored[name] = jnp.where(copied, jnp.clip(moved, low, high), value)
    actors = state.actors.replace(
        first=state.actors.first | copied[:, None],  # all that it does is to empty the memory
        discounted_return=jnp.where(copied[:, None], 0, state.actors.discounted_return),
    )
    return state.replace(**learned | {"hyperparams": hyperparams.set(explored), "actors": actors}), parent


def choose_parents(key, fitness, num_copies: int):
    """Whom each run goes on from, [R] int32: itself, but for the lowest `num_copies`, which draw among the highest."""
    order = jnp.argsort(-fitness).astype(jnp.int32)  # the fittest first, nan last
    worst = order[-num_copies:]
    num_highest = jnp.clip((~jnp.isnan(fitness)).sum(), 1, num_copies)
    drawn = order[jax.random.randint(key, (num_copies,), 0, num_highest)]
    fitter = ~jnp.isnan(fitness[drawn]) & ~(fitness[worst] >= fitness[drawn])
    return jnp.arange(len(fitness), dtype=jnp.int32).at[worst].set(jnp.where(fitter, drawn, worst))


def num_replaced(fraction: float, num_runs: int) -> int:
    """How many of R runs an evolution replaces at most. Raises ValueError where that would be none."""
    _check_fraction(fraction)
    number = math.floor(fraction * num_runs + 1e-6)
    if number < 1:
        enough = f"try {math.ceil(1 / fraction)} runs"
        enough += f", or fraction={math.ceil(100 / num_runs) / 100}" if 2 <= num_runs <= 100 else ""
        raise ValueError(f"fraction={fraction} of a population of {num_runs} is no run to replace ({enough})")
    return number


def explored_ranges(explore, factors) -> dict:
    """The lowest and the highest value of every field to explore. Raises ValueError for what cannot be explored."""
    if not len(factors) or not all(0 < factor < math.inf for factor in factors):
        raise ValueError(f"factors={factors} must be numbers above 0, such as (0.8, 1.25)")
    names = (explore,) if isinstance(explore, str) else tuple(explore)
    wanted = explore if isinstance(explore, Mapping) else {}
    ranges = {}
    for name in names:
        spec = spec_of(str(name))
        if spec is None:
            near = difflib.get_close_matches(str(name), Hyperparams().names, n=1, cutoff=0)
            raise ValueError(f"explore names {name!r}, which is no hyperparameter (did you mean {near[0]!r}?)")
        low, high = wanted.get(name, (spec.low, spec.high))
        if not spec.low <= low <= high <= spec.high:
            raise ValueError(f"explore={{{name!r}: ({low}, {high})}} must ascend within [{spec.low:g}, {spec.high:g}]")
        if spec.open_high:
            high = min(high, float(np.nextafter(np.float32(spec.high), np.float32(0))))
        ranges[name] = low, high
    return ranges


def _check_fraction(fraction: float):
    if not 0 < fraction <= 0.5:
        raise ValueError(f"fraction={fraction} must be in (0, 0.5], so that no run is both replaced and copied")


def _check_plain(hyperparams: Hyperparams, ranges: dict):
    for name in ranges:
        if name not in hyperparams.names:
            raise ValueError(f"explore names {name!r}, which the hyperparameters lack (give it a first value)")
        if callable(hyperparams.get(name)):
            raise ValueError(f"{name} is a schedule, which cannot be explored (give a number, or explore other fields)")
