"""What the adapters of suites share: names, packages that are imported late, and states that fit an `Env`."""

import difflib
import importlib
import importlib.metadata
import importlib.util
import re
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from purejaxppo.dependence import used_leaves
from purejaxppo.envs.base import Box, Env, Step, in_32_bits
from purejaxppo.text import quote, shorten

# Suite -> the package that it is imported as; its adapter is the module from_SUITE here, its extra is called like it.
SUITES = {
    "brax": "brax", "craftax": "craftax", "jumanji": "jumanji", "navix": "navix", "pgx": "pgx",
    "playground": "mujoco_playground", "xland": "xminigrid",
}  # fmt: skip
SIMULATORS = "brax", "playground"  # the suites whose option `traced` makes parameters
TRACING = threading.RLock()  # held while a simulator holds the physics of a trace


@dataclass(frozen=True, eq=False)
class Adapted:
    """The functions of a suite's environment as those of an `Env`; its name and options say what it is."""

    name: str
    options: Mapping[str, Any]
    env: Env = field(metadata={"identity": False})  # as the adapter makes it of name and options

    def reset(self, key: jax.Array, params: Any) -> tuple[Any, Any]:
        """The state and the observation in which an episode begins."""
        return in_32_bits(self.env.reset(key, params))

    def step(self, key: jax.Array, state: Any, action: jax.Array, params: Any) -> Step:
        """One step, whose randomness comes from `key` alone."""
        state_key, step_key = jax.random.split(key)
        result = self.env.step(step_key, with_keys(state, state_key), action, params)
        return in_32_bits(
            result._replace(
                reward=jnp.asarray(result.reward, jnp.float32),
                terminated=jnp.asarray(result.terminated, bool),
                truncated=jnp.asarray(result.truncated, bool),
                metrics=_as_metrics(result.metrics),
                episode_metrics=_as_metrics(result.episode_metrics),
            )
        )


class Refusal(ValueError):
    """An error of an adapter, which says what to do; those of a suite are put into a sentence with the name."""


def from_suite(env: str, options: Mapping[str, Any]) -> Env:
    """The environment `env`, SUITE/NAME, of a suite; `options` are those of its adapter.

    Raises ValueError if the suite cannot make it.
    """
    suite, _, name = env.partition("/")
    adapter = import_adapter(suite)
    try:
        made = adapter.make(name, **options)
    except Refusal:
        raise
    except Exception as error:  # of any kind: the suite decides
        given = ", ".join(f"{option}={quote(value)}" for option, value in options.items())
        raise ValueError(
            f"env={quote(env)}{' with ' * bool(given)}{given} cannot be made: {type(error).__name__}: "
            f"{_first_line(error)}{_near_option(options, adapter.make)}"
        ) from error
    adapted = Adapted(env, dict(options), made)
    return made._replace(reset=adapted.reset, step=adapted.step, params=in_32_bits(made.params), name=env)


def suite_names(suite: str) -> list[str]:
    """The names of a suite's environments, each as SUITE/NAME. Raises ValueError if the suite is not installed."""
    return [f"{suite}/{name}" for name in import_adapter(suite).names()]


def import_adapter(suite: str) -> ModuleType:
    """The adapter of a suite. Raises ValueError, with the command that installs it, if it cannot be imported."""
    try:
        return importlib.import_module(f"purejaxppo.envs.from_{suite}")
    except Exception as error:  # of any kind: a suite may not fit the versions of what it imports
        fault = f"cannot be imported: {_first_line(error)}" if is_installed(suite) else "is not installed"
        raise ValueError(f"{suite} {fault} ({install_command(suite)})") from error


def install_command(suite: str) -> str:
    """The command that installs a suite beside this package."""
    return f'pip install "purejaxppo[{suite}]"'


def is_installed(suite: str) -> bool:
    """Whether the package of a suite is installed; does not import it."""
    return importlib.util.find_spec(SUITES[suite]) is not None


def suite_versions() -> dict[str, str]:
    """The versions of the suites that are imported, and of MuJoCo if it is, by the names of their distributions."""
    packages = {suite: package for suite, package in SUITES.items() if suite != "xland"}
    packages |= {"xminigrid": "xminigrid", "mujoco": "mujoco", "mujoco-mjx": "mujoco.mjx"}
    return {name: importlib.metadata.version(name) for name, package in packages.items() if package in sys.modules}


def with_keys(state: Any, key: jax.Array) -> Any:
    """`state` in new containers, with a key drawn from `key` in place of each random key.

    Suites draw from keys in their states, which environments that began alike would then share, and some write into
    the dictionaries of the state that they are given.
    """

    def renew(position: int, x: Any) -> Any:
        return jax.random.split(jax.random.fold_in(key, position), x.shape) if _is_key(x) else x

    leaves, structure = jax.tree.flatten(state)
    return jax.tree.unflatten(structure, [renew(i, x) for i, x in enumerate(leaves)])


def shape_of_start(reset: Callable, params: Any = ()) -> Any:
    """Shape and dtype of the observation in which an episode begins."""
    return jax.eval_shape(reset, jax.random.key(0), params)[1]


def from_simulator(
    simulator: Any, attribute: str, physics: Any, traced: Sequence[str], observation_space: Any = None
) -> Env:
    """The `Env` of a simulator whose actions lie in [-1, 1], and whose physics can be its parameters.

    Simulators read their physics from themselves. While one is traced, it holds that of the parameters, so only one
    thread at a time traces it.

    Args:
        simulator: with `reset(key)`, `step(state, action)` and `action_size`.
        attribute: of the simulator, which holds the physics.
        physics: as the simulator holds it, with `tree_replace`.
        traced: the parts of the physics that become parameters, as paths of attributes.
        observation_space: None for unbounded boxes.

    Raises:
        ValueError: if `traced` is not a sequence of paths in the physics on which episodes depend.
    """
    if isinstance(traced, str):
        raise Refusal(f"traced={traced!r} must be a sequence of paths, such as ({traced!r},)")

    def run(params, function, *args):
        with TRACING:
            before = getattr(simulator, attribute)
            setattr(simulator, attribute, physics.tree_replace(params))
            try:
                return function(*args)
            finally:
                setattr(simulator, attribute, before)

    def reset(key, params):
        state = run(params, simulator.reset, key)
        return state, state.obs

    def step(key, state, action, params):
        state = run(params, simulator.step, state, action)
        return Step(state, state.obs, state.reward, state.done > 0, jnp.bool_(False), state.metrics)

    params = {path: _part_of_physics(physics, path) for path in traced}
    env = Env(reset, step, params, Box(-1.0, 1.0, (simulator.action_size,)), observation_space)
    _check_effect(env)
    return env


def _check_effect(env: Env) -> None:
    """Refuses parameters on which an episode does not depend."""

    def play(params, action):
        state, obs = env.reset(jax.random.key(0), params)
        return obs, env.step(jax.random.key(0), state, action, params)._replace(state=())

    if not env.params:
        return
    action = jnp.zeros(env.action_space.shape)
    try:
        used, _ = used_leaves(play, env.params, action)
    except Exception as error:  # of any kind: the suite decides
        raise Refusal(
            f"traced={tuple(env.params)} cannot be traced: {type(error).__name__}: {_first_line(error)} (try numbers, "
            "such as opt.gravity)"
        ) from error
    for path, parts in used.items():
        if not any(jax.tree.leaves(parts)):
            raise Refusal(f"traced={path!r} has no effect on an episode (of Brax's physics, mjx reads opt.gravity)")


def _part_of_physics(physics: Any, path: str) -> Any:
    try:
        return attrgetter(path)(physics)
    except (AttributeError, TypeError):
        raise Refusal(f"traced={path!r} is no part of {type(physics).__name__} (try gravity or opt.gravity)") from None


def _as_metrics(metrics: Mapping[str, Any]) -> dict[str, jax.Array]:
    numbers = {name: jnp.asarray(x, jnp.float32) for name, x in metrics.items() if jnp.ndim(x) == 0}
    return {name.replace("/", "_"): x for name, x in numbers.items()}


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _first_line(error: Exception) -> str:
    text = error.args[0] if isinstance(error, KeyError) and error.args else error  # the text of a KeyError is quoted
    return shorten(str(text).strip().partition("\n")[0], 200)


def _near_option(options: Mapping[str, Any], make: Callable) -> str:
    """A suggestion for an option that the docstring of an adapter does not name, but one like it."""
    named = re.findall(r"\w+", make.__doc__ or "")
    unknown = [option for option in options if option not in named]
    near = [x for option in unknown for x in difflib.get_close_matches(option, named, n=1, cutoff=0.8)]
    return f" (did you mean {near[0]}?)" if near else ""
