"""Standardisation: of advantages, and by running moments of observations and returns, kept as state of the policy."""

import chex
import jax
import jax.numpy as jnp
from flax import struct

from purejaxppo.collectives import gather_shards
from purejaxppo.envs.base import Box


class Moments(struct.PyTreeNode):
    """How many values were seen, their mean and their population variance, per element of a shape."""

    count: jax.Array  # [] float32; grows by whole rollouts, so it does not stall at 2**24
    mean: jax.Array  # [...]
    variance: jax.Array  # [...]


def no_moments(shape=()) -> Moments:
    """Moments of nothing yet, which leave what they standardise as it is."""
    return Moments(count=jnp.float32(0), mean=jnp.zeros(shape, jnp.float32), variance=jnp.ones(shape, jnp.float32))


def measure(values, axes=None) -> Moments:
    """Moments of values over some axes, all by default."""
    values = values.astype(jnp.float32)
    mean = values.mean(axes, keepdims=True)
    variance = ((values - mean) ** 2).mean(axes)
    return Moments(
        count=jnp.float32(values.size // max(mean.size, 1)), mean=mean.reshape(variance.shape), variance=variance
    )


def pool(parts: Moments) -> Moments:
    """Moments of D parts of one size as a whole, from theirs [D, ...]: their means vary as well (Chan et al., 1979)."""
    mean = parts.mean.mean(0)
    variance = (parts.variance + (parts.mean - mean[None]) ** 2).mean(0)
    return Moments(count=parts.count.sum(0), mean=mean, variance=variance)


def merge(moments: Moments, parts: Moments) -> Moments:
    """The moments with D parts [D, ...] of other values counted in (Chan et al., 1979: pairwise, so it is stable)."""
    new = pool(parts)
    count = moments.count + new.count
    share = new.count / count
    delta = new.mean - moments.mean
    variance = (1 - share) * moments.variance + share * new.variance + (1 - share) * share * delta**2
    return Moments(count=count, mean=moments.mean + share * delta, variance=variance)


def standardize_advantage(advantage, axes=None, axis_name=()):
    """Advantages less their mean, over their population deviation, over some axes and the shards of a mesh axis."""
    moments = pool(gather_shards(measure(advantage, axes), axis_name))
    mean, variance = (jnp.expand_dims(x, axes or ()) for x in (moments.mean, moments.variance))
    return (advantage - mean) * jax.lax.rsqrt(variance + 1e-8)


def standardize(moments: Moments, values, clip: float):
    """Values [..., *shape] in deviations from the running mean, within [-clip, clip]."""
    chex.assert_shape(values, (..., *moments.mean.shape))
    lead = (1,) * (values.ndim - moments.mean.ndim)
    mean, variance = (x.reshape(lead + x.shape) for x in (moments.mean, moments.variance))
    return jnp.clip((values - mean) * jax.lax.rsqrt(variance + 1e-8), -clip, clip)


def scale(moments: Moments, values, clip: float):
    """Values divided by the running deviation but not shifted, within [-clip, clip]: for rewards."""
    chex.assert_rank(moments.variance, 0)
    return jnp.clip(values * jax.lax.rsqrt(moments.variance + 1e-8), -clip, clip)


def observation_moments(space):
    """No moments yet for every Box in a space of observations; discrete parts are never standardised."""
    return jax.tree.map(lambda part: no_moments(part.shape) if isinstance(part, Box) else None, space)


def measure_observations(moments, obs):
    """Of every part of an observation [..., *shape] that has moments, those of this batch alone."""

    def measure_part(part, x):
        return measure(x, tuple(range(x.ndim - part.mean.ndim))) if isinstance(part, Moments) else None

    return jax.tree.map(measure_part, moments, obs, is_leaf=_is_part)


def merge_observations(moments, parts):
    """The moments of every part of an observation with those of D shards counted in."""
    return jax.tree.map(
        lambda old, new: merge(old, new) if isinstance(old, Moments) else old, moments, parts, is_leaf=_is_part
    )


def standardize_observations(moments, obs, clip: float):
    """An observation, batched or not, with every part that has moments standardised; () stands for no moments."""
    return jax.tree.map(
        lambda part, x: standardize(part, x, clip) if isinstance(part, Moments) else x, moments, obs, is_leaf=_is_part
    )


def _is_part(x):
    return isinstance(x, Moments) or x is None or (isinstance(x, tuple) and not x)
