"""Standardisation: of advantages, and of observations and rewards by running moments, which are state of the policy."""

from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import struct

from purejaxppo.collectives import gather_shards


class Moments(struct.PyTreeNode):
    """The number of values seen, and their mean and population variance for each element of a shape."""

    count: jax.Array  # [] float32; grows by whole rollouts, so it does not stall at 2**24
    mean: jax.Array  # [...]
    variance: jax.Array  # [...]


def no_moments(shape: Sequence[int] = ()) -> Moments:
    """Initial moments (count 0, mean 0, variance 1), under which standardising changes nothing but clips."""
    return Moments(count=jnp.float32(0), mean=jnp.zeros(shape, jnp.float32), variance=jnp.ones(shape, jnp.float32))


def measure(values: jax.Array, axes: int | Sequence[int] | None = None) -> Moments:
    """Moments of values over some axes, all by default."""
    values = values.astype(jnp.float32)
    mean = values.mean(axes, keepdims=True)
    variance = ((values - mean) ** 2).mean(axes)
    return Moments(
        count=jnp.float32(values.size // max(mean.size, 1)), mean=mean.reshape(variance.shape), variance=variance
    )


def pool(shards: Moments) -> Moments:
    """The moments of D shards of equal size taken together, from those of each, [D, ...] (Chan et al., 1979).

    The variance includes the spread of their means.
    """
    mean = shards.mean.mean(0)
    variance = (shards.variance + (shards.mean - mean[None]) ** 2).mean(0)
    return Moments(count=shards.count.sum(0), mean=mean, variance=variance)


def merge(moments: Moments, shards: Moments) -> Moments:
    """The moments after counting in D shards of new values, of which `shards` holds the moments [D, ...].

    Pairwise, and so numerically stable (Chan et al., 1979).
    """
    new = pool(shards)
    count = moments.count + new.count
    share = new.count / count
    delta = new.mean - moments.mean
    variance = (1 - share) * moments.variance + share * new.variance + (1 - share) * share * delta**2
    return Moments(count=count, mean=moments.mean + share * delta, variance=variance)


def standardize_advantage(
    advantage: jax.Array, axes: int | Sequence[int] | None = None, axis_name: str | tuple = ()
) -> jax.Array:
    """Advantages minus their mean, divided by their population deviation.

    Both are taken over the given axes, all by default, and over the shards of a mesh axis.
    """
    moments = pool(gather_shards(measure(advantage, axes), axis_name))
    mean, variance = (jnp.expand_dims(x, axes or ()) for x in (moments.mean, moments.variance))
    return (advantage - mean) * jax.lax.rsqrt(variance + 1e-8)


def standardize(moments: Moments, values: jax.Array, clip: float) -> jax.Array:
    """Values [..., *shape] in deviations from the running mean, within [-clip, clip]."""
    chex.assert_shape(values, (..., *moments.mean.shape))
    lead = (1,) * (values.ndim - moments.mean.ndim)
    mean, variance = (x.reshape(lead + x.shape) for x in (moments.mean, moments.variance))
    return jnp.clip((values - mean) * jax.lax.rsqrt(variance + 1e-8), -clip, clip)


def scale(moments: Moments, values: jax.Array, clip: float) -> jax.Array:
    """Values divided by the running deviation but not shifted, within [-clip, clip], as rewards are."""
    chex.assert_rank(moments.variance, 0)
    return jnp.clip(values * jax.lax.rsqrt(moments.variance + 1e-8), -clip, clip)


def observation_moments(obs: Any) -> Any:
    """Initial moments for every part of one observation that is a floating-point number, and None for all others.

    Integers (discrete parts, uint8 images) and booleans stay as they are.
    """
    is_float = lambda x: jnp.issubdtype(jnp.result_type(x), jnp.floating)
    return jax.tree.map(lambda x: no_moments(jnp.shape(x)) if is_float(x) else None, obs)


def measure_observations(moments: Any, obs: Any) -> Any:
    """The moments of this batch alone, for every part of an observation [..., *shape] that has moments."""

    def measure_part(part, x):
        return measure(x, tuple(range(x.ndim - part.mean.ndim))) if isinstance(part, Moments) else None

    return jax.tree.map(measure_part, moments, obs, is_leaf=_is_part)


def merge_observations(moments: Any, shards: Any) -> Any:
    """The moments of every part of an observation after counting in those of D shards, leaves [D, ...]."""
    return jax.tree.map(
        lambda old, new: merge(old, new) if isinstance(old, Moments) else old, moments, shards, is_leaf=_is_part
    )


def standardize_observations(moments: Any, obs: Any, clip: float) -> Any:
    """An observation, batched or not, with every part that has moments standardised; `moments=()` changes nothing."""
    return jax.tree.map(
        lambda part, x: standardize(part, x, clip) if isinstance(part, Moments) else x, moments, obs, is_leaf=_is_part
    )


def _is_part(x):
    return isinstance(x, Moments) or x is None or (isinstance(x, tuple) and not x)
