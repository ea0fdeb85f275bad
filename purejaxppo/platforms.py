"""What a program does differently on a CPU and on an accelerator, decided when it is compiled for one of them.

A CPU is bound by bytes, and likes what stays in its cache. On a GPU every kernel costs some microseconds whatever it
does, so a few large ones are faster than many small ones.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial, wraps
from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree


def scan(step: Callable, carry: Any, inputs: Any, *, unroll: int, reverse: bool = False) -> tuple[Any, Any]:
    """`jax.lax.scan` over time, with `unroll` steps per iteration on accelerators, so that they share their kernels.

    Args:
        step: (carry, inputs of a step) -> carry, outputs of a step.
        carry: before the first step.
        inputs: [T, ...].
        unroll: steps per iteration; on a CPU it is one.
        reverse: whether time runs backward.
    """
    one_by_one = partial(jax.lax.scan, step, reverse=reverse)
    return jax.lax.platform_dependent(carry, inputs, cpu=one_by_one, default=partial(one_by_one, unroll=unroll))


def scan_updates(step: Callable, params: Any, others: Any, inputs: Any) -> tuple[tuple[Any, Any], Any]:
    """`jax.lax.scan` over optimizer steps, which carries the parameters as one vector on accelerators.

    Every array that is carried costs a GPU some kernels. A CPU carries them as they are: in a batch of runs it would
    have to copy each array out of the vectors.

    Args:
        step: (unpack, apply, (carried, others), inputs of a step) -> (carried, others), outputs of a step, where
            unpack(carried) are the parameters, and apply(carried, updates) is carried after them.
        params: before the first step, of any dtypes.
        others: what else is carried.
        inputs: [M, ...].

    Returns:
        The parameters and the others after the last step, and the outputs [M, ...].
    """

    def scan_arrays(params, others, inputs):
        return jax.lax.scan(partial(step, lambda params: params, optax.apply_updates), (params, others), inputs)

    def scan_vector(params, others, inputs):
        vector, unpack = ravel_pytree(params)
        several_dtypes = len({x.dtype for x in jax.tree.leaves(params)}) > 1

        def apply(vector, updates):
            new: Any = optax.apply_updates(vector, ravel_pytree(updates)[0])
            return ravel_pytree(unpack(new))[0] if several_dtypes else new  # rounded as parameters of their own dtypes

        (vector, others), outputs = jax.lax.scan(partial(step, unpack, apply), (vector, others), inputs)
        return (unpack(vector), others), outputs

    return jax.lax.platform_dependent(params, others, inputs, cpu=scan_arrays, default=scan_vector)


def map_each(function: Callable, each: Sequence[Any], *shared: Any) -> list[Any]:
    """`[function(x, *shared) for x in each]`, whose gradients accelerators compute as one batch.

    Without gradients it stays one by one, so that a result that nobody reads is not computed.

    Args:
        function: pure.
        each: trees of equal shapes.
        shared: further arguments.
    """

    def one_by_one(each, *shared):
        return [function(x, *shared) for x in each]

    def batched(each, *shared):
        stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *each)
        results = jax.vmap(function, in_axes=(0, *(None for _ in shared)))(stacked, *shared)
        return [jax.tree.map(itemgetter(i), results) for i in range(len(each))]

    return (faster_gradient(one_by_one, batched) if len(each) > 1 else one_by_one)(each, *shared)


def faster_gradient(function: Callable, equal: Callable) -> Callable:
    """The function, with gradients on accelerators by an equal function that needs fewer kernels for them.

    Args:
        function: of arrays; it must not close over any that depend on what is differentiated.
        equal: returns the same, to rounding.
    """
    chosen = jax.custom_jvp(function)

    @chosen.defjvp
    def jvp(primals, tangents):
        def of(function):
            return lambda primals, tangents: jax.jvp(function, primals, tangents)

        return jax.lax.platform_dependent(primals, tangents, cpu=of(function), default=of(equal))

    return chosen


def one_by_one_on_cpus(function: Callable) -> Callable:
    """A function of arrays that CPUs map over a batch one by one: LAPACK under `vmap` can block a small thread pool."""

    @wraps(function)
    def chosen(*args, **kwargs):
        args = inspect.signature(function).bind(*args, **kwargs).args
        return jax.lax.platform_dependent(*args, cpu=jax.custom_batching.sequential_vmap(function), default=function)

    return chosen


def means(terms: Mapping[str, jax.Array], shape: tuple[int, ...]) -> dict[str, jax.Array]:
    """The mean of each array. Accelerators compute the means of all arrays of this shape at once."""

    def one_by_one(terms):
        return {name: jnp.mean(x) for name, x in terms.items()}

    def at_once(terms):
        table = jnp.stack([jnp.broadcast_to(x, shape) for x in terms.values()])
        found = table.reshape(len(terms), -1).mean(1)
        return {name: mean.astype(x.dtype) for (name, x), mean in zip(terms.items(), found)}

    @jax.custom_jvp
    def chosen(terms):
        return jax.lax.platform_dependent(terms, cpu=one_by_one, default=at_once)

    @chosen.defjvp
    def jvp(primals, tangents):
        return chosen(*primals), one_by_one(*tangents)  # a mean is linear

    return chosen({name: x if jnp.shape(x) in ((), shape) else jnp.mean(x) for name, x in terms.items()})
