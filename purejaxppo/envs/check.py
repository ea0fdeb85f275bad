"""`check_env`: lists the faults of an environment for its author."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from purejaxppo.envs.base import Box, Discrete, Env, MultiDiscrete, Step, action_space, bound_action, observation_space


def check_env(env: Any, num_steps: int = 200, seed: int = 0) -> list[str]:
    """The faults of an environment, one sentence each; an empty list if none was found.

    Traces `reset` and `step`. If they fit together, plays `num_steps` random steps in 8 environments.
    """
    if not isinstance(env, Env):
        return [f"{env!r} is not an Env; make_env makes one from a name or a gymnax environment."]
    return check_shapes(env) or _check_play(env, num_steps, seed)


def check_shapes(env: Env) -> list[str]:
    """The faults that tracing alone can find, in milliseconds: types, shapes, spaces."""
    key = jax.random.key(0)
    try:
        space = action_space(env, env.params)
    except Exception as error:
        return [f"action_space(params) failed: {_first_line(error)}."]
    if not isinstance(space, (Discrete, MultiDiscrete, Box)):
        return [f"action_space is {space!r}; it must be a Discrete, MultiDiscrete or Box of purejaxppo.envs."]
    try:
        start = jax.eval_shape(env.reset, key, env.params)
    except Exception as error:
        return [f"reset(key, params) failed when traced: {_first_line(error)}."]
    if not (isinstance(start, tuple) and len(start) == 2):
        return [f"reset(key, params) must return the pair (state, obs), not {_kind(start)}."]
    state, obs = start
    action = jax.eval_shape(partial(_random_action, space=space), key)
    try:
        result = jax.eval_shape(env.step, key, state, action, env.params)
    except Exception as error:
        return [f"step(key, state, action, params) failed when traced: {_first_line(error)}."]
    if not isinstance(result, Step):
        return [f"step must return a Step(state, obs, reward, terminated, truncated), not {_kind(result)}."]
    problems = _differences("state", state, result.state) + _differences("obs", obs, result.obs)
    for name in ("reward", "terminated", "truncated"):
        value = getattr(result, name)
        if np.shape(value) != ():
            problems.append(
                f"{name} has shape {np.shape(value)}; it must be a scalar, since an Env is one environment."
            )
    for name in ("terminated", "truncated"):
        if jnp.result_type(getattr(result, name)) != jnp.bool_:
            problems.append(f"{name} is {jnp.result_type(getattr(result, name))}; it must be a bool.")
    for name, value in [*result.metrics.items(), *result.episode_metrics.items()]:
        if np.shape(value) != () or "/" in name:
            problems.append(
                f"metric {name!r} has shape {np.shape(value)}; it must be a scalar with no '/' in its name."
            )
    return problems + _check_observation_space(env, obs)


def metric_names(env: Env) -> list[str]:
    """The names of the metrics that an environment reports, those of steps first."""
    key = jax.random.key(0)
    state, _ = jax.eval_shape(env.reset, key, env.params)
    action = jax.eval_shape(partial(_random_action, space=action_space(env, env.params)), key)
    result = jax.eval_shape(env.step, key, state, action, env.params)
    return [*result.metrics, *result.episode_metrics]


def _check_observation_space(env, obs) -> list[str]:
    spaces = observation_space(env)
    if jax.tree.structure(spaces) != jax.tree.structure(obs):
        return [f"observation_space is {spaces!r}, but reset returns {_kind(obs)}; both must have the same structure."]
    problems = []
    for space, x in zip(jax.tree.leaves(spaces), jax.tree.leaves(obs)):
        if not isinstance(space, (Discrete, MultiDiscrete, Box)):
            problems.append(f"observation_space holds {space!r}; it must hold Discrete, MultiDiscrete or Box.")
        elif space.shape != x.shape:
            problems.append(f"observation_space is {space!r}, but reset returns an observation of shape {x.shape}.")
        elif isinstance(space, (Discrete, MultiDiscrete)) and not jnp.issubdtype(x.dtype, jnp.integer):
            problems.append(f"observation_space is {space!r}, but reset returns {x.dtype}; it must be an integer.")
    return problems


def _differences(what: str, first, second) -> list[str]:
    if jax.tree.structure(first) != jax.tree.structure(second):
        return [
            f"{what} from step has another structure than {what} from reset "
            f"({jax.tree.structure(second)} instead of {jax.tree.structure(first)})."
        ]
    problems = []
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(first), jax.tree.leaves(second)):
        where = what + jax.tree_util.keystr(path)
        if a.shape != b.shape:
            problems.append(f"{where} has shape {a.shape} from reset and {b.shape} from step; they must agree.")
        elif a.dtype != b.dtype:
            problems.append(f"{where} is {a.dtype} from reset and {b.dtype} from step; they must agree.")
    return problems


def _check_play(env: Env, num_steps: int, seed: int) -> list[str]:
    space = action_space(env, env.params)

    def step(state, key):
        action_key, step_key = jax.random.split(key)
        action = _random_action(action_key, space=space)
        result = env.step(step_key, state, action, env.params)
        again = env.step(step_key, state, action, env.params)
        same = [jnp.array_equal(a, b, equal_nan=True) for a, b in zip(_numbers(result), _numbers(again))]
        # An Env that resets itself returns a start state where an episode ends.
        done = result.terminated | result.truncated
        fresh_state, _ = env.reset(step_key, env.params)
        next_state = jax.tree.map(
            lambda f, s: jnp.where(done, f, s).astype(jnp.result_type(f)), fresh_state, result.state
        )
        seen = {
            "obs": jnp.array([jnp.isfinite(x).all() for x in _numbers(result.obs)]).all(),
            "reward": jnp.isfinite(result.reward),
            "range": _within(observation_space(env), result.obs),
            "same": jnp.array(same).all(),
            "done": done,
        }
        return next_state, seen

    def play(key):
        reset_key, step_key = jax.random.split(key)
        state, obs = env.reset(reset_key, env.params)
        finite = jnp.array([jnp.isfinite(x).all() for x in _numbers(obs)]).all()
        _, seen = jax.lax.scan(step, jax.tree.map(jnp.asarray, state), jax.random.split(step_key, num_steps))
        return finite, seen

    try:
        finite, seen = jax.jit(jax.vmap(play))(jax.random.split(jax.random.key(seed), 8))
    except Exception as error:
        return [f"playing {num_steps} random steps under jit and vmap failed: {_first_line(error)}."]
    problems = []
    if not finite.all():
        problems.append("reset returns an observation that is nan or infinite.")
    if not seen["obs"].all():
        problems.append(f"step {_when(~seen['obs'])} returns an observation that is nan or infinite.")
    if not seen["reward"].all():
        problems.append(f"step {_when(~seen['reward'])} returns a reward that is nan or infinite.")
    if not seen["range"].all():
        problems.append(f"step {_when(~seen['range'])} returns an observation outside observation_space.")
    if not seen["same"].all():
        problems.append("step is not a pure function: the same key, state and action gave two different results.")
    if not seen["done"].any():
        problems.append(
            f"no episode ended within {num_steps} random steps; if none ever ends, no return is ever reported "
            "(time_limit(env, max_steps) truncates them, check_env(env, num_steps=...) plays longer)."
        )
    return problems


def _random_action(key, *, space):
    if isinstance(space, Discrete):
        return jax.random.randint(key, (), 0, space.n)
    if isinstance(space, MultiDiscrete):
        return jax.random.randint(key, space.shape, jnp.zeros(space.shape, jnp.int32), jnp.array(space.sizes))
    return bound_action(jax.random.normal(key, (int(np.prod(space.shape)),)), space, "clip")


def _within(spaces, obs):
    checks = [jnp.bool_(True)]
    for space, x in zip(jax.tree.leaves(spaces), jax.tree.leaves(obs)):
        if isinstance(space, Discrete):
            checks.append((x >= 0) & (x < space.n))
        elif isinstance(space, MultiDiscrete):
            checks.append(((x >= 0) & (x < jnp.array(space.sizes))).all())
        else:
            low, high = (jnp.broadcast_to(jnp.asarray(b, jnp.float32), x.shape) for b in (space.low, space.high))
            checks.append(((x >= low) & (x <= high)).all())
    return jnp.stack(checks).all()


def _numbers(tree):
    """The leaves that are numbers, random keys left out."""
    leaves = [jnp.asarray(x) for x in jax.tree.leaves(tree)]
    return [x for x in leaves if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)]


def _when(failed):
    return f"{int(np.argwhere(np.asarray(failed))[:, 1].min()) + 1} of random play"


def _kind(value) -> str:
    shapes = jax.tree.map(lambda x: f"{jnp.result_type(x)}{list(np.shape(x))}", value)
    return f"{type(value).__name__} {shapes}"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0].rstrip('.') if str(error).strip() else ''}"
