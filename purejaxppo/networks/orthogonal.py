"""Orthogonal initialisation of a whole network at once."""

import math

import jax
import jax.numpy as jnp
from flax import struct
from flax.core import meta


@struct.dataclass
class Orthogonal(meta.AxisMetadata):
    """A weight that `orthogonalize` will draw; until then, and to flax, it is zeros of its shape."""

    value: jax.Array
    scale: float = struct.field(pytree_node=False)

    def unbox(self):
        return self.value

    def replace_boxed(self, value):
        return self.replace(value=value)

    def add_axis(self, index, params):
        raise ValueError(
            "kernel_init=orthogonal(...) cannot be stacked by nn.vmap or nn.scan "
            "(try flax.linen.initializers.orthogonal in such layers)"
        )

    remove_axis = add_axis


def orthogonal(scale: float = 1.0):
    """A flax initialiser of weights that are to be orthogonal matrices times a scale, drawn by `orthogonalize`."""
    return lambda key, shape, dtype=jnp.float32: Orthogonal(value=jnp.zeros(shape, dtype), scale=scale)


def is_orthogonal(leaf) -> bool:
    """Whether a leaf of parameters is still to be drawn."""
    return isinstance(leaf, Orthogonal)


def orthogonalize(key, params):
    """Parameters whose `Orthogonal` weights are random orthogonal matrices times their scale; the others stay.

    The last axis of a weight is one side of its matrix, all before it the other. Either its rows or its columns are
    orthonormal (Saxe et al., 2013), uniformly distributed. All are drawn by one loop, since a draw for each layer would
    take most of the time that a first state takes to compile; every weight then takes the memory and the time of the
    largest, while a state is begun.
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


def orthonormal_vectors(key, number: int, sizes: list[int]):
    """For each of W sizes orthonormal vectors, padded to the largest, [W, number, max]; those beyond a size are no use.

    Gram-Schmidt, twice for accuracy, on Gaussian vectors: the same law as a QR with positive diagonal. It is plain
    matrix-vector products, because LAPACK's QR under `vmap` can deadlock a CPU with two threads.
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
        return vectors.at[i].set(vector / jnp.where(length > 0, length, 1))  # not by 0, beyond `size`

    return jax.lax.map(draw, (jax.random.split(key, len(sizes)), jnp.array(sizes)))
