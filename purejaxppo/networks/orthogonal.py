"""Orthogonal initialisation of all weights of a network at once."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from flax.core import meta


class Orthogonal(struct.PyTreeNode, meta.AxisMetadata):
    """A weight that `orthogonalize` will draw; until then it is zeros of its shape."""

    value: jax.Array
    scale: float = struct.field(pytree_node=False)

    def unbox(self) -> jax.Array:
        """The weight, as flax asks for it."""
        return self.value

    def replace_boxed(self, value: Any) -> "Orthogonal":
        """The same with another weight, as flax asks for it."""
        return self.replace(value=value)

    def add_axis(self, index: int, params: Any):
        """Refuses stacked weights."""
        raise ValueError(
            "kernel_init=orthogonal(...) cannot be stacked by nn.vmap or nn.scan "
            "(try flax.linen.initializers.orthogonal in such layers)"
        )

    remove_axis = add_axis


def orthogonal(scale: float = 1.0) -> Callable:
    """A flax initialiser for orthogonal matrices times a scale, which `orthogonalize` draws."""
    return lambda key, shape, dtype=jnp.float32: Orthogonal(value=jnp.zeros(shape, dtype), scale=scale)


def is_orthogonal(leaf: Any) -> bool:
    """Whether a leaf of parameters is still to be drawn."""
    return isinstance(leaf, Orthogonal)


def orthogonalize(key: jax.Array, params: Any) -> Any:
    """Parameters with every `Orthogonal` weight drawn: a random orthogonal matrix times its scale.

    The last axis of a weight is one side of its matrix, all axes before it the other. Either its rows or its columns
    are orthonormal (Saxe et al., 2013), uniformly distributed. One loop draws all weights, since separate draws would
    take most of the time to compile `init`; there each weight therefore takes the memory and the time of the largest.
    """
    leaves, treedef = jax.tree.flatten(params, is_leaf=is_orthogonal)
    weights = [i for i, leaf in enumerate(leaves) if is_orthogonal(leaf)]
    if not weights:
        return params
    shapes = [leaves[i].value.shape for i in weights]
    sides = [(math.prod(shape[:-1]), shape[-1]) for shape in shapes]
    drawn = orthonormal_vectors(key, max(map(min, sides)), [max(side) for side in sides])
    for i, shape, (rows, columns), vectors in zip(weights, shapes, sides, drawn):
        matrix = vectors[:rows, :columns] if rows <= columns else vectors[:columns, :rows].T
        leaves[i] = (leaves[i].scale * matrix.reshape(shape)).astype(leaves[i].value.dtype)
    return jax.tree.unflatten(treedef, leaves)


def orthonormal_vectors(key: jax.Array, number: int, sizes: list[int]) -> jax.Array:
    """Orthonormal vectors for each of W sizes, padded to the largest, [W, number, max]; ignore those beyond the size.

    Gram-Schmidt, twice for accuracy, on Gaussian vectors has the same distribution as a QR decomposition with positive
    diagonal. It uses matrix-vector products, because LAPACK's QR under `vmap` can deadlock a CPU with two threads.
    """
    width = max(sizes)

    def draw(key_and_size):
        key, size = key_and_size
        gaussian = jnp.where(jnp.arange(width)[None] < size, jax.random.normal(key, (number, width), jnp.float32), 0)
        return jax.lax.fori_loop(0, number, orthonormalize, gaussian)

    def orthonormalize(i, vectors):
        vector = vectors[i]
        done = jnp.where(jnp.arange(number)[:, None] < i, vectors, 0)
        for _ in range(2):
            overlap = jnp.matmul(done, vector, precision="highest")
            vector = vector - jnp.matmul(overlap, done, precision="highest")
        length = jnp.linalg.norm(vector)
        return vectors.at[i].set(vector / jnp.where(length > 0, length, 1))  # vectors beyond `size` have length 0

    return jax.lax.map(draw, (jax.random.split(key, len(sizes)), jnp.array(sizes)))
