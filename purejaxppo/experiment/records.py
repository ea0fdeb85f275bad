"""Records on disk: JSON data that is read back as the annotated types which describe it, whatever the file holds."""

import json
import sys
import types
import warnings
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Literal,
    NotRequired,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

import numpy as np

import purejaxppo
from purejaxppo.checks import check_range
from purejaxppo.config import Config, Hyperparams, rename_older, spec_of
from purejaxppo.experiment.files import read_bytes
from purejaxppo.experiment.provenance import as_json
from purejaxppo.text import shorten

T = TypeVar("T")
MAX_BYTES = 2**26  # of a JSON file
MAX_FLOAT, INFINITY = sys.float_info.max, float("inf")
# A number, a word for one that JSON lacks (inf, -inf, nan), or lists of them with one shape; as `as_json` writes them.
Numbers = Annotated[Any, "numbers"]
WORDS = ("inf", "-inf", "nan")
KINDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "null"}


class OtherVersion(ValueError):
    """A file that another version of this package wrote and this one cannot read."""


def read_record(path: Path, read: Callable[[Any, list[str]], T], remedy: str = "") -> T:
    """The record that a JSON file holds.

    Fields that the file lacks have their defaults, and a warning says so. Raises ValueError for a damaged file, and
    `OtherVersion` for one that another version wrote if this one cannot read it.

    Args:
        path: of the file.
        read: maps JSON data to the record; it raises ValueError, and adds fields that have their defaults to its list.
        remedy: what to do about a damaged file, for the message.
    """
    data, lacking = None, []
    try:
        data = json.loads(read_bytes(path, at_most=MAX_BYTES))
        record = read(data, lacking)
    except (OSError, ValueError, RecursionError) as error:
        wrong = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        writer, this = _writer(data), purejaxppo.__version__
        if writer == this or writer is None:
            raise ValueError(f"{path} is damaged: {wrong}" + (remedy and f" ({remedy})")) from None
        raise OtherVersion(
            f"{path} cannot be read: purejaxppo {writer} wrote it, this is {this}, and {wrong}"
        ) from None
    if lacking:
        writer = _writer(data)
        warnings.warn(f"{path}, written by purejaxppo {writer}, lacks {', '.join(lacking)}: the defaults are used")
    return record


def as_record(kind: Any, data: Any, lacking: list[str] | None = None, name: str = "") -> Any:
    """JSON data as a value of an annotated type: numbers, words, lists, dictionaries, dataclasses and TypedDicts.

    Args:
        kind: the type.
        data: what `json.loads` returned.
        lacking: receives the names of fields that the data lack and that have defaults.
        name: of the value, for messages.

    Raises:
        ValueError: if the data are of another type, have a field that the type lacks, or lack one without a default.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if origin is NotRequired:  # around the type of a field
        return as_record(inner[0], data, lacking, name)
    if kind is Any:
        return data
    if kind is Numbers:
        return _check(name, data, _shape(data) is not None, "a number or a list of numbers")
    if origin in (Union, types.UnionType):
        return _read_one_of(inner, data, lacking, name)
    if origin is Literal:
        return _check(name, data, isinstance(data, str) and data in inner, f"one of {', '.join(map(repr, inner))}")
    if origin in (list, tuple):
        _check(name, data, isinstance(data, list), "a list")
        return origin(as_record(inner[0], x, lacking, f"{name}[{i}]") for i, x in enumerate(data))
    if origin is dict:
        _check(name, data, isinstance(data, dict), "a dictionary")
        return {key: as_record(inner[1], x, lacking, f"{name}.{key}") for key, x in data.items()}
    if is_dataclass(kind) or is_typeddict(kind):
        return _read_fields(kind, data, [] if lacking is None else lacking, name)
    good = isinstance(data, (int, float) if kind is float else kind) and (kind is bool or not isinstance(data, bool))
    if kind is int:
        good = good and abs(data) < 2**63
    if kind is float:
        good = good and (abs(data) <= MAX_FLOAT or abs(data) == INFINITY)
    _check(name, data, good, KINDS[kind])
    return float(data) if kind is float else data


def complete_hyperparams(values: Mapping[str, Any], lacking: list[str]) -> dict[str, Any]:
    """All hyperparameters by their names, from those that a file holds.

    Args:
        values: name -> `Numbers`.
        lacking: receives the names of those that have their defaults.

    Raises:
        ValueError: for a name that is not known, or numbers out of range.
    """
    defaults = Hyperparams()
    for name, value in values.items():
        spec = spec_of(name)
        if spec is None:
            raise ValueError(f"the key {shorten('hyperparams.' + name)!r} is not known")
        _check(f"hyperparams.{name}", value, not isinstance(value, bool), "a number")
        if not (spec.schedulable and isinstance(value, list)):  # the numbers of a schedule
            numbers = [float(x) if x in ("inf", "-inf") else x for x in (value if isinstance(value, list) else [value])]
            check_range(f"hyperparams.{name}", np.array(numbers), spec.low, spec.high, open_high=spec.open_high)
    lacking += [f"hyperparams.{name}" for name in defaults.names if name not in values]
    return {name: as_json(defaults.get(name)) for name in defaults.names} | dict(values)


def _read_fields(kind: Any, data: Any, lacking: list[str], name: str) -> Any:
    """A dataclass or a TypedDict."""
    _check(name, data, isinstance(data, dict), "a dictionary")
    data = rename_older(data) if kind is Config else data
    known, path = get_type_hints(kind, include_extras=True), lambda key: f"{name}.{key}".removeprefix(".")
    for key in data:
        if key not in known:
            raise ValueError(f"the key {shorten(path(key))!r} is not known")
    for key in known:
        if key not in data:
            if key not in _optional(kind):
                raise ValueError(f"it lacks {path(key)}")
            lacking += [] if is_typeddict(kind) else [path(key)]
    values = {key: as_record(known[key], x, lacking, path(key)) for key, x in data.items()}
    return kind(**values)


def _optional(kind: Any) -> set[str]:
    """The fields that a dataclass or a TypedDict can do without."""
    if is_typeddict(kind):
        return set(kind.__optional_keys__)
    return {f.name for f in fields(kind) if f.default is not MISSING or f.default_factory is not MISSING}


def _read_one_of(kinds: tuple, data: Any, lacking: list[str] | None, name: str) -> Any:
    """The first of several types that fits."""
    errors = []
    for kind in kinds:
        try:
            return as_record(kind, data, lacking, name)
        except ValueError as error:
            errors.append(error)
    raise errors[0]


def _check(name: str, value: Any, good: bool, what: str) -> Any:
    if not good:
        raise ValueError(f"{shorten(name)}={shorten(repr(value))} must be {what}" if name else f"it must hold {what}")
    return value


def _shape(value: Any) -> tuple[int, ...] | None:
    """The shape of lists of numbers; None if they hold something else, or are not equally long."""
    if isinstance(value, list):
        shapes = {_shape(x) for x in value} or {()}
        shape = shapes.pop()
        return None if shapes or shape is None else (len(value), *shape)
    number = abs(value) < 2**64 or isinstance(value, float) if isinstance(value, (int, float)) else value in WORDS
    return () if number else None


def _writer(data: Any) -> str | None:
    """The version of this package that wrote a file last."""
    try:
        version = data["sessions"][-1]["versions"]["purejaxppo"]
    except (KeyError, IndexError, TypeError):
        return None
    return shorten(version) if isinstance(version, str) else None
