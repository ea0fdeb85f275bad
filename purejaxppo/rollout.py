"""Acting in environments: from a policy and actors that stand somewhere to a rollout, T steps of N environments."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from purejaxppo.config import Config
from purejaxppo.envs.base import Env, action_space, bound_action
from purejaxppo.networks.network import Network
from purejaxppo.normalize import standardize_observations


class Policy(struct.PyTreeNode):
    """All that acting needs, and what scales the rewards that it learns from."""

    params: Any  # of the network
    observation: Any  # Moments per part of an observation; () where observations are not normalised
    reward: Any  # Moments of the discounted return; () where rewards are not scaled


class Actors(struct.PyTreeNode):
    """Where N environments stand between two rollouts."""

    env_state: Any  # [N, ...]
    obs: Any  # [N, ...], as the environment shows it
    first: jax.Array  # [N] bool, whether `obs` begins an episode
    memory: Any  # [N, ...] of the network, before `first` empties it
    episode_return: jax.Array  # [N], raw rewards so far
    episode_length: jax.Array  # [N] int32, steps so far
    discounted_return: jax.Array  # [N], discounted sum of past rewards learned from, for their scale


class Rollout(struct.PyTreeNode):
    """T steps of N environments, a record that may be changed before it is learned from; one step of it is [N, ...]."""

    obs: Any  # [T, N, ...] acted on, as the environment shows it
    first: jax.Array  # [T, N] bool, whether `obs` begins an episode
    memory: Any  # [T, N, ...] of the network, before `obs`
    distribution: Any  # [T, N, ...] that `action` was drawn from; its scalars belong to all steps
    action: jax.Array  # [T, N, ...] as drawn, before any bound
    reward: jax.Array  # [T, N] raw; what is learned from
    next_obs: Any  # [T, N, ...] reached, before any reset
    terminated: jax.Array  # [T, N] bool
    truncated: jax.Array  # [T, N] bool
    metrics: dict  # of the environment, [T, N] each: means over steps are reported
    episode_metrics: dict  # of the environment, [T, N] each: means over the episodes that ended are reported
    # Filled in once for the whole rollout, which costs less than step by step.
    log_prob: Any = None  # [T, N] of `action` when it was drawn
    ended: Any = None  # [T, N] bool, whether the environment ended an episode with this step
    episode_return: Any = None  # [T, N], the environment's rewards so far, this one included
    episode_length: Any = None  # [T, N] int32, this step included
    key: Any = None  # [] that learning from this rollout draws from

    @property
    def done(self) -> jax.Array:
        """Whether what is learned from ends with this step, [T, N] bool: `terminated` or `truncated`."""
        return self.terminated | self.truncated


class Draws(struct.PyTreeNode):
    """What one step of every environment draws; a rollout stacks T of them in front."""

    action: Any  # noise for the actions, or a key where the distribution knows no noise
    env_keys: jax.Array  # [N]
    start: Any  # (state, obs) at the beginning of episodes, [N, ...], or fewer where they are shared out


def start(key, env_params, *, env: Env, network: Network, num_envs: int) -> Actors:
    """N environments at the beginning of their first episodes."""
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


def unroll(key, actors: Actors, policy: Policy, env_params, *, env: Env, network: Network, config: Config):
    """T steps of N environments under a fixed policy: the actors where they end, and the Rollout without its key."""

    def step(actors, draws):
        return act_and_step(draws, actors, policy, env_params, env=env, network=network, config=config)

    def look(policy, actors):
        obs, first = jax.tree.map(
            lambda x: jnp.broadcast_to(x, (config.num_steps, *x.shape)), (actors.obs, actors.first)
        )
        return apply_policy(policy, actors.memory, obs, first, network=network, config=config)[1]

    distribution = jax.eval_shape(look, policy, actors)
    draws = draw_ahead(key, distribution, env_params, env=env, config=config)
    actors, rollout = jax.lax.scan(step, actors, draws)
    # Stacked over steps of their own time axis, [T, 1, N, ...]; scalars are the same in every step.
    distribution = jax.tree.map(lambda x: x[:, 0] if x.ndim > 1 else x[0], rollout.distribution)
    rollout = rollout.replace(distribution=distribution, log_prob=distribution.log_prob(rollout.action))
    return count_episodes(actors, rollout)


def count_episodes(actors: Actors, rollout: Rollout):
    """Actors and Rollout with what is counted of the environment's episodes filled in."""

    def count(before, step):
        reward, done = step
        after = before[0] + reward, before[1] + 1
        return jax.tree.map(lambda x: jnp.where(done, 0, x), after), after

    ended = rollout.done
    before = actors.episode_return, actors.episode_length
    last, (returns, lengths) = jax.lax.scan(count, before, (rollout.reward, ended))
    rollout = rollout.replace(ended=ended, episode_return=returns, episode_length=lengths)
    return actors.replace(episode_return=last[0], episode_length=last[1]), rollout


def discounted_returns(before, reward, done, discount):
    """Running discounted sums of rewards [T, N] from `before` [N]: those after the last step, [N], and all, [T, N]."""

    def count(before, step):
        reward, done = step
        after = discount * before + reward
        return jnp.where(done, 0, after), after

    return jax.lax.scan(count, before, (reward, done))


def draw_ahead(key, distribution, env_params, *, env: Env, config: Config) -> Draws:
    """What a whole rollout draws that no policy decides, [T, ...]: drawn step by step, it costs more than acting.

    Of the distribution [T, N] only the shapes count. Everything is drawn along one axis and shaped afterwards, which
    gives the same numbers: XLA compiles the generator for every draw, and several times as much code for several axes.
    """
    act_key, env_key, reset_key = jax.random.split(key, 3)
    num_resets = config.resets_per_step or config.num_envs
    reset_keys = jax.random.split(reset_key, config.num_steps * num_resets)
    fresh = jax.vmap(env.reset, in_axes=(0, None))(reset_keys, env_params)
    noise = getattr(distribution, "noise", None)
    return Draws(
        action=noise(act_key) if noise else jax.random.split(act_key, config.num_steps),
        env_keys=jax.random.split(env_key, config.num_steps * config.num_envs).reshape(config.num_steps, -1),
        start=jax.tree.map(lambda x: x.reshape(config.num_steps, num_resets, *x.shape[1:]), fresh),
    )


def act_and_step(draws: Draws, actors, policy, env_params, *, env, network, config):
    """One step of N environments, those that ended begun anew: the actors after it, and this step of the Rollout, [N].

    What `unroll` fills in for a whole rollout is left out, and `distribution` has a time axis of one step.
    """
    memory, distribution, _ = apply_policy(
        policy, actors.memory, add_time(actors.obs), actors.first[None], network=network, config=config
    )
    if hasattr(distribution, "place"):
        action = distribution.place(draws.action[None])[0]
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


def apply_policy(policy: Policy, memory, obs, first, *, network: Network, config: Config):
    """The network on raw observations [T, B, ...], normalised as the policy says: memory, distribution, value."""
    obs = standardize_observations(policy.observation, obs, config.observation_clip)
    return network.apply(policy.params, memory, obs, first)


def step_envs(keys, env_state, action, env_params, *, env: Env, config: Config):
    """One raw step of N environments with keys [N] and actions as drawn, [N, ...]: Step [N]."""
    space = action_space(env, env_params)

    def step(key, state, action):
        return env.step(key, state, bound_action(action, space, config.bound_action), env_params)

    result = jax.vmap(step)(keys, env_state, action)
    return result._replace(
        state=jax.tree.map(_strong, result.state),
        obs=jax.tree.map(_strong, result.obs),
        reward=result.reward.astype(jnp.float32),
        metrics=_as_floats(result.metrics),
        episode_metrics=_as_floats(result.episode_metrics),
    )


def begin_where(done, start, reached):
    """States and observations [N, ...]: those reached, or one to start from where an episode ended, `done` [N].

    Where there are fewer starts than environments, they are dealt out in turn to the episodes that ended.
    """
    num_starts = len(jax.tree.leaves(start)[0])
    if num_starts < len(done):
        turn = (jnp.cumsum(done) - 1) % num_starts
        start = jax.tree.map(lambda x: x[turn], start)

    def choose(new, old):
        return jnp.where(done.reshape(done.shape + (1,) * (old.ndim - 1)), new.astype(old.dtype), old)

    return jax.tree.map(choose, start, reached)


def add_time(tree):
    """Every leaf with a time axis of one step in front."""
    return jax.tree.map(lambda x: x[None], tree)


def _strong(x):
    return jnp.asarray(x, jnp.result_type(x))


def _as_floats(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)
