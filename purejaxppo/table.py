"""The settings of a sweep as a table: every combination of values, paired values, or random samples."""

import itertools
import math
from dataclasses import dataclass
from typing import Any, cast

import jax
import numpy as np

from purejaxppo.checks import check_whole
from purejaxppo.text import align, quote, shorten, show, show_setting, to_coordinate
from purejaxppo.validate import as_key

# Fields whose values are objects with a name; `env` may be one or a name.
PLUGGED = ("network", "loss", "optimizer", "step")


class Named(str):
    """A name in a table that stands for an object, such as a loss; it equals the bare name."""

    value: Any

    def __new__(cls, name: str, value: Any) -> "Named":
        """The name `name` for `value`."""
        named = super().__new__(cls, name)
        named.value = value
        return named


@dataclass(frozen=True)
class Table:
    """Settings, as the product of axes; `a * b` combines every setting of `a` with every setting of `b`."""

    axes: tuple[dict[str, tuple], ...] = ()
    """Each maps one field or more to its values; fields of one axis vary together."""

    def __post_init__(self) -> None:
        names = [name for axis in self.axes for name in axis]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"{min(twice)} is swept twice (leave it in one of the tables only)")

    def __mul__(self, other: "Table") -> "Table":
        return Table(self.axes + other.axes)

    def __len__(self) -> int:
        return math.prod(_length(axis) for axis in self.axes)

    def __str__(self) -> str:
        return align(self.rows()) if self.names else "one setting"

    @property
    def names(self) -> tuple[str, ...]:
        """All fields, in order."""
        return tuple(name for axis in self.axes for name in axis)

    def rows(self) -> list[dict[str, Any]]:
        """Every setting as field -> value; the last axis varies fastest."""
        axes = [[dict(zip(axis, values)) for values in zip(*axis.values())] for axis in self.axes]
        return [{name: value for entry in row for name, value in entry.items()} for row in itertools.product(*axes)]

    def columns(self) -> dict[str, list[Any]]:
        """The values of every field, one per setting."""
        rows = self.rows()
        return {name: [row[name] for row in rows] for name in self.names}

    def index(self, **setting: Any) -> int:
        """The row of the setting with the given values, from 0. Raises ValueError unless exactly one has them."""
        unknown = sorted(setting.keys() - set(self.names))
        if unknown:
            raise ValueError(f"{unknown[0]} was not swept (swept: {', '.join(self.names) or 'nothing'})")
        rows = self.rows()
        fitting = [i for i, row in enumerate(rows) if all(_same(row[name], x) for name, x in setting.items())]
        if not fitting:
            raise ValueError(
                f"{show_setting(setting)} matches none of the {len(rows)} settings (print the table to see them)"
            )
        if len(fitting) > 1:
            given = show_setting(setting) or "an empty setting"
            raise ValueError(f"{given} matches {len(fitting)} settings (name more of {', '.join(self.names)})")
        return fitting[0]


def grid(**values: Any) -> Table:
    """Every combination of the values of some fields; the last field varies fastest.

        >>> print(pjp.grid(clip=[0.1, 0.2], discount=[0.9, 0.99]))
        clip  discount
         0.1       0.9
         0.1      0.99
         0.2       0.9
         0.2      0.99

    Environments, networks, losses, optimizers and steps are values too: functions have names, and a dict names the
    others, as in `grid(loss={"ppo": ppo_loss, "spo": partial(ppo_loss, surrogate=spo)})`.

    Raises ValueError for an empty list, or a value given twice.
    """
    return Table(tuple({name: _values(name, column)} for name, column in values.items()))


def paired(**values: Any) -> Table:
    """Values of several fields in pairs: the first values of all fields are one setting, the second ones the next.

    Raises ValueError if one field has more values than another.
    """
    axis = {name: _values(name, column, distinct=False) for name, column in values.items()}
    lengths = {name: len(column) for name, column in axis.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"paired fields must have equally many values, not {lengths} (grid(...) combines them)")
    return Table((axis,) if axis else ())


def sample(key: jax.Array, num_settings: int, *, sobol: bool = False, **distributions: "Distribution") -> Table:
    """Settings with every field drawn from its distribution.

    Args:
        key: of the draws.
        num_settings: how many to draw.
        sobol: draws a scrambled Sobol sequence (scipy), which fills the space more evenly than independent draws.
        distributions: one for each field: `uniform`, `log_uniform`, `integers` or `choice`.

    Raises:
        ValueError: for no field, or one without a distribution.
    """
    key = as_key(key)
    check_whole("num_settings", num_settings)
    for name, distribution in distributions.items():
        if not isinstance(distribution, Distribution):
            raise ValueError(f"{name}={quote(distribution)} must be a distribution, such as log_uniform(1e-4, 1e-2)")
    if not distributions:
        raise ValueError("a sample needs one field or more, such as learning_rate=log_uniform(1e-4, 1e-2)")
    random = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())
    if sobol:
        from scipy.stats import qmc  # as slow to import as JAX

        points = qmc.Sobol(len(distributions), rng=random).random_base2((num_settings - 1).bit_length())[:num_settings]
    else:
        points = random.random((num_settings, len(distributions)))
    return Table(({name: tuple(map(f, u)) for (name, f), u in zip(distributions.items(), points.T.tolist())},))


@dataclass(frozen=True)
class Distribution:
    """The distribution of a sampled field: a function that maps a number in [0, 1) to a value."""

    kind: str
    """"uniform", "log_uniform", "integers" or "choice"."""
    values: tuple
    """The two bounds, or the values of a "choice"."""

    def __call__(self, u: float) -> Any:
        """The value at a quantile in [0, 1)."""
        if self.kind == "choice":
            return self.values[int(u * len(self.values))]
        low, high = self.values
        if self.kind == "integers":
            return low + int(u * (high - low + 1))
        return low * (high / low) ** u if self.kind == "log_uniform" else low + (high - low) * u


def uniform(low: float, high: float) -> Distribution:
    """Numbers distributed uniformly between two bounds."""
    return Distribution("uniform", _bounds(low, high))


def log_uniform(low: float, high: float) -> Distribution:
    """Positive numbers whose logarithm is distributed uniformly between those of two bounds."""
    bounds = _bounds(low, high)
    if low <= 0:
        raise ValueError(f"low={low} of log_uniform must be above 0")
    return Distribution("log_uniform", bounds)


def integers(low: int, high: int) -> Distribution:
    """Whole numbers from `low` to `high`, both included, with equal probability."""
    bounds = _bounds(low, high)
    if int(low) != low or int(high) != high:
        raise ValueError(f"integers({low}, {high}) must have whole numbers as bounds")
    return Distribution("integers", tuple(map(int, bounds)))


def choice(*values: Any) -> Distribution:
    """One of the values, with equal probability."""
    return Distribution("choice", _values("choice", values))


def _same(value: Any, wanted: Any) -> bool:
    if isinstance(value, Named) and value.value is wanted:
        return True
    return value == (tuple(wanted) if isinstance(wanted, list) else wanted) or to_coordinate(value) == wanted


def _values(name: str, column: Any, distinct: bool = True) -> tuple:
    """A column as plain Python values."""
    if isinstance(column, dict) and name in ("env", *PLUGGED):
        column = [Named(key, value) if isinstance(key, str) else key for key, value in column.items()]
    try:
        single = isinstance(column, str) or hasattr(column, "_fields") or np.ndim(cast(Any, column)) == 0
        values = [column] if single else list(column)
    except ValueError:  # lists of unequal length, such as widths
        values = list(column)
    values = tuple(_plain(name, value) for value in values)
    if not values:
        raise ValueError(f"{name}=[] must be a list of one value or more")
    if distinct and len(set(values)) < len(values):
        again = next(value for value in values if values.count(value) > 1)
        if isinstance(again, Named):
            raise ValueError(f"{name} has two values called {again} (name them: {name}={{{str(again)!r}: ..., ...}})")
        raise ValueError(f"{name}={show(again)} is given twice (use num_seeds to repeat a setting)")
    return values


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, (jax.Array, np.ndarray, np.generic)) and np.ndim(value) == 0:
        value = np.asarray(value).item()
    if name in ("env", *PLUGGED) and (callable(value) or hasattr(value, "_fields") or hasattr(value, "step_env")):
        return named(name, value)
    if isinstance(value, (tuple, list)):
        return tuple(_plain(name, entry) for entry in value)
    if isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(f"{name}={shorten(value)} must be a number, a word, True, False or a tuple of numbers")


def named(field: str, value: Any) -> Named:
    """A value of a field with its own name. Raises ValueError if it has none."""
    name = getattr(value, "__name__", None) or getattr(value, "name", None)
    if not isinstance(name, str) or name == "<lambda>":
        raise ValueError(f"{field}={shorten(value)} has no name (give one: {field}={{'NAME': ...}})")
    return Named(name, value)


def _length(axis: dict) -> int:
    return len(next(iter(axis.values())))


def _bounds(low: float, high: float) -> tuple:
    numbers = all(isinstance(x, (int, float)) and math.isfinite(x) for x in (low, high))
    if not numbers or not low < high:
        raise ValueError(f"low={quote(low)} must be a number below high={quote(high)}")
    return low, high
