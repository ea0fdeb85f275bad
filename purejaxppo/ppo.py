"""Proximal Policy Optimization as pure functions: `init` makes a run, `step` is one cycle, `train` is all of them."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from purejaxppo.advantages import gae
from purejaxppo.config import Config, Hyperparams, as_arrays
from purejaxppo.envs import make_env
from purejaxppo.envs.base import Env, action_space, bound_action, observation_space
from purejaxppo.envs.check import check_shapes
from purejaxppo.evaluate import evaluate
from purejaxppo.loss import ppo_loss
from purejaxppo.messages import gather_shards
from purejaxppo.networks import Network, as_network, check_network, make_network
from purejaxppo.normalize import (
    measure,
    measure_observations,
    merge,
    merge_observations,
    no_moments,
    observation_moments,
    scale,
    standardize_advantage,
    standardize_observations,
)
from purejaxppo.rollout import Actors, Policy, add_time, apply_policy, collect, start
from purejaxppo.summary import measure_rollout, summarize
from purejaxppo.update import Batch, adam, update
from purejaxppo.values import values


@struct.dataclass
class TrainState:
    """A run: everything that the next step needs."""

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
    step: Callable  # state -> state, metrics: one rollout and the update from it
    train: Callable  # state -> state, metrics [U]: `config.num_updates` steps
    evaluate: Callable  # key, policy, env_params=None, *, num_episodes, greedy, max_steps -> Evaluation [E]
    act: Callable  # policy, obs, key=None, memory=None, env_params=None -> action, memory
    env: Env
    network: Network
    config: Config
    mesh: Any = None  # of the devices that share the environments of a run (see `sharded`)


def make_ppo(
    env, config: Config = Config(), *, network=None, loss: Callable = ppo_loss, optimizer: Callable = adam
) -> PPO:
    """PPO for an environment: a name, a gymnax environment, a pair (gymnax environment, params), or an `Env`.

    What plugs in: `network`, a `Network` or a flax linen module (see `networks`); `loss`, a function like
    `loss.ppo_loss`, given advantages that are standardised by then; `optimizer`, a function from `Hyperparams` to an
    optax transformation. Raises ValueError, before anything compiles, where the environment, the network and the
    config do not fit together.
    """
    env = make_env(env)
    problems = check_shapes(env)
    if problems:
        raise ValueError(f"{env.name} is no sound environment: {' '.join(problems)}")
    spaces = observation_space(env), action_space(env, env.params)
    network = make_network(config, *spaces) if network is None else as_network(network)
    parts = {"env": env, "network": network, "config": config}
    learning = parts | {"loss": partial(loss, network=network, config=config), "optimizer": optimizer}
    bind = partial(bind_in_precision, config.matmul_precision)
    ppo = PPO(
        init=bind(init, **parts, optimizer=optimizer),
        step=bind(step, **learning),
        train=bind(train, **learning),
        evaluate=bind(evaluate, **parts),
        act=bind(act, **parts),
        **parts,
    )
    obs = jax.eval_shape(partial(_first_observation, env=env, config=config), jax.random.key(0))
    check_network(network, obs, spaces[1], config.num_envs)
    return ppo


def bind_in_precision(precision: str, function: Callable, **static) -> Callable:
    """A function with static arguments bound, whose float32 products have a precision, under its own name."""
    bound = partial(in_precision, precision, partial(function, **static))
    bound.__name__ = function.__name__  # what compiled programs and profiles call it
    return bound


def in_precision(precision: str, function: Callable, *args, **kwargs):
    """The result of a function whose float32 products have a precision; JAX's own default is TF32 on recent GPUs."""
    with jax.default_matmul_precision(precision):
        return function(*args, **kwargs)


def init(
    key, hyperparams: Hyperparams = Hyperparams(), env_params=None, *, env, network, config, optimizer
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
    return TrainState(
        key=key,
        hyperparams=hyperparams,
        env_params=env_params,
        policy=Policy(params=params, observation=observation, reward=no_moments() if config.scale_reward else ()),
        opt_state=optimizer(hyperparams.at(0.0)).init(params),
        actors=actors,
        num_updates=jnp.int32(0),
    )


def step(state: TrainState, *, env, network, config, loss, optimizer, axis_name=()):
    """One cycle: act for T steps, estimate advantages, learn for some epochs. Returns the next state and metrics.

    `axis_name` is the mesh axis whose shards hold the environments, each `config.num_envs` of them (see `sharded`);
    () is none.
    """
    key, rollout_key, update_key = jax.random.split(state.key, 3)
    if axis_name:  # what lies in a shard is drawn and shuffled there
        shard = jax.lax.axis_index(axis_name)
        rollout_key, update_key = jax.random.fold_in(rollout_key, shard), jax.random.fold_in(update_key, shard)
    progress = jnp.minimum(state.num_updates / config.num_updates, 1.0).astype(jnp.float32)
    hyperparams = state.hyperparams.at(progress)
    policy = state.policy

    actors, transitions = collect(
        rollout_key,
        state.actors,
        policy,
        state.env_params,
        hyperparams.discount,
        env=env,
        network=network,
        config=config,
    )
    policy, reward = scale_rewards(policy, transitions, config, axis_name)
    batch = estimate(policy, transitions, reward, actors.memory, hyperparams, network=network, config=config)
    if config.normalize_advantage == "batch":
        batch = batch.replace(advantage=standardize_advantage(batch.advantage, axis_name=axis_name))
    params, opt_state, learned = update(
        update_key,
        policy.params,
        state.opt_state,
        batch,
        hyperparams,
        loss=loss,
        optimizer=optimizer,
        config=config,
        axis_name=axis_name,
    )

    measured_obs, measured = gather_shards(
        (measure_observations(policy.observation, transitions.obs), measure_rollout(transitions, batch)), axis_name
    )
    # The policy acted and learned under the old moments, so that its ratio began at 1; the next cycle has the new.
    policy = policy.replace(observation=merge_observations(policy.observation, measured_obs))
    next_state = state.replace(
        key=key,
        policy=policy.replace(params=params),
        opt_state=opt_state,
        actors=actors,
        num_updates=state.num_updates + 1,
    )
    return next_state, learned | summarize(measured) | {"learning_rate": hyperparams.learning_rate}


def train(state: TrainState, *, config, **parts):
    """All `config.num_updates` cycles of a run in one program; metrics are stacked, [U]."""
    return jax.lax.scan(lambda state, _: step(state, config=config, **parts), state, length=config.num_updates)


def scale_rewards(policy: Policy, transitions, config: Config, axis_name=()):
    """The policy with this rollout's returns counted in, and the rewards to learn from, [T, N].

    Unlike observations, rewards take no part in the ratio: the newest moments are the right ones for them.
    """
    if not config.scale_reward:
        return policy, transitions.reward
    moments = merge(policy.reward, gather_shards(measure(transitions.discounted_return), axis_name))
    return policy.replace(reward=moments), scale(moments, transitions.reward, config.reward_clip)


def estimate(policy: Policy, transitions, reward, last_memory, hyperparams: Hyperparams, *, network, config) -> Batch:
    """What there is to learn from a rollout: advantages and value targets, [T, N]."""
    terminated = transitions.terminated if config.bootstrap_on_truncation else transitions.done
    value, next_value = values(policy, transitions, terminated, last_memory, network=network, config=config)
    advantage = gae(
        reward, value, next_value, terminated, transitions.done, hyperparams.discount, hyperparams.gae_lambda
    )
    return Batch(
        obs=standardize_observations(policy.observation, transitions.obs, config.observation_clip),
        first=transitions.first,
        memory=transitions.memory,
        action=transitions.action,
        log_prob=transitions.log_prob,
        value=value,
        advantage=advantage,
        target=advantage + value,
    )


def act(policy: Policy, obs, key=None, memory=None, env_params=None, *, env, network, config):
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
