"""What the shards of a run tell each other over a mesh axis; where `axis_name` is (), a run is one shard, and silent.

Each call is one message: shards wait for each other at every one, which costs more than what it carries.
"""

import jax
from jax.flatten_util import ravel_pytree


def gather_shards(tree, axis_name=()):
    """What all D shards hold, leaves [D, ...]; D = 1 where no axis is named."""
    if not axis_name:
        return jax.tree.map(lambda x: x[None], tree)
    vector, unravel = ravel_pytree(tree)
    return jax.vmap(unravel)(jax.lax.all_gather(vector, axis_name))


def mean_over_shards(tree, axis_name=()):
    """The mean of every leaf over the shards."""
    if not axis_name:
        return tree
    vector, unravel = ravel_pytree(tree)
    return unravel(jax.lax.pmean(vector, axis_name))


def key_of_shard(key: jax.Array, axis_name=()) -> jax.Array:
    """The key itself, or one for each shard of a mesh axis: what lies in a shard is drawn and shuffled there."""
    return jax.random.fold_in(key, jax.lax.axis_index(axis_name)) if axis_name else key
