"""Advantage estimation."""

import chex
import jax
import jax.numpy as jnp


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
