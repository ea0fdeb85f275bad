"""The losses of PPO; mathematics over bare arrays, and the one function that puts them together."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from purejaxppo.config import Config, Hyperparams


def policy_loss(log_ratio: jax.Array, advantage: jax.Array, clip: jax.Array | float) -> jax.Array:
    """Clipped surrogate, to be minimised; any shape (Schulman et al., 2017, eq. 7)."""
    chex.assert_equal_shape([log_ratio, advantage])
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1 - clip, 1 + clip)
    return -jnp.minimum(ratio * advantage, clipped * advantage).mean()


def value_loss(value: jax.Array, old_value: jax.Array, target: jax.Array, clip: jax.Array | float) -> jax.Array:
    """Half the mean square error, the value's change held within `clip` of the old one; inf does not clip; any shape.

    The larger of the clipped and the plain error counts, as in OpenAI baselines' ppo2.
    """
    chex.assert_equal_shape([value, old_value, target])
    clipped = old_value + jnp.clip(value - old_value, -clip, clip)
    return 0.5 * jnp.maximum((value - target) ** 2, (clipped - target) ** 2).mean()


def approximate_kl(log_ratio: jax.Array) -> jax.Array:
    """KL of the old from the new policy by samples of the old; any shape, never negative (Schulman, 2020, k3)."""
    return (jnp.expm1(log_ratio) - log_ratio).mean()


def ppo_loss(
    params: Any,
    minibatch: Any,
    hyperparams: Hyperparams,
    *,
    network: Any,
    config: Config,
    surrogate: Callable = policy_loss,
) -> tuple[jax.Array, dict]:
    """The loss of one minibatch [L, B] (an `update.Batch`), its advantages standardised, and what to report of it.

    A mean over transitions, as is all that it reports. Any function of this signature can take its place
    (`make_ppo(..., loss=...)`), with one keyword more, `key`, if it draws random numbers (named in
    its signature, not in **kwargs). Its report holds scalars and
    vectors [K], and must hold `approx_kl` where `stop_on_kl` is on. `surrogate(log_ratio, advantage, clip)` is the
    policy's part of the loss.
    """
    _, distribution, value = network.apply(params, minibatch.memory, minibatch.obs, minibatch.first)
    log_ratio = distribution.log_prob(minibatch.action) - minibatch.log_prob
    value_clip = hyperparams.value_clip if config.clip_value_loss else jnp.inf

    actor = surrogate(log_ratio, minibatch.advantage, hyperparams.clip)
    critic = value_loss(value, minibatch.value, minibatch.target, value_clip)
    entropy = distribution.entropy().mean()
    loss = actor + hyperparams.value_coefficient * critic - hyperparams.entropy_coefficient * entropy
    report = {
        "loss": loss,
        "policy_loss": actor,
        "value_loss": critic,
        "entropy": entropy,
        "approx_kl": approximate_kl(log_ratio),
        "clip_fraction": (jnp.abs(jnp.expm1(log_ratio)) > hyperparams.clip).mean(dtype=jnp.float32),
    }
    return loss, report
