"""`Record`, a pytree of named arrays that prints as an outline; `Row`, a tree of numbers as one vector per dtype."""

import math
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


class Row(struct.PyTreeNode):
    """A tree of numbers as one vector for each dtype, since each array that a loop stacks costs a GPU a kernel."""

    vectors: dict[str, Any]  # dtype -> [..., F]
    structure: Any = struct.field(pytree_node=False)  # of the tree
    kinds: tuple[tuple[str, tuple[int, ...]], ...] = struct.field(pytree_node=False)  # dtype and shape of each leaf

    def unpack(self) -> Any:
        """The tree; its leaves have the leading axes of the vectors, and are numpy's if those are."""
        ends, leaves = dict.fromkeys(self.vectors, 0), []
        for dtype, shape in self.kinds:
            start, ends[dtype] = ends[dtype], ends[dtype] + math.prod(shape)
            vector = self.vectors[dtype][..., start : ends[dtype]]
            leaves.append(vector.reshape(*vector.shape[:-1], *shape))
        return jax.tree.unflatten(self.structure, leaves)


def pack(tree: Any, axes: int = 0) -> Row:
    """A tree of arrays as a row; their first `axes` axes are those of its vectors."""
    leaves, structure = jax.tree.flatten(jax.tree.map(jnp.asarray, tree))
    kinds = tuple((x.dtype.name, x.shape[axes:]) for x in leaves)
    vectors = {
        dtype: jnp.concatenate([x.reshape(*x.shape[:axes], -1) for x in leaves if x.dtype.name == dtype], axis=-1)
        for dtype in sorted({dtype for dtype, _ in kinds})
    }
    return Row(vectors, structure, kinds)


def size_of(tree: Any) -> int:
    """Bytes of arrays, or of their shapes."""
    return sum(x.size * (x.dtype.itemsize if hasattr(x.dtype, "itemsize") else 8) for x in jax.tree.leaves(tree))


def _size(tree: Any) -> str:
    leaves = jax.tree.leaves(tree)
    if len(leaves) == 1 and leaves[0] is tree:
        return f"{jnp.result_type(tree)}{list(np.shape(tree))}" if hasattr(tree, "dtype") else repr(tree)
    return f"{count(len(leaves), 'array')}, {count(sum(map(np.size, leaves)), 'number')}" if leaves else repr(tree)
