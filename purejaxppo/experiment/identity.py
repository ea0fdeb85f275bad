"""The identity of what a user plugs in: environment, network, loss, optimizer, step, schedules.

An identity is one line of text, kept on disk and compared when a run or a sweep continues. What comes with the package
and with the libraries under it counts by its name, so that an upgrade or a docstring changes nothing. The user's own
functions and classes count by their names and a digest: of their syntax trees without docstrings, and of all that they
are bound to (defaults, arguments of `partial`, variables of enclosing functions, globals that they read, what they
import). Without source the digest is that of bytecode and constants.

The digests must be the same in every process: nothing in them depends on an address or on the order of a set.
"""

import ast
import copyreg
import dataclasses
import dis
import functools
import hashlib
import importlib.util
import inspect
import linecache
import sys
import types
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from purejaxppo.config import Hyperparams, suggest
from purejaxppo.envs import make_env
from purejaxppo.envs.base import Env, action_space, observation_space
from purejaxppo.envs.memory_inputs import with_memory_inputs
from purejaxppo.networks.actor_critic import make_network
from purejaxppo.networks.network import Network
from purejaxppo.ppo import PPO

# Code of these packages, and of Python, counts by its name.
BY_NAME = {"purejaxppo", "jax", "jaxlib", "flax", "optax", "gymnax", "chex", "numpy", "scipy", *sys.stdlib_module_names}
INSTALLED = ("site-packages", "dist-packages")
PLAIN = (bool, int, float, complex, str, bytes)
# Attributes of a class that Python derives from the others, and flax those of modules.
DERIVED = {
    "__abstractmethods__", "__annotate__", "__annotate_func__", "__annotations__", "__annotations_cache__",
    "__classcell__", "__classdictcell__", "__dataclass_fields__", "__dataclass_params__", "__dict__", "__doc__",
    "__firstlineno__", "__hash__", "__match_args__", "__module__", "__orig_bases__", "__parameters__", "__qualname__",
    "__slots__", "__static_attributes__", "__type_params__", "__weakref__", "_abc_impl",
}  # fmt: skip
DERIVED_BY_FLAX = {"_compact_name_scope_methods", "_parent_ref", "_state"}
READS_GLOBAL = {"LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"}
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
    if env == _identity_of_name(ppo.env.name, ppo.config.memory_inputs):
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
    before: Mapping[str, str],
    now: Mapping[str, str],
    folder: str | Path,
    allow_changed: Sequence[str] = (),
    *,
    remedy: str,
) -> None:
    """As `check_identity`, for policies that are loaded to act: of what matters to training alone, it only warns."""
    differing = _differing(before, now, allow_changed)
    text = ", ".join(f"{name}={before.get(name, NONE)} instead of {now.get(name, NONE)}" for name in differing)
    if set(differing) & ACTING:
        raise ValueError(
            f"folder={folder} was trained with {text} ({remedy}; load accepts another that fits with "
            f"allow_changed={differing!r})"
        )
    if differing:
        warnings.warn(
            f"{folder} was trained with {text}; its policies act as trained, but train differently ({remedy})"
        )


def changed_names(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The names whose identities differ."""
    return [name for name in {**now, **before} if before.get(name, NONE) != now.get(name, NONE)]


def _differing(before: Mapping[str, str], now: Mapping[str, str], allow_changed: Sequence[str]) -> list[str]:
    """The names whose identities differ and may not; none if the folder holds no identities.

    Raises ValueError for a name in `allow_changed` that nothing has.
    """
    if isinstance(allow_changed, str):
        raise ValueError(f"allow_changed={allow_changed!r} must be a list of names, such as ['loss']")
    known = sorted({*ACTING, *TRAINING, *before, *now})
    for name in allow_changed:
        if name not in known:
            raise ValueError(f"allow_changed={list(allow_changed)!r} holds an unknown name ({suggest(name, known)})")
    return [name for name in changed_names(before, now) if before and name not in allow_changed]


def identify(value: Any) -> str:
    """The identity of any value: its name, followed by a digest unless the name says it all."""
    return _Identifier()(value)


def _network_of_config(ppo: PPO) -> Network | None:
    try:
        return make_network(ppo.config, observation_space(ppo.env), action_space(ppo.env, ppo.env.params))
    except ValueError:  # the config describes no network for these observations
        return None


@functools.cache
def _identity_of_name(name: str, memory_inputs: bool) -> str | None:
    """The identity of the environment that a name stands for; None for an unknown name."""
    try:
        env = make_env(name)
    except ValueError:
        return None
    return identify(with_memory_inputs(env) if memory_inputs else env)


class _Identifier:
    """Identifies values from the inside out; remembers those that it has seen, and those that it is inside of."""

    def __init__(self, known: Mapping[int, tuple[Any, str]] = types.MappingProxyType({})):
        self.known = dict(known)  # by id; the value too, so that its id is not used again

    def __call__(self, value: Any) -> str:
        if value is None or isinstance(value, (type(...), np.dtype)):
            return repr(value)
        if isinstance(value, PLAIN) and _is_known(type(value)):
            return repr(value)
        if id(value) not in self.known:
            self.known[id(value)] = value, f"cycle {len(self.known)}"
            self.known[id(value)] = value, self.identify(value)
        return self.known[id(value)][1]

    def identify(self, value: Any) -> str:
        """The identity of a value that is seen for the first time."""
        kind = type(value)
        if isinstance(value, (jax.Array, np.ndarray, np.generic)):
            return _of_array(value)
        if isinstance(value, Env):
            self.known[id(value.params)] = value.params, "params"  # they are compared as numbers
            return self.join(value.name, map(self, value._replace(params=None)))
        if isinstance(value, (Mapping, set, frozenset, list, tuple)):
            return self.of_container(value)
        if isinstance(value, functools.partial):  # also jax.tree_util.Partial
            return self.join(_name(value), map(self, (value.func, value.args, value.keywords)))
        if isinstance(value, types.MethodType):
            return self.join(_name(value), map(self, (value.__func__, value.__self__)))
        if isinstance(value, (staticmethod, classmethod)):
            return self(value.__func__)
        if isinstance(value, property):
            return self.join("property", map(self, (value.fget, value.fset)))
        if isinstance(value, functools.cached_property):
            return self.join("property", [self(value.func)])
        if isinstance(value, types.ModuleType):
            return value.__name__
        if isinstance(value, types.FunctionType):
            return self.of_function(value)
        if isinstance(value, type):
            return self.of_class(value)
        wrapped = getattr(value, "__wrapped__", None) if _is_known(kind) else None
        if callable(wrapped):  # by jax.jit, jax.custom_vjp and the like
            known = _package(getattr(wrapped, "__module__", None) or "") in BY_NAME
            rest = {} if known else {name: x for name, x in _state(value).items() if not name.startswith("_")}
            return self.join(self(wrapped), self.named(rest))
        if isinstance(value, np.random.Generator):
            return self(kind)  # its state changes with every use
        if _is_known(kind) and not hasattr(value, "__dict__"):
            return self.join(self(kind), map(self, _reduced(value)))
        return self.join(self(kind), self.named(_state(value)))

    def of_container(self, value: Any) -> str:
        """By what it holds; of the user's class also by that."""
        kind = type(value)
        if isinstance(value, Mapping):
            name, parts = "dict", sorted(f"{self(key)}: {self(x)}" for key, x in value.items())
        elif isinstance(value, (set, frozenset)):
            # Each from the same start: what a cycle is called must not depend on the order of the set.
            name, parts = "set", sorted(_Identifier(self.known)(x) for x in value)
        else:
            name, parts = kind.__name__ if hasattr(value, "_fields") else "list", list(map(self, value))
        if not _is_known(kind):
            name, parts = self(kind), [*parts, *self.named(_state(value))]
        return self.join(name, parts)

    def named(self, values: Mapping[str, Any]) -> list[str]:
        """The identities of values with their names, in the order of the names."""
        return sorted(f"{name}={self(x)}" for name, x in values.items())

    def of_function(self, function: types.FunctionType) -> str:
        """By its name and what it is bound to; the user's also by its code and the globals that it reads."""
        module = function.__globals__.get("__name__", "")
        names = function.__code__.co_freevars
        cells = {name: x for name, cell in zip(names, function.__closure__ or ()) for x in _contents(cell)}
        bound = {**cells, "defaults": function.__defaults__ or (), "keywords": function.__kwdefaults__ or {}}
        if _package(module) in BY_NAME:
            outer = function.__qualname__.partition(".<locals>")[0]  # what lies within may be renamed by an upgrade
            return self.join(f"{_package(module)}.{outer}", self.named(cells))
        code = _syntax(function.__code__) or _bytecode(function.__code__)
        parts = [code, *(f"{name}={self(x)}" for name, x in bound.items())]
        if not any(place in function.__code__.co_filename for place in INSTALLED):
            parts += [f"{name}={self(x)}" for name, x in _read(function, cells)]
        return digest(function.__qualname__, *parts)

    def of_class(self, kind: type) -> str:
        """By its name; the user's also by its bases, methods and attributes."""
        if _is_known(kind):
            return f"{_package(kind.__module__)}.{kind.__qualname__}"
        derived = DERIVED | (DERIVED_BY_FLAX if issubclass(kind, nn.Module) else set())
        own = {name: x for name, x in vars(kind).items() if name not in derived and not _is_generated(name, x, kind)}
        # With slots, the defaults of a dataclass lie in its fields alone.
        defaults = {name: field.default for name, field in vars(kind).get("__dataclass_fields__", {}).items()}
        own = {name: defaults.get(name, name) if _is_slot(x) else x for name, x in own.items()}
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


def _is_known(kind: type) -> bool:
    """Whether a class counts by its name."""
    if kind.__module__ == "builtins":
        return not isinstance(vars(kind).get("__module__"), str)  # as a class made by `exec` has
    return _package(kind.__module__) in BY_NAME


def _is_slot(value: Any) -> bool:
    return isinstance(value, types.MemberDescriptorType)


# The identities of arrays of JAX, which do not change, by their ids: large ones need not be copied for every call.
_arrays: dict[int, tuple[weakref.ref, str]] = {}


def _of_array(value: Any) -> str:
    """By the numbers of an array."""
    fixed = isinstance(value, jax.Array)
    if fixed and id(value) in _arrays and _arrays[id(value)][0]() is value:
        return _arrays[id(value)][1]
    if fixed and value.is_deleted():
        return f"deleted {value.dtype}{list(value.shape)}"
    is_key = jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
    data = np.ascontiguousarray(jax.random.key_data(jnp.asarray(value)) if is_key else value)
    found = digest(f"{data.dtype}{list(data.shape)}", data.tobytes())
    if fixed:
        number = id(value)
        _arrays[number] = weakref.ref(value, lambda _: _arrays.pop(number, None)), found
    return found


def _state(value: Any) -> dict[str, Any]:
    """What an instance holds; of a dataclass the fields that differ from their defaults."""
    kind = type(value)
    if dataclasses.is_dataclass(value):
        ignored = ("parent", "name") if isinstance(value, nn.Module) else ()
        kept = [f for f in dataclasses.fields(value) if f.metadata.get("identity", True) and f.name not in ignored]
        return {f.name: x for f in kept if (x := getattr(value, f.name, None)) is not f.default}
    slotted = [base for base in kind.__mro__ if "__slots__" in vars(base)]
    slots = {name for base in slotted for name, x in vars(base).items() if _is_slot(x)}
    held = {name: getattr(value, name) for name in slots if hasattr(value, name)} | getattr(value, "__dict__", {})
    # What a cached property keeps follows from the rest, and comes with its first use.
    cached = {n for base in kind.__mro__ for n, x in vars(base).items() if isinstance(x, functools.cached_property)}
    content: list[Any] = [base for base in PLAIN if isinstance(value, base)]
    plain = {"": content[-1].__repr__(value)} if content else {}
    return plain | {name: x for name, x in held.items() if name not in cached | {"__doc__", "__dict__", "__weakref__"}}


def _reduced(value: Any) -> list[Any]:
    """What pickle would keep of an instance without a dictionary, such as a range; nothing if pickle refuses it."""
    if isinstance(value, Iterator):
        return []  # an iterator, which changes with every use
    try:
        reduce = copyreg.dispatch_table.get(type(value))
        found: Any = reduce(value) if reduce else value.__reduce_ex__(2)
    except Exception:  # of any kind: the class decides
        return []
    if isinstance(found, str):
        return [getattr(value, "__module__", None), found]
    return [list(x) if isinstance(x, Iterator) else x for x in found]


def _is_generated(name: str, value: Any, kind: type) -> bool:
    """Whether a method was written by `dataclass` or `NamedTuple`."""
    function = value.__func__ if isinstance(value, staticmethod) else value
    if not isinstance(function, types.FunctionType):
        return False
    function = inspect.unwrap(function)
    if "__dataclass_fields__" in vars(kind):
        return function.__code__.co_qualname.startswith("__create_fn__.")
    return name == "__new__" and "_fields" in vars(kind) and function.__code__.co_name == "<lambda>"


def _read(function: types.FunctionType, cells: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The globals that a function reads, and what it reads of modules of the user's and of itself, sorted by name."""
    steps = list(_steps(function.__code__))
    names = sorted({name for step in steps for name in _names(step)})
    # Not all names: a variable of a notebook may be called like an attribute that the function reads.
    read = sorted({step.argval for step in steps if step.opname in READS_GLOBAL} & function.__globals__.keys())
    found = {name: function.__globals__[name] for name in read}
    yield from found.items()
    yield from ((f".{name}", vars(function)[name]) for name in names if name in vars(function))
    modules = {name: x for name, x in {**found, **cells}.items() if isinstance(x, types.ModuleType)}
    modules |= {f"import {module.__name__}": module for module in _imports(steps, function.__globals__)}
    for name, module in sorted(modules.items()):
        yield from _attributes(name, module, names, set())


def _attributes(path: str, module: types.ModuleType, names: list[str], seen: set[str]) -> Iterator[tuple[str, Any]]:
    """The attributes with these names of a module of the user's, and of the modules among them."""
    place = getattr(module, "__file__", None) or ""
    known = _package(module.__name__) in BY_NAME or any(x in place for x in INSTALLED)
    if known or module.__name__ in seen:
        return
    seen.add(module.__name__)
    for name in names:
        if hasattr(module, name):
            value = getattr(module, name)
            yield f"{path}.{name}", value
            if isinstance(value, types.ModuleType):
                yield from _attributes(f"{path}.{name}", value, names, seen)


def _imports(steps: list[dis.Instruction], namespace: dict[str, Any]) -> Iterator[types.ModuleType]:
    """The modules of the user's that a function imports itself."""
    for level, names, step in zip(steps, steps[1:], steps[2:]):
        if step.opname == "IMPORT_NAME" and (level.argval or _is_mine(step.argval)):
            try:
                yield __import__(step.argval, namespace, None, names.argval or (), level.argval)
            except Exception:  # an optional module; the function may catch this too
                continue


def _is_mine(module: str) -> bool:
    """Whether a module is the user's; a library is not imported to find out."""
    package = _package(module)
    if package in BY_NAME:
        return False
    try:
        found = sys.modules.get(package) or importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return False
    place = getattr(found, "__file__", None) or getattr(found, "origin", None) or ""
    return found is not None and not any(x in place for x in INSTALLED)


def _steps(code: types.CodeType) -> Iterator[dis.Instruction]:
    """The instructions of a function and of those inside it."""
    yield from (step for step in dis.get_instructions(code) if step.opname != "EXTENDED_ARG")
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _steps(constant)


def _names(step: dis.Instruction) -> list[str]:
    """The name of a global, an attribute or an import that an instruction reads."""
    return [step.argval] if step.opcode in dis.hasname and isinstance(step.argval, str) else []


def _bytecode(code: types.CodeType) -> str:
    """Bytecode and constants as text, without docstring and line numbers."""
    constants = list(map(_constant, code.co_consts))
    flag = getattr(inspect, "CO_HAS_DOCSTRING", None)  # from Python 3.13 on; before, the first constant is its place
    named = not code.co_name.startswith("<")  # lambdas and comprehensions have none
    documented = code.co_flags & flag if flag else named and isinstance(code.co_consts[0], str)
    return repr((code.co_code, code.co_names, code.co_varnames, constants[1:] if documented else constants))


def _constant(value: Any) -> str:
    """A constant of a function as text, with sets in order."""
    if isinstance(value, types.CodeType):
        return _bytecode(value)
    if isinstance(value, (tuple, frozenset)):
        parts = list(map(_constant, value))
        return f"{type(value).__name__}({', '.join(sorted(parts) if isinstance(value, frozenset) else parts)})"
    return repr(value)


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
