"""Brax: `make_env("brax/ant", backend="mjx", traced=("opt.gravity",))`."""

from collections.abc import Sequence
from typing import Any

import brax.envs

from purejaxppo.envs.base import Env
from purejaxppo.envs.suite import from_simulator
from purejaxppo.envs.wrappers import time_limit


def names() -> list[str]:
    """The registered environments, without the one of Brax's own tests."""
    return sorted(brax.envs._envs.keys() - {"fast"})


def make(
    name: str, backend: str = "generalized", max_steps: int = 1000, traced: Sequence[str] = (), **options: Any
) -> Env:
    """An environment of Brax.

    Args:
        name: as `names` lists it.
        backend: of the physics: generalized, spring, positional or mjx.
        max_steps: after which an episode is truncated.
        traced: the parts of the physics that are parameters, as paths in `brax.base.System`, such as gravity or
            dof.damping; mjx reads opt.gravity.
        options: of the environment in Brax.

    Raises:
        ValueError: for a path in `traced` that is no part of the physics, or has no effect.
    """
    simulator = brax.envs.get_environment(name, backend=backend, **options)
    # Every environment of Brax takes actions from -1 to 1, and those with other actuators scale them.
    return time_limit(from_simulator(simulator, "sys", simulator.sys, traced), max_steps)
