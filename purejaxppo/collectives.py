"""Collectives across the shards of a run, over the mesh axis `axis_name`; with () a run is one shard.

Each call is one message. Shards wait for each other at every message, which costs more than sending its data.
"""

from typing import Any

import jax
from jax.flatten_util import ravel_pytree


def gather_shards(tree: Any, axis_name: str | tuple = ()) -> Any:
    """The values of all D shards, leaves [D, ...]; D = 1 for `axis_name=()`."""
    if not axis_name:
        return jax.tree.map(lambda x: x[None], tree)
    vector, unravel = ravel_pytree(tree)
    return jax.vmap(unravel)(jax.lax.all_gather(vector, axis_name))


def mean_over_shards(tree: Any, axis_name: str | tuple = ()) -> Any:
    """The mean of every leaf over the shards."""
    if not axis_name:
        return tree
    vector, unravel = ravel_pytree(tree)
    return unravel(jax.lax.pmean(vector, axis_name))


def key_of_shard(key: jax.Array, axis_name: str | tuple = ()) -> jax.Array:
    """A different key in each shard, so that each draws and shuffles its own data; for () the key is unchanged."""
    return jax.random.fold_in(key, jax.lax.axis_index(axis_name)) if axis_name else key
