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
from purejaxppo.envs.errors import place
from purejaxppo.normalize import standardize_advantage, standardize_observations
from purejaxppo.platforms import scan_updates
from purejaxppo.record import pack
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
    observation: Any,
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
        observation: moments that normalise observations, () for none.
        axis_name: mesh axis of the shards, each with an equal share of every minibatch; () for one shard.

    Returns:
        `params`, `opt_state`, and the report of the loss, means over the minibatches.
    """
    chex.assert_equal_shape_prefix([x for x in jax.tree.leaves(batch.replace(memory=())) if x.ndim], 2)
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

    gradient = jax.jit(jax.value_and_grad(checked_loss, has_aux=True), inline=True)  # traced once for all platforms

    def learn(unpack, apply, carry, minibatch):
        carried, (opt_state, stopped) = carry
        params = unpack(carried)
        chosen, advantage, random = minibatch
        minibatch = take(batch, chosen, config.segment_length)
        read = {"obs": minibatch.obs, "next_obs": minibatch.next_obs}
        read = {name: standardize_observations(observation, x, config.observation_clip) for name, x in read.items()}
        minibatch = minibatch.replace(advantage=advantage, **read)  # standardised, all three
        (_, report), grads = gradient(params, minibatch, hyperparams, **random)
        grads, report = mean_over_shards((grads, report), axis_name)
        updates, new_opt_state = transformation.update(grads, opt_state, params)
        new = apply(carried, updates)
        if config.stop_on_kl:
            stopped = stopped | (report["approx_kl"] > hyperparams.target_kl)
            new, new_opt_state = jax.tree.map(
                lambda old, new: jnp.where(stopped, old, new), (carried, opt_state), (new, new_opt_state)
            )
        report |= {"grad_norm": optax.tree.norm(ravel_pytree(grads)[0])}
        return (new, (new_opt_state, stopped)), pack((report, (~stopped).astype(jnp.float32)))

    others = opt_state, jnp.bool_(False)
    (params, (opt_state, _)), rows = scan_updates(learn, params, others, (chosen, advantage, random))
    reports, counted = rows.unpack()
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
    advantage = _flat(advantage)[rows_of(chosen, advantage.shape[1], config.segment_length)]
    if config.normalize_advantage == "minibatch":
        advantage = standardize_advantage(advantage, (1, 2), axis_name)
    return advantage


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


def take(batch: Batch, chosen: jax.Array, length: int) -> Batch:
    """The minibatch [L, B, ...] of the segments `chosen` [B] of a rollout [T, N, ...], which keeps its order."""
    rows = rows_of(chosen, batch.advantage.shape[1], length)
    memory = jax.tree.map(lambda x: _flat(x)[chosen], batch.memory)
    minibatch = jax.tree.map(lambda x: _flat(x)[rows] if x.ndim else x, batch.replace(memory=()))
    return minibatch.replace(memory=memory)


def rows_of(chosen: jax.Array, num_envs: int, length: int) -> jax.Array:
    """The transitions of segments [..., B], as [..., L, B] rows of all T * N.

    Segment s begins at step s // N * L of environment s % N.
    """
    if length == 1:
        return chosen[..., None, :]
    first = chosen // num_envs * (length * num_envs) + chosen % num_envs
    return first[..., None, :] + num_envs * jnp.arange(length).reshape(*(1,) * (chosen.ndim - 1), length, 1)


def _flat(x: jax.Array) -> jax.Array:
    """[T, N, ...] as [T * N, ...]."""
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def _mean_where(counted, values):
    counts = counted.reshape(-1, *(1,) * (values.ndim - 1))
    return jnp.where(counts > 0, values, 0).sum(0) / jnp.maximum(counted.sum(), 1)
