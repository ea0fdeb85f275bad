"""`Record`, a pytree of named arrays that prints as an outline instead of all its numbers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from purejaxppo.text import count


class Record(struct.PyTreeNode):
    """A flax.struct record that prints one line per field: dtype and shape of an array, sizes of anything larger."""

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**{"repr": False} | kwargs)

    def __repr__(self) -> str:
        width = max(map(len, vars(self)), default=0)
        return "\n".join([type(self).__name__, *(f"  {name:{width}}  {_size(x)}" for name, x in vars(self).items())])


def size_of(tree: Any) -> int:
    """Bytes of arrays, or of their shapes."""
    return sum(x.size * (x.dtype.itemsize if hasattr(x.dtype, "itemsize") else 8) for x in jax.tree.leaves(tree))


def _size(tree: Any) -> str:
    leaves = jax.tree.leaves(tree)
    if len(leaves) == 1 and leaves[0] is tree:
        return f"{jnp.result_type(tree)}{list(np.shape(tree))}" if hasattr(tree, "dtype") else repr(tree)
    return f"{count(len(leaves), 'array')}, {count(sum(map(np.size, leaves)), 'number')}" if leaves else repr(tree)
