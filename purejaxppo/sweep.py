"""Many runs in one program: the same functions and the same pytrees with one more axis R in front."""

import itertools
from dataclasses import fields, replace
from functools import wraps

import jax
import jax.numpy as jnp
import numpy as np

from purejaxppo.config import Hyperparams, as_arrays
from purejaxppo.ppo import PPO


def batched(ppo: PPO) -> PPO:
    """The same PPO over R runs: again a PPO, whose keys, states, policies and metrics have a leading axis R.

    In `init`, hyperparameters and environment parameters without that axis are shared by all runs.
    """

    def init(keys, hyperparams=Hyperparams(), env_params=None):
        if keys.ndim != 1:
            raise ValueError(f"keys must be one for each run, [R], not of shape {keys.shape} (see `runs`)")
        num_runs = keys.shape[0]
        env_params = ppo.env.params if env_params is None else env_params
        hyperparams = _per_run(hyperparams, jax.tree.map(lambda _: 0.0, hyperparams), num_runs)
        return jax.vmap(ppo.init)(keys, hyperparams, _per_run(env_params, ppo.env.params, num_runs))

    def evaluate(keys, policies, env_params=None, **options):
        env_params = ppo.env.params if env_params is None else env_params
        env_params = _per_run(env_params, ppo.env.params, keys.shape[0])
        return jax.vmap(lambda *args: ppo.evaluate(*args, **options))(keys, policies, env_params)

    def act(policies, obs, keys=None, memory=None, env_params=None):
        if env_params is not None:
            env_params = _per_run(env_params, ppo.env.params, len(jax.tree.leaves(policies)[0]))
        return jax.vmap(ppo.act)(policies, obs, keys, memory, env_params)

    return ppo._replace(init=init, step=_over_runs(ppo.step), train=_over_runs(ppo.train), evaluate=evaluate, act=act)


def _over_runs(function):
    """A function of one state as one of a batch of R; a single run goes through without its axis, which is faster."""

    @wraps(function)
    def run(state):
        if state.num_updates.ndim == 0:
            raise ValueError("a batch of runs takes states with a leading axis R, from its own init with keys [R]")
        if len(state.num_updates) > 1:
            return jax.vmap(function)(state)
        return jax.tree.map(lambda x: x[None], function(jax.tree.map(lambda x: x[0], state)))

    return run


def grid(**values) -> dict[str, np.ndarray]:
    """Every combination of values of hyperparameters, as columns of equal length; the last name varies fastest.

    Raises ValueError for an empty grid.
    """
    try:
        columns = {name: np.atleast_1d(np.asarray(column, np.float32)) for name, column in values.items()}
    except (TypeError, ValueError):
        raise ValueError(
            f"a grid takes lists of numbers, not {values} (learning_rate_annealing sweeps annealing)"
        ) from None
    for name, column in columns.items():
        if column.ndim != 1 or not column.size:
            raise ValueError(f"{name}={values[name]!r} must be a list of one number or more")
    return dict(zip(columns, np.array(list(itertools.product(*columns.values())), np.float32).T))


def runs(key, values: dict | None = None, num_seeds: int = 1, hyperparams: Hyperparams = Hyperparams()):
    """Keys [R] and Hyperparams [R] for every setting in `values` times `num_seeds` seeds; seeds vary fastest.

    Seed i has the same key under every setting and whatever `num_seeds` is, so settings are compared on the same
    draws. Raises ValueError for a name that is no hyperparameter.
    """
    values = values or {}
    known = [field.name for field in fields(Hyperparams)]
    for name in values:
        if name not in known:
            raise ValueError(f"{name} is not a hyperparameter (known: {', '.join(known)})")
    if num_seeds < 1:
        raise ValueError(f"num_seeds={num_seeds} must be at least 1")
    lengths = {name: len(column) for name, column in values.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"the columns of values must be equally long, not {lengths} (grid(...) combines them)")
    num_settings = max(lengths.values(), default=1)
    seeds = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(num_seeds))
    keys = seeds[jnp.tile(jnp.arange(num_seeds), num_settings)]
    columns = {name: jnp.repeat(jnp.asarray(column), num_seeds) for name, column in values.items()}
    swept = as_arrays(replace(hyperparams, **columns))
    return keys, _per_run(swept, jax.tree.map(lambda _: 0.0, swept), keys.shape[0])


def _per_run(tree, like, num_runs: int):
    """Every leaf with a leading axis R: as it is where it has one axis more than in `like`, else shared by all runs."""

    def spread(x, one):
        x = jnp.asarray(x)
        return x if x.ndim > jnp.ndim(one) else jnp.broadcast_to(x, (num_runs, *x.shape))

    return jax.tree.map(spread, tree, like)
