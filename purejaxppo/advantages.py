"""What a rollout is worth: scaled rewards, the values of its states, and advantages by GAE."""

from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import struct

from purejaxppo.collectives import gather_shards
from purejaxppo.config import Config, Hyperparams
from purejaxppo.networks.network import Network
from purejaxppo.normalize import measure, merge, scale, standardize_observations
from purejaxppo.rollout import Actors, Policy, Rollout, add_time, apply_policy, discounted_returns


class Batch(struct.PyTreeNode):
    """What is learned from: a rollout [T, N, ...], or a minibatch of it [L, B, ...]. What no loss reads costs nothing.

    Where a shape is not said it is [T, N] or [L, B].
    """

    obs: Any  # as the network reads it, normalised if at all
    first: jax.Array  # bool, whether `obs` begins an episode
    memory: Any  # of the network before `obs`; in a minibatch [B, ...], before the segment
    action: jax.Array  # as drawn
    log_prob: jax.Array  # of the policy that acted
    value: jax.Array  # of the policy that acted
    advantage: jax.Array
    target: jax.Array  # of the value
    distribution: Any = None  # of the policy that acted; its scalars belong to all transitions
    reward: jax.Array | None = None  # as learned from: scaled, if at all
    next_obs: Any = None  # reached, before any reset, as the network reads it
    terminated: jax.Array | None = None  # bool
    truncated: jax.Array | None = None  # bool


def scale_rewards(policy: Policy, actors: Actors, rollout: Rollout, discount, config: Config, axis_name=()):
    """Policy and actors with this rollout's returns counted in, and the rewards to learn from, [T, N].

    Unlike observations, rewards take no part in the ratio: the newest moments are the right ones for them.
    """
    if not config.scale_reward:
        return policy, actors, rollout.reward
    rewards = jnp.asarray(rollout.reward, jnp.float32)
    last, returns = discounted_returns(actors.discounted_return, rewards, rollout.done, discount)
    moments = merge(policy.reward, gather_shards(measure(returns), axis_name))
    rewards = scale(moments, rewards, config.reward_clip)
    return policy.replace(reward=moments), actors.replace(discounted_return=last), rewards


def estimate(
    policy: Policy, rollout: Rollout, reward, last_memory, hyperparams: Hyperparams, *, network, config
) -> Batch:
    """What there is to learn from a rollout: advantages and value targets, [T, N]."""
    terminated = rollout.terminated if config.bootstrap_on_truncation else rollout.done
    value, next_value = values(policy, rollout, terminated, last_memory, network=network, config=config)
    advantage = gae(reward, value, next_value, terminated, rollout.done, hyperparams.discount, hyperparams.gae_lambda)
    obs, next_obs = (
        standardize_observations(policy.observation, x, config.observation_clip)
        for x in (rollout.obs, rollout.next_obs)
    )
    return Batch(
        obs=obs,
        first=rollout.first,
        memory=rollout.memory,
        action=rollout.action,
        log_prob=rollout.log_prob,
        value=value,
        advantage=advantage,
        target=advantage + value,
        distribution=rollout.distribution,
        reward=reward,
        next_obs=next_obs,
        terminated=rollout.terminated,
        truncated=rollout.truncated,
    )


def values(policy: Policy, rollout: Rollout, terminated, last_memory, *, network: Network, config: Config):
    """The value of every state acted on, and of every state reached, before any reset, [T, N] each.

    Where an episode goes on, the state reached is the one acted on next. Only the others are looked at by themselves:
    the last of the rollout, and those of episodes that were cut off. What `terminated` [T, N] marks is worth nothing.
    """
    memory = jax.tree.map(lambda x, last: jnp.concatenate([x, last[None]]), rollout.memory, last_memory)
    first_memory, memory_after = (jax.tree.map(lambda x: x[part], memory) for part in (0, slice(1, None)))
    _, _, value = apply_policy(policy, first_memory, rollout.obs, rollout.first, network=network, config=config)
    next_value = jnp.where(terminated, 0, jnp.concatenate([value[1:], value[-1:]]))
    last = (jnp.arange(config.num_steps) == config.num_steps - 1)[:, None]
    unknown = (rollout.ended | rollout.done | last) & ~terminated

    settings = {"network": network, "config": config}
    fill = jax.custom_jvp(partial(fill_in_turn, **settings))  # a loop of unknown length has no gradient of its own
    fill.defjvp(lambda primals, tangents: jax.jvp(partial(fill_at_once, **settings), primals, tangents))
    return value, fill(next_value, unknown, policy, memory_after, rollout.next_obs)


def fill_at_once(next_value, unknown, policy: Policy, memory, obs, **settings):
    """Values [T, N] with those that are unknown filled in, by one look at every state reached [T, N, ...].

    A look takes the memory after the step, and does not advance it.
    """
    flat_memory, flat_obs = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (memory, obs))
    never_first = jnp.zeros((1, unknown.size), bool)
    _, _, looked = apply_policy(policy, flat_memory, add_time(flat_obs), never_first, **settings)
    return jnp.where(unknown, looked.reshape(unknown.shape), next_value)


def fill_in_turn(next_value, unknown, policy: Policy, memory, obs, **settings):
    """What `fill_at_once` gives, by looks at the first unknown of every environment until there are none.

    That is one look for the end of the rollout, and as many more as episodes were cut off in the environment that
    has most of them (of all runs of a batch).
    """
    steps, envs = (jnp.arange(size) for size in unknown.shape)

    def look(found):
        next_value, unknown = found
        step = jnp.argmax(unknown, axis=0)
        first_memory, first_obs = jax.tree.map(lambda x: x[step, envs], (memory, obs))
        here = unknown & (steps[:, None] == step[None])
        never_first = jnp.zeros_like(unknown[:1])
        _, _, looked = apply_policy(policy, first_memory, add_time(first_obs), never_first, **settings)
        return jnp.where(here, looked, next_value), unknown & ~here

    return jax.lax.while_loop(lambda found: found[1].any(), look, (next_value, unknown))[0]


def gae(
    reward: jax.Array,
    value: jax.Array,
    next_value: jax.Array,
    terminated: jax.Array,
    done: jax.Array,
    discount: jax.Array | float,
    gae_lambda: jax.Array | float,
) -> jax.Array:
    """Generalised advantage estimates (Schulman et al., 2016, eq. 11-16), time first.

        delta[t] = reward[t] + discount * next_value[t] * (1 - terminated[t]) - value[t]
        A[t]     = delta[t] + discount * gae_lambda * (1 - done[t]) * A[t + 1]

    `next_value` [T, ...] is the value of the state reached before any reset: a truncation is worth it, a termination
    is worth nothing, and neither (`done`, their union) lets an advantage leak across. All arrays are [T, ...], the
    result as well; the value targets are `advantage + value`. Raises AssertionError for arrays of different shapes.
    """
    reward, value, next_value = (jnp.asarray(x, jnp.float32) for x in (reward, value, next_value))
    terminated, done = jnp.asarray(terminated, bool), jnp.asarray(done, bool)
    chex.assert_equal_shape([reward, value, next_value, terminated, done])
    delta = reward + discount * jnp.where(terminated, 0, next_value) - value

    def backward(next_advantage, step):
        delta, done = step
        advantage = delta + discount * gae_lambda * jnp.where(done, 0, next_advantage)
        return advantage, advantage

    _, advantage = jax.lax.scan(backward, jnp.zeros_like(delta[-1]), (delta, done), reverse=True)
    return advantage
