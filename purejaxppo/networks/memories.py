"""Memories for actor-critics, as flax modules over sequences of features [T, B, F].

A memory is emptied before every step that begins an episode. It takes features as rows or as `Columns`, and returns
them as they were given.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from purejaxppo.networks.layers import Columns, Dense, to_columns, to_rows
from purejaxppo.networks.orthogonal import orthogonal


class GRU(nn.Module):
    """A gated recurrent unit (Cho et al., 2014)."""

    width: int

    def empty(self, batch: int) -> jax.Array:
        """The memory [B, width] before the first step."""
        return jnp.zeros((batch, self.width), jnp.float32)

    @nn.compact
    def __call__(self, memory: jax.Array, features: jax.Array | Columns, first: jax.Array):
        """The memory [B, width] after features [T, B, F], and features [T, B, width]."""
        weights = draw_weights(self, ("reset", "update", "candidate"), features)
        bias = self.param("recalled_candidate_bias", nn.initializers.zeros, (self.width,), jnp.float32)

        def cell(hidden, given, recalled):
            (*gates, candidate), (*more, recalled) = jnp.split(given, 3, axis=-1), jnp.split(recalled, 3, axis=-1)
            reset, update = (nn.sigmoid(x + y) for x, y in zip(gates, more))
            candidate = jnp.tanh(candidate + reset * (recalled + bias[None]))
            return (1 - update) * candidate + update * hidden

        return step_by_step(cell, weights, memory, features, first)


class LSTM(nn.Module):
    """Long short-term memory (Hochreiter and Schmidhuber, 1997) with a forget gate."""

    width: int

    def empty(self, batch: int) -> tuple[jax.Array, jax.Array]:
        """The memory before the first step: the cell [B, width] and the output [B, width]."""
        return jnp.zeros((batch, self.width), jnp.float32), jnp.zeros((batch, self.width), jnp.float32)

    @nn.compact
    def __call__(self, memory: tuple[jax.Array, jax.Array], features: jax.Array | Columns, first: jax.Array):
        """The memory after features [T, B, F], and features [T, B, width]."""
        weights = draw_weights(self, ("write", "forget", "candidate", "read"), features)

        def cell(memory, given, recalled):
            write, forget, candidate, read = jnp.split(given + recalled, 4, axis=-1)
            kept = nn.sigmoid(forget) * memory[0] + nn.sigmoid(write) * jnp.tanh(candidate)
            return kept, nn.sigmoid(read) * jnp.tanh(kept)

        return step_by_step(cell, weights, memory, features, first)


class MinGRU(nn.Module):
    """A GRU whose gates see the input alone, so that all steps can be computed in parallel (Feng et al., 2024).

    h_t = (1 - z_t) h_{t-1} + z_t c_t, where the gate z_t = sigmoid(affine(x_t)) and the candidate c_t = affine(x_t).
    """

    width: int

    def empty(self, batch: int) -> jax.Array:
        """The memory [B, width] before the first step."""
        return jnp.zeros((batch, self.width), jnp.float32)

    @nn.compact
    def __call__(self, memory: jax.Array, features: jax.Array | Columns, first: jax.Array):
        """The memory [B, width] after features [T, B, F], and features [T, B, width]."""
        columns = to_columns(features)
        mapped = Dense(2 * self.width, 2**0.5, name="gate_and_candidate")(columns).values
        gate, candidate = mapped.reshape(2, self.width, *first.shape)
        gate = nn.sigmoid(gate)
        after = linear_recurrence(memory.T, 1 - gate, gate * candidate, first)
        columns = Columns(after.reshape(self.width, -1), first.shape)
        return after[:, -1].T, columns if isinstance(features, Columns) else to_rows(columns)


@jax.custom_jvp
def linear_recurrence(start: jax.Array, decay: jax.Array, added: jax.Array, first: jax.Array) -> jax.Array:
    """h_t = decay_t h_{t-1} + added_t [F, T, B], where h_{t-1} is 0 if step t begins an episode.

    Accelerators compute all steps in parallel. A CPU goes step by step, which takes it less time.

    Args:
        start: [F, B], before the first step.
        decay: [F, T, B].
        added: [F, T, B].
        first: [T, B] bool.
    """
    return _linear_recurrence(start, decay, added, first)


@linear_recurrence.defjvp
def _jvp(primals, tangents):
    # A linear recurrence, too, whose gradient takes less time than that of the loop itself.
    (start, decay, _, first), (of_start, of_decay, of_added, _) = primals, tangents
    after = linear_recurrence(*primals)
    before = jnp.concatenate([start[:, None], after[:, :-1]], axis=1)
    of_added = of_added + of_decay * jnp.where(first[None], 0, before)
    return after, _linear_recurrence(of_start, decay, of_added, first)


def in_sequence(start: jax.Array, decay: jax.Array, added: jax.Array, first: jax.Array) -> jax.Array:
    """`linear_recurrence` as a loop over time."""

    def step(before, inputs):
        decay, added, first = inputs
        after = decay * jnp.where(first[None], 0, before) + added
        return after, after

    by_time = partial(jnp.moveaxis, source=1, destination=0)
    _, after = jax.lax.scan(step, start, (by_time(decay), by_time(added), first))
    return jnp.moveaxis(after, 0, 1)


def in_parallel(start: jax.Array, decay: jax.Array, added: jax.Array, first: jax.Array) -> jax.Array:
    """`linear_recurrence` as a prefix sum of the maps h -> decay h + added, which compose to such maps."""

    def after(one, two):
        (decay, added, first), (decay_two, added_two, first_two) = one, two
        # Values from before a reset are dropped, not multiplied by 0: they may be nan.
        joined = jnp.where(first_two, added_two, decay_two * added + added_two)
        return decay * decay_two, joined, first | first_two

    added = added.at[:, 0].add(decay[:, 0] * jnp.where(first[None, 0], 0, start))
    return jax.lax.associative_scan(after, (decay, added, jnp.broadcast_to(first, added.shape)), axis=1)[1]


def _linear_recurrence(*args: jax.Array) -> jax.Array:
    return jax.lax.platform_dependent(*args, cpu=in_sequence, default=in_parallel)


class Weights(NamedTuple):
    """Of a memory with G gates of a width H each."""

    given: jax.Array  # [F, G H], of the features
    recalled: jax.Array  # [H, G H], of what the memory holds
    bias: jax.Array  # [G H]


def draw_weights(module: Any, gates: Sequence[str], features: jax.Array | Columns) -> Weights:
    """Weights of all gates side by side, so that a step takes two products; each gate's are an orthogonal matrix.

    Args:
        module: becomes theirs; its `width` is that of a gate.
        gates: their names.
        features: to be read.
    """
    num_features = len(features.values) if isinstance(features, Columns) else features.shape[-1]

    def draw(name: str, size: int) -> jax.Array:
        shape = (size, module.width)
        return jnp.concatenate([module.param(f"{name}_{gate}", orthogonal(), shape) for gate in gates], axis=1)

    bias = module.param("bias", nn.initializers.zeros, (len(gates) * module.width,), jnp.float32)
    return Weights(draw("given", num_features), draw("recalled", module.width), bias)


def step_by_step(cell: Callable, weights: Weights, memory: Any, features: jax.Array | Columns, first: jax.Array):
    """The memory of a cell after features [T, B, F], and its features [T, B, H].

    Accelerators compute the products with the features of all steps at once. A CPU computes them step by step, from
    its cache.

    Args:
        cell: memory, products of features and of the memory [B, G H] -> memory.
        weights: of these products.
        memory: before the first step; its last array [B, H] is what the cell shows.
        features: rows or columns.
        first: [T, B] bool.
    """

    def give(rows):
        products = rows @ weights.given
        return products + jnp.broadcast_to(weights.bias, products.shape)

    def step(memory, inputs):
        given, first = inputs
        memory = jax.tree.map(lambda x: jnp.where(first[:, None], 0, x), memory)
        memory = cell(memory, given, jax.tree.leaves(memory)[-1] @ weights.recalled)
        return memory, jax.tree.leaves(memory)[-1]

    def in_the_loop(memory, rows, first):
        return jax.lax.scan(lambda memory, x: step(memory, (give(x[0]), x[1])), memory, (rows, first))

    def ahead(memory, rows, first):
        return jax.lax.scan(step, memory, (give(rows), first))

    as_columns = isinstance(features, Columns)
    rows = features.values.T.reshape(*first.shape, -1) if as_columns else features
    memory, rows = jax.lax.platform_dependent(memory, rows, first, cpu=in_the_loop, default=ahead)
    return memory, to_columns(rows) if as_columns else rows


MEMORIES = {"gru": GRU, "lstm": LSTM, "mingru": MinGRU}
