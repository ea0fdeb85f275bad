"""Brax: `make_env("brax/ant", backend="mjx", traced=("gravity",))`."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import brax.envs
import jax.numpy as jnp

from purejaxppo.envs.base import Box, Env, Step
from purejaxppo.envs.suite import read_path, while_set
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
    """
    simulator = brax.envs.get_environment(name, backend=backend, **options)
    physics = simulator.sys

    def under(params, function, *args):
        return while_set(simulator, "sys", physics.tree_replace(params), partial(function, *args))

    def reset(key, params):
        state = under(params, simulator.reset, key)
        return state, state.obs

    def step(key, state, action, params):
        state = under(params, simulator.step, state, action)
        return Step(state, state.obs, state.reward, state.done > 0, jnp.bool_(False), state.metrics)

    params = {path: read_path(physics, path) for path in traced}
    # Every environment of Brax takes actions from -1 to 1, and those with other actuators scale them.
    return time_limit(Env(reset, step, params, Box(-1.0, 1.0, (simulator.action_size,))), max_steps)
