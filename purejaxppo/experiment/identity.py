"""The identity of what a user plugs in: environment, network, loss, optimizer, step, schedules.

An identity is one line of text, kept on disk and compared when a run or a sweep continues. What comes with the package
and with the libraries under it counts by its name, so that an upgrade or a docstring changes nothing. The user's own
functions and classes count by their names and a digest: of their syntax trees without docstrings, and of all that they
are bound to (defaults, arguments of `partial`, variables of enclosing functions, globals that they read). Without
source the digest is that of bytecode and constants.
"""

import ast
import dataclasses
import functools
import hashlib
import inspect
import linecache
import sys
import types
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from purejaxppo.config import Hyperparams
from purejaxppo.envs import env_names, make_env
from purejaxppo.envs.base import Env, action_space, observation_space
from purejaxppo.networks.actor_critic import make_network
from purejaxppo.networks.network import Network
from purejaxppo.ppo import PPO

# Code of these packages, and of Python, counts by its name.
BY_NAME = {"purejaxppo", "jax", "jaxlib", "flax", "optax", "gymnax", "chex", "numpy", "scipy", *sys.stdlib_module_names}
INSTALLED = ("site-packages", "dist-packages")
DEFAULTS = {"network": "purejaxppo.make_network", "loss": "purejaxppo.ppo_loss", "optimizer": "purejaxppo.adam"}
NONE = "none"
# What a policy needs to act, and what matters to training alone.
ACTING = {"env", "network"}
TRAINING = ("loss", "optimizer", "step", *Hyperparams().names)


def identify_ppo(ppo: PPO, hyperparams: Hyperparams = Hyperparams()) -> dict[str, str]:
    """The identities of all that a PPO is made of, by name: `step` and the names of schedules only where there are any.

    Args:
        ppo: of a run.
        hyperparams: may hold schedules.
    """
    network = identify(ppo.network)
    if network == identify(_network_of_config(ppo)):
        network = DEFAULTS["network"]
    env = identify(ppo.env)
    if ppo.env.name in env_names() and env == identify(make_env(ppo.env.name)):
        env = ppo.env.name
    found = {"env": env, "network": network, "loss": identify(ppo.loss), "optimizer": identify(ppo.optimizer)}
    if ppo.changes:
        found["step"] = ", ".join(map(identify, ppo.changes))
    schedules = {name: hyperparams.get(name) for name in hyperparams.names if callable(hyperparams.get(name))}
    # Their numbers are compared as numbers.
    return found | {name: identify(jax.tree.map(lambda _: 0, x)) for name, x in schedules.items()}


def check_identity(
    before: Mapping[str, str], now: Mapping[str, str], folder: str | Path, allow_changed: Sequence[str] = ()
) -> None:
    """Raises ValueError if one thing is not what it was when the folder was written.

    Args:
        before: the identities in the folder, perhaps none (of an older version of this package).
        now: the identities of what is given.
        folder: for the message.
        allow_changed: names whose identities may differ.
    """
    differing = _differing(before, now, allow_changed)
    if differing:
        name, accepted = differing[0], [*allow_changed, *differing]
        raise ValueError(
            f"folder={folder} was trained with another {name}, {before.get(name, NONE)} instead of "
            f"{now.get(name, NONE)} (name another folder, or accept the change with allow_changed={accepted!r})"
        )


def check_loaded(
    before: Mapping[str, str], now: Mapping[str, str], folder: str | Path, allow_changed: Sequence[str] = ()
) -> None:
    """As `check_identity`, for policies that are loaded to act: of what matters to training alone, it only warns."""
    differing = _differing(before, now, allow_changed)
    text = ", ".join(f"{name}={before.get(name, NONE)} instead of {now.get(name, NONE)}" for name in differing)
    remedy = "give load what was trained: its ppo, or make= and values= of a sweep"
    if set(differing) & ACTING:
        raise ValueError(f"folder={folder} was trained with {text} ({remedy}; allow_changed={differing!r} accepts it)")
    if differing:
        warnings.warn(
            f"{folder} was trained with {text}; its policies act as trained, but train differently ({remedy})"
        )


def _differing(before: Mapping[str, str], now: Mapping[str, str], allow_changed: Sequence[str]) -> list[str]:
    """The names whose identities differ and may not; none if the folder holds no identities."""
    names = [name for name in {**now, **before} if before and before.get(name, NONE) != now.get(name, NONE)]
    return [name for name in names if name not in allow_changed]


def identify(value: Any) -> str:
    """The identity of any value: its name, followed by a digest unless the name says it all."""
    return _Identifier()(value)


def _network_of_config(ppo: PPO) -> Network | None:
    try:
        return make_network(ppo.config, observation_space(ppo.env), action_space(ppo.env, ppo.env.params))
    except ValueError:  # the config describes no network for these observations
        return None


class _Identifier:
    """Identifies values from the inside out; remembers those that it has seen, and those that it is inside of."""

    def __init__(self):
        self.known: dict[int, tuple[Any, str]] = {}  # the value too, so that its id is not used again

    def __call__(self, value: Any) -> str:
        if value is None or isinstance(value, (bool, int, float, complex, str, bytes, type(...), np.dtype)):
            return repr(value)
        if id(value) not in self.known:
            self.known[id(value)] = value, f"cycle {len(self.known)}"
            self.known[id(value)] = value, self.identify(value)
        return self.known[id(value)][1]

    def identify(self, value: Any) -> str:
        """The identity of a value that is seen for the first time."""
        kind = type(value)
        if isinstance(value, (jax.Array, np.ndarray, np.generic)):
            if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
                value = jax.random.key_data(jnp.asarray(value))
            data = np.ascontiguousarray(value)
            return digest(f"{data.dtype}{list(data.shape)}", data.tobytes())
        if isinstance(value, Mapping):
            return self.join("dict", sorted(f"{self(key)}: {self(x)}" for key, x in value.items()))
        if isinstance(value, (set, frozenset)):
            return self.join("set", sorted(map(self, value)))
        if isinstance(value, Env):
            self.known[id(value.params)] = value.params, "params"  # they are compared as numbers
            return self.join(value.name, map(self, value._replace(params=None)))
        if isinstance(value, (list, tuple)):
            return self.join(kind.__name__ if hasattr(value, "_fields") else "list", map(self, value))
        if isinstance(value, functools.partial):  # also jax.tree_util.Partial
            return self.join(_name(value), map(self, (value.func, value.args, value.keywords)))
        if isinstance(value, types.MethodType):
            return self.join(_name(value), map(self, (value.__func__, value.__self__)))
        if isinstance(value, (staticmethod, classmethod)):
            return self(value.__func__)
        if isinstance(value, property):
            return self.join("property", map(self, (value.fget, value.fset)))
        if isinstance(value, types.ModuleType):
            return value.__name__
        if isinstance(value, types.FunctionType):
            return self.of_function(value)
        if isinstance(value, type):
            return self.of_class(value)
        wrapped = getattr(value, "__wrapped__", None) if _package(kind.__module__) in BY_NAME else None
        if callable(wrapped):  # by jax.jit, jax.custom_vjp and the like
            known = _package(getattr(wrapped, "__module__", None) or "") in BY_NAME
            rest = {} if known else {name: x for name, x in _state(value).items() if not name.startswith("_")}
            return self.join(self(wrapped), sorted(f"{name}={self(x)}" for name, x in rest.items()))
        return self.join(self(kind), sorted(f"{name}={self(x)}" for name, x in _state(value).items()))

    def of_function(self, function: types.FunctionType) -> str:
        """By its name and what it is bound to; the user's also by its code and the globals that it reads."""
        module = function.__globals__.get("__name__", "")
        names = function.__code__.co_freevars
        cells = {name: x for name, cell in zip(names, function.__closure__ or ()) for x in _contents(cell)}
        bound = {**cells, "defaults": function.__defaults__ or (), "keywords": function.__kwdefaults__ or {}}
        if _package(module) in BY_NAME:
            outer = function.__qualname__.partition(".<locals>")[0]  # what lies within may be renamed by an upgrade
            return self.join(f"{_package(module)}.{outer}", sorted(f"{name}={self(x)}" for name, x in cells.items()))
        code = _syntax(function.__code__) or _bytecode(function.__code__)
        parts = [code, *(f"{name}={self(x)}" for name, x in bound.items())]
        if not any(place in function.__code__.co_filename for place in INSTALLED):
            parts += [f"{name}={self(x)}" for name, x in _globals(function)]
        return digest(function.__qualname__, *parts)

    def of_class(self, kind: type) -> str:
        """By its name; the user's also by its bases, methods and attributes."""
        if _package(kind.__module__) in BY_NAME:
            return f"{_package(kind.__module__)}.{kind.__qualname__}"
        functions = (types.FunctionType, staticmethod, classmethod, property)
        own = {
            name: x
            for name, x in vars(kind).items()
            if isinstance(x, functions) or not (name.startswith("_") or isinstance(x, types.MemberDescriptorType))
        }
        own = {name: x for name, x in own.items() if not _is_generated(x)}
        return digest(kind.__qualname__, *map(self, kind.__bases__), *(f"{name}={self(x)}" for name, x in own.items()))

    def join(self, name: str, parts: Any) -> str:
        """The name, and a digest of the parts if there are any."""
        parts = list(parts)
        return digest(name, *parts) if parts else name


def digest(name: str, *parts: str | bytes) -> str:
    """A name and twelve hexadecimal digits that stand for the parts and the name."""
    sha = hashlib.sha256(name.encode())
    for part in parts:
        part = part.encode() if isinstance(part, str) else part
        sha.update(len(part).to_bytes(8, "big") + part)
    return f"{name} {sha.hexdigest()[:12]}"


def _name(value: Any) -> str:
    while isinstance(value, functools.partial):
        value = value.func
    return getattr(value, "__qualname__", type(value).__qualname__)


def _package(module: str) -> str:
    return module.partition(".")[0]


def _contents(cell: types.CellType) -> list[Any]:
    """What a variable of an enclosing function holds: nothing if it is not assigned yet."""
    try:
        return [cell.cell_contents]
    except ValueError:
        return []


def _state(value: Any) -> dict[str, Any]:
    """What an instance holds; of a dataclass the fields that differ from their defaults."""
    if dataclasses.is_dataclass(value):
        kept = [f for f in dataclasses.fields(value) if f.name not in ("parent", "name")]  # of flax modules
        return {f.name: x for f in kept if (x := getattr(value, f.name, None)) is not f.default}
    return dict(getattr(value, "__dict__", {}))


def _is_generated(value: Any) -> bool:
    """Whether a method comes from a decorator such as `dataclass`."""
    return isinstance(value, types.FunctionType) and value.__code__.co_filename.startswith("<string")


def _globals(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """The globals that a function reads, and the attributes that it reads of modules of the user's, sorted by name."""
    names = sorted(set(_names(function.__code__)))
    for name in names:
        if name in function.__globals__:
            value = function.__globals__[name]
            yield name, value
            if isinstance(value, types.ModuleType) and _package(value.__name__) not in BY_NAME:
                path = getattr(value, "__file__", None) or ""
                if not any(place in path for place in INSTALLED):
                    yield from ((f"{name}.{part}", getattr(value, part)) for part in names if hasattr(value, part))


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _bytecode(code: types.CodeType) -> str:
    """Bytecode and constants as text, without docstring and line numbers."""
    constants = [_bytecode(x) if isinstance(x, types.CodeType) else repr(x) for x in code.co_consts]
    flag = getattr(inspect, "CO_HAS_DOCSTRING", None)  # from Python 3.13 on; before, the first constant is its place
    documented = code.co_flags & flag if flag else code.co_name != "<lambda>" and isinstance(code.co_consts[0], str)
    return repr((code.co_code, code.co_names, code.co_varnames, constants[1:] if documented else constants))


def _syntax(code: types.CodeType) -> str | None:
    """The syntax tree of a function as text, without docstrings; None if there is no source."""
    lines = linecache.getlines(code.co_filename)
    found = [node for node in _functions("".join(lines)) if _begins_at(node, code)]
    if len(found) > 1:  # several lambdas in one line
        columns = [(first, last) for _, _, first, last in code.co_positions() if first is not None and last is not None]
        low, high = min(first for first, _ in columns[1:]), max(last for _, last in columns[1:])
        found = [node for node in found if node.col_offset <= low and high <= node.end_col_offset]
        found = sorted(found, key=lambda node: node.end_col_offset - node.col_offset)
    return repr(_as_tuples(found[0])) if found else None


@functools.lru_cache(maxsize=8)
def _functions(source: str) -> list[Any]:
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return []
    return [x for x in ast.walk(tree) if isinstance(x, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))]


def _begins_at(node: Any, code: types.CodeType) -> bool:
    first = min([node.lineno, *(x.lineno for x in getattr(node, "decorator_list", ()))])
    return first == code.co_firstlineno and getattr(node, "name", "<lambda>") == code.co_name


def _as_tuples(node: Any) -> Any:
    """A syntax tree as nested tuples without positions, docstrings and empty fields, the same in all versions."""
    if isinstance(node, list):
        return tuple(map(_as_tuples, node))
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = {name: x for name, x in ast.iter_fields(node) if x not in (None, [])}
    body = fields.get("body")
    if isinstance(body, list) and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        if isinstance(body[0].value.value, str):
            fields["body"] = body[1:]
    return type(node).__name__, *((name, _as_tuples(x)) for name, x in fields.items())
