"""What the states of a rollout are worth to the critic: those acted on, and those reached before any reset."""

from functools import partial

import jax
import jax.numpy as jnp

from purejaxppo.config import Config
from purejaxppo.networks import Network
from purejaxppo.rollout import Policy, Rollout, add_time, apply_policy


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
