"""Many runs in one program: the same functions and pytrees, with a leading axis R."""

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from functools import partial, wraps
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from purejaxppo.checks import check_whole
from purejaxppo.config import Hyperparams, as_arrays, spec_of, suggest
from purejaxppo.ppo import PPO, TrainState, replace_step
from purejaxppo.rollout import Policy
from purejaxppo.sharded import choose_devices
from purejaxppo.summary import FAILURE, reports_failures
from purejaxppo.table import Table
from purejaxppo.text import shorten
from purejaxppo.validate import (
    as_env_params,
    as_key,
    check_axis,
    check_hyperparams,
    check_is_state,
    check_target_kl,
    check_type,
    refuse_difference,
)

AXIS = "runs"
ONE = "what belongs to one run goes to the PPO that is not batched"
GIVEN = ("key", "hyperparams", "env_params", "actors")  # of a state; all else is learned
WATCHED = ("loss", "grad_norm")  # metrics that tell why a run failed


def batched(ppo: PPO, devices: int | Sequence[Any] | None = None) -> PPO:
    """The same PPO over R runs: again a PPO, whose keys, states, policies and metrics have a leading axis R.

        >>> ppo = pjp.make_ppo("CartPole-v1", pjp.Config(num_envs=8, num_updates=2))
        >>> many = pjp.batched(ppo)
        >>> state = jax.jit(many.init)(jax.random.split(jax.random.key(0), 3))
        >>> state, metrics = jax.eval_shape(many.train, state)  # shapes alone; jax.jit(many.train) trains
        >>> metrics["loss"].shape
        (3, 2)

    A run's result does not depend on the other runs of its batch, except that a batch of one run rounds differently: it
    is passed without its axis, which is faster. Such differences grow in training, so compare runs that trained in
    batches (or slices) of one, or runs of batches of two or more.

    In `init`, hyperparameters and environment parameters without the axis R are shared by all runs. A run that would
    become nan or infinite is frozen: its state stays as it was before that update, so `num_updates` of the state says
    how many succeeded, and from then on the run reports nan and no episodes.

    `devices`, a list or a number of them, distributes the runs across D devices, R / D on each, without communication.
    Raises ValueError if there are fewer devices, or if `ppo` is sharded already.
    """
    check_type("ppo", ppo, PPO, "as make_ppo returns it")
    if ppo.many:
        raise ValueError("batched takes the PPO of one run, and this one is batched already (leave out one batched)")
    mesh = _mesh(ppo, devices)
    on_devices = partial(_on_devices, mesh)

    @wraps(ppo.init)
    def init(key: jax.Array, hyperparams: Hyperparams = Hyperparams(), env_params: Any = None):
        key = as_key(key, axes=1)
        if "rbg" in str(jax.random.key_impl(key)):
            raise ValueError(
                f"keys of the generator {jax.random.key_impl(key)!r} draw numbers that depend on the size of the batch "
                "(use keys of 'threefry2x32', or train one run at a time)"
            )
        num_runs = key.shape[0]
        check_hyperparams(hyperparams, num_runs)
        check_target_kl(hyperparams.target_kl, ppo.config)
        hyperparams = _per_run(hyperparams, jax.tree.map(lambda _: 0.0, hyperparams), num_runs)
        env_params = _per_run(as_env_params(env_params, ppo.env, num_runs), ppo.env.params, num_runs)
        return on_devices(jax.vmap(ppo.init))(key, hyperparams, env_params)

    @wraps(ppo.evaluate)
    def evaluate(key: jax.Array, policy: Any, env_params: Any = None, **options: Any):
        key = as_key(key, axes=1)
        check_axis(len(key), ONE, policy=policy)
        env_params = _per_run(as_env_params(env_params, ppo.env, len(key)), ppo.env.params, len(key))
        return on_devices(jax.vmap(lambda *args: ppo.evaluate(*args, **options)))(key, policy, env_params)

    @wraps(ppo.act)
    def act(policy: Any, obs: Any, key: jax.Array | None = None, memory: Any = None, env_params: Any = None):
        check_type("policy", policy, Policy, "such as state.policy")
        if len({np.shape(x)[:1] for x in jax.tree.leaves(policy)}) > 1:
            raise ValueError(f"policy is of one run, but this PPO is batched ({ONE})")
        num_runs, *_ = *np.shape(jax.tree.leaves(policy)[0]), 0
        check_axis(num_runs, ONE, policy=policy, obs=obs, key=key, memory=memory)
        if env_params is not None:
            env_params = _per_run(as_env_params(env_params, ppo.env, num_runs), ppo.env.params, num_runs)
        return jax.vmap(ppo.act)(policy, obs, key, memory, env_params)

    def over_runs(function: Callable) -> Callable:
        distributed = on_devices(partial(_over_runs, function))
        names = list(inspect.signature(function).parameters)

        @wraps(function)
        def run(state: TrainState, *args: Any):
            _check_batch(state)
            check_target_kl(state.hyperparams.target_kl, ppo.config)
            check_axis(len(state.num_updates), ONE, **dict(zip(names[1:], args)))
            return distributed(state, *args)

        return run

    one = replace_step(ppo, wraps(ppo.step)(lambda state: freeze(state, *ppo.step(state))))
    lifted = {name: over_runs(getattr(one, name)) for name in ("collect", "learn", "step", "train")}
    return ppo._replace(
        init=init, evaluate=evaluate, act=act, **lifted,
        mesh=mesh or ppo.mesh, freeze=over_runs(freeze), custom=None, many=True,
    )  # fmt: skip


def _over_runs(function: Callable, state: TrainState, *args: Any) -> Any:
    """Applies a function of one state to a batch of R; a single run is passed without its axis, which is faster."""
    if len(state.num_updates) > 1:
        return jax.vmap(function)(state, *args)
    return jax.tree.map(lambda x: x[None], function(*jax.tree.map(lambda x: x[0], (state, *args))))


def freeze(state: TrainState, new: TrainState, metrics: dict) -> tuple[TrainState, dict]:
    """The state and metrics after a step; if a learned number is not finite, the state before it and nan as metrics.

    Args:
        state: before the step.
        new: after the step.
        metrics: of the step; a loss or a learning rate that is not finite freezes the run too. A batch that a custom
            step calls has frozen a run already if its learning rate is nan.
    """
    learned = [getattr(new, field.name) for field in fields(new) if field.name not in GIVEN]
    reported = [metrics[name] for name in ("loss", "learning_rate") if name in metrics]
    numbers = [x for x in jax.tree.leaves((learned, reported)) if jnp.issubdtype(x.dtype, jnp.inexact)]
    finite = jnp.stack([jnp.isfinite(x).all() for x in numbers]).all()
    # A frozen state keeps its key, so its next step is the same and fails again: once frozen, a run stays frozen.
    state = jax.tree.map(lambda old, new: jnp.where(finite, new, old), state, new)
    # Behind a barrier: fused with the program before it, it would round differently from `step` alone.
    watched = jax.lax.optimization_barrier((new, metrics)) if reports_failures.get() else None
    report = {}
    if watched:
        before = metrics.get(FAILURE, jnp.int32(0))
        report[FAILURE] = jnp.where(finite, 0, jnp.where(before > 0, before, _cause(*watched)))
    return state, {name: jnp.where(finite, x, _nothing(x)) for name, x in metrics.items()} | report


@contextlib.contextmanager
def reported_failures() -> Iterator[None]:
    """Batches that are traced here also report `failure`, int32: why a run is frozen, counted from 1 in `causes`, or 0.

    The programs of the host are traced so. `step` and `train` themselves report the metrics of one run.
    """
    token = reports_failures.set(True)
    try:
        yield
    finally:
        reports_failures.reset(token)


def causes(metrics: Iterable[str], leaves: Iterable[str]) -> list[str]:
    """What may be the first number that is not finite: a metric, or a learned part of the state, in this order.

    Args:
        metrics: names of metrics.
        leaves: paths of the leaves of a state, with "/" between names.
    """
    known, parts = set(metrics), dict.fromkeys(part for part in map(_part_of, leaves) if part)
    return [name for name in WATCHED if name in known] + list(parts)


def _cause(state: TrainState, metrics: Mapping[str, jax.Array]) -> jax.Array:
    """The place of the first of `causes` that is not finite, from 1."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    leaves = [(jax.tree_util.keystr(path, simple=True, separator="/"), x) for path, x in leaves]
    numbers = [(name, metrics[name]) for name in WATCHED if name in metrics]
    numbers += [(_part_of(name), x) for name, x in leaves if jnp.issubdtype(x.dtype, jnp.inexact)]
    known = causes(metrics, [name for name, _ in leaves])
    finite = [jnp.array([jnp.isfinite(x).all() for at, x in numbers if at == name], bool).all() for name in known]
    return jnp.argmin(jnp.stack(finite)).astype(jnp.int32) + 1


def _part_of(leaf: str) -> str:
    """The learned part of a state that a leaf belongs to, such as policy.params; "" if it was given."""
    name, *rest = leaf.split("/")
    return "" if name in GIVEN else ".".join([name, *rest[:1]]) if name == "policy" else name


def _check_batch(state: Any) -> None:
    """Refuses what is not a batch of runs."""
    check_is_state(state)
    if np.ndim(state.num_updates) != 1:
        raise ValueError("the batched PPO needs states with a leading axis R (from its own init, with keys [R])")
    check_axis(len(state.num_updates), "make it with the init of this PPO", state=state)


def _nothing(metric: jax.Array) -> jax.Array:
    return jnp.asarray(jnp.nan if jnp.issubdtype(metric.dtype, jnp.floating) else 0, metric.dtype)


def _mesh(ppo: PPO, devices: int | Sequence[Any] | None) -> Mesh | None:
    if devices is None:
        return None
    if ppo.mesh is not None:
        raise ValueError(f"this PPO is sharded already, over {ppo.mesh.size} devices (leave devices=None)")
    return Mesh(np.array(choose_devices(devices)), AXIS)


def _on_devices(mesh: Mesh | None, function: Callable) -> Callable:
    """A function of arrays with a leading axis R that is distributed across the devices of a mesh."""
    if mesh is None:
        return function

    def run(*args: Any):
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
    """The runs of several batches as one batch, in the order given.

    Raises ValueError for anything but batches whose runs have equal shapes.
    """
    if not states:
        raise ValueError("concatenate needs at least one batch: concatenate(state, other)")
    for state in states:
        _check_batch(state)
        refuse_difference("a batch", state[:0], jax.eval_shape(lambda: states[0][:0]), "PPO or config than the first")
    return jax.tree.map(lambda *xs: jnp.concatenate(xs), *states)


def with_hyperparams(state: TrainState, **values: Any) -> TrainState:
    """The same state with some hyperparameters changed, to continue from: numbers, schedules, or one value per run [R].

        >>> state = pjp.with_hyperparams(state, learning_rate=1e-4, learning_rate_annealing=0.0)

    A name with a point is written as `**{"extra.beta": 0.1}`. Raises ValueError for an unknown name, or a value out
    of its range.
    """
    check_is_state(state)
    hyperparams = state.hyperparams.set(values)
    num_runs = state.num_updates.size if state.num_updates.ndim else None
    check_hyperparams(hyperparams, num_runs)
    if num_runs is not None:
        hyperparams = _per_run(hyperparams, jax.tree.map(lambda _: 0.0, hyperparams), num_runs)
    return state.replace(hyperparams=as_arrays(hyperparams))


def runs(
    key: jax.Array,
    values: Table | Mapping[str, Any] | None = None,
    num_seeds: int = 1,
    hyperparams: Hyperparams = Hyperparams(),
) -> tuple[jax.Array, Hyperparams]:
    """Keys [R] and hyperparameters [R] for every setting of a table times `num_seeds` seeds; seeds vary fastest.

        >>> keys, hyperparams = pjp.runs(jax.random.key(0), pjp.grid(clip=[0.1, 0.2]), num_seeds=2)
        >>> hyperparams.clip
        Array([0.1, 0.1, 0.2, 0.2], dtype=float32)

    Seed i has the same key under every setting and for every `num_seeds`, so settings are compared on the same draws.

    Args:
        key: of the whole batch.
        values: a table of hyperparameters (`grid`, `paired`, `sample`), or a dict of columns; None for one setting.
        num_seeds: seeds of every setting.
        hyperparams: the values that the table leaves as they are.

    Raises:
        ValueError: for columns of unequal lengths, or a name that is not a hyperparameter (`Sweep` takes other fields).
    """
    key = as_key(key)
    check_hyperparams(hyperparams)
    if not isinstance(values, (Table, Mapping, type(None))):
        raise ValueError(
            f"values={shorten(repr(values))} must be a table or a dictionary of columns, such as "
            "grid(learning_rate=[1e-4, 1e-3]) (num_seeds= and hyperparams= are arguments of their own)"
        )
    values = values.columns() if isinstance(values, Table) else values or {}
    for name in values:
        if spec_of(name) is None:
            near = suggest(name, hyperparams.names)
            raise ValueError(f"{name} is not a hyperparameter ({near}), and only Sweep takes other fields")
    check_whole("num_seeds", num_seeds)
    lengths = {name: len(column) for name, column in values.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"the columns of values must be equally long, not {lengths} (grid(...) combines them)")
    num_settings = max(lengths.values(), default=1)
    keys = seed_keys(key, jnp.tile(jnp.arange(num_seeds), num_settings))
    columns = {name: np.repeat(np.asarray(column), num_seeds) for name, column in values.items()}
    swept = as_arrays(hyperparams.set(columns))
    return keys, _per_run(swept, jax.tree.map(lambda _: 0.0, swept), keys.shape[0])


def seed_keys(key: jax.Array, seeds: jax.Array) -> jax.Array:
    """The keys [R] of seeds, given by their numbers [R]."""
    return jax.vmap(partial(jax.random.fold_in, key))(seeds)


def _per_run(tree: Any, like: Any, num_runs: int) -> Any:
    """Every leaf with a leading axis R: unchanged if it has one axis more than in `like`, else repeated R times."""

    def spread(x, one):
        x = jnp.asarray(x)
        return x if x.ndim > jnp.ndim(one) else jnp.broadcast_to(x, (num_runs, *x.shape))

    return jax.tree.map(spread, tree, like)
