"""What a user plugs in on the command line, given as `module:name`.

Only what the command itself names is imported, never a name that a file holds.
"""

import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import purejaxppo
from purejaxppo.config import Config
from purejaxppo.envs import make_env
from purejaxppo.ppo import PPO
from purejaxppo.table import PLUGGED, Named
from purejaxppo.text import shorten


@dataclass(frozen=True)
class Acting:
    """Custom parts that a trained agent needs to act."""

    env: str | None = None
    """The environment, if the agents were trained in one given as module:name."""
    network: str | None = None
    """The network, if the agents were trained with one given as module:name."""


@dataclass(frozen=True)
class Plugged:
    """Custom parts of the algorithm, each as module:name of this directory or an installed package."""

    network: str | None = None
    """Custom network, as module:name: a network, or a function of the environment that returns one."""
    loss: str | None = None
    """Custom loss, as module:name, like `ppo_loss`."""
    optimizer: str | None = None
    """Custom optimizer, as module:name: a function from hyperparameters to an optax transformation."""
    step: str | None = None
    """Custom step, as module:name: a function of (ppo, state), or a pair of it and `init`, see `with_step`."""

    def given(self) -> dict[str, str]:
        """Those that are given, by field."""
        return {field: x for field in PLUGGED if (x := getattr(self, field)) is not None}


def check_given(
    given: Mapping[str, str], before: Mapping[str, str], folder: Path, needed: Sequence[str] = PLUGGED + ("env",)
):
    """Raises ValueError unless what a run was trained with is given again: files hold names, but no code.

    Args:
        given: module:name by field.
        before: those that the run was started with.
        folder: of the run.
        needed: the fields that count.
    """
    for field in needed:
        if field in before and field not in given:
            part = before[field]
            raise ValueError(f"the run in {folder} was started with {field}={part} (add --{field} {part})")


def make_plugged(env: str, config: Config, plugged: Plugged) -> PPO:
    """The PPO of an environment, a name or module:name, with custom parts. Raises ValueError for a part not found."""
    from purejaxppo.experiment.sweeps.sweep import Group, make_group

    parts = tuple((field, to_named(field, text, env)) for field, text in plugged.given().items())
    return make_group(Group(to_named("env", env) if ":" in env else env, config, parts))


def find_env(env: str) -> Any:
    """What `make_ppo` takes for a name, or for module:name of an environment or of a function that returns one."""
    if ":" not in env:
        return env
    found = _import("env", env)
    is_environment = hasattr(found, "step_env") or isinstance(found, tuple)
    return found if is_environment or not callable(found) else _call("env", env, found)


def find(field: str, text: str, env: str) -> Any:
    """The object that `module:name` names, for one of `PLUGGED`. Raises ValueError if there is none.

    Args:
        field: one of `PLUGGED`.
        text: module:name.
        env: a name or module:name, for a function that makes a network.
    """
    found = _import(field, text)
    if field == "network" and not hasattr(found, "init"):
        return _call(field, text, found, make_env(find_env(env)))
    return found


def to_named(field: str, text: str, env: str = "") -> Named:
    """As `find` and `find_env`, as a value of a sweep's table.

    Args:
        field: one of `PLUGGED`, or "env".
        text: module:name; for a field in `PLUGGED` also "default".
        env: of the sweep, for functions that make a network.
    """
    if field == "env":
        return Named(text, find_env(text))
    return Named(text, None if text == "default" else find(field, text, env))


def _import(field: str, text: str) -> Any:
    module_name, colon, name = text.partition(":")
    if not (colon and name.replace(".", "_").isidentifier() and module_name.replace(".", "_").isidentifier()):
        raise ValueError(f"{field}={text} must be module:name, such as my_module:my_{field}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{field}={text} needs the module {error.name}, which is neither in this directory nor installed"
        ) from None
    except Exception as error:
        raise ValueError(f"{field}={text} cannot be imported: {_in_words(error)}") from None
    for part in name.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{field}={text}: there is no {part} in {module_name}{_nearest(part, vars(found))}")
        found = getattr(found, part)
    return found


def _call(field: str, text: str, function: Any, *args: Any) -> Any:
    try:
        return function(*args)
    except Exception as error:
        what = "of the environment" if args else "without arguments"
        raise ValueError(f"{field}={text} failed as a function {what}: {_in_words(error)}") from None


def _nearest(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _in_words(error: Exception) -> str:
    """An error with the last place before the code of this package, or else where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    package = os.path.dirname(purejaxppo.__file__) + os.sep
    before = [*takewhile(lambda frame: not frame.filename.startswith(package), frames[1:])]
    where = (before or frames)[-1]
    return (
        f"{type(error).__name__}: {shorten(' '.join(str(error).split()), 200)} ({where.filename}, line {where.lineno})"
    )
