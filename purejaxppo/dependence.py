"""On which of its arguments the results of a function depend."""

from collections.abc import Callable
from typing import Any

import jax
from jax.interpreters.partial_eval import dce_jaxpr


def used_leaves(function: Callable, *args: Any) -> Any:
    """Whether any result of a function depends on each leaf of its arguments: `args` with bools for leaves.

    Traces the function, and compiles nothing.

    Args:
        function: of arrays, which returns arrays.
        args: arrays, or their shapes and dtypes.
    """
    program = jax.make_jaxpr(function)(*args)
    used = dce_jaxpr(program.jaxpr, [True] * len(program.jaxpr.outvars))[1]
    return jax.tree.unflatten(jax.tree.structure(args), used)
