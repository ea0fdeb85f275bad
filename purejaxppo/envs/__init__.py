"""Environments: `Env`, its spaces, adapters for suites, and the registry of names."""

import difflib
from typing import Any

from purejaxppo.envs.base import ActionMask, Box, Discrete, Env, MultiDiscrete, Step, privileged, time_limit
from purejaxppo.envs.check import check_env, check_shapes
from purejaxppo.envs.from_gymnax import from_gymnax, gymnax_names
from purejaxppo.text import quote

__all__ = [
    "ActionMask", "Box", "Discrete", "Env", "MultiDiscrete", "Step",
    "check_env", "check_shapes", "env_names", "from_gymnax", "make_env", "privileged", "time_limit",
]  # fmt: skip


def env_names() -> list[str]:
    """Every name that `make_env` accepts."""
    return gymnax_names()


def check_name(env: str) -> None:
    """Raises ValueError, with the nearest known names, unless a name is one of an environment."""
    names = env_names()
    if env not in names:
        lower = {name.lower(): name for name in names}
        near = difflib.get_close_matches(env.lower(), lower, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(lower[n] for n in near)}?" if near else "`purejaxppo envs` lists them"
        raise ValueError(f"env={quote(env)} is not a known environment ({hint})")


def make_env(env: Any) -> Env:
    """An `Env` from a name, a gymnax environment, a pair (gymnax environment, params), or an `Env` itself.

    A gymnax environment may be wrapped, see `from_gymnax`. Raises ValueError for an unknown name, with the nearest
    known ones, and for anything else.
    """
    if isinstance(env, Env):
        return env
    if isinstance(env, str):
        check_name(env)
        return from_gymnax(env)
    environment, params = env if isinstance(env, tuple) and len(env) == 2 else (env, None)
    if isinstance(environment, type):
        raise ValueError(f"env={environment.__name__} is a class (pass an instance, such as {environment.__name__}())")
    if not hasattr(environment, "step_env"):
        raise ValueError(
            f"env={quote(env)} is not an environment: pass a name, a gymnax environment, "
            "a pair (gymnax environment, params), or a purejaxppo.Env"
        )
    return from_gymnax(environment, params)
