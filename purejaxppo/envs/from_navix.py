"""Navix, MiniGrid's tasks in JAX: `make_env("navix/Navix-DoorKey-5x5-v0")`."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import navix
import numpy as np
from navix import observations

from purejaxppo.envs.base import Discrete, Env, MultiDiscrete, Step
from purejaxppo.envs.suite import shape_of_start

CODES = 11, 6, 4  # of a cell in a symbolic grid: the kind of its content, the colour, the state
LAST = np.array(CODES, np.uint8) - 1


def names() -> list[str]:
    """The registered environments."""
    return sorted(navix.registry())


def make(
    name: str,
    observation_fn: Callable = observations.symbolic_first_person,
    max_steps: int | None = None,
    **options: Any,
) -> Env:
    """An environment of Navix. Its reward for success is 1, where MiniGrid's falls with the time taken.

    Args:
        name: as `names` lists it.
        observation_fn: of navix.observations, by default the symbolic view of 7 x 7 cells before the agent.
        max_steps: after which an episode is truncated, by default those of Navix.
        options: of the environment in Navix.
    """
    limit = {} if max_steps is None else {"max_steps": max_steps}
    grid = navix.make(name, observation_fn=observation_fn, **limit, **options)
    symbolic = observation_fn in (observations.symbolic, observations.symbolic_first_person)

    def show(timestep):
        if not symbolic:
            return timestep.observation
        # The locked doors of KeyCorridor are in state 254, which is -2.
        return jnp.minimum(timestep.observation, np.broadcast_to(LAST, timestep.observation.shape))

    def reset(key, params):
        timestep = grid.reset(key)
        if symbolic:  # the cache is of colors, and most of a state
            timestep = timestep.replace(state=timestep.state.replace(cache=None))
        return timestep, show(timestep)

    def step(key, timestep, action, params):
        timestep = grid._step(timestep, action)  # `step` resets in the step after the last
        terminated, truncated = timestep.is_termination(), timestep.is_truncation()
        return Step(timestep, show(timestep), timestep.reward, terminated, truncated)

    space = MultiDiscrete(np.broadcast_to(CODES, shape_of_start(reset).shape)) if symbolic else None
    return Env(reset, step, (), Discrete(len(grid.action_set)), space)
