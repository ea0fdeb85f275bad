"""Proximal Policy Optimization as pure functions: `init` makes a run, `step` is one cycle, `train` is all of them.

A cycle is `learn` after `collect`. What is built from a PPO is again a PPO: `with_step` gives it another cycle.
"""

import inspect
from collections.abc import Callable
from functools import partial, wraps
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from purejaxppo.advantages import estimate, scale_rewards
from purejaxppo.collectives import gather_shards, key_of_shard
from purejaxppo.config import Config, Hyperparams, as_arrays
from purejaxppo.envs import make_env
from purejaxppo.envs.base import Env, action_space, bound_action, observation_space
from purejaxppo.envs.check import check_shapes
from purejaxppo.evaluate import evaluate
from purejaxppo.loss import ppo_loss
from purejaxppo.networks.actor_critic import make_network
from purejaxppo.networks.network import Network, as_network, check_network
from purejaxppo.networks.orthogonal import orthogonalize
from purejaxppo.normalize import (
    measure_observations,
    merge_observations,
    no_moments,
    observation_moments,
    standardize_advantage,
    standardize_observations,
)
from purejaxppo.rollout import Actors, Policy, Rollout, add_time, apply_policy, start, unroll
from purejaxppo.summary import COORDINATES, join_metrics, measure_rollout, summarize
from purejaxppo.update import adam, update


class TrainState(struct.PyTreeNode):
    """A run: everything that the next step needs. A subclass with more fields is a state too, see `with_step`."""

    key: jax.Array
    hyperparams: Hyperparams  # float32 leaves []
    env_params: Any
    policy: Policy
    opt_state: Any
    actors: Actors
    num_updates: jax.Array  # [] int32, done so far

    def __getitem__(self, runs) -> "TrainState":
        """Of a batch, one run by its index, or the batch of some by a slice, a mask or a list of indices."""
        return jax.tree.map(lambda x: x[jnp.asarray(runs) if isinstance(runs, list) else runs], self)


class PPO(NamedTuple):
    """Pure functions with their static arguments bound, and those arguments themselves."""

    init: Callable  # key, hyperparams=Hyperparams(), env_params=None -> TrainState
    collect: Callable  # state -> state, Rollout: act for T steps
    learn: Callable  # state, Rollout -> state, metrics: the update from it
    step: Callable  # state -> state, metrics: one after the other
    train: Callable  # state -> state, metrics [U]: `config.num_updates` steps
    evaluate: Callable  # key, policy, env_params=None, *, num_episodes, greedy, max_steps -> Evaluation [E]
    act: Callable  # policy, obs, key=None, memory=None, env_params=None -> action, memory
    env: Env
    network: Network
    config: Config
    loss: Callable  # as given to `make_ppo`
    optimizer: Callable
    mesh: Any = None  # of devices that share the environments of a run (`sharded`) or the runs of a batch (`batched`)
    freeze: Callable | None = None  # state, next state, metrics -> both, with runs that turned nan as they were
    custom: "Custom | None" = None  # what `with_step` was given

    def __repr__(self) -> str:
        config = self.config
        names = [getattr(f, "__name__", None) or repr(f) for f in (self.loss, self.optimizer)]
        cycle = f", step {getattr(self.custom.step, '__name__', self.custom.step)}" if self.custom else ""
        return "\n".join(
            [
                f"PPO on {self.env.name}" + (f", over {self.mesh.size} devices" if self.mesh else ""),
                f"  collect  {config.num_envs} environments x {config.num_steps} steps",
                f"  learn    {config.num_epochs} epochs x {config.num_minibatches} minibatches, "
                f"loss {names[0]}, optimizer {names[1]}{cycle}",
                f"  train    {config.num_updates} updates, {config.total_steps:,} steps",
                f"  fields   {', '.join(self._fields)}",
            ]
        )


class Custom(NamedTuple):
    """A cycle that is not ours, and the PPO that it is given."""

    ppo: PPO
    step: Callable
    init: Callable | None


def make_ppo(
    env: Any,
    config: Config = Config(),
    *,
    network: Any = None,
    loss: Callable = ppo_loss,
    optimizer: Callable = adam,
) -> PPO:
    """PPO for an environment: a name, a gymnax environment, a pair (gymnax environment, params), or an `Env`.

    What plugs in: `network`, a `Network` or a flax linen module (see `networks`); `loss`, a function like
    `loss.ppo_loss`, given advantages that are standardised by then; `optimizer`, a function from `Hyperparams` to an
    optax transformation. Another cycle is plugged in by `with_step`. Raises ValueError, before anything compiles, where
    the environment, the network and the config do not fit together.
    """
    env = make_env(env)
    problems = check_shapes(env)
    if problems:
        raise ValueError(f"{env.name} is no sound environment: {' '.join(problems)}")
    spaces = observation_space(env), action_space(env, env.params)
    network = make_network(config, *spaces) if network is None else as_network(network)
    obs = jax.eval_shape(partial(_first_observation, env=env, config=config), jax.random.key(0))
    check_network(network, obs, spaces[1], config)
    return bind_ppo(env, network, config, loss, optimizer)


def bind_ppo(env: Env, network: Network, config: Config, loss: Callable, optimizer: Callable, axis_name=()) -> PPO:
    """The PPO of parts that fit together.

    `axis_name` is the mesh axis whose shards hold the environments, each `config.num_envs` of them (see `sharded`);
    () is none.
    """
    bound = partial(bind, config.matmul_precision)
    acting = {"env": env, "network": network, "config": config}
    learning = {"network": network, "config": config, "loss": loss, "optimizer": optimizer, "axis_name": axis_name}
    ppo = PPO(
        init=bound(init, **acting, optimizer=optimizer),
        collect=bound(collect, **acting, axis_name=axis_name),
        learn=bound(learn, **learning),
        step=bound(step, **acting | learning),
        train=None,
        evaluate=bound(evaluate, **acting),
        act=bound(act, **acting),
        **acting,
        loss=loss,
        optimizer=optimizer,
    )
    return replace_step(ppo, ppo.step)


def bind(precision: str, function: Callable, **static) -> Callable:
    """A function with static arguments bound, whose float32 products have a precision; else it looks as it did.

    JAX's own default precision is TF32 on recent GPUs.
    """

    @wraps(function)
    def bound(*args, **kwargs):
        with jax.default_matmul_precision(precision):
            return function(*args, **static, **kwargs)

    signature = inspect.signature(function)
    left = [parameter for name, parameter in signature.parameters.items() if name not in static]
    bound.__signature__ = signature.replace(parameters=left)
    return bound


def with_step(ppo: PPO, step: Callable, init: Callable | None = None) -> PPO:
    """The same PPO with another cycle, `step(ppo, state) -> state, metrics`: again a PPO, which all transforms take.

    The step is given the PPO that `with_step` was given, whose `collect`, `learn` and `step` it may call, and whose
    state it may change: hyperparameters, environment parameters, or fields of its own. A state with such fields is a
    subclass of `TrainState`, from `init(ppo, key, hyperparams, env_params)`. What is scheduled is a number in
    `state.hyperparams.at(state.num_updates, ppo.config)`. Others may be added to the metrics of `learn`. Under
    `sharded` the step sees the whole rollout, not a shard of it. Raises ValueError at tracing for a step that returns
    no state like the one given, or lacks metrics of `learn`.
    """

    def whole_step(state: TrainState):
        new, metrics = _check_step(state, step(ppo, state))
        return ppo.freeze(state, new, metrics) if ppo.freeze else (new, metrics)

    def whole_init(key, hyperparams=Hyperparams(), env_params=None):
        return init(ppo, key, hyperparams, env_params) if init else ppo.init(key, hyperparams, env_params)

    bound = partial(bind, ppo.config.matmul_precision)
    new = replace_step(ppo, wraps(ppo.step)(bound(whole_step)))
    return new._replace(init=wraps(ppo.init)(bound(whole_init)), custom=Custom(ppo, step, init))


def replace_step(ppo: PPO, step: Callable) -> PPO:
    """A PPO with another step, a function of the state, and the training that repeats it."""
    return ppo._replace(step=step, train=bind(ppo.config.matmul_precision, train, step=step, config=ppo.config))


def init(
    key: jax.Array,
    hyperparams: Hyperparams = Hyperparams(),
    env_params: Any = None,
    *,
    env: Env,
    network: Network,
    config: Config,
    optimizer: Callable,
) -> TrainState:
    """A run that has not learned yet. `env_params` are those of the environment where none are given."""
    _check_target_kl(hyperparams.target_kl, config)
    key, network_key, actors_key = jax.random.split(key, 3)
    hyperparams = as_arrays(hyperparams)
    env_params = jax.tree.map(
        lambda x: jnp.asarray(x, jnp.result_type(x)), env.params if env_params is None else env_params
    )
    actors = start(actors_key, env_params, env=env, network=network, num_envs=config.num_envs)
    observation = observation_moments(observation_space(env)) if config.normalize_observation else ()
    obs = standardize_observations(observation, add_time(actors.obs), config.observation_clip)
    params = network.init(network_key, actors.memory, obs, actors.first[None])
    params = orthogonalize(jax.random.fold_in(network_key, 0), params)  # a user's network may leave them to be drawn
    return TrainState(
        key=key,
        hyperparams=hyperparams,
        env_params=env_params,
        policy=Policy(params=params, observation=observation, reward=no_moments() if config.scale_reward else ()),
        opt_state=optimizer(hyperparams.at(0, config)).init(params),
        actors=actors,
        num_updates=jnp.int32(0),
    )


def collect(
    state: TrainState, *, env: Env, network: Network, config: Config, axis_name=()
) -> tuple[TrainState, Rollout]:
    """The first half of a cycle: act for T steps. Returns the state after them, and the rollout to `learn` from."""
    key, rollout_key, update_key = jax.random.split(state.key, 3)
    actors, rollout = unroll(
        key_of_shard(rollout_key, axis_name),
        state.actors,
        state.policy,
        state.env_params,
        env=env,
        network=network,
        config=config,
    )
    return state.replace(key=key, actors=actors), rollout.replace(key=update_key)


def learn(
    state: TrainState,
    rollout: Rollout,
    *,
    network: Network,
    config: Config,
    loss: Callable,
    optimizer: Callable,
    axis_name=(),
) -> tuple[TrainState, dict[str, jax.Array]]:
    """The second half of a cycle: estimate advantages, learn for some epochs. Returns the next state and metrics.

    All that is learned follows from the rollout as it is given; the returns and lengths of episodes that are reported
    are those that the environment had in `collect`. Values are bootstrapped from `next_obs` where the environment ended
    an episode and at the last step, elsewhere from the next `obs`. Raises ValueError for a rollout of another shape.
    """
    rollout = _check_rollout(rollout, config)
    hyperparams = state.hyperparams.at(state.num_updates, config)
    policy, actors, reward = scale_rewards(state.policy, state.actors, rollout, hyperparams.discount, config, axis_name)
    batch = estimate(policy, rollout, reward, actors.memory, hyperparams, network=network, config=config)
    if config.normalize_advantage == "batch":
        batch = batch.replace(advantage=standardize_advantage(batch.advantage, axis_name=axis_name))
    params, opt_state, learned = update(
        key_of_shard(rollout.key, axis_name),
        policy.params,
        state.opt_state,
        batch,
        hyperparams,
        loss=partial(loss, network=network, config=config),
        optimizer=optimizer,
        config=config,
        axis_name=axis_name,
    )
    measured_obs, measured = gather_shards(
        (measure_observations(policy.observation, rollout.obs), measure_rollout(rollout, batch)), axis_name
    )
    # The policy acted and learned under the old moments, so that its ratio began at 1; the next cycle has the new.
    policy = policy.replace(observation=merge_observations(policy.observation, measured_obs))
    policy = policy.replace(params=params)
    state = state.replace(policy=policy, actors=actors, opt_state=opt_state, num_updates=state.num_updates + 1)
    metrics = summarize(measured, rollout) | {"learning_rate": hyperparams.learning_rate}
    return state, join_metrics(metrics, {"reports of the loss": learned})


def step(
    state: TrainState,
    *,
    env: Env,
    network: Network,
    config: Config,
    loss: Callable,
    optimizer: Callable,
    axis_name=(),
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One cycle: act for T steps, estimate advantages, learn for some epochs. Returns the next state and metrics."""
    state, rollout = collect(state, env=env, network=network, config=config, axis_name=axis_name)
    return learn(state, rollout, network=network, config=config, loss=loss, optimizer=optimizer, axis_name=axis_name)


def train(state: TrainState, *, step: Callable, config: Config) -> tuple[TrainState, dict[str, jax.Array]]:
    """All `config.num_updates` cycles of a run in one program; metrics are stacked, [U, ...], of R runs [R, U, ...]."""
    state, metrics = jax.lax.scan(lambda state, _: step(state), state, length=config.num_updates)
    return state, jax.tree.map(lambda x: jnp.moveaxis(x, 0, state.num_updates.ndim), metrics)


def act(
    policy: Policy,
    obs: Any,
    key: jax.Array | None = None,
    memory: Any = None,
    env_params: Any = None,
    *,
    env: Env,
    network: Network,
    config: Config,
) -> tuple[Any, Any]:
    """One action of a trained policy for one observation, ready for the environment, and the memory after it.

    `key` draws a sample; without one, the mode. `memory` is what the last call of this episode returned; None begins
    an episode. `env_params` hold the bounds of the action where they differ from the environment's own.
    """
    first = jnp.full((1, 1), memory is None)
    memory = network.initial_memory(1) if memory is None else memory
    obs = jax.tree.map(lambda x: jnp.asarray(x)[None, None], obs)
    memory, distribution, _ = apply_policy(policy, memory, obs, first, network=network, config=config)
    action = (distribution.mode() if key is None else distribution.sample(key))[0, 0]
    space = action_space(env, env.params if env_params is None else env_params)
    return bound_action(action, space, config.bound_action), memory


def _check_rollout(rollout: Rollout, config: Config) -> Rollout:
    """A rollout as arrays. Refuses leaves that are not [T, N, ...], and numbers per step that are not [T, N]."""
    if not isinstance(rollout, Rollout):
        raise ValueError(f"learn takes (state, rollout), both from collect, not a {type(rollout).__name__} as rollout")
    rollout, shape = jax.tree.map(jnp.asarray, rollout), (config.num_steps, config.num_envs)
    numbers = "reward", "terminated", "truncated", "ended", "metrics", "episode_metrics"
    for path, x in jax.tree_util.tree_leaves_with_path(rollout):
        exact = path[0].name in numbers
        if x.shape != shape if exact else x.ndim and x.shape[:2] != shape:
            raise ValueError(
                f"rollout{jax.tree_util.keystr(path)} of shape {x.shape} must be [T, N{'' if exact else ', ...'}], "
                f"with [T, N] = {list(shape)} as in the config"
            )
    return rollout


def _check_step(state: TrainState, after: Any) -> tuple[TrainState, dict]:
    """What a custom step returned, as strongly typed arrays. Refuses what is no state like `state`, or no metrics."""
    if not (isinstance(after, tuple) and len(after) == 2 and isinstance(after[1], dict)):
        raise ValueError(f"step must return (state, metrics), as ppo.step does, not {type(after).__name__}")
    new, metrics = jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), after)
    if jax.tree.structure(new) != jax.tree.structure(state):
        raise ValueError(
            f"step must return a {type(state).__name__} built like the one given (same fields, same extra, same "
            f"parameters), not another {type(new).__name__}"
        )
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(new), jax.tree.leaves(state)):
        if (x.shape, x.dtype) != (jnp.shape(y), jnp.result_type(y)):
            where, kept = f"state{jax.tree_util.keystr(path)}", f"{jnp.result_type(y)}{list(jnp.shape(y))}"
            raise ValueError(f"step made {where} {x.dtype}{list(x.shape)}; it must stay {kept}")
    missing = {"episode_return", "num_episodes", "learning_rate"} - metrics.keys()
    if missing:
        raise ValueError(f"metrics of a step must hold {min(missing)} (add others to those that ppo.learn returns)")
    for name, x in metrics.items():
        if jnp.ndim(x) > new.num_updates.ndim + 1 or "/" in name or name in COORDINATES:
            raise ValueError(f"metric {name!r} of shape {jnp.shape(x)} must be a scalar or a vector, under a free name")
    return new, metrics


def _check_target_kl(target_kl, config: Config):
    """Refuses a target without the stop, and a stop without a target, where the target is known yet."""
    if isinstance(target_kl, (int, float)) and np.isfinite(target_kl) != config.stop_on_kl:
        raise ValueError(
            f"target_kl={target_kl} and stop_on_kl={config.stop_on_kl} have no effect: set both, such as "
            "target_kl=0.02 and stop_on_kl=True, or neither"
        )


def _first_observation(key, *, env, config):
    """One observation as the network of a new run reads it."""
    moments = observation_moments(observation_space(env)) if config.normalize_observation else ()
    return standardize_observations(moments, env.reset(key, env.params)[1], config.observation_clip)
