"""Acting in environments: from a policy and the actors to a rollout, T steps of N environments."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from purejaxppo.config import Config
from purejaxppo.envs.base import Env, Step, action_space, bound_action, observation_space
from purejaxppo.networks.network import Network
from purejaxppo.networks.orthogonal import orthogonalize
from purejaxppo.normalize import no_moments, observation_moments, standardize_observations
from purejaxppo.record import Record


class Policy(Record):
    """All that acting needs, and the moments that scale the rewards to learn from."""

    params: Any  # of the network
    observation: Any  # Moments per part of an observation; () where observations are not normalised
    reward: Any  # Moments of the discounted return; () where rewards are not scaled


class Actors(Record):
    """Where N environments stand between two rollouts."""

    env_state: Any  # [N, ...]
    obs: Any  # [N, ...], as the environment shows it
    first: jax.Array  # [N] bool, whether `obs` begins an episode
    memory: Any  # [N, ...] of the network, before `first` clears it
    episode_return: jax.Array  # [N], raw rewards so far
    episode_length: jax.Array  # [N] int32, steps so far
    discounted_return: jax.Array  # [N], discounted sum of past rewards; its deviation scales rewards


class Rollout(Record):
    """T steps of N environments, which a custom step may change before it learns from them; one step is [N, ...]."""

    obs: Any  # [T, N, ...] acted on, as the environment shows it
    first: jax.Array  # [T, N] bool, whether `obs` begins an episode
    memory: Any  # [T, N, ...] of the network, before `obs`
    distribution: Any  # [T, N, ...] that `action` was drawn from; its scalars belong to all steps
    action: jax.Array  # [T, N, ...] as drawn, before any bound
    reward: jax.Array  # [T, N] raw; `learn` scales it, if at all
    next_obs: Any  # [T, N, ...] reached, before any reset
    terminated: jax.Array  # [T, N] bool
    truncated: jax.Array  # [T, N] bool
    metrics: dict[str, jax.Array]  # of the environment, [T, N] each: means over steps are reported
    episode_metrics: dict[str, jax.Array]  # of the environment, [T, N] each: means over ended episodes are reported
    # Filled in once for the whole rollout, which costs less than step by step.
    log_prob: Any = None  # [T, N] of `action` when it was drawn
    ended: Any = None  # [T, N] bool, whether the environment ended an episode with this step
    episode_return: Any = None  # [T, N], the environment's rewards so far, this one included
    episode_length: Any = None  # [T, N] int32, this step included
    key: Any = None  # [] random key for the update that learns from this rollout

    @property
    def done(self) -> jax.Array:
        """[T, N] bool, whether the episode to learn from ends with this step: `terminated` or `truncated`."""
        return self.terminated | self.truncated


class Draws(struct.PyTreeNode):
    """The random draws of one step of every environment; for a rollout, T of them along a leading axis."""

    action: Any  # noise for the actions, or a key if the distribution has no `noise`
    env_keys: jax.Array  # [N]
    start: Any  # (state, obs) of start states, [N, ...], or [resets_per_step, ...]


def start(key: jax.Array, env_params: Any, *, env: Env, network: Network, num_envs: int) -> Actors:
    """N environments at the beginning of their first episodes.

    Args:
        key: draws the start states.
        env_params: of the environment.
        env: where to act.
        network: gives the empty memory.
        num_envs: N.
    """
    env_state, obs = jax.vmap(env.reset, in_axes=(0, None))(jax.random.split(key, num_envs), env_params)
    zeros = jnp.zeros(num_envs, jnp.float32)
    return Actors(
        env_state=jax.tree.map(_strong, env_state),
        obs=jax.tree.map(_strong, obs),
        first=jnp.ones(num_envs, bool),
        memory=network.initial_memory(num_envs),
        episode_return=zeros,
        episode_length=zeros.astype(jnp.int32),
        discounted_return=zeros,
    )


def start_policy(key: jax.Array, obs: Any, memory: Any, *, env: Env, network: Network, config: Config) -> Policy:
    """A policy that has learned nothing.

    Args:
        key: draws the parameters.
        obs: [N, ...], whose shapes the network gets to know.
        memory: [N, ...], empty.
        env: says what there is to observe.
        network: draws its parameters.
        config: says what is normalised.
    """
    observation = observation_moments(observation_space(env)) if config.normalize_observation else ()
    read = standardize_observations(observation, add_time(obs), config.observation_clip)
    first = jnp.ones((1, *jax.tree.leaves(obs)[0].shape[:1]), bool)
    params = network.init(key, memory, read, first)
    params = orthogonalize(jax.random.fold_in(key, 0), params)  # of custom networks
    return Policy(params=params, observation=observation, reward=no_moments() if config.scale_reward else ())


def unroll(
    key: jax.Array, actors: Actors, policy: Policy, env_params: Any, *, env: Env, network: Network, config: Config
) -> tuple[Actors, Rollout]:
    """T steps of N environments under a fixed policy: the actors after them, and the rollout without its key.

    Args:
        key: for everything that is drawn.
        actors: where the environments stand.
        policy: stays the same in all T steps.
        env_params: of the environment.
        env: where to act.
        network: applies the policy.
        config: sizes.
    """

    def step(actors, draws):
        return act_and_step(draws, actors, policy, env_params, env=env, network=network, config=config)

    def forward(policy, actors):
        obs, first = jax.tree.map(
            lambda x: jnp.broadcast_to(x, (config.num_steps, *x.shape)), (actors.obs, actors.first)
        )
        return apply_policy(policy, actors.memory, obs, first, network=network, config=config)[1]

    distribution = jax.eval_shape(forward, policy, actors)
    draws = draw_ahead(key, distribution, env_params, env=env, config=config)
    actors, rollout = jax.lax.scan(step, actors, draws)
    # The scan stacks distributions that have a time axis already, [T, 1, N, ...]; scalars are the same in every step.
    distribution = jax.tree.map(lambda x: x[:, 0] if x.ndim > 1 else x[0], rollout.distribution)
    rollout = rollout.replace(distribution=distribution, log_prob=distribution.log_prob(rollout.action))
    return count_episodes(actors, end_lost_states(rollout))


def end_lost_states(rollout: Rollout) -> Rollout:
    """The rollout with every last observation of an episode that holds a nan as 0, and that episode as terminated."""
    lost = jnp.zeros_like(rollout.done)
    for x in jax.tree.leaves(rollout.next_obs):
        if jnp.issubdtype(x.dtype, jnp.floating):
            lost |= rollout.done & jnp.isnan(x).any(range(2, x.ndim))

    def clear(x):
        return jnp.where(lost.reshape(lost.shape + (1,) * (x.ndim - 2)), jnp.zeros_like(x), x)

    return rollout.replace(next_obs=jax.tree.map(clear, rollout.next_obs), terminated=rollout.terminated | lost)


def count_episodes(actors: Actors, rollout: Rollout) -> tuple[Actors, Rollout]:
    """The actors and the rollout with the returns and lengths of the environment's episodes filled in."""

    def count(before, step):
        reward, done = step
        after = before[0] + reward, before[1] + 1
        return jax.tree.map(lambda x: jnp.where(done, 0, x), after), after

    ended = rollout.done
    before = actors.episode_return, actors.episode_length
    last, (returns, lengths) = jax.lax.scan(count, before, (rollout.reward, ended))
    rollout = rollout.replace(ended=ended, episode_return=returns, episode_length=lengths)
    return actors.replace(episode_return=last[0], episode_length=last[1]), rollout


def discounted_returns(
    before: jax.Array, reward: jax.Array, done: jax.Array, discount: jax.Array | float
) -> tuple[jax.Array, jax.Array]:
    """Running discounted sums of past rewards: what the next rollout starts from, [N], and those of each step, [T, N].

    Args:
        before: [N], the sums before the first step.
        reward: [T, N].
        done: [T, N] bool, where the sum restarts at 0 after the step.
        discount: in [0, 1].
    """

    def count(before, step):
        reward, done = step
        after = discount * before + reward
        return jnp.where(done, 0, after), after

    return jax.lax.scan(count, before, (reward, done))


def draw_ahead(key: jax.Array, distribution: Any, env_params: Any, *, env: Env, config: Config) -> Draws:
    """All random draws of a rollout that do not depend on the policy, [T, ...].

    Drawing step by step would cost more than acting. Everything is drawn along one axis and reshaped afterwards, which
    gives the same numbers: XLA compiles the generator for every draw, and several times as much code for several axes.

    Args:
        key: for everything that is drawn.
        distribution: [T, N] of the actions; only its shapes are read.
        env_params: of the environment.
        env: draws the start states.
        config: sizes.
    """
    act_key, env_key, reset_key = jax.random.split(key, 3)
    num_resets = config.resets_per_step or config.num_envs
    reset_keys = jax.random.split(reset_key, config.num_steps * num_resets)
    fresh = jax.vmap(env.reset, in_axes=(0, None))(reset_keys, env_params)
    noise = getattr(distribution, "noise", None) if hasattr(distribution, "from_noise") else None
    return Draws(
        action=noise(act_key) if noise else jax.random.split(act_key, config.num_steps),
        env_keys=jax.random.split(env_key, config.num_steps * config.num_envs).reshape(config.num_steps, -1),
        start=jax.tree.map(lambda x: x.reshape(config.num_steps, num_resets, *x.shape[1:]), fresh),
    )


def act_and_step(
    draws: Draws, actors: Actors, policy: Policy, env_params: Any, *, env: Env, network: Network, config: Config
) -> tuple[Actors, Rollout]:
    """One step of N environments, with ended episodes restarted: the actors after it, and one step of a rollout, [N].

    The fields that `unroll` fills in for a whole rollout stay None, and `distribution` has a time axis of one step.

    Args:
        draws: of this step.
        actors: where the environments stand.
        policy: chooses the actions.
        env_params: of the environment.
        env: where to act.
        network: applies the policy.
        config: sizes, and how actions are bounded.
    """
    memory, distribution, _ = apply_policy(
        policy, actors.memory, add_time(actors.obs), actors.first[None], network=network, config=config
    )
    if hasattr(distribution, "from_noise"):
        action = distribution.from_noise(draws.action[None])[0]
    else:
        action = distribution.sample(draws.action)[0]
    result = step_envs(draws.env_keys, actors.env_state, action, env_params, env=env, config=config)
    done = result.terminated | result.truncated
    env_state, obs = begin_where(done, draws.start, (result.state, result.obs))

    rollout_step = Rollout(
        obs=actors.obs,
        first=actors.first,
        memory=actors.memory,
        distribution=distribution,
        action=action,
        reward=result.reward,
        next_obs=result.obs,
        terminated=result.terminated,
        truncated=result.truncated,
        metrics=result.metrics,
        episode_metrics=result.episode_metrics,
    )
    return actors.replace(env_state=env_state, obs=obs, first=done, memory=memory), rollout_step


def apply_policy(
    policy: Policy, memory: Any, obs: Any, first: jax.Array, *, network: Network, config: Config
) -> tuple[Any, Any, jax.Array]:
    """One forward pass on raw observations: the memory after it, the distribution of actions, and the value [T, B].

    Args:
        policy: parameters, and the moments that normalise observations.
        memory: [B, ...], before the first step.
        obs: [T, B, ...], as the environment shows it.
        first: [T, B] bool, where episodes begin.
        network: applies the parameters.
        config: the bound of a normalised observation.
    """
    obs = standardize_observations(policy.observation, obs, config.observation_clip)
    return network.apply(policy.params, memory, obs, first)


def step_envs(keys: jax.Array, env_state: Any, action: jax.Array, env_params: Any, *, env: Env, config: Config) -> Step:
    """One step of N environments without any reset; the fields of the result are [N, ...].

    In a step that ends an episode, a reward or a metric that is nan counts as 0.

    Args:
        keys: [N].
        env_state: [N, ...].
        action: [N, ...] as drawn, before any bound.
        env_params: of the environment.
        env: where to act.
        config: says how actions are bounded.
    """
    space = action_space(env, env_params)

    def step(key, state, action):
        return env.step(key, state, bound_action(action, space, config.bound_action), env_params)

    result = jax.vmap(step)(keys, env_state, action)
    number = partial(count_lost_as_zero, result.terminated | result.truncated)
    return result._replace(
        state=jax.tree.map(_strong, result.state),
        obs=jax.tree.map(_strong, result.obs),
        reward=number(result.reward),
        metrics=jax.tree.map(number, result.metrics),
        episode_metrics=jax.tree.map(number, result.episode_metrics),
    )


def count_lost_as_zero(done: jax.Array, x: jax.Array) -> jax.Array:
    """A reward or a metric as float32, 0 where it is nan in a step that ends an episode."""
    x = x.astype(jnp.float32)
    return jnp.where(done & jnp.isnan(x), 0, x)


def begin_where(done: jax.Array, start: Any, reached: Any) -> Any:
    """States and observations [N, ...]: those reached, or start states where an episode ended, `done` [N].

    If there are fewer start states than environments, the episodes that ended get them round-robin.
    """
    num_starts = len(jax.tree.leaves(start)[0])
    if num_starts < len(done):
        index = (jnp.cumsum(done) - 1) % num_starts
        start = jax.tree.map(lambda x: x[index], start)

    def choose(new, old):
        return jnp.where(done.reshape(done.shape + (1,) * (old.ndim - 1)), new.astype(old.dtype), old)

    return jax.tree.map(choose, start, reached)


def add_time(tree: Any) -> Any:
    """Every leaf with a time axis of one step in front."""
    return jax.tree.map(lambda x: x[None], tree)


def _strong(x):
    return jnp.asarray(x, jnp.result_type(x))
