"""`check_env`: lists the faults of an environment for its author."""

from collections.abc import Iterable, Mapping
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from purejaxppo.checks import check_whole
from purejaxppo.envs.base import ActionMask, Box, Discrete, Env, MultiDiscrete, Step, action_space, observation_space
from purejaxppo.envs.costs import EnvCosts, measure_costs
from purejaxppo.envs.errors import call_env
from purejaxppo.envs.random_play import play_faults
from purejaxppo.envs.roles import check_roles, random_action
from purejaxppo.text import quote

# Names of the metrics of training and of their coordinates; those of an environment must be others.
REPORTED = frozenset(
    "episode_return episode_length num_episodes num_lost_episodes num_reused_starts explained_variance value_mean "
    "learning_rate loss policy_loss value_loss entropy approx_kl clip_fraction grad_norm parent "
    "run seed setting updates step evaluation_return failed_update failed_metric failure".split()
)


class EnvCheck(list):
    """The faults of an environment, one sentence each; prints what the environment costs, too, if it can be played."""

    def __init__(self, faults: Iterable[str], playable: "Env | None" = None):
        super().__init__(faults)
        self._playable = playable

    @cached_property
    def costs(self) -> "EnvCosts | None":
        """What the environment costs, measured when it is first asked for; None if it cannot be played."""
        return None if self._playable is None else measure_costs(self._playable)

    def __str__(self) -> str:
        return repr(self) + (f"  # {self.costs}" if self.costs else "")


def check_env(env: Any, num_steps: int = 200, seed: int = 0) -> EnvCheck:
    """The faults of an environment, one sentence each; an empty list if none was found.

        >>> faults = pjp.check_env(pjp.make_env("CartPole-v1"))
        >>> len(faults), faults.costs.start_bytes
        (0, 36)

    Traces `reset` and `step`. If they fit together, plays `num_steps` random steps in 8 environments. Printed, the list
    also says what a start state costs against a step, and the bytes of a step in a rollout (see `EnvCosts`).
    """
    check_whole("num_steps", num_steps)
    check_whole("seed", seed, at_least=0)
    try:
        faults = check_shapes(env) or _taken_names(env)
        return EnvCheck(faults) if faults else EnvCheck(play_faults(env, num_steps, seed), env)
    except ValueError as error:
        return EnvCheck([f"{error}."])


def check_shapes(env: Env) -> list[str]:
    """The faults that tracing alone can find: types, shapes, spaces, and what `vmap` does not batch.

    Raises ValueError, with the environment's own error as its cause, if a function of the environment fails.
    """
    if not isinstance(env, Env):
        return [f"{quote(env)} is not an Env; make_env makes one from a name or a gymnax environment."]
    key = jax.random.key(0)
    space = call_env("action_space(params)", partial(action_space, env), env.params)
    if not isinstance(space, (Discrete, MultiDiscrete, Box)):
        return [f"action_space is {space!r}; it must be a Discrete, MultiDiscrete or Box of purejaxppo."]
    if isinstance(space, MultiDiscrete) and len(space.shape) > 1:
        return [f"action_space is {space!r}; the sizes of a MultiDiscrete action must be a vector."]
    if problems := _check_bounds("action_space", space):
        return problems
    start = call_env("reset(key, params)", partial(jax.eval_shape, env.reset), key, env.params)
    if not (isinstance(start, tuple) and len(start) == 2):
        return [f"reset(key, params) must return the pair (state, obs), not {_kind(start)}."]
    state, obs = start
    action = jax.eval_shape(partial(random_action, space=space), key)
    result = call_env(
        "step(key, state, action, params)", partial(jax.eval_shape, env.step), key, state, action, env.params
    )
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
    for kind in ("metrics", "episode_metrics"):
        if not isinstance(getattr(result, kind), Mapping):
            return [f"{kind} of step is a {type(getattr(result, kind)).__name__}; it must be a dictionary of numbers."]
    for name, value in [*result.metrics.items(), *result.episode_metrics.items()]:
        if np.shape(value) != () or "/" in name:
            problems.append(
                f"metric {name!r} has shape {np.shape(value)}; it must be a scalar with no '/' in its name."
            )
    problems += _check_observation_space(env, obs)
    return list(dict.fromkeys(problems or _check_batch(env, key, start, result)))


def _taken_names(env: Env) -> list[str]:
    """The metrics of an environment that training reports, too; a custom loss may report fewer."""
    return [
        f"metric {name!r} has the name of a metric of training; give it another one."
        for name in metric_names(env)
        if name in REPORTED
    ]


def _check_batch(env: Env, key: jax.Array, start: Any, result: Any) -> list[str]:
    """The leaves that `vmap` does not batch, as those of a simulator with buffers that a whole batch shares."""
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 3))
    many = call_env("vmap of reset", partial(jax.eval_shape, jax.vmap(env.reset, (0, None))), keys, env.params)
    action = jax.eval_shape(jax.vmap(partial(random_action, space=action_space(env, env.params))), keys)
    step = jax.vmap(env.step, (0, 0, 0, None))
    results = call_env("vmap of step", partial(jax.eval_shape, step), keys, many[0], action, env.params)
    for what, one, batch in (("reset", start, many), ("step", result, results)):
        for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(batch)):
            if y.shape != (3, *np.shape(x)):
                return [
                    f"vmap of {what} over 3 environments gives an array of shape {y.shape} instead of "
                    f"{(3, *np.shape(x))} (at {jax.tree_util.keystr(path)}): one environment must not share it with "
                    "others."
                ]
    return []


def check_squash(space: Any) -> None:
    """Raises ValueError for a Box that tanh cannot fill: its bounds and their distance must be finite in float32."""
    if not isinstance(space, Box) or isinstance(space.low, Tracer) or isinstance(space.high, Tracer):
        return
    with np.errstate(over="ignore", invalid="ignore"):
        width = np.float32(space.high) - np.float32(space.low)
    if not (np.isfinite(width) & (width > 0)).all():
        raise ValueError(
            f"bound_action='tanh' needs finite bounds with low < high, not {space!r} (try bound_action='clip')"
        )


def metric_names(env: Env) -> list[str]:
    """The names of the metrics that an environment reports, those of steps first."""
    key = jax.random.key(0)
    state, _ = jax.eval_shape(env.reset, key, env.params)
    action = jax.eval_shape(partial(random_action, space=action_space(env, env.params)), key)
    result = jax.eval_shape(env.step, key, state, action, env.params)
    return [*result.metrics, *result.episode_metrics]


def _check_observation_space(env, obs) -> list[str]:
    leaves = jax.tree.leaves(obs)
    if not leaves:
        return [f"an observation is {obs!r}, which holds no number."]
    kinds = jnp.floating, jnp.integer, jnp.bool_
    for dtype in dict.fromkeys(x.dtype for x in leaves if not any(jnp.issubdtype(x.dtype, kind) for kind in kinds)):
        return [f"an observation is of {dtype}; it must be of floats, integers or bools."]
    spaces = observation_space(env)
    if jax.tree.structure(spaces) != jax.tree.structure(obs):
        return [f"observation_space is {spaces!r}, but reset returns {_kind(obs)}; both must have the same structure."]
    problems = []
    for (path, space), x in zip(jax.tree_util.tree_leaves_with_path(spaces), jax.tree.leaves(obs)):
        name = f"observation_space{jax.tree_util.keystr(path)}"
        if not isinstance(space, (Discrete, MultiDiscrete, Box, ActionMask)):
            problems.append(f"{name} is {space!r}; it must be a Discrete, MultiDiscrete or Box.")
        elif space.shape != x.shape:
            problems.append(f"{name} is {space!r}, but reset returns an observation of shape {x.shape}.")
        elif isinstance(space, (Discrete, MultiDiscrete)) and not jnp.issubdtype(x.dtype, jnp.integer):
            problems.append(f"{name} is {space!r}, but reset returns {x.dtype}; it must be an integer.")
        elif isinstance(space, ActionMask) and x.dtype != jnp.bool_:
            problems.append(f"{name} is {space!r}, but reset returns {x.dtype}; it must be a bool.")
        elif isinstance(space, Box) and _is_whole(space.dtype) and not _is_whole(x.dtype):
            problems.append(f"{name} is {space!r}, but reset returns {x.dtype}; both must be of one kind.")
        elif env.observation_space is None and x.dtype == jnp.bool_ and _name(path) == "action_mask":
            problems.append(
                f"obs{jax.tree_util.keystr(path)} masks nothing, since nothing says that it is a mask (give the "
                f"environment an observation_space, with ActionMask({x.shape}) there, or rename it)."
            )
        else:
            problems += _check_bounds(name, space)
    return problems or check_roles(spaces, action_space(env, env.params))


def _name(path: tuple) -> str:
    """The last name of the path to a part."""
    return jax.tree_util.keystr(path[-1:], simple=True)


def _is_whole(dtype: Any) -> bool:
    return not jnp.issubdtype(dtype, jnp.inexact)


def _check_bounds(what: str, space: Any) -> list[str]:
    if not isinstance(space, Box) or isinstance(space.low, Tracer) or isinstance(space.high, Tracer):
        return []
    try:
        low, high = (np.broadcast_to(np.asarray(bound, np.float64), space.shape) for bound in (space.low, space.high))
    except ValueError:
        return [f"{what} is {space!r}; its bounds must be numbers, or arrays of its shape."]
    if not (low <= high).all():
        return [f"{what} is {space!r}; low must be at most high, and neither may be nan."]
    return [] if low.size or what != "action_space" else [f"{what} is {space!r}, which holds no number."]


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


def _kind(value) -> str:
    shapes = jax.tree.map(lambda x: f"{jnp.result_type(x)}{list(np.shape(x))}", value)
    return f"{type(value).__name__} {shapes}"
