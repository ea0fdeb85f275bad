"""Jumanji, its environments with one reward: `make_env("jumanji/Snake-v1")`."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jumanji
import numpy as np

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
    """An environment of Jumanji by its name; its clock is not shown, and its option `time_limit` is a truncation.

    Raises ValueError for Sokoban without the option `generator`, since its own downloads the levels.
    """
    if name.startswith("Sokoban") and "generator" not in options:
        raise Refusal(f"env='jumanji/{name}' downloads its levels: allow it in Python by generator={SOKOBAN}")
    task = jumanji.make(name, **options)
    max_steps, task.time_limit = getattr(task, "time_limit", NEVER), NEVER  # Jumanji would report a termination
    shown = _as_dict(task.observation_spec)
    if name.startswith("Game2048"):  # whose board holds exponents, up to 17
        shown["board"] = jumanji.specs.BoundedArray(shown["board"].shape, jnp.int32, 0, 17)
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
        last, lost = timestep.last(), timestep.discount == 0
        return Step(state, show(timestep), timestep.reward, last & lost, last & ~lost, {}, timestep.extras)

    actions = MultiDiscrete(sizes) if chosen.shape else Discrete(sizes[0])
    return time_limit(Env(reset, step, (), actions, space), max_steps)


def _as_dict(x: Any) -> Any:
    """An observation, or its specification, as nested dictionaries without the count of steps."""
    fields = getattr(x, "_specs", {}) or getattr(x, "_fields", ()) or getattr(x, "__dataclass_fields__", {})
    named = {name: x[name] if isinstance(x, jumanji.specs.Spec) else getattr(x, name) for name in fields}
    return {name: _as_dict(part) for name, part in named.items() if name != "step_count"} if fields else x


def _part(spec: jumanji.specs.Array) -> tuple[Any, Callable]:
    """The space of a part of an observation, and how it is shown: integers of few values as codes, others as floats."""
    if spec.dtype == bool:
        return Box(0, 1, spec.shape, bool), jnp.asarray
    low, high = np.asarray(getattr(spec, "minimum", -np.inf)), np.asarray(getattr(spec, "maximum", np.inf))
    if not jnp.issubdtype(spec.dtype, jnp.integer) or not np.all(high - low < MOST_CODES):
        return Box(low, high, spec.shape), lambda x: jnp.asarray(x, jnp.float32)
    sizes = np.broadcast_to(high - low + 1, spec.shape).astype(int)
    space = MultiDiscrete(sizes) if spec.shape else Discrete(int(sizes))
    return space, lambda x: (jnp.asarray(x, jnp.int32) - np.int32(low)).astype(jnp.uint8)
