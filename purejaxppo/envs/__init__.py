"""Environments: `Env`, its spaces, wrappers, adapters for suites, and the registry of names."""

import difflib
from typing import Any

from purejaxppo.envs.base import ActionMask, Box, Discrete, Env, MultiDiscrete, Step, privileged
from purejaxppo.envs.check import check_env, check_shapes
from purejaxppo.envs.from_gymnax import from_gymnax, gymnax_names
from purejaxppo.envs.suite import SUITES, from_suite, suite_names
from purejaxppo.envs.wrappers import action_repeat, frame_stack, randomize, sticky_actions, time_limit
from purejaxppo.text import either, quote

__all__ = [
    "ActionMask", "Box", "Discrete", "Env", "MultiDiscrete", "SUITES", "Step",
    "action_repeat", "check_env", "check_shapes", "env_names", "frame_stack", "from_gymnax", "is_env_name", "make_env",
    "privileged", "randomize", "sticky_actions", "time_limit",
]  # fmt: skip


def env_names(suite: str = "gymnax") -> list[str]:
    """Every name that `make_env` accepts of one suite. Raises ValueError if it is unknown or not installed."""
    if suite == "gymnax":
        return gymnax_names()
    if suite not in SUITES:
        owner = suite.partition("/")[0]  # of an environment, where one was given
        listed = f"`purejaxppo envs {owner}` lists those of {owner}"
        near = listed if owner in SUITES else _nearest(suite, ["gymnax", *SUITES])
        raise ValueError(f"{quote(suite)} is not a known suite ({near})")
    return suite_names(suite)


def check_name(env: str) -> None:
    """Raises ValueError, with the nearest known names, unless a name is one of an environment."""
    suite, slash, _ = env.partition("/")
    if slash and suite not in SUITES:
        near = _nearest(suite, list(SUITES))
        raise ValueError(f"env={quote(env)} is not a known environment, and {quote(suite)} is no suite ({near})")
    try:
        names = env_names(suite if slash else "gymnax")
    except ValueError as error:
        raise ValueError(f"env={quote(env)} cannot be made: {error}") from error
    if env not in names:
        lists = f"`purejaxppo envs{f' {suite}' * (suite in SUITES)}` lists them"
        own = "" if slash else "; one of your own is module:name on the command line, and an Env in Python"
        near = lists if env in SUITES else _nearest(env, names, lists + own)
        raise ValueError(f"env={quote(env)} is not a known environment ({near})")


def is_env_name(env: str) -> bool:
    """Whether a name is one of gymnax, or says that it is one of a known suite, which is not imported."""
    suite, slash, _ = env.partition("/")
    return suite in SUITES if slash else env in gymnax_names()


def make_env(env: Any, **options: Any) -> Env:
    """An `Env` from a name, a gymnax environment, a pair (gymnax environment, params), or an `Env` itself.

    A gymnax environment may be wrapped, see `from_gymnax`. Environments of other suites have names such as brax/ant.

    Args:
        env: see above.
        options: for a name of another suite, those of its adapter, such as backend="spring" for Brax (see
            `purejaxppo.envs.from_brax.make`).

    Raises:
        ValueError: for an unknown name, with the nearest known ones, for a suite that is not installed, with the
            command that installs it, and for anything else.
    """
    if isinstance(env, str):
        check_name(env)
        if "/" in env:
            return from_suite(env, options)
    if options:
        raise ValueError(f"{next(iter(options))} is an option of suites such as brax/ant; env={quote(env)} takes none")
    if isinstance(env, Env):
        return env
    if isinstance(env, str):
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


def _nearest(name: str, known: list[str], otherwise: str = "") -> str:
    """The remedy of a message about a name that is not known."""
    lower = {x.rpartition("/")[2].lower(): x for x in known}
    near = difflib.get_close_matches(name.rpartition("/")[2].lower(), lower, n=3, cutoff=0.5)
    return f"did you mean {either([lower[x] for x in near])}?" if near else otherwise or f"known: {', '.join(known)}"
