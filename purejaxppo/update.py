"""Learning from one rollout: epochs of shuffled minibatches, one optimizer step each."""

import inspect
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from purejaxppo.advantages import Batch
from purejaxppo.collectives import mean_over_shards
from purejaxppo.config import Config, Hyperparams
from purejaxppo.normalize import standardize_advantage

LOSS = 2**31  # folded into the key of the shuffles, it gives the key of the loss


def adam(hyperparams: Hyperparams) -> optax.GradientTransformation:
    """Adam behind a bound on the global gradient norm; `learning_rate` is a number by now."""
    step = optax.adam(
        hyperparams.learning_rate, b1=hyperparams.adam_b1, b2=hyperparams.adam_b2, eps=hyperparams.adam_eps
    )
    # On all parameters as one vector: taken one by one, many small arrays cost as much as a small network's gradient.
    return optax.flatten(optax.chain(optax.clip_by_global_norm(hyperparams.max_grad_norm), step))


def update(
    key,
    params,
    opt_state,
    batch: Batch,
    hyperparams: Hyperparams,
    *,
    loss: Callable,
    optimizer: Callable,
    config: Config,
    axis_name=(),
):
    """All epochs over one rollout: params, opt_state, and the means of what the minibatches reported.

    A `loss(params, minibatch, hyperparams)` whose signature names `key` is given a random key, another for every
    minibatch.
    Every epoch draws a permutation of its own. With `stop_on_kl`, the first minibatch whose KL exceeds the target
    and all after it leave params and optimizer state as they are, and do not count in the means.
    Where a rollout lies in shards along the mesh axis `axis_name`, a minibatch has an equal part in each.
    """
    segments = to_segments(batch, config.segment_length)
    transformation = optimizer(hyperparams)
    chosen = minibatches(key, config)
    advantage = segments.advantage[chosen]
    if config.normalize_advantage == "minibatch":
        # For all minibatches at once, so that shards wait for each other once and not in every one.
        advantage = standardize_advantage(advantage, (1, 2), axis_name)
    random = {}
    if "key" in inspect.signature(loss).parameters:
        random["key"] = jax.random.split(jax.random.fold_in(key, LOSS), len(chosen))

    def learn(carry, minibatch):
        params, opt_state, stopped = carry
        chosen, advantage, random = minibatch
        minibatch = take(segments, chosen).replace(advantage=advantage.T)
        (_, report), grads = jax.value_and_grad(loss, has_aux=True)(params, minibatch, hyperparams, **random)
        _check_report(report, config)
        report = {name: jnp.asarray(value, jnp.float32) for name, value in report.items()}
        grads, report = mean_over_shards((grads, report), axis_name)
        updates, new_opt_state = transformation.update(grads, opt_state, params)
        new_params = optax.apply_updates(params, updates)
        if config.stop_on_kl:
            stopped = stopped | (report["approx_kl"] > hyperparams.target_kl)
            new_params, new_opt_state = jax.tree.map(
                lambda old, new: jnp.where(stopped, old, new), (params, opt_state), (new_params, new_opt_state)
            )
        return (new_params, new_opt_state, stopped), (
            report | {"grad_norm": optax.tree.norm(ravel_pytree(grads)[0])},
            ~stopped,
        )

    carry = params, opt_state, jnp.bool_(False)
    (params, opt_state, _), (reports, counted) = jax.lax.scan(learn, carry, (chosen, advantage, random))
    return params, opt_state, jax.tree.map(lambda x: _mean_where(counted, x), reports)


def minibatches(key, config: Config):
    """Indices of segments, [epochs * minibatches, segments of a minibatch]: every epoch shuffled anew."""
    shuffled = shuffle(key, config.num_segments, config.num_epochs)
    return shuffled.reshape(config.num_epochs * config.num_minibatches, -1)


def shuffle(key, size: int, num_shuffles: int):
    """Permutations of 0 .. size - 1, [num_shuffles, size] int32.

    Sorts numbers whose high bits are random and whose low bits are the index: one array of integers, several times
    faster to sort than keys with a payload. Two indices with the same random bits keep their order. That happens to a
    given pair with a chance of 2**-16 at most (above 65,536 a second pass shuffles the first, which holds up to
    2**24), and it matters only where a minibatch ends between the two: otherwise they are in it together.
    """
    index_bits = max(size - 1, 1).bit_length()
    index = jnp.arange(size, dtype=jnp.uint32)[None]
    mask = jnp.uint32(2**index_bits - 1)

    def shuffle_once(key):
        drawn = jax.random.bits(key, (num_shuffles * size,), jnp.uint32).reshape(num_shuffles, size)
        return (jax.lax.sort((drawn & ~mask) | index, dimension=1) & mask).astype(jnp.int32)

    if index_bits <= 16:
        return shuffle_once(key)
    first, second = map(shuffle_once, jax.random.split(key))
    return jnp.take_along_axis(first, second, axis=1)


def to_segments(batch: Batch, length: int) -> Batch:
    """A rollout [T, N, ...] cut into S = T / L * N segments [S, L, ...]; of the memory what precedes each, [S, ...]."""
    chex.assert_equal_shape_prefix([x for x in jax.tree.leaves(batch) if x.ndim], 2)

    def cut(x):
        if x.ndim == 0:
            return x
        num_steps, num_envs, *shape = x.shape
        x = x.reshape(num_steps // length, length, num_envs, *shape)
        return jnp.swapaxes(x, 1, 2).reshape(-1, length, *shape)

    segments = jax.tree.map(cut, batch)
    return segments.replace(memory=jax.tree.map(lambda x: x[:, 0], segments.memory))


def take(segments: Batch, chosen) -> Batch:
    """The minibatch [L, B, ...] of the segments with the indices `chosen` [B]."""
    minibatch = jax.tree.map(lambda x: x[chosen] if x.ndim else x, segments)
    time_first = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1) if x.ndim > 1 else x, minibatch)
    return time_first.replace(memory=minibatch.memory)


def _check_report(report: dict, config: Config):
    for name, value in report.items():
        if jnp.ndim(value) > 1 or not jnp.size(value):
            raise ValueError(
                f"the loss reports {name} of shape {jnp.shape(value)}; it must be a scalar or a vector (take a mean)"
            )
    if config.stop_on_kl and "approx_kl" not in report:
        raise ValueError("stop_on_kl=True needs a loss that reports approx_kl")


def _mean_where(counted, values):
    counts = counted.reshape(-1, *(1,) * (values.ndim - 1))
    return jnp.where(counts, values, 0).sum(0) / jnp.maximum(counted.sum(), 1)
