"""XLand-MiniGrid: `make_env("xland/MiniGrid-Empty-5x5")`, `make_env("xland/XLand-MiniGrid-R4-13x13", ruleset=...)`."""

from typing import Any

import numpy as np
import xminigrid
from xminigrid.core.constants import NUM_COLORS, NUM_TILES

from purejaxppo.envs.base import Discrete, Env, MultiDiscrete, Step
from purejaxppo.envs.suite import Refusal, shape_of_start


def names() -> list[str]:
    """The registered environments."""
    return sorted(xminigrid.registered_environments())


def make(name: str, **changes: Any) -> Env:
    """An environment of XLand-MiniGrid. A ruleset is a parameter of the `Env`, so that `randomize` can draw it.

    Args:
        name: as `names` lists it.
        changes: to the environment's parameters, such as ruleset, view_size or max_steps.

    Raises:
        ValueError: for an environment of XLand without a ruleset, which has no goal.
    """
    world, params = xminigrid.make(name, **changes)
    if hasattr(params, "ruleset") and not np.any(params.ruleset.goal):
        raise Refusal(
            f"env='xland/{name}' has no goal, since its ruleset is empty: give one in Python, as in "
            f"make_env('xland/{name}', ruleset=xminigrid.load_benchmark('trivial-1m').get_ruleset(0)), which "
            "downloads the benchmark once"
        )

    def reset(key, params):
        timestep = world.reset(params, key)
        return timestep, timestep.observation

    def step(key, timestep, action, params):
        timestep = world.step(params, timestep, action)
        terminated = timestep.last() & (timestep.discount == 0)
        return Step(timestep, timestep.observation, timestep.reward, terminated, timestep.last() & ~terminated)

    space = MultiDiscrete(np.broadcast_to((NUM_TILES, NUM_COLORS), shape_of_start(reset, params).shape))
    return Env(reset, step, params, Discrete(world.num_actions(params)), space)
