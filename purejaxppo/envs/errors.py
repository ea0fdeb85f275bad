"""Errors of an environment's own functions, with the line of its author."""

import re
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from flax import struct

PACKAGES = [Path(jax.__file__).parent, Path(struct.__file__).parent, Path(__file__).parents[1]]


def call_env(what: str, function: Callable, *args: Any) -> Any:
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
