"""What the functions of a PPO are given: checks on the host, once for each time that a function is traced.

`Expected` knows the shapes that belong to a PPO; the functions below it look at single arguments. Each raises a
ValueError of one sentence with the argument, its value and a remedy.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from purejaxppo.config import Config, Hyperparams, nearest, suggest
from purejaxppo.envs.base import Env
from purejaxppo.envs.roles import without_privileged
from purejaxppo.networks.network import Network
from purejaxppo.rollout import Policy, Rollout, first_limits, start_policy
from purejaxppo.starts import fill_pool
from purejaxppo.summary import FAILURE, RESERVED, reports_failures
from purejaxppo.text import Word, shorten


class Expected:
    """The shapes of what belongs to a PPO, traced when they are first needed, and checks against them."""

    def __init__(self, env: Env, network: Network, config: Config, optimizer: Callable):
        self.env, self.network, self.config, self.optimizer = env, network, config, optimizer

    @cached_property
    def start(self) -> tuple[Any, Any]:
        """State and observation of one environment."""
        return jax.eval_shape(self.env.reset, jax.random.key(0), self.env.params)

    @cached_property
    def pool(self) -> Any:
        """Start states that wait, if any."""
        fill = partial(fill_pool, env=self.env, config=self.config)
        return jax.eval_shape(fill, jax.random.key(0), self.env.params)

    @cached_property
    def memory(self) -> Any:
        """Of the network, [1, ...]."""
        return jax.eval_shape(lambda: self.network.initial_memory(1))

    @cached_property
    def policy(self) -> Policy:
        """A policy of one run."""
        begin = partial(start_policy, env=self.env, network=self.network, config=self.config)
        obs = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), self.start[1])
        return jax.eval_shape(begin, jax.random.key(0), obs, self.memory)

    def check_state(self, state: Any) -> None:
        """Refuses what is not a state of one run of this PPO."""
        check_is_state(state)
        check_one_run(state)
        config = self.config
        if np.shape(state.key):
            raise ValueError(f"state.key has shape {np.shape(state.key)}, but must be a single key (one of them)")
        check_hyperparams(state.hyperparams)
        check_target_kl(state.hyperparams.target_kl, config)
        num_envs = len(state.actors.first)
        if num_envs != config.num_envs:
            raise ValueError(
                f"state has {num_envs} environments, but num_envs={config.num_envs} (make it with the init of this PPO)"
            )
        env_state, obs = (_add_axis(x, num_envs) for x in self.start)
        memory = jax.tree.map(lambda x: jax.ShapeDtypeStruct((num_envs, *x.shape[1:]), x.dtype), self.memory)
        refuse_difference("state.env_params", state.env_params, self.env.params, "environment")
        refuse_difference("state.actors.obs", state.actors.obs, obs, "environment")
        refuse_difference("state.actors.env_state", state.actors.env_state, env_state, "environment")
        self.check_policy(state.policy, "state.policy")
        refuse_difference("state.actors.memory", state.actors.memory, memory, "network")
        refuse_difference("state.actors.pool", state.actors.pool, self.pool, "config (resets_per_step)")
        limits = first_limits(config)
        refuse_difference("state.actors.first_limit", state.actors.first_limit, limits, "config (stagger)")
        opt_state = jax.eval_shape(
            lambda hyperparams, params: make_transformation(self.optimizer, hyperparams.at(0, config)).init(params),
            state.hyperparams,
            state.policy.params,
        )
        refuse_difference("state.opt_state", state.opt_state, opt_state, "optimizer")

    def check_learn(self, state: Any, rollout: Any) -> None:
        """Refuses arguments of `learn`; `as_rollout` checks the rollout's shapes."""
        if not isinstance(rollout, Rollout):
            raise ValueError(
                f"learn takes (state, rollout), both from collect, not a {type(rollout).__name__} as rollout"
            )
        self.check_state(state)

    def check_policy(self, policy: Any, name: str = "policy") -> None:
        """Refuses what is not a policy of one run for this PPO's network."""
        if not isinstance(policy, Policy):
            remedy = "give its .policy" if hasattr(policy, "policy") else "such as state.policy"
            raise ValueError(f"{name}={shorten(repr(policy))} must be a Policy ({remedy})")
        shapes, own = _shapes(policy.params), _shapes(self.policy.params)
        if shapes.keys() == own.keys() and all(shape and shape[1:] == own[where] for where, shape in shapes.items()):
            raise ValueError(
                f"{name} holds one policy per run, [R, ...], but this PPO is of one run (give it to batched(ppo), or "
                "one of them here: jax.tree.map(lambda x: x[0], policy))"
            )
        refuse_difference(f"{name}.params", policy.params, self.policy.params, "network")
        refuse_difference(
            f"{name}.observation", policy.observation, self.policy.observation, "config (normalize_observation)"
        )
        refuse_difference(f"{name}.reward", policy.reward, self.policy.reward, "config (scale_reward)")

    def check_evaluate(self, key: Any, policy: Any, env_params: Any = None, **_: Any) -> None:
        """Refuses arguments of `evaluate`."""
        as_key(key)
        self.check_policy(policy)
        as_env_params(env_params, self.env)

    def check_act(self, policy: Any, obs: Any, key: Any = None, memory: Any = None, env_params: Any = None) -> None:
        """Refuses arguments of `act`."""
        self.check_policy(policy)
        expected, given = self.start[1], _shapes(obs)
        acted_on = without_privileged(self.env.observation_space, expected)
        expected = acted_on if given == _shapes(acted_on) else expected
        if given != _shapes(expected):
            tail = {where: shape[1:] for where, shape in given.items()}
            remedy = (
                "jax.vmap(ppo.act, in_axes=(None, 0)) takes a batch of them"
                if tail == _shapes(expected)
                else "give one observation as the environment shows it"
            )
            raise ValueError(f"{_first_difference('obs', obs, expected)} ({remedy})")
        for (path, x), like in zip(jax.tree_util.tree_leaves_with_path(obs), jax.tree.leaves(expected)):
            if not _fits(x, like):
                name = "obs" + jax.tree_util.keystr(path)
                raise ValueError(
                    f"{name} is {_describe(x)}, but must be {_describe(like)} (convert it to {like.dtype})"
                )
        if key is not None:
            as_key(key)
        if memory is not None and _shapes(memory) != _shapes(self.memory):
            raise ValueError(
                f"memory is {_describe(memory)}, but must be {_describe(self.memory)} (the one that act returned, or "
                "None where an episode begins)"
            )
        as_env_params(env_params, self.env)


def check_type(name: str, value: Any, kind: type, remedy: str) -> None:
    """Refuses an argument of another type; `remedy` says how to make one."""
    if not isinstance(value, kind):
        article = "" if kind.__name__.endswith("s") else "a "
        raise ValueError(f"{name}={shorten(repr(value))} must be {article}{kind.__name__} ({remedy})")


def check_config(config: Any) -> None:
    """Refuses what is not a `Config`, and says where it belongs."""
    settings = {field.name for field in fields(Config)}
    if isinstance(config, tuple) and any(isinstance(x, Config) for x in config):
        remedy = "a preset is a pair: config, hyperparams = preset(...)"
    elif isinstance(config, Hyperparams):
        remedy = "hyperparameters go to ppo.init(key, hyperparams)"
    elif isinstance(config, Mapping) and config.keys() <= settings:
        remedy = "write Config(**config)"
    elif isinstance(config, Mapping) and config.keys() <= settings.union(Hyperparams().names):
        remedy = "hyperparameters go to ppo.init(key, Hyperparams(**hyperparams))"
    elif config is Config:
        remedy = "write Config()"
    elif callable(config):
        remedy = "such as Config(num_envs=8), or call a preset: config, hyperparams = preset(...)"
    elif config is None or isinstance(config, (str, int, float)):
        remedy = "such as Config(num_envs=8)"
    else:
        remedy = (
            "the parameters of an environment go beside it: make_ppo((env, params), config) of a gymnax environment, "
            "env._replace(params=...) of an Env"
        )
    check_type("config", config, Config, remedy)


def check_optimizer(optimizer: Any) -> None:
    """Refuses what is not a function of `Hyperparams` alone."""
    remedy = "such as lambda hyperparams: optax.adamw(hyperparams.learning_rate)"
    good = callable(optimizer) and not hasattr(optimizer, "update") and _accepts(optimizer, None)
    if not good or next(iter(_parameters(optimizer)), "") == "learning_rate":
        raise ValueError(
            f"optimizer={_name(optimizer)} must be a function from Hyperparams to an optax transformation ({remedy})"
        )


def make_transformation(optimizer: Callable, hyperparams: Hyperparams) -> Any:
    """The optax transformation of `hyperparams`. Refuses another result of `optimizer`.

    It sees parameters and gradients of 16 bits as float32, and keeps its moments so. The parameters themselves stay in
    16 bits, so a small update of a large one is lost: give a network float32 parameters and activations of 16 bits.
    """
    transformation = optimizer(hyperparams)
    if not (hasattr(transformation, "init") and hasattr(transformation, "update")):
        raise ValueError(
            f"optimizer={_name(optimizer)} must return an optax transformation, not {shorten(repr(transformation))}"
        )

    def widen(tree: Any) -> Any:
        return jax.tree.map(_at_least_float32, tree)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        return transformation.update(widen(updates), state, widen(params))

    return optax.GradientTransformation(lambda params: transformation.init(widen(params)), update)


def check_loss(loss: Any) -> None:
    """Refuses what cannot be called as `ppo_loss` is."""
    random = {"key": None} if callable(loss) and "key" in _parameters(loss) else {}
    if not callable(loss) or not _accepts(loss, None, None, None, network=None, config=None, **random):
        raise ValueError(
            f"loss={_name(loss)} must be a function (params, minibatch, hyperparams, *, network, config) -> loss, "
            "report, as ppo_loss is (another surrogate goes in as partial(ppo_loss, surrogate=...))"
        )


def as_loss(result: Any, config: Config) -> tuple[jax.Array, dict[str, jax.Array]]:
    """What a loss returned, with its report in float32.

    Refuses anything but the pair of a scalar and a dictionary of scalars and vectors.
    """
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping)):
        pair = isinstance(result, tuple) and len(result) == 2
        what = f"{len(result)} values" if isinstance(result, tuple) else _describe(result)
        what = f"{shorten(_describe(result[0]))} and {shorten(_describe(result[1]))}" if pair else what
        raise ValueError(f"loss must return the pair (loss, report), the report as a dictionary, not {what}")
    loss, report = result
    if not _is_array(loss) or jnp.shape(loss) or not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
        raise ValueError(f"loss must return one number as its loss, not {_describe(loss)} (take a mean)")
    check_metrics("the loss reports", report, most=1)
    if "grad_norm" in report:
        raise ValueError("the loss reports grad_norm, a name that is taken (use another name)")
    if config.stop_on_kl and "approx_kl" not in report:
        raise ValueError("stop_on_kl=True needs a loss that reports approx_kl")
    return loss, {name: jnp.asarray(value, jnp.float32) for name, value in report.items()}


def check_metrics(source: str, metrics: Mapping[Any, Any], most: int) -> None:
    """Refuses metrics that are not numbers with at most `most` axes; `source` begins the sentence."""
    for name, value in metrics.items():
        if not isinstance(name, str):
            raise ValueError(f"{source} a metric under the name {name!r} (names must be text)")
        if not _is_array(value) or jnp.ndim(value) > most or not jnp.size(value):
            what = f"of shape {jnp.shape(value)}" if _is_array(value) else f"as {_describe(value)}"
            raise ValueError(f"{source} {name} {what}; it must be a scalar or a vector (take a mean)")


def as_key(key: Any, axes: int = 0) -> jax.Array:
    """A random key, or with `axes=1` an array [R] of them, also from `jax.random.PRNGKey`."""
    several, dtype = axes == 1, getattr(key, "dtype", None)
    plain = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    if dtype == plain.dtype and key.shape[axes:] == plain.shape:
        return jax.random.wrap_key_data(key)
    if dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        example = "jax.random.split(jax.random.key(0), 8)" if several else "jax.random.key(0)"
        value = _describe(key) if np.ndim(key) and dtype is not None else shorten(repr(key))
        raise ValueError(f"key={value} must be a random key{' per run, [R]' if several else ''}, such as {example}")
    if key.ndim != axes:
        raise ValueError(
            f"key must hold one key per run, [R], not shape {key.shape} (see `runs`)"
            if several
            else f"key has shape {key.shape}, but must be a single key (batched(ppo) takes one per run)"
        )
    return key


def check_hyperparams(hyperparams: Any, num_runs: int | None = None) -> None:
    """Refuses what is not `Hyperparams` of one run, or of R runs: numbers, or arrays [R]."""
    check_type("hyperparams", hyperparams, Hyperparams, _place_of(hyperparams))
    for name in hyperparams.names:
        value = hyperparams.get(name)
        for shape in map(np.shape, jax.tree.leaves(value)):
            if num_runs is None and shape and not callable(value):
                raise ValueError(
                    f"hyperparams.{name} has shape {shape}, but this PPO is of one run (give a number, or give one "
                    "value per run to batched(ppo))"
                )
            if num_runs is not None and shape[:1] not in ((), (num_runs,)):
                raise ValueError(
                    f"hyperparams.{name} has shape {shape}, but there are {num_runs} keys (give a number, or one per "
                    "key)"
                )


def _place_of(value: Any) -> str:
    """Where something belongs that was given as hyperparameters."""
    if isinstance(value, Mapping) and all(name in Hyperparams().names for name in value):
        return "write Hyperparams(**hyperparams)"
    if isinstance(value, Mapping):
        known = Hyperparams().names
        unknown = str(next(name for name in value if name not in known))
        return suggest(unknown, known) if nearest(unknown, known) else "parameters of the environment go to env_params="
    if isinstance(value, Config):
        return "a Config goes to make_ppo(env, config)"
    if isinstance(value, tuple):
        return "a preset is a pair: config, hyperparams = preset(...)"
    return "such as Hyperparams(learning_rate=3e-4)"


def check_target_kl(target_kl: Any, config: Config) -> None:
    """Refuses a target without the stop, and a stop without a target, unless the target is traced.

    Of several runs [R] some may have no target.
    """
    if isinstance(target_kl, (Tracer, jax.ShapeDtypeStruct)):
        return
    if np.isfinite(target_kl).any() != config.stop_on_kl:
        value = f"{np.min(target_kl):g}"
        raise ValueError(
            f"target_kl={value} and stop_on_kl={config.stop_on_kl} have no effect: set both, such as "
            "target_kl=0.02 and stop_on_kl=True, or neither"
        )


def as_env_params(env_params: Any, env: Env, num_runs: int | None = None) -> Any:
    """The parameters of an environment as strongly typed arrays, by default its own.

    Refuses another structure, shapes other than its own (with a leading axis R if there are R runs), and numbers that
    do not fit the types of its own.
    """
    if env_params is None:
        return jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), env.params)
    given, expected = _shapes(env_params), _shapes(env.params)
    if given.keys() != expected.keys():
        raise ValueError(
            f"env_params={_describe(env_params)} must have the structure of those of {env.name}: "
            f"{_where_differ(env_params, env.params)} (change ppo.env.params)"
        )
    per_run = () if num_runs is None else (num_runs,)
    for where, shape in given.items():
        own = expected[where]
        if shape not in (own, (*per_run, *own)):
            one = "; give R values to batched(ppo)" if num_runs is None and shape[1:] == own else ""
            several = f" or {(*per_run, *own)}, one value per run" if per_run else ""
            raise ValueError(
                f"env_params{where} has shape {shape}, but must have {own}{several}, as in {env.name}{one}"
            )

    def read(path, x, like):
        if not _fits(x, like):
            raise ValueError(
                f"env_params{jax.tree_util.keystr(path)}={shorten(repr(x))} must be {jnp.result_type(like)}, as in "
                f"{env.name} (change it there if it may be any number)"
            )
        return jnp.asarray(x, jnp.result_type(like))

    leaves, own = jax.tree_util.tree_leaves_with_path(env_params), jax.tree.leaves(env.params)
    return jax.tree.unflatten(jax.tree.structure(env_params), [read(*x, y) for x, y in zip(leaves, own)])


def as_rollout(rollout: Rollout, config: Config) -> Rollout:
    """A rollout as arrays. Refuses leaves that are not [T, N, ...], and numbers that are not [T, N]."""
    rollout, shape = jax.tree.map(jnp.asarray, rollout), (config.num_steps, config.num_envs)
    of_segments = config.num_steps // config.segment_length, config.num_envs
    numbers = "reward", "terminated", "truncated", "ended", "metrics", "episode_metrics"
    for path, x in jax.tree_util.tree_leaves_with_path(rollout):
        exact, kept = path[0].name in numbers, of_segments if path[0].name == "memory" else shape
        if x.shape != kept if exact else x.ndim and x.shape[:2] != kept:
            axes = "T / L, N" if path[0].name == "memory" else "T, N"
            raise ValueError(
                f"rollout{jax.tree_util.keystr(path)} has shape {x.shape}, but must be "
                f"[{axes}{'' if exact else ', ...'}] with [{axes}] = {list(kept)}"
            )
    return rollout


def as_step(state: Any, after: Any) -> tuple[Any, dict]:
    """The result of a custom step as strongly typed arrays. Refuses another kind of state, and bad metrics."""
    if not (isinstance(after, tuple) and len(after) == 2 and isinstance(after[1], dict)):
        raise ValueError(f"step must return (state, metrics), as ppo.step does, not {type(after).__name__}")
    for name, x in after[1].items():
        if not isinstance(name, str) or not _is_array(x):
            raise ValueError(f"metric {name!r} of step is {_describe(x)}; it must be a scalar or a vector, by its name")
        if jnp.issubdtype(jnp.result_type(x), jnp.complexfloating):
            raise ValueError(f"metric {name!r} of step is complex; it must be a real number (take jnp.abs)")
    new, metrics = jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), after)
    # Files hold no floating-point numbers of 16 bits.
    metrics = {name: _at_least_float32(x) for name, x in metrics.items()}
    if jax.tree.structure(new) != jax.tree.structure(state):
        raise ValueError(
            f"step must return a {type(state).__name__} with the structure of the one given (same fields, extra and "
            f"parameters), not another {type(new).__name__}"
        )
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(new), jax.tree.leaves(state)):
        if (x.shape, x.dtype) != (jnp.shape(y), jnp.result_type(y)):
            where, kept = f"state{jax.tree_util.keystr(path)}", f"{jnp.result_type(y)}{list(jnp.shape(y))}"
            raise ValueError(f"step changed {where} from {kept} to {x.dtype}{list(x.shape)} (keep shape and dtype)")
    missing = {"episode_return", "num_episodes", "learning_rate"} - metrics.keys()
    if missing:
        raise ValueError(f"metrics of a step must hold {min(missing)} (add others to those that ppo.learn returns)")
    batch = new.num_updates.ndim > 0
    reported = {FAILURE} if batch and reports_failures.get() else set()  # by the batch whose step it called
    for name, x in metrics.items():
        if jnp.ndim(x) > new.num_updates.ndim + 1 or "/" in name or name in RESERVED - reported:
            raise ValueError(f"metric {name!r} of shape {jnp.shape(x)} must be a scalar or a vector, under a free name")
    return new, metrics


def check_step(step: Any, init: Any) -> None:
    """Refuses functions that `with_step` cannot call."""
    if not callable(step) or not _accepts(step, None, None) or next(iter(_parameters(step)), "") == "state":
        raise ValueError(f"step={_name(step)} must be a function (ppo, state) -> state, metrics")
    if init is not None and not (callable(init) and _accepts(init, None, None, None, None)):
        raise ValueError(f"init={_name(init)} must be a function (ppo, key, hyperparams, env_params) -> state")


def check_is_state(state: Any) -> None:
    """Refuses what is not a `TrainState`, of one run or of many."""
    if hasattr(state, "runs"):
        raise ValueError(
            "state is a Population, which belongs to the PPO that evolving returned (state.runs are its runs)"
        )
    if not (hasattr(state, "actors") and hasattr(state, "opt_state")):
        remedy = "give its .state" if hasattr(state, "state") else "from ppo.init, or from an earlier step"
        raise ValueError(f"state={shorten(repr(state))} must be a TrainState ({remedy})")
    check_typed_key("state.key", state.key)
    check_type("state.hyperparams", state.hyperparams, Hyperparams, _place_of(state.hyperparams))


def check_one_run(state: Any) -> None:
    """Refuses the state of a batch of runs."""
    shape = np.shape(state.num_updates)
    if shape:
        raise ValueError(
            f"state holds {shape[0]} runs, but this PPO is of one run (give it to batched(ppo), or state[0] here)"
        )


def check_typed_key(name: str, key: Any) -> None:
    """Refuses a key of a state that is not of `jax.random.key`: a step would not keep its type."""
    dtype = getattr(key, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        raise ValueError(
            f"{name}={_describe(key)} must be made by jax.random.key, such as jax.random.key(0) "
            "(jax.random.wrap_key_data makes it of a PRNGKey)"
        )


def check_axis(num_runs: int, remedy: str, **arguments: Any) -> None:
    """Refuses arguments with a leaf that does not have `num_runs` entries along its first axis."""
    for name, tree in arguments.items():
        for path, x in jax.tree_util.tree_leaves_with_path(tree):
            if np.shape(x)[:1] != (num_runs,):
                raise ValueError(
                    f"{name}{jax.tree_util.keystr(path)} has shape {np.shape(x)}, but must be [R, ...] with "
                    f"R = {num_runs} runs for a batched PPO ({remedy})"
                )


def refuse_difference(name: str, given: Any, expected: Any, cause: str) -> None:
    """Refuses another structure or other shapes than expected; `cause` says what belongs to another PPO."""
    if _shapes(given) != _shapes(expected):
        where = _where_differ(given, expected)
        raise ValueError(f"{name} belongs to another {cause}: {where} (take what the init of this PPO makes)")


def _where_differ(given: Any, expected: Any) -> str:
    """The first leaf in which two trees differ, in words."""
    shapes, others = _shapes(given), _shapes(expected)
    for where in {**others, **shapes}:
        if where not in others:
            return f"{where or 'it'} is not expected"
        if where not in shapes:
            return f"{where or 'an array'} is missing"
        if shapes[where] != others[where]:
            return f"{where or 'it'} has shape {shapes[where]} instead of {others[where]}"
    return ""


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of all leaves by their paths."""
    return {jax.tree_util.keystr(path): np.shape(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def _first_difference(name: str, given: Any, expected: Any) -> str:
    """Where the shapes of two pytrees differ first, as the beginning of a sentence."""
    shapes, wanted = _shapes(given), _shapes(expected)
    where = next(path for path in {**wanted, **shapes} if shapes.get(path) != wanted.get(path))
    if where in shapes and where in wanted:
        leaves = (dict(zip(_shapes(tree), jax.tree.leaves(tree))) for tree in (given, expected))
        is_, must = (_describe(tree[where]) for tree in leaves)
        return f"{name}{where} is {is_}, but must be {must}"
    if isinstance(given, Mapping) and isinstance(expected, Mapping):
        return f"{name}{where} {'is missing' if where in wanted else 'is no part of an observation'}"
    return f"{name} is {_describe(given)}, but must be {_describe(expected)}"


def _add_axis(tree: Any, size: int) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((size, *x.shape), x.dtype), tree)


def _fits(x: Any, like: Any) -> bool:
    """Whether a number may be converted to the dtype of another without loss of its kind."""
    if not _is_array(x):
        return False
    given, own = jnp.result_type(x), jnp.result_type(like)
    if given == own or not (isinstance(given, np.dtype) and isinstance(own, np.dtype)):
        return given == own
    kinds = [next(i for i, kind in enumerate(KINDS) if jnp.issubdtype(dtype, kind)) for dtype in (given, own)]
    return kinds[0] <= kinds[1]


KINDS = jnp.bool_, jnp.integer, jnp.floating, jnp.generic


def _at_least_float32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4 else x


def _is_array(value: Any) -> bool:
    """Whether a value is an array or a number, traced or not."""
    if isinstance(value, (bool, int, float, complex)):
        return True
    return hasattr(value, "dtype") and hasattr(value, "shape") and not isinstance(value, np.str_)


def _describe(tree: Any) -> str:
    """Arrays by dtype and shape, as short text."""

    def kind(x):
        return Word(f"{jnp.result_type(x)}{list(np.shape(x))}" if _is_array(x) else repr(x))

    leaf = len(jax.tree.leaves(tree)) == 1 and jax.tree.structure(tree) == jax.tree.structure(0)
    return str(kind(tree)) if leaf else shorten(jax.tree.map(kind, tree), 80)


def _name(function: Any) -> str:
    """A function by its name, anything else as short text."""
    name = getattr(function, "__name__", None)
    return f"{name}{_signature(function)}" if name and callable(function) else shorten(repr(function))


def _signature(function: Callable) -> str:
    return shorten(f"({', '.join(_parameters(function))})", 60)


def _parameters(function: Callable) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):  # some functions in C have none
        return {}


def _accepts(function: Callable, *args: Any, **kwargs: Any) -> bool:
    """Whether a function can be called with such arguments, as far as its signature says."""
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError:
        return False
    except ValueError:
        return True
    return True
