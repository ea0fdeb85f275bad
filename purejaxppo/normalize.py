"""Standardisation: of advantages, and by running moments of observations and returns, kept as state of the policy."""

import jax
import jax.numpy as jnp
from flax import struct

from purejaxppo.envs.base import Box


@struct.dataclass
class Moments:
    """How many values were seen, their mean and their population variance, per element of a shape."""

    count: jax.Array  # [] float32; grows by whole rollouts, so it does not stall at 2**24
    mean: jax.Array  # [...]
    variance: jax.Array  # [...]


def no_moments(shape=()) -> Moments:
    """Moments of nothing yet, which leave what they standardise as it is."""
    return Moments(count=jnp.float32(0), mean=jnp.zeros(shape, jnp.float32), variance=jnp.ones(shape, jnp.float32))


def mean_and_variance(values, axes=None, axis_name=()):
    """Mean and population variance over some axes, all by default, and over the shards of a mesh axis if one is named.

    The axes stay, with length 1. `axis_name` is () where there are no shards.
    """
    mean = values.mean(axes, keepdims=True)
    variance = ((values - mean) ** 2).mean(axes, keepdims=True)
    if not axis_name:
        return mean, variance
    # One message for both: shards of one size, whose means vary as well (Chan et al., 1979).
    means, variances = jax.lax.all_gather(jnp.stack([mean, variance]), axis_name, axis=1)
    mean = means.mean(0)
    return mean, (variances + (means - mean[None]) ** 2).mean(0)


def standardize_advantage(advantage, axes=None, axis_name=()):
    """Advantages less their mean, over their population deviation, as `mean_and_variance` takes them."""
    mean, variance = mean_and_variance(advantage, axes, axis_name)
    return (advantage - mean) * jax.lax.rsqrt(variance + 1e-8)


def merge(moments: Moments, values, axis_name=()) -> Moments:
    """The moments with a batch of values [..., *shape] counted in (Chan et al., 1979: pairwise, so it is stable)."""
    axes = tuple(range(values.ndim - moments.mean.ndim))
    values = values.astype(jnp.float32)
    size = jnp.float32(values.size // max(moments.mean.size, 1) * jax.lax.axis_size(axis_name))
    count = moments.count + size
    new_mean, new_variance = (x.reshape(moments.mean.shape) for x in mean_and_variance(values, axes, axis_name))
    delta = new_mean - moments.mean
    share = size / count
    variance = (1 - share) * moments.variance + share * new_variance + (1 - share) * share * delta**2
    return Moments(count=count, mean=moments.mean + share * delta, variance=variance)


def standardize(moments: Moments, values, clip: float):
    """Values [..., *shape] in deviations from the running mean, within [-clip, clip]."""
    lead = (1,) * (values.ndim - moments.mean.ndim)
    mean, variance = (x.reshape(lead + x.shape) for x in (moments.mean, moments.variance))
    return jnp.clip((values - mean) * jax.lax.rsqrt(variance + 1e-8), -clip, clip)


def scale(moments: Moments, values, clip: float):
    """Values divided by the running deviation but not shifted, within [-clip, clip]: for rewards."""
    return jnp.clip(values * jax.lax.rsqrt(moments.variance + 1e-8), -clip, clip)


def observation_moments(space):
    """No moments yet for every Box in a space of observations; discrete parts are never standardised."""
    return jax.tree.map(lambda part: no_moments(part.shape) if isinstance(part, Box) else None, space)


def merge_observations(moments, obs, axis_name=()):
    """The moments of every part of an observation [..., *shape], batched, with it counted in."""
    return jax.tree.map(
        lambda part, x: None if part is None else merge(part, x, axis_name), moments, obs, is_leaf=_is_part
    )


def standardize_observations(moments, obs, clip: float):
    """An observation, batched or not, with every part that has moments standardised; () stands for no moments."""
    if isinstance(moments, tuple) and not moments:
        return obs
    return jax.tree.map(
        lambda part, x: x if part is None else standardize(part, x, clip), moments, obs, is_leaf=_is_part
    )


def _is_part(x):
    return x is None or isinstance(x, Moments)
