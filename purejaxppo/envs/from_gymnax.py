"""gymnax environments, through their raw step: no auto-reset, terminated and truncated apart."""

import contextlib
import importlib
import pkgutil
import sys
from types import ModuleType

import jax
import jax.numpy as jnp

from purejaxppo.envs.base import Box, Discrete, Env, MultiDiscrete, Step


def from_gymnax(env, params=None) -> Env:
    """An `Env` of a gymnax 1.0 environment, given by its registered name or as an instance with its own params.

    Raises ValueError for an unknown name or a space that no network here can act in or read.
    """
    if isinstance(env, str):
        env, default_params = import_gymnax().make(env)
        params = default_params if params is None else params
    params = env.default_params if params is None else params

    def reset(key, params):
        obs, state = env.reset_env(key, params)
        return _strong(state), _strong(obs)

    def step(key, state, action, params):
        obs, state, reward, terminated, info = env.step_env(key, state, action, params)
        truncated = env.is_truncated(state, params)
        return Step(
            state=_strong(state),
            obs=_strong(obs),
            reward=jnp.asarray(reward, jnp.float32),
            terminated=jnp.asarray(terminated, bool),
            truncated=jnp.asarray(truncated, bool),
            metrics=_numbers(info),
        )

    return Env(
        reset=reset,
        step=step,
        params=params,
        action_space=lambda params: _space(env.action_space(params)),
        observation_space=_observation_space(env, params),
        name=env.name,
    )


def gymnax_names() -> list[str]:
    """The names that gymnax knows, less those that need data from elsewhere."""
    return [name for name in import_gymnax().registered_envs if name != "MNISTBandit-bsuite"]


def import_gymnax():
    """gymnax, without what only its pictures need: that takes a second and 120 MB, and comes when one is drawn."""
    with _postponed("matplotlib", "matplotlib.pyplot", "seaborn"):
        return importlib.import_module("gymnax")


@contextlib.contextmanager
def _postponed(*names: str):
    """While this lasts, importing one of these modules gives a stand-in, which imports it when it is first used."""
    stand_ins = {name: _StandIn(name) for name in names if name not in sys.modules}
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name in stand_ins:
            del sys.modules[name]


class _StandIn(ModuleType):
    """Of a module, or of something in one, while its package is postponed."""

    def __getattr__(self, attribute):
        package = sys.modules.get(self.__name__.partition(".")[0])
        if not isinstance(package, _StandIn) and sys.modules.get(self.__name__) is not self:
            return getattr(pkgutil.resolve_name(self.__name__), attribute)
        if attribute.startswith("__"):
            raise AttributeError(f"{self.__name__} is not imported yet")
        return _StandIn(f"{self.__name__}.{attribute}")


def _numbers(info: dict) -> dict:
    """What an environment reports of a step as `info_NAME`, less gymnax's discount, which is 0 or 1 by `terminated`."""
    scalars = {name: x for name, x in info.items() if isinstance(x, (jax.Array, float, int)) and jnp.ndim(x) == 0}
    kept = {name: x for name, x in scalars.items() if name != "discount" and not _is_key(x)}
    return {f"info_{name.replace('/', '_')}": x for name, x in kept.items()}


def _is_key(x) -> bool:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _strong(tree):
    """Every leaf as an array of a fixed 32-bit type: a Python number in a state would change type after a step, and
    in double precision mode gymnax gives one leaf now this width, now that."""
    narrow = {jnp.dtype("float64"): jnp.float32, jnp.dtype("int64"): jnp.int32}
    return jax.tree.map(lambda x: jnp.asarray(x, narrow.get(jnp.result_type(x), jnp.result_type(x))), tree)


def _observation_space(env, params):
    """Kinds as declared, shapes and dtypes as `reset` really shows them: the two differ at times in gymnax."""
    obs, _ = jax.eval_shape(env.reset_env, jax.random.key(0), params)
    try:
        declared = _space(env.observation_space(params))
    except NotImplementedError:
        declared = jax.tree.map(lambda x: Box(), obs)
    return jax.tree.map(
        lambda space, x: Box(shape=x.shape, dtype=x.dtype) if isinstance(space, Box) else space, declared, obs
    )


def _space(space):
    """A gymnax space (told by its attributes, so that a user's subclass fits) as one of ours."""
    if hasattr(space, "spaces"):
        if not hasattr(space.spaces, "items"):
            raise ValueError(f"{space} is a tuple of spaces; make it a Dict, or a MultiDiscrete where all are discrete")
        return {name: _space(child) for name, child in space.spaces.items()}
    if hasattr(space, "nvec"):
        return MultiDiscrete(space.nvec)
    if hasattr(space, "n"):
        return Discrete(space.n)
    return Box(space.low, space.high, space.shape, space.dtype)
