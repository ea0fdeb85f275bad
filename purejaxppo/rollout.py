"""Acting in environments: from a policy and the actors to a rollout, T steps of N environments."""

from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from purejaxppo.config import Config
from purejaxppo.envs.base import Env, Step, action_space, bound_action, count_lost_as_zero
from purejaxppo.networks.network import Network
from purejaxppo.networks.orthogonal import orthogonalize
from purejaxppo.normalize import no_moments, observation_moments, standardize_observations
from purejaxppo.platforms import one_by_one_on_cpus, scan
from purejaxppo.record import Record
from purejaxppo.starts import close_pool, draw_starts, open_pool, refill, renew_keys, rows_at, starts_per_step

FLAGS = "terminated", "truncated", "lost", "ended"  # of a rollout
SMALL = 256  # bytes of an observation up to which a rollout of them is copied without hesitation
WIDE = 256  # bytes of a distribution of one action from which it is not kept for a whole rollout


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
    pool: Any = ()  # of start states that wait; () where every environment gets a fresh one in every step
    first_limit: Any = ()  # [N] int32, steps until the first episode is truncated, 0 for never; () without `stagger`


class Rollout(Record):
    """T steps of N environments, which a custom step may change before it learns from them; one step is [N, ...]."""

    obs: Any  # [T, N, ...] acted on, as the environment shows it
    first: Any  # [T, N] bool, whether `obs` begins an episode
    memory: Any  # [T / L, N, ...] of the network, before the `obs` where a segment begins
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
    lost: Any = None  # [T, N] bool, whether an episode ended on nan with this step
    reused: Any = None  # [T, N] bool, whether the next episode begins from a start state that was used before
    episode_return: Any = None  # [T, N], the environment's rewards so far, this one included
    episode_length: Any = None  # [T, N] int32, this step included
    key: Any = None  # [] random key for the update that learns from this rollout
    flags: Any = None  # within a scan, [N] uint8: all `FLAGS` in one array, since each that it stacks is a kernel

    @property
    def done(self) -> jax.Array:
        """[T, N] bool, whether the episode to learn from ends with this step: `terminated` or `truncated`."""
        return self.terminated | self.truncated


class Draws(struct.PyTreeNode):
    """The random draws of one step of every environment; for a rollout, T of them along a leading axis."""

    action: Any  # noise for the actions, or a key if the distribution has no `noise`
    env_keys: jax.Array  # [N]
    start: Any  # (state, obs) of start states, [N, ...] for a step; K of them where a pool is refilled


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


def first_limits(config: Config) -> Any:
    """After how many steps each of N environments truncates its first episode, from 1 to `stagger`; () for 0."""
    if not config.stagger:
        return ()
    return jnp.asarray(1 + np.arange(config.num_envs) * config.stagger // config.num_envs, jnp.int32)


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
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), obs)
    observation = observation_moments(one) if config.normalize_observation else ()
    read = standardize_observations(observation, add_time(obs), config.observation_clip)
    first = jnp.ones((1, *jax.tree.leaves(obs)[0].shape[:1]), bool)
    params = one_by_one_on_cpus(network.init)(key, memory, read, first)
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
    acting = {"network": network, "config": config}

    def forward(policy, actors):
        obs, first = jax.tree.map(
            lambda x: jnp.broadcast_to(x, (config.num_steps, *x.shape)), (actors.obs, actors.first)
        )
        return apply_policy(policy, actors.memory, obs, first, **acting)[1]

    # At once for all steps costs fewer kernels, but would copy the observations.
    at_once = sum(x.nbytes for x in jax.tree.leaves(actors.obs)) <= SMALL * config.num_envs

    def step(actors, draws):
        actors, kept = act_and_step(draws, actors, policy, env_params, env=env, **acting)
        return actors, pack_flags(kept if at_once else end_lost_states(kept))

    draws = draw_ahead(key, jax.eval_shape(forward, policy, actors), env_params, env=env, config=config)
    after, memory, rollout = scan_steps(step, actors, draws, config)
    rollout = unpack_flags(rollout)
    rollout = end_lost_states(rollout) if at_once else rollout
    first = jnp.concatenate([actors.first[None], rollout.done[:-1]])
    rollout = with_distribution(rollout.replace(first=first, memory=memory), policy, actors.memory, **acting)
    return count_episodes(after, rollout)


def scan_steps(step: Callable, actors: Actors, draws: Draws, config: Config) -> tuple[Actors, Any, Any]:
    """T steps of N environments, each with a start state for where an episode ends.

    Args:
        step: (actors, draws) -> actors, a record of what to keep, with a field `reused`; `first` of the actors says
            where episodes ended.
        actors: where the environments stand.
        draws: of all steps.
        config: sizes.

    Returns:
        The actors after the steps; the memories before the first step of each segment, [T / L, N, ...]; and what was
        kept, [T, ...].
    """
    table, queue, rows = open_pool(actors.pool, draws.start)

    def pooled_start(carry, inputs):
        (actors, queue), (draws, fresh) = carry, inputs
        state, obs = rows_at(table, queue.row)
        state = renew_keys(state, draws.env_keys, queue.age > 0)
        actors, kept = step(actors, draws.replace(start=(state, obs)))
        after, reused = refill(queue, actors.first, fresh)
        return (actors, after), kept.replace(reused=reused)

    if not queue:
        return scan_segments(step, actors, draws, lambda actors: actors.memory, config)
    inputs = draws.replace(start=()), rows
    (after, queue), memory, kept = scan_segments(
        pooled_start, (actors, queue), inputs, lambda carry: carry[0].memory, config
    )
    return after.replace(pool=close_pool(table, queue)), memory, kept


def scan_segments(step: Callable, carry: Any, inputs: Any, memory_of: Callable, config: Config) -> tuple[Any, Any, Any]:
    """A scan over T steps that also returns the memories before the first step of each segment, [T / L, N, ...].

    Args:
        step: as `jax.lax.scan` takes it.
        carry: before the first step.
        inputs: [T, ...].
        memory_of: carry -> memory [N, ...].
        config: sizes.
    """

    def segment(carry, inputs):
        after, outputs = scan(step, carry, inputs, unroll=8)
        return after, (memory_of(carry), outputs)

    num_segments = config.num_steps // config.segment_length if jax.tree.leaves(memory_of(carry)) else 1
    if num_segments == 1:
        after, (memory, outputs) = segment(carry, inputs)
        return after, add_time(memory), outputs
    inputs = jax.tree.map(lambda x: x.reshape(num_segments, config.segment_length, *x.shape[1:]), inputs)
    after, (memory, outputs) = jax.lax.scan(segment, carry, inputs)
    return after, memory, jax.tree.map(lambda x: x.reshape(config.num_steps, *x.shape[2:]), outputs)


def with_distribution(rollout: Rollout, policy: Policy, memory: Any, *, network: Network, config: Config) -> Rollout:
    """The rollout with the distributions of its actions and their log probabilities, [T, N].

    Wide distributions were not kept. They are computed again, which the compiler leaves out where nobody reads them.

    Args:
        rollout: with the distributions [T, 1, N, ...] that a scan stacked, or with log probabilities.
        policy: that acted.
        memory: [N, ...], before the first step.
        network: applies the policy.
        config: of the PPO.
    """
    if rollout.log_prob is not None:
        _, distribution, _ = apply_policy(policy, memory, rollout.obs, rollout.first, network=network, config=config)
        return rollout.replace(distribution=distribution)
    # Scalars of a distribution are the same in every step.
    distribution = jax.tree.map(lambda x: x[:, 0] if x.ndim > 1 else x[0], rollout.distribution)
    return rollout.replace(distribution=distribution, log_prob=distribution.log_prob(rollout.action))


def pack_flags(step: Rollout) -> Rollout:
    """One step of a rollout with its flags as the bits of one number; () stands for each of them."""
    known = {name: (i, getattr(step, name)) for i, name in enumerate(FLAGS) if getattr(step, name) is not None}
    bits = sum(x.astype(jnp.uint8) << i for i, x in known.values())
    return step.replace(flags=bits, **dict.fromkeys(known, ()))


def unpack_flags(rollout: Rollout) -> Rollout:
    """The rollout [T, N] of steps that `pack_flags` packed."""
    known = {name: i for i, name in enumerate(FLAGS) if getattr(rollout, name) is not None}
    return rollout.replace(flags=None, **{name: (rollout.flags >> i) % 2 == 1 for name, i in known.items()})


def end_lost_states(rollout: Rollout) -> Rollout:
    """The rollout, or one step of it, without the nans that an episode may end on.

    A reward or a metric that is nan in the last step of an episode counts as 0, and the episode as lost. Where the last
    observation holds a nan, it is 0, and the state terminal.
    """
    done = rollout.done
    unknown = [jnp.isnan(x) for x in jax.tree.leaves((rollout.reward, rollout.metrics, rollout.episode_metrics))]
    no_value = jnp.zeros_like(done)
    for x in jax.tree.leaves(rollout.next_obs):
        if jnp.issubdtype(x.dtype, jnp.floating):
            no_value |= done & jnp.isnan(x).any(range(done.ndim, x.ndim))
    number = partial(count_lost_as_zero, done)
    return rollout.replace(
        next_obs=begin_where(no_value, jax.tree.map(jnp.zeros_like, rollout.next_obs), rollout.next_obs),
        terminated=rollout.terminated | no_value,
        reward=number(rollout.reward),
        metrics=jax.tree.map(number, rollout.metrics),
        episode_metrics=jax.tree.map(number, rollout.episode_metrics),
        lost=no_value | (done & reduce(jnp.logical_or, unknown)),
    )


def count_episodes(actors: Actors, rollout: Rollout) -> tuple[Actors, Rollout]:
    """The actors and the rollout with the returns and lengths of the environment's episodes filled in.

    An episode that `stagger` truncated did not end by itself, so it does not count in the metrics.
    """

    def count(before, step):
        reward, done = step
        after = before[0] + reward, before[1] + 1
        return jax.tree.map(lambda x: jnp.where(done, 0, x), after), after

    ended = rollout.done if rollout.ended is None else rollout.ended
    before = actors.episode_return, actors.episode_length
    last, (returns, lengths) = scan(count, before, (rollout.reward, rollout.done), unroll=16)
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

    return scan(count, before, (reward, done), unroll=16)


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
    num_starts = starts_per_step(env, config)
    draw_noise = getattr(distribution, "noise", None) if _draws_noise(distribution) else None
    return Draws(
        action=draw_noise(act_key) if draw_noise else jax.random.split(act_key, config.num_steps),
        env_keys=jax.random.split(env_key, config.num_steps * config.num_envs).reshape(config.num_steps, -1),
        start=draw_starts(reset_key, env_params, (config.num_steps, num_starts), env=env),
    )


def act_and_step(
    draws: Draws, actors: Actors, policy: Policy, env_params: Any, *, env: Env, network: Network, config: Config
) -> tuple[Actors, Rollout]:
    """One step of N environments, with ended episodes restarted: the actors after it, and one step of a rollout, [N].

    The fields that `unroll` fills in for a whole rollout stay None, and `distribution` has a time axis of one step. A
    wide one is not kept, but its `log_prob` is.

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
    if _draws_noise(distribution):
        action = distribution.from_noise(draws.action[None])[0]
    else:
        action = distribution.sample(draws.action)[0]
    result = step_envs(draws.env_keys, actors.env_state, action, env_params, env=env, config=config)
    kept = Rollout(
        obs=actors.obs,
        first=None,
        memory=None,
        distribution=distribution,
        action=action,
        reward=result.reward,
        next_obs=result.obs,
        terminated=result.terminated,
        truncated=result.truncated,
        metrics=result.metrics,
        episode_metrics=result.episode_metrics,
    )
    if is_wide(distribution):
        kept = kept.replace(distribution=None, log_prob=distribution.log_prob(action[None])[0])
    if config.stagger:
        ended = kept.done
        cut = (actors.first_limit == 1) & ~ended
        kept = kept.replace(truncated=kept.truncated | cut, ended=ended)
        actors = actors.replace(first_limit=jnp.where(kept.done, 0, jnp.maximum(actors.first_limit - 1, 0)))
    env_state, obs = begin_where(kept.done, draws.start, (result.state, result.obs))
    return actors.replace(env_state=env_state, obs=obs, first=kept.done, memory=memory), kept


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
    number = lambda x: x.astype(jnp.float32)
    return result._replace(
        state=jax.tree.map(_strong, result.state),
        obs=jax.tree.map(_strong, result.obs),
        reward=number(result.reward),
        metrics=jax.tree.map(number, result.metrics),
        episode_metrics=jax.tree.map(number, result.episode_metrics),
    )


def begin_where(done: jax.Array, start: Any, reached: Any) -> Any:
    """The leaves of `reached`, or those of `start` where an episode ended, `done`, whose axes lead theirs."""

    def choose(new, old):
        return jnp.where(done.reshape(done.shape + (1,) * (old.ndim - done.ndim)), new.astype(old.dtype), old)

    return jax.tree.map(choose, start, reached)


def _draws_noise(distribution: Any) -> bool:
    """Whether the noise of a whole rollout's actions is drawn ahead."""
    return hasattr(distribution, "from_noise") and not is_wide(distribution)


def is_wide(distribution: Any) -> bool:
    """Whether a distribution [T, N, ...] takes too much memory to be kept for every action of a rollout."""
    arrays = [x for x in jax.tree.leaves(distribution) if jnp.ndim(x) > 1]
    return sum(x.size // (x.shape[0] * x.shape[1]) * x.dtype.itemsize for x in arrays) > WIDE


def add_time(tree: Any) -> Any:
    """Every leaf with a time axis of one step in front."""
    return jax.tree.map(lambda x: x[None], tree)


def _strong(x):
    return jnp.asarray(x, jnp.result_type(x))
