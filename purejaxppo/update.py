"""The update from one rollout: epochs of shuffled minibatches, one optimizer step each."""

import inspect
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from purejaxppo.advantages import Batch
from purejaxppo.collectives import mean_over_shards
from purejaxppo.config import Config, Hyperparams
from purejaxppo.envs.check import place
from purejaxppo.normalize import standardize_advantage
from purejaxppo.validate import as_loss, make_transformation

LOSS = 2**31  # folded into the key of the shuffles, it gives the key of the loss


def adam(hyperparams: Hyperparams) -> optax.GradientTransformation:
    """Adam after clipping by the global gradient norm; `learning_rate` must be a number here, not a schedule."""
    step = optax.adam(
        hyperparams.learning_rate, b1=hyperparams.adam_b1, b2=hyperparams.adam_b2, eps=hyperparams.adam_eps
    )
    # On all parameters as one vector: one by one, many small arrays cost as much as the gradient of a small network.
    return optax.flatten(optax.chain(optax.clip_by_global_norm(hyperparams.max_grad_norm), step))


def update(
    key: jax.Array,
    params: Any,
    opt_state: Any,
    batch: Batch,
    hyperparams: Hyperparams,
    *,
    loss: Callable,
    optimizer: Callable,
    config: Config,
    axis_name: str | tuple = (),
) -> tuple[Any, Any, dict[str, jax.Array]]:
    """All epochs over one rollout; every epoch draws its own permutation.

    With `stop_on_kl`, the first minibatch whose KL exceeds the target and all after it leave `params` and `opt_state`
    unchanged, and do not count in the report.

    Args:
        key: for the permutations, and for a loss that has an argument `key`, a new one for every minibatch.
        params: of the network.
        opt_state: of the optimizer.
        batch: the rollout [T, N, ...].
        hyperparams: their values in this update.
        loss: (params, minibatch, hyperparams) -> loss, report.
        optimizer: hyperparams -> optax transformation.
        config: of the PPO.
        axis_name: mesh axis of the shards, each with an equal share of every minibatch; () for one shard.

    Returns:
        `params`, `opt_state`, and the report of the loss, means over the minibatches.
    """
    segments = to_segments(batch, config.segment_length)
    transformation = make_transformation(optimizer, hyperparams)
    chosen = minibatches(key, config)
    advantage = minibatch_advantages(batch.advantage, chosen, config, axis_name)
    random = {}
    if "key" in inspect.signature(loss).parameters:
        random["key"] = jax.random.split(jax.random.fold_in(key, LOSS), len(chosen))

    def checked_loss(*args, **kwargs):
        try:
            return as_loss(loss(*args, **kwargs), config)
        except KeyError as error:
            remedy = f"a coefficient is given as Hyperparams(extra={{{error}: ...}})"
            raise ValueError(f"loss finds no {error}{place(error)} ({remedy})") from error

    def learn(carry, minibatch):
        params, opt_state, stopped = carry
        chosen, advantage, random = minibatch
        minibatch = take(segments, chosen).replace(advantage=advantage)  # standardised
        (_, report), grads = jax.value_and_grad(checked_loss, has_aux=True)(params, minibatch, hyperparams, **random)
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


def minibatch_advantages(
    advantage: jax.Array, chosen: jax.Array, config: Config, axis_name: str | tuple = ()
) -> jax.Array:
    """The advantages of all minibatches, [M, L, B], standardised as `config.normalize_advantage` says.

    Args:
        advantage: [T, N].
        chosen: [M, B], the segments of every minibatch.
        config: how to standardise, and the length of a segment.
        axis_name: mesh axis of the shards, () for one shard. All minibatches are standardised at once, so that shards
            wait for each other once and not in every minibatch.
    """
    if config.normalize_advantage == "batch":
        advantage = standardize_advantage(advantage, axis_name=axis_name)
    advantage = _cut(advantage, config.segment_length)[chosen]
    if config.normalize_advantage == "minibatch":
        advantage = standardize_advantage(advantage, (1, 2), axis_name)
    return jnp.swapaxes(advantage, 1, 2)


def minibatches(key: jax.Array, config: Config) -> jax.Array:
    """The segments of every minibatch, [epochs * minibatches, B] int32; every epoch shuffles again."""
    shuffled = shuffle(key, config.num_segments, config.num_epochs)
    return shuffled.reshape(config.num_epochs * config.num_minibatches, -1)


def shuffle(key: jax.Array, size: int, num_shuffles: int) -> jax.Array:
    """Permutations of 0 .. size - 1, [num_shuffles, size] int32.

    Sorts integers whose high bits are random and whose low bits are the index, which is several times faster than
    sorting keys with a payload. Two indices with the same random bits keep their order. That happens to a given pair
    with a probability of at most 2**-16 (above 65,536 indices a second pass shuffles the first, which holds up to
    2**24), and it matters only if a minibatch ends between the two.
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
    """A rollout [T, N, ...] as S = T / L * N segments [S, L, ...], with the memory before each segment, [S, ...]."""
    chex.assert_equal_shape_prefix([x for x in jax.tree.leaves(batch) if x.ndim], 2)
    segments = jax.tree.map(lambda x: _cut(x, length) if x.ndim else x, batch)
    return segments.replace(memory=jax.tree.map(lambda x: x[:, 0], segments.memory))


def _cut(x: jax.Array, length: int) -> jax.Array:
    """[T, N, ...] as segments [S, L, ...]."""
    num_steps, num_envs, *shape = x.shape
    num_parts = num_steps // length
    x = x.reshape(num_parts, length, num_envs, *shape)
    return jnp.swapaxes(x, 1, 2).reshape(num_parts * num_envs, length, *shape)


def take(segments: Batch, chosen: jax.Array) -> Batch:
    """The minibatch [L, B, ...] of the segments `chosen` [B]."""
    minibatch = jax.tree.map(lambda x: x[chosen] if x.ndim else x, segments)
    time_first = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1) if x.ndim > 1 else x, minibatch)
    return time_first.replace(memory=minibatch.memory)


def _mean_where(counted, values):
    counts = counted.reshape(-1, *(1,) * (values.ndim - 1))
    return jnp.where(counts, values, 0).sum(0) / jnp.maximum(counted.sum(), 1)
