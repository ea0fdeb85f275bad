"""Jumanji, its environments with one reward: `make_env("jumanji/Snake-v1")`."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import jumanji
import numpy as np
from jumanji import specs

from purejaxppo.envs.base import ActionMask, Box, Discrete, Env, MultiDiscrete, Step
from purejaxppo.envs.suite import Refusal
from purejaxppo.envs.wrappers import time_limit

# Those with a reward for each of several agents, and MultiCVRP, whose mask leaves out an action of its specification.
EXCLUDED = {"Connector-v3", "LevelBasedForaging-v0", "MultiCVRP-v0", "SearchAndRescue-v0"}
SOKOBAN = "jumanji.environments.routing.sokoban.generator.HuggingFaceDeepMindGenerator('unfiltered-train', 1.0)"
MOST_CODES = 40  # of an integer that is a code; those of a wider range are numbers
NEVER = 2**30


def names() -> list[str]:
    """The registered environments with one reward for all that acts."""
    return sorted(jumanji.registered_environments() - EXCLUDED)


def make(name: str, **options: Any) -> Env:
    """An environment of Jumanji; its time limit is a truncation, and its clock is not shown.

    Args:
        name: as `names` lists it.
        options: of the environment in Jumanji, such as `time_limit=500` or a generator.

    Raises:
        ValueError: for Sokoban, which downloads its levels, without a generator.
    """
    if name.startswith("Sokoban") and "generator" not in options:
        raise Refusal(f"env='jumanji/{name}' downloads its levels: allow it in Python by generator={SOKOBAN}")
    task = jumanji.make(name, **options)
    max_steps, task.time_limit = getattr(task, "time_limit", NEVER), NEVER  # Jumanji would report a termination
    shown = _as_dict(task.observation_spec)
    if name.startswith("Game2048"):  # whose board holds exponents, up to 17
        shown["board"] = specs.BoundedArray(shown["board"].shape, jnp.int32, 0, 17)
    space = jax.tree.map(lambda spec: _part(spec)[0], shown)
    chosen = task.action_spec
    sizes = tuple((np.broadcast_to(chosen.maximum, chosen.shape) + 1).ravel().tolist())
    if "action_mask" in space:  # over combinations of choices, or else over the choices of each entry
        shape = space["action_mask"].shape
        space["action_mask"] = ActionMask(shape if shape == sizes else (math.prod(shape),))

    def show(timestep):
        convert = lambda spec, space, x: _part(spec)[1](x).reshape(space.shape)
        return jax.tree.map(convert, shown, space, _as_dict(timestep.observation))

    def reset(key, params):
        state, timestep = task.reset(key)
        return state, show(timestep)

    def step(key, state, action, params):
        state, timestep = task.step(state, action)
        terminated = timestep.last() & (timestep.discount == 0)
        truncated = timestep.last() & ~terminated
        return Step(state, show(timestep), timestep.reward, terminated, truncated, {}, timestep.extras)

    actions = MultiDiscrete(sizes) if chosen.shape else Discrete(sizes[0])
    return time_limit(Env(reset, step, (), actions, space), max_steps)


def _as_dict(x: Any) -> Any:
    """An observation, or its specification, as nested dictionaries without the count of steps."""
    fields = getattr(x, "_specs", {}) or getattr(x, "_fields", ()) or getattr(x, "__dataclass_fields__", {})
    named = {name: x[name] if isinstance(x, specs.Spec) else getattr(x, name) for name in fields}
    return {name: _as_dict(part) for name, part in named.items() if name != "step_count"} if fields else x


def _part(spec: specs.Array) -> tuple[Any, Callable]:
    """The space of a part of an observation, and how it is shown: integers of few values as codes, others as floats."""
    if spec.dtype == bool:
        return Box(0, 1, spec.shape, bool), jnp.asarray
    bounds = getattr(spec, "minimum", -np.inf), getattr(spec, "maximum", np.inf)
    low, high = (np.broadcast_to(bound, spec.shape) for bound in bounds)
    if not jnp.issubdtype(spec.dtype, jnp.integer) or not np.all(high - low < MOST_CODES):
        return Box(*bounds, spec.shape), partial(jnp.asarray, dtype=jnp.float32)
    sizes = (high - low + 1).astype(int)
    space = MultiDiscrete(sizes) if spec.shape else Discrete(int(sizes))
    return space, lambda x: (jnp.asarray(x, jnp.int32) - low.astype(int)).astype(jnp.uint8)
