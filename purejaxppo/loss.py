"""The losses of PPO: mathematics over arrays, and `ppo_loss`, which combines them."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from purejaxppo.config import Config, Hyperparams
from purejaxppo.platforms import means


def policy_loss(log_ratio: jax.Array, advantage: jax.Array, clip: jax.Array | float) -> jax.Array:
    """The clipped surrogate, to be minimised; any shape (Schulman et al., 2017, eq. 7)."""
    return clipped_surrogate(log_ratio, advantage, clip).mean()


def clipped_surrogate(log_ratio: jax.Array, advantage: jax.Array, clip: jax.Array | float) -> jax.Array:
    """The terms whose mean is `policy_loss`, in the shape of its arguments."""
    chex.assert_equal_shape([log_ratio, advantage])
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1 - clip, 1 + clip)
    return -jnp.minimum(ratio * advantage, clipped * advantage)


def value_loss(value: jax.Array, old_value: jax.Array, target: jax.Array, clip: jax.Array | float) -> jax.Array:
    """Half the mean squared error of the value, with clipping around the old value; any shape; inf does not clip.

    The larger of the clipped and the unclipped error counts, as in OpenAI baselines' ppo2.

    Args:
        value: of the new policy.
        old_value: of the policy that acted.
        target: of the value.
        clip: how far the clipped value may be from the old one.
    """
    return half_squared_error(value, old_value, target, clip).mean()


def half_squared_error(value: jax.Array, old_value: jax.Array, target: jax.Array, clip: jax.Array | float) -> jax.Array:
    """The terms whose mean is `value_loss`, in the shape of its arguments."""
    chex.assert_equal_shape([value, old_value, target])
    clipped = old_value + jnp.clip(value - old_value, -clip, clip)
    return 0.5 * jnp.maximum((value - target) ** 2, (clipped - target) ** 2)


def approximate_kl(log_ratio: jax.Array) -> jax.Array:
    """KL(old || new), the divergence of the old policy from the new one, estimated from samples of the old one.

    Any shape; never negative (Schulman, 2020, k3).
    """
    return kl_terms(log_ratio).mean()


def kl_terms(log_ratio: jax.Array) -> jax.Array:
    """The terms whose mean is `approximate_kl`, in the shape of its argument."""
    return jnp.expm1(log_ratio) - log_ratio


def ppo_loss(
    params: Any,
    minibatch: Any,
    hyperparams: Hyperparams,
    *,
    network: Any,
    config: Config,
    surrogate: Callable = clipped_surrogate,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of one minibatch and a report of its terms, all of them means over transitions.

    Any function with this signature can replace it (`make_ppo(..., loss=...)`). If its signature names an argument
    `key` (**kwargs is not enough), it gets a random key. Its report holds scalars and vectors [K], and must hold
    `approx_kl` if `stop_on_kl` is on.

    Args:
        params: of the network.
        minibatch: a `Batch` [L, B, ...] with standardised advantages.
        hyperparams: their values in this update.
        network: applies `params`.
        config: says whether the value loss is clipped.
        surrogate: (log_ratio, advantage, clip) -> the policy's term of the loss, for each transition or their mean.

    Returns:
        The loss and the report, name -> scalar.
    """
    _, distribution, value = network.apply(params, minibatch.memory, minibatch.obs, minibatch.first)
    log_ratio = distribution.log_prob(minibatch.action) - minibatch.log_prob
    value_clip = hyperparams.value_clip if config.clip_value_loss else jnp.inf

    terms = {
        "policy_loss": surrogate(log_ratio, minibatch.advantage, hyperparams.clip),
        "value_loss": half_squared_error(value, minibatch.value, minibatch.target, value_clip),
        "entropy": distribution.entropy(),
        "approx_kl": kl_terms(log_ratio),
        "clip_fraction": (jnp.abs(jnp.expm1(log_ratio)) > hyperparams.clip).astype(jnp.float32),
    }
    report = means(terms, log_ratio.shape)
    loss = (
        report["policy_loss"]
        + hyperparams.value_coefficient * report["value_loss"]
        - hyperparams.entropy_coefficient * report["entropy"]
    )
    return loss, {"loss": loss} | report
