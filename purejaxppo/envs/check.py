"""`check_env`: lists the faults of an environment for its author."""

import re
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.core import Tracer

from purejaxppo.checks import check_whole
from purejaxppo.envs.base import ActionMask, Box, Discrete, Env, MultiDiscrete, Step, action_space, observation_space
from purejaxppo.envs.roles import allowed_actions, check_roles, random_action
from purejaxppo.record import size_of
from purejaxppo.text import quote

PACKAGES = [Path(jax.__file__).parent, Path(struct.__file__).parent, Path(__file__).parents[1]]
BATCH, ROUNDS = 64, 8  # environments whose costs are measured together, and steps of each
LARGEST = 1e18  # of a number whose square, summed over a rollout, stays finite in float32


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


class EnvCosts(NamedTuple):
    """What an environment costs, measured on this machine in batches of `BATCH`."""

    start_seconds: float  # of one start state
    step_seconds: float  # of one step
    start_bytes: int  # of a start state with its observation
    transition_bytes: int  # of a step in a rollout: both observations, action, reward, flags, metrics

    def __str__(self) -> str:
        return (
            f"a start takes the time of {self.start_seconds / self.step_seconds:,.1f} steps and {self.start_bytes:,} "
            f"bytes; a step in a rollout takes {self.transition_bytes:,} bytes"
        )


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
        faults = check_shapes(env)
        return EnvCheck(faults) if faults else EnvCheck(_check_play(env, num_steps, seed), env)
    except ValueError as error:
        return EnvCheck([f"{error}."])


def measure_costs(env: Env) -> EnvCosts:
    """The costs of an environment that can be played; compiles its reset and its step, and runs them."""
    keys, space = jax.random.split(jax.random.key(0), (ROUNDS, BATCH)), action_space(env, env.params)

    def reset(keys):
        return jax.vmap(env.reset, in_axes=(0, None))(keys, env.params)

    def step(start, keys):
        state, obs = start
        action_keys = jax.vmap(partial(jax.random.fold_in, data=1))(keys)
        actions = jax.vmap(partial(_random_action, space, observation_space(env)))(action_keys, obs)
        result = jax.vmap(env.step, in_axes=(0, 0, 0, None))(keys, state, actions, env.params)
        return jax.tree.map(lambda new, old: new.astype(old.dtype), (result.state, result.obs), start), result

    start = jax.jit(reset)(keys[0])
    _, result = jax.eval_shape(step, start, keys[0])
    action = jax.eval_shape(partial(random_action, space=space), keys[0, 0])
    kept = result.obs, result.obs, result.reward, result.terminated, result.metrics, result.episode_metrics
    return EnvCosts(
        start_seconds=_seconds(jax.jit(partial(jax.lax.map, reset)), keys) / keys.size,
        step_seconds=_seconds(jax.jit(partial(jax.lax.scan, step)), start, keys) / keys.size,
        start_bytes=size_of(start) // BATCH,
        transition_bytes=size_of(kept) // BATCH + size_of(action),
    )


def _seconds(function: Callable, *args: Any) -> float:
    """The least time of three calls of a compiled function, after one that compiles it."""
    taken = []
    for _ in range(4):
        start = time.perf_counter()
        jax.block_until_ready(function(*args))
        taken.append(time.perf_counter() - start)
    return min(taken[1:])


def check_shapes(env: Env) -> list[str]:
    """The faults that tracing alone can find: types, shapes, spaces, and what `vmap` does not batch.

    Raises ValueError, with the environment's own error as its cause, if a function of the environment fails.
    """
    if not isinstance(env, Env):
        return [f"{quote(env)} is not an Env; make_env makes one from a name or a gymnax environment."]
    key = jax.random.key(0)
    space = _call("action_space(params)", partial(action_space, env), env.params)
    if not isinstance(space, (Discrete, MultiDiscrete, Box)):
        return [f"action_space is {space!r}; it must be a Discrete, MultiDiscrete or Box of purejaxppo.envs."]
    if isinstance(space, MultiDiscrete) and len(space.shape) > 1:
        return [f"action_space is {space!r}; the sizes of a MultiDiscrete action must be a vector."]
    if problems := _check_bounds("action_space", space):
        return problems
    start = _call("reset(key, params)", partial(jax.eval_shape, env.reset), key, env.params)
    if not (isinstance(start, tuple) and len(start) == 2):
        return [f"reset(key, params) must return the pair (state, obs), not {_kind(start)}."]
    state, obs = start
    action = jax.eval_shape(partial(random_action, space=space), key)
    result = _call(
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


def _check_batch(env: Env, key: jax.Array, start: Any, result: Any) -> list[str]:
    """The leaves that `vmap` does not batch, as those of a simulator with buffers that a whole batch shares."""
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 3))
    many = _call("vmap of reset", partial(jax.eval_shape, jax.vmap(env.reset, (0, None))), keys, env.params)
    action = jax.eval_shape(jax.vmap(partial(random_action, space=action_space(env, env.params))), keys)
    step = jax.vmap(env.step, (0, 0, 0, None))
    results = _call("vmap of step", partial(jax.eval_shape, step), keys, many[0], action, env.params)
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


def _check_play(env: Env, num_steps: int, seed: int) -> list[str]:
    space = action_space(env, env.params)

    def step(start, key):
        state, obs = start
        action_key, step_key, reset_key = jax.random.split(key, 3)
        action = _random_action(space, observation_space(env), action_key, obs)
        result = env.step(step_key, state, action, env.params)
        again = env.step(step_key, state, action, env.params)
        same = [jnp.array_equal(a, b, equal_nan=True) for a, b in zip(_numbers(result), _numbers(again))]
        # An Env that resets itself returns a start state where an episode ends.
        done = result.terminated | result.truncated
        next_start = jax.tree.map(
            lambda f, s: jnp.where(done, f, s).astype(jnp.result_type(f)),
            env.reset(reset_key, env.params),
            (result.state, result.obs),
        )
        # An episode may end on nan, see `Step`.
        fine = lambda x: jnp.isfinite(x) | (done & jnp.isnan(x))
        seen = {
            "obs": jnp.array([fine(x).all() for x in _numbers(result.obs)]).all(),
            "reward": fine(result.reward),
            "large obs": _largest(result.obs),
            "large reward": _largest(result.reward),
            "range": _within(observation_space(env), result.obs, done),
            "ends": _ends(result.obs),
            "allowed": _allows(observation_space(env), result.obs),
            "same": jnp.array(same).all(),
            "done": done,
            "rewarded": result.reward != 0,
            "state": _leaves_of(result.state, result.obs),
            "key": step_key,
        }
        return next_start, seen

    def play(key):
        reset_key, step_key = jax.random.split(key)
        state, obs = env.reset(reset_key, env.params)
        finite = jnp.array([jnp.isfinite(x).all() for x in _numbers(obs)]).all()
        begun = _leaves_of(state, obs)
        start = jax.tree.map(jnp.asarray, (state, obs))
        _, seen = jax.lax.scan(step, start, jax.random.split(step_key, num_steps))
        return finite, _largest(obs), begun, seen

    what, keys = f"playing {num_steps} random steps under jit and vmap", jax.random.split(jax.random.key(seed), 8)
    finite, large, begun, seen = _call(what, jax.jit(jax.vmap(play)), keys)
    problems = []
    if not finite.all():
        problems.append("reset returns an observation that is nan or infinite.")
    for name, largest in {"an observation": seen["large obs"], "a reward": seen["large reward"]}.items():
        largest = max(float(largest.max()), float(large.max()) if name == "an observation" else 0.0)
        if largest > LARGEST:
            problems.append(
                f"{name} reached {largest:.3g}; above {LARGEST:g} its square overflows float32, so that it cannot be "
                "normalised (divide it by a constant)."
            )
    if not seen["obs"].all():
        problems.append(f"step {_when(~seen['obs'])} returns an observation that is nan or infinite.")
    if not seen["reward"].all():
        problems.append(f"step {_when(~seen['reward'])} returns a reward that is nan or infinite.")
    if not seen["range"].all() and seen["obs"].all():
        part = int(np.argmin(seen["range"].all((0, 1))))
        path, space = jax.tree_util.tree_leaves_with_path(observation_space(env))[part]
        ends = seen["ends"][..., part, :]
        problems.append(
            f"step {_when(~seen['range'].all(-1))} returns an observation outside observation_space"
            f"{jax.tree_util.keystr(path)}, which is {space!r}: its numbers went from {ends.min():g} to {ends.max():g}."
        )
    if not seen["allowed"].any():
        problems.append("the action mask never allowed an action; where it allows none, all are allowed.")
    if not seen["same"].all():
        problems.append("step is not a pure function: the same key, state and action gave two different results.")
    if _resets_itself(env, begun, seen):
        problems.append(
            "step seems to reset the environment by itself: where an episode ends, it returns a state in which "
            "episodes begin, and must return the one that was reached (all is well if that is one of them, as in a "
            "round trip)."
        )
    if not seen["rewarded"].any():
        problems.append(
            f"every reward within {num_steps} random steps was 0; if it always is, nothing can be learned "
            "(check_env(env, num_steps=...) plays longer)."
        )
    if not seen["done"].any():
        problems.append(
            f"no episode ended within {num_steps} random steps; if none ever ends, no return is ever reported "
            "(time_limit(env, max_steps) truncates them, check_env(env, num_steps=...) plays longer)."
        )
    return problems


def _leaves_of(state: Any, obs: Any) -> list[jax.Array]:
    """The numbers of a state and an observation as they are compared with those of a start."""
    return [jnp.asarray(x, jnp.float32) for x in _numbers((state, obs))]


def _resets_itself(env: Env, begun: list[jax.Array], seen: dict) -> bool:
    """Whether episodes end in states in which others begin.

    All numbers that are equal in all start states and change within episodes, such as a count of steps, are then as at
    a start wherever an episode ends. Or the last states are those of resets with a key that the step derived.

    Args:
        env: that was played.
        begun: the numbers of 8 start states, [8, ...] each.
        seen: of all steps, [8, T].
    """
    done = np.asarray(seen["done"])
    if not done.any() or done.all():
        return False
    at_start = []
    for start, x in zip(begun, seen["state"]):
        start, x = np.asarray(start).reshape(len(start), -1), np.asarray(x).reshape(*done.shape, -1)
        same = x == start[0]
        moves = (start == start[0]).all(0) & ~same[~done].all(0)
        at_start += [same[done][:, moves].all()] if moves.any() else []
    if at_start:
        return all(at_start)
    ends = tuple(np.argwhere(done)[:8].T)
    last, keys = [np.asarray(x)[ends] for x in seen["state"]], seen["key"][ends]

    def derived(key):
        others = jnp.stack([key, *jax.random.split(key), *jax.random.split(key, 3)])
        return _leaves_of(*jax.vmap(env.reset, (0, None))(others, env.params))

    resets = jax.jit(jax.vmap(derived))(keys)  # [8, 6, ...] each
    equal = [(x[:, None] == np.asarray(y)).reshape(*y.shape[:2], -1).all(-1) for x, y in zip(last, resets)]
    return bool(np.logical_and.reduce(equal).any(-1).all())


def _random_action(space, observation_space, key, obs):
    return random_action(key, space, allowed_actions(observation_space, obs))


def _within(spaces, obs, done):
    """Whether each leaf of an observation lies in its space, [L]."""
    checks = []
    for space, x in zip(jax.tree.leaves(spaces), jax.tree.leaves(obs)):
        if isinstance(space, Discrete):
            checks.append((x >= 0) & (x < space.n))
        elif isinstance(space, MultiDiscrete):
            checks.append(((x >= 0) & (x < jnp.array(space.sizes).reshape(space.shape))).all())
        elif isinstance(space, Box):
            low, high = (jnp.broadcast_to(jnp.asarray(b, jnp.float32), x.shape) for b in (space.low, space.high))
            checks.append((((x >= low) & (x <= high)) | (done & jnp.isnan(x))).all())
        else:
            checks.append(jnp.bool_(True))
    return jnp.stack(checks)


def _ends(obs):
    """The lowest and the highest number of each leaf, [L, 2]."""
    leaves = [jnp.asarray(x, jnp.float32) for x in jax.tree.leaves(obs)]
    return jnp.stack([jnp.stack([jnp.nanmin(x, initial=jnp.inf), jnp.nanmax(x, initial=-jnp.inf)]) for x in leaves])


def _allows(space, obs):
    """Whether an observation allows any action."""
    allowed = allowed_actions(space, obs)
    return jnp.bool_(True) if allowed is None else allowed.any()


def _largest(tree):
    """The largest absolute value that is finite, 0 for none."""
    numbers = [jnp.asarray(x, jnp.float32).reshape(-1) for x in _numbers(tree)]
    largest = [jnp.max(jnp.where(jnp.isfinite(x), jnp.abs(x), 0), initial=0) for x in numbers]
    return jnp.stack([jnp.float32(0), *largest]).max()


def _numbers(tree):
    """The leaves that are numbers, random keys left out."""
    leaves = [jnp.asarray(x) for x in jax.tree.leaves(tree)]
    return [x for x in leaves if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)]


def _when(failed):
    return f"{int(np.argwhere(np.asarray(failed))[:, 1].min()) + 1} of random play"


def _kind(value) -> str:
    shapes = jax.tree.map(lambda x: f"{jnp.result_type(x)}{list(np.shape(x))}", value)
    return f"{type(value).__name__} {shapes}"


def _call(what: str, function, *args):
    """Calls a function of the environment. Raises ValueError with its error, and the line in the user's file."""
    try:
        return function(*args)
    except Exception as error:
        lines = str(error).strip().splitlines()
        sentence = f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__
        when = "when traced"
        if isinstance(
            error, jax.errors.JaxRuntimeError
        ):  # of a callback: Python's traceback, with its error at the end
            last = [line.strip().rstrip(".") for line in lines if re.match(r"\s*\w+(\.\w+)*: ", line)]
            sentence, when = [sentence, *last][-1], "when run"
        raise ValueError(f"{what} failed {when}: {sentence}{place(error)}") from error


def place(error: Exception) -> str:
    """The last line that an error passed through outside of JAX, flax and this package, " (FILE, line N)" or "".

    The file of a notebook's cell has a number for a name, which says nothing, so FILE is "notebook cell".
    """
    frames = [(Path(f.filename), f.lineno) for f in traceback.extract_tb(error.__traceback__)]
    outside = [(path, line) for path, line in frames if not any(map(path.is_relative_to, PACKAGES))]
    if not outside:
        return ""
    path, line = outside[-1]
    return f" ({'notebook cell' if path.parent.name.startswith('ipykernel_') else path.name}, line {line})"
