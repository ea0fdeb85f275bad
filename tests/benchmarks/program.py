"""What a peer hands back when it is ready to do a work."""

import time
from collections.abc import Callable
from typing import NamedTuple


class Program(NamedTuple):
    """A whole training run, ready to be repeated."""

    run: Callable[[int], float]  # seed -> seconds of the whole run, without compilation
    steps: int  # environment steps of one run, of all seeds together
    compile_seconds: float | None  # None where a peer does not compile ahead, or cannot tell


def compiled(train: Callable, arguments: Callable, steps: int) -> Program:
    """A program of a function that JAX compiles; `arguments(seed)` are made before the clock starts."""
    import jax

    start = time.perf_counter()
    executable = jax.jit(train).lower(*arguments(0)).compile()
    compile_seconds = time.perf_counter() - start

    def run(seed):
        ready = jax.block_until_ready(arguments(seed))
        start = time.perf_counter()
        jax.block_until_ready(executable(*ready))
        return time.perf_counter() - start

    return Program(run, steps, compile_seconds)
