"""Orthogonal initialisation of a whole network at once."""

import math

import jax
import jax.numpy as jnp


def orthogonalize(key, params):
    """Parameters whose weights, filled with their scale so far, are random orthogonal matrices times that scale.

    A weight is what has two axes or more; its last axis is one side of the matrix, all before it the other. Either its
    rows or its columns are orthonormal (Saxe et al., 2013), uniformly distributed. All are drawn by one loop, since a
    draw for each layer would take most of the time that a first state takes to compile; every weight then takes the
    memory and the time of the largest, while a state is begun.
    """
    leaves, treedef = jax.tree.flatten(params)
    weights = [i for i, leaf in enumerate(leaves) if jnp.ndim(leaf) > 1]
    if not weights:
        return params
    sides = [(math.prod(leaves[i].shape[:-1]), leaves[i].shape[-1]) for i in weights]
    drawn = orthonormal_vectors(key, max(map(min, sides)), [max(side) for side in sides])
    for i, (rows, columns), vectors in zip(weights, sides, drawn):
        matrix = vectors[:rows, :columns] if rows <= columns else vectors[:columns, :rows].T
        leaves[i] *= matrix.reshape(leaves[i].shape)
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
