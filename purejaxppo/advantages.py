"""The advantages of a rollout: scaled rewards, values of its states, and GAE."""

from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp

from purejaxppo.collectives import gather_shards
from purejaxppo.config import Config, Hyperparams
from purejaxppo.networks.network import Network
from purejaxppo.normalize import measure, merge, scale
from purejaxppo.platforms import scan
from purejaxppo.record import Record
from purejaxppo.rollout import Actors, Policy, Rollout, apply_policy, begin_where, discounted_returns

PIECE = 2**21  # bytes of observations, as float32, that one forward pass reads for their values


class Batch(Record):
    """The data to learn from: a rollout [T, N, ...] or a minibatch of it [L, B, ...]; unused fields cost nothing.

    Fields without a shape are [T, N] or [L, B].
    """

    obs: Any  # as the environment shows it; in a minibatch as the network reads it, normalised if at all
    first: jax.Array  # bool, whether `obs` begins an episode
    memory: Any  # of the network before each segment, [T / L, N, ...]; in a minibatch [B, ...]
    action: jax.Array  # [..., *action], before any bound
    log_prob: jax.Array  # under the policy that acted
    value: jax.Array  # under the policy that acted
    advantage: jax.Array
    target: jax.Array  # of the value
    distribution: Any = None  # that `action` was drawn from; its scalars belong to all transitions
    reward: Any = None  # scaled, if at all
    next_obs: Any = None  # reached, before any reset; as `obs`
    terminated: Any = None  # bool
    truncated: Any = None  # bool


def estimate(
    policy: Policy,
    rollout: Rollout,
    reward: jax.Array,
    last_memory: Any,
    hyperparams: Hyperparams,
    *,
    network: Network,
    config: Config,
) -> Batch:
    """The batch [T, N, ...] of a rollout, with advantages and value targets.

    Args:
        policy: the policy that acted.
        rollout: what it did.
        reward: [T, N], scaled if at all.
        last_memory: [N, ...], of the network after the last step.
        hyperparams: their values in this update.
        network: applies the policy.
        config: says whether truncations are bootstrapped.
    """
    terminated = rollout.terminated if config.bootstrap_on_truncation else rollout.done
    value, next_value = state_values(policy, rollout, terminated, last_memory, network=network, config=config)
    advantage = gae(reward, value, next_value, terminated, rollout.done, hyperparams.discount, hyperparams.gae_lambda)
    return Batch(
        obs=rollout.obs,
        first=rollout.first,
        memory=rollout.memory,
        action=rollout.action,
        log_prob=rollout.log_prob,
        value=value,
        advantage=advantage,
        target=advantage + value,
        distribution=rollout.distribution,
        reward=reward,
        next_obs=rollout.next_obs,
        terminated=rollout.terminated,
        truncated=rollout.truncated,
    )


def scale_rewards(
    policy: Policy,
    actors: Actors,
    rollout: Rollout,
    discount: jax.Array | float,
    config: Config,
    axis_name: str | tuple = (),
) -> tuple[Policy, Actors, jax.Array]:
    """Rewards divided by the running deviation of the discounted return, if `config.scale_reward` is on.

    The moments count this rollout's returns first. Unlike observations, rewards take no part in the ratio, so the
    newest moments are the right ones for them.

    Args:
        policy: holds the moments of the discounted return.
        actors: hold the discounted return so far.
        rollout: the rewards.
        discount: in [0, 1].
        config: says whether to scale, and the bound of a scaled reward.
        axis_name: mesh axis of the shards, () for one shard.

    Returns:
        The policy and the actors after this rollout, and the rewards [T, N] to learn from.
    """
    if not config.scale_reward:
        return policy, actors, rollout.reward
    rewards = jnp.asarray(rollout.reward, jnp.float32)
    last, returns = discounted_returns(actors.discounted_return, rewards, rollout.done, discount)
    moments = merge(policy.reward, gather_shards(measure(returns), axis_name))
    rewards = scale(moments, rewards, config.reward_clip)
    return policy.replace(reward=moments), actors.replace(discounted_return=last), rewards


def state_values(
    policy: Policy, rollout: Rollout, terminated: jax.Array, last_memory: Any, *, network: Network, config: Config
) -> tuple[jax.Array, jax.Array]:
    """Values of the states acted on, and of the states reached before any reset, [T, N] each.

    Within an episode the state reached is the next one acted on. Only the remaining states need a forward pass of
    their own: those of the last step, and the last ones of truncated episodes. Terminal states have value 0.

    Args:
        policy: the policy that acted.
        rollout: the states.
        terminated: [T, N] bool, which states reached are terminal.
        last_memory: [N, ...], of the network after the last step.
        network: applies the policy.
        config: of the PPO.
    """
    last_obs = jax.tree.map(lambda x: x[-1:], rollout.next_obs)
    _, _, last_value = apply_policy(
        policy, last_memory, last_obs, jnp.zeros_like(terminated[-1:]), network=network, config=config
    )
    before_last = (jnp.arange(config.num_steps) < config.num_steps - 1)[:, None]
    unknown = (rollout.ended | rollout.done) & before_last & ~terminated

    in_rounds = partial(bootstrap_in_rounds, network=network, config=config)
    bootstrap = jax.custom_jvp(in_rounds)  # a loop of unknown length has no gradient
    all_at_once = partial(bootstrap_all, network=network, config=config)
    bootstrap.defjvp(lambda primals, tangents: jax.jvp(all_at_once, primals, tangents))
    # Before the other values, so that the states reached need not be kept while these are computed.
    seen = rollout.memory, rollout.obs, rollout.first, rollout.next_obs
    bootstrapped = bootstrap(jnp.zeros(unknown.shape, last_value.dtype), unknown, policy, *seen)
    value = values_acted_on(policy, rollout, network=network, config=config)
    next_value = jnp.where(unknown, bootstrapped, jnp.concatenate([value[1:], last_value]))
    return value, jnp.where(terminated, 0, next_value)


def values_acted_on(policy: Policy, rollout: Rollout, *, network: Network, config: Config) -> jax.Array:
    """Values of the states acted on, [T, N], by a forward pass in pieces of so many steps as `PIECE` allows.

    So the activations of a network that reads images do not take more memory than learning does.

    Args:
        policy: the policy that acted.
        rollout: the states.
        network: applies the policy.
        config: of the PPO.
    """
    num_steps = len(rollout.first)
    read_bytes = 4 * sum(x.size for x in jax.tree.leaves(rollout.obs))  # as float32
    divisors = [n for n in range(1, num_steps + 1) if num_steps % n == 0]
    num_pieces = next((n for n in divisors if read_bytes <= n * PIECE), num_steps)
    length = num_steps // num_pieces

    def forward(memory, begin):
        # A gather and no slice, before which a GPU would copy all observations into the layout of convolutions.
        obs, first = jax.tree.map(lambda x: x[begin + jnp.arange(length)], (rollout.obs, rollout.first))
        memory, _, value = apply_policy(policy, memory, obs, first, network=network, config=config)
        return memory, value

    memory = jax.tree.map(lambda x: x[0], rollout.memory)
    if num_pieces == 1:
        _, _, value = apply_policy(policy, memory, rollout.obs, rollout.first, network=network, config=config)
        return value
    return jax.lax.scan(forward, memory, length * jnp.arange(num_pieces))[1].reshape(rollout.first.shape)


def bootstrap_all(
    next_value: jax.Array,
    unknown: jax.Array,
    policy: Policy,
    memory: Any,
    obs: Any,
    first: jax.Array,
    next_obs: Any,
    *,
    network: Network,
    config: Config,
) -> jax.Array:
    """`next_value` [T, N] with the unknown values filled in, by a forward pass on every state reached.

    Args:
        next_value: [T, N].
        unknown: [T, N] bool.
        policy: the policy that acted.
        memory: [T / L, N, ...], of the network before each segment.
        obs: [T, N, ...], of the states acted on.
        first: [T, N] bool.
        next_obs: [T, N, ...], of the states reached.
        network: applies the policy.
        config: of the PPO.
    """

    def step(memory, seen):
        obs, first, next_obs = jax.tree.map(lambda x: x[None], seen)
        memory, _, _ = apply_policy(policy, memory, obs, first, network=network, config=config)
        # The forward pass on the state reached does not advance the memory.
        _, _, value = apply_policy(policy, memory, next_obs, jnp.zeros_like(first), network=network, config=config)
        return memory, value[0]

    _, value = jax.lax.scan(step, jax.tree.map(lambda x: x[0], memory), (obs, first, next_obs))
    return jnp.where(unknown, value, next_value)


def bootstrap_in_rounds(
    next_value: jax.Array,
    unknown: jax.Array,
    policy: Policy,
    memory: Any,
    obs: Any,
    first: jax.Array,
    next_obs: Any,
    *,
    network: Network,
    config: Config,
) -> jax.Array:
    """The result of `bootstrap_all`, by forward passes on the first unknown state of every environment.

    The number of passes is that of the truncated episodes of the environment that has most of them (over all runs of a
    batch). Measured on a CPU, training is 2 to 8 % faster than with one pass on all states. A network with a memory
    runs over the whole segment up to the state, because its memory is kept only where the segment begins.
    """
    steps, envs = (jnp.arange(size) for size in unknown.shape)
    replayed = config.segment_length if jax.tree.leaves(memory) else 0

    def fill_first(carry):
        next_value, unknown = carry
        step = jnp.argmax(unknown, axis=0)  # [N]
        segment = step // config.segment_length
        before = (segment * config.segment_length)[None] + jnp.arange(replayed)[:, None]  # [replayed, N]
        position = step - before[0] + 1 if replayed else jnp.zeros_like(step)  # of the state reached
        reached = jnp.arange(replayed + 1)[:, None] == position[None]

        def join(acted_on, reached_):
            path = jnp.concatenate([acted_on[before, envs[None]], reached_[step, envs][None]])
            return begin_where(reached, jnp.broadcast_to(reached_[step, envs][None], path.shape), path)

        path = jax.tree.map(join, obs, next_obs)
        path_first = join(first, jnp.zeros_like(first))
        kept = jax.tree.map(lambda x: x[segment, envs], memory)
        _, _, value = apply_policy(policy, kept, path, path_first, network=network, config=config)
        value = value[position, envs]
        chosen = unknown & (steps[:, None] == step[None])
        return jnp.where(chosen, value[None], next_value), unknown & ~chosen

    return jax.lax.while_loop(lambda carry: carry[1].any(), fill_first, (next_value, unknown))[0]


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

        >>> ones, zeros = jnp.ones(3), jnp.zeros(3)
        >>> gae(ones, zeros, zeros, zeros, zeros, discount=0.5, gae_lambda=1.0)
        Array([1.75, 1.5 , 1.  ], dtype=float32)

    Args:
        reward: [T, ...], as all arrays here.
        value: of the states acted on.
        next_value: of the states reached, before any reset.
        terminated: bool; a terminal state has value 0.
        done: bool, terminated or truncated; no advantage leaks into the next episode. A truncated state keeps its
            value.
        discount: in [0, 1].
        gae_lambda: in [0, 1].

    Returns:
        Advantages [T, ...]; the value targets are `advantage + value`.

    Raises:
        AssertionError: for arrays of different shapes.
    """
    reward, value, next_value = (jnp.asarray(x, jnp.float32) for x in (reward, value, next_value))
    terminated, done = jnp.asarray(terminated, bool), jnp.asarray(done, bool)
    chex.assert_equal_shape([reward, value, next_value, terminated, done])
    delta = reward + discount * jnp.where(terminated, 0, next_value) - value

    def backward(next_advantage, step):
        delta, done = step
        advantage = delta + discount * gae_lambda * jnp.where(done, 0, next_advantage)
        return advantage, advantage

    _, advantage = scan(backward, jnp.zeros_like(delta[-1]), (delta, done), reverse=True, unroll=16)
    return advantage
