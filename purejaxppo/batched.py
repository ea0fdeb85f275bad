"""Many runs in one program: the same functions and the same pytrees with one more axis R in front."""

from collections.abc import Mapping
from dataclasses import fields
from functools import partial, wraps

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from purejaxppo.checks import check_whole
from purejaxppo.config import Hyperparams, as_arrays, spec_of
from purejaxppo.ppo import PPO, TrainState, replace_step
from purejaxppo.sharded import choose_devices
from purejaxppo.table import Table

AXIS = "runs"
GIVEN = ("key", "hyperparams", "env_params", "actors")  # of a state; all else is learned


def batched(ppo: PPO, devices=None) -> PPO:
    """The same PPO over R runs: again a PPO, whose keys, states, policies and metrics have a leading axis R.

    In `init`, hyperparameters and environment parameters without that axis are shared by all runs. A run that would
    turn nan or infinite is frozen: its state stays as it was before that update, in which `num_updates` tells when it
    was, and from there on it reports nan and no episodes. `devices`, a list or how many, share the runs out among
    them, R / D to each, with no communication.
    """
    mesh = _mesh(ppo, devices)
    on_devices = partial(_on_devices, mesh)

    @wraps(ppo.init)
    def init(key, hyperparams=Hyperparams(), env_params=None):
        if key.ndim != 1:
            raise ValueError(f"keys must be one for each run, [R], not of shape {key.shape} (see `runs`)")
        if "rbg" in str(jax.random.key_impl(key)):
            raise ValueError(
                f"keys of the generator {jax.random.key_impl(key)!r} draw other numbers in other batches: "
                "take those of 'threefry2x32', or train one run at a time"
            )
        num_runs = key.shape[0]
        env_params = ppo.env.params if env_params is None else env_params
        hyperparams = _per_run(hyperparams, jax.tree.map(lambda _: 0.0, hyperparams), num_runs)
        return on_devices(jax.vmap(ppo.init))(key, hyperparams, _per_run(env_params, ppo.env.params, num_runs))

    @wraps(ppo.evaluate)
    def evaluate(key, policy, env_params=None, **options):
        env_params = ppo.env.params if env_params is None else env_params
        env_params = _per_run(env_params, ppo.env.params, key.shape[0])
        return jax.vmap(lambda *args: ppo.evaluate(*args, **options))(key, policy, env_params)

    @wraps(ppo.act)
    def act(policy, obs, key=None, memory=None, env_params=None):
        if env_params is not None:
            env_params = _per_run(env_params, ppo.env.params, len(jax.tree.leaves(policy)[0]))
        return jax.vmap(ppo.act)(policy, obs, key, memory, env_params)

    def over_runs(function):
        return wraps(function)(on_devices(partial(_over_runs, function)))

    one = replace_step(ppo, wraps(ppo.step)(lambda state: freeze(state, *ppo.step(state))))
    lifted = {name: over_runs(getattr(one, name)) for name in ("collect", "learn", "step", "train")}
    return ppo._replace(
        init=init, evaluate=evaluate, act=act, **lifted,
        mesh=mesh or ppo.mesh, freeze=over_runs(freeze), custom=None,
    )  # fmt: skip


def _over_runs(function, state, *args):
    """A function of one state for a batch of R; a single run goes through without its axis, which is faster."""
    if state.num_updates.ndim == 0:
        raise ValueError("a batch of runs takes states with a leading axis R, from its own init with keys [R]")
    if len(state.num_updates) > 1:
        return jax.vmap(function)(state, *args)
    return jax.tree.map(lambda x: x[None], function(*jax.tree.map(lambda x: x[0], (state, *args))))


def freeze(state: TrainState, new: TrainState, metrics: dict) -> tuple[TrainState, dict]:
    """The state after a whole step and its metrics, or the state before and nan if what it learned is not finite."""
    learned = [getattr(new, field.name) for field in fields(new) if field.name not in GIVEN]
    numbers = [x for x in jax.tree.leaves((learned, metrics.get("loss", 0.0))) if jnp.issubdtype(x, jnp.inexact)]
    finite = jnp.stack([jnp.isfinite(x).all() for x in numbers]).all()
    # The same state has the same key, and so the same step before it: once frozen it stays so.
    state = jax.tree.map(lambda old, new: jnp.where(finite, new, old), state, new)
    return state, {name: jnp.where(finite, x, _nothing(x)) for name, x in metrics.items()}


def _nothing(metric):
    return jnp.asarray(jnp.nan if jnp.issubdtype(metric.dtype, jnp.floating) else 0, metric.dtype)


def _mesh(ppo: PPO, devices):
    if devices is None:
        return None
    if ppo.mesh is not None:
        raise ValueError(f"this PPO shares its environments out to {ppo.mesh.size} devices (leave devices=None)")
    return Mesh(np.array(choose_devices(devices)), AXIS)


def _on_devices(mesh, function):
    """A function of arrays with a leading axis R, each device of a mesh with a share of the runs."""
    if mesh is None:
        return function

    def run(*args):
        num_runs = len(jax.tree.leaves(args)[0])
        if num_runs % mesh.size:
            raise ValueError(
                f"{num_runs} runs must be a multiple of the {mesh.size} devices that share them "
                f"(try {num_runs + -num_runs % mesh.size})"
            )
        share = PartitionSpec(AXIS)
        return jax.shard_map(function, mesh=mesh, in_specs=share, out_specs=share, check_vma=False)(*args)

    return run


def concatenate(*states: TrainState) -> TrainState:
    """The runs of several batches as one batch, in their order."""
    return jax.tree.map(lambda *xs: jnp.concatenate(xs), *states)


def runs(key, values: Table | Mapping | None = None, num_seeds: int = 1, hyperparams: Hyperparams = Hyperparams()):
    """Keys [R] and Hyperparams [R] for every setting of a table times `num_seeds` seeds; seeds vary fastest.

    `values` is a table of hyperparameters (`grid`, `paired`, `sample`) or a dict of columns. Seed i has the same key
    under every setting and whatever `num_seeds` is, so settings are compared on the same draws. Raises ValueError for
    a name that is no hyperparameter: `Sweep` takes those of every kind.
    """
    values = values.columns() if isinstance(values, Table) else values or {}
    for name in values:
        if spec_of(name) is None:
            known = ", ".join(hyperparams.names)
            raise ValueError(f"{name} is not a hyperparameter (known: {known}, extra.NAME; Sweep takes other fields)")
    check_whole("num_seeds", num_seeds)
    lengths = {name: len(column) for name, column in values.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"the columns of values must be equally long, not {lengths} (grid(...) combines them)")
    num_settings = max(lengths.values(), default=1)
    keys = seed_keys(key, jnp.tile(jnp.arange(num_seeds), num_settings))
    columns = {name: np.repeat(np.asarray(column), num_seeds) for name, column in values.items()}
    swept = as_arrays(hyperparams.set(columns))
    return keys, _per_run(swept, jax.tree.map(lambda _: 0.0, swept), keys.shape[0])


def seed_keys(key, seeds):
    """The keys [R] of the seeds with numbers [R]."""
    return jax.vmap(partial(jax.random.fold_in, key))(seeds)


def _per_run(tree, like, num_runs: int):
    """Every leaf with a leading axis R: as it is where it has one axis more than in `like`, else shared by all runs."""

    def spread(x, one):
        x = jnp.asarray(x)
        return x if x.ndim > jnp.ndim(one) else jnp.broadcast_to(x, (num_runs, *x.shape))

    return jax.tree.map(spread, tree, like)
