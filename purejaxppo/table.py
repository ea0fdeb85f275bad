"""Settings of a sweep as a table: every combination of values, values side by side, or a sample."""

import itertools
import math
from dataclasses import dataclass

import jax
import numpy as np

from purejaxppo.checks import check_whole
from purejaxppo.text import align, show, show_setting, to_coordinate


@dataclass(frozen=True)
class Table:
    """Settings as the product of axes; `a * b` has every setting of `a` with every setting of `b`."""

    axes: tuple[dict[str, tuple], ...] = ()
    """Each of one field or more, name -> values; the fields of one axis go side by side."""

    def __post_init__(self):
        names = [name for axis in self.axes for name in axis]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"{min(twice)} is swept twice (each field may stand in one axis only)")

    def __mul__(self, other: "Table") -> "Table":
        return Table(self.axes + other.axes)

    def __len__(self) -> int:
        return math.prod(_length(axis) for axis in self.axes)

    def __str__(self) -> str:
        return align(self.rows()) if self.names else "one setting"

    @property
    def names(self) -> tuple[str, ...]:
        """All fields, in their order."""
        return tuple(name for axis in self.axes for name in axis)

    def rows(self) -> list[dict]:
        """Every setting as field -> value; the last axis varies fastest."""
        axes = [[dict(zip(axis, values)) for values in zip(*axis.values())] for axis in self.axes]
        return [{name: value for part in parts for name, value in part.items()} for parts in itertools.product(*axes)]

    def columns(self) -> dict[str, list]:
        """Every field's values over all settings."""
        rows = self.rows()
        return {name: [row[name] for row in rows] for name in self.names}

    def index(self, **setting) -> int:
        """The number of the one setting with the given values. Raises ValueError where none fits, or several do."""
        unknown = sorted(setting.keys() - set(self.names))
        if unknown:
            raise ValueError(f"{unknown[0]} was not swept (swept: {', '.join(self.names) or 'nothing'})")
        rows = self.rows()
        fitting = [i for i, row in enumerate(rows) if all(_same(row[name], x) for name, x in setting.items())]
        if not fitting:
            raise ValueError(f"{show_setting(setting)} is none of the {len(rows)} settings (print the table)")
        if len(fitting) > 1:
            given = show_setting(setting) or "no field"
            raise ValueError(f"{given} fits {len(fitting)} settings; name more of {', '.join(self.names)}")
        return fitting[0]


def grid(**values) -> Table:
    """Every combination of values of fields; the last name varies fastest. Raises ValueError for an empty list."""
    return Table(tuple({name: _values(name, column)} for name, column in values.items()))


def paired(**values) -> Table:
    """Values of several fields side by side, the first of each together and so on.

    Raises ValueError where one field has more values than another.
    """
    axis = {name: _values(name, column, distinct=False) for name, column in values.items()}
    lengths = {name: len(column) for name, column in axis.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"paired fields must have equally many values, not {lengths} (grid(...) combines them)")
    return Table((axis,) if axis else ())


def sample(key, num_settings: int, *, sobol: bool = False, **distributions) -> Table:
    """`num_settings` settings, each field drawn from its distribution: `uniform`, `log_uniform`, `integers`, `choice`.

    With `sobol` they are points of a scrambled Sobol sequence (scipy), which fill the space more evenly than
    independent draws. `key` is a JAX key. Raises ValueError for what is no distribution.
    """
    check_whole("num_settings", num_settings)
    for name, distribution in distributions.items():
        if not isinstance(distribution, Distribution):
            raise ValueError(f"{name}={distribution!r} must be a distribution, such as log_uniform(1e-4, 1e-2)")
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
    """What a sampled field is drawn from; calling it maps a number in [0, 1) to a value."""

    kind: str
    """"uniform", "log_uniform", "integers" or "choice"."""
    values: tuple
    """Its two bounds, or for "choice" what there is to choose from."""

    def __call__(self, u: float):
        if self.kind == "choice":
            return self.values[int(u * len(self.values))]
        low, high = self.values
        if self.kind == "integers":
            return low + int(u * (high - low + 1))
        return low * (high / low) ** u if self.kind == "log_uniform" else low + (high - low) * u


def uniform(low: float, high: float) -> Distribution:
    """Numbers evenly between two bounds."""
    return Distribution("uniform", _bounds(low, high))


def log_uniform(low: float, high: float) -> Distribution:
    """Positive numbers whose logarithm is evenly between those of two bounds."""
    bounds = _bounds(low, high)
    if low <= 0:
        raise ValueError(f"low={low} of log_uniform must be above 0")
    return Distribution("log_uniform", bounds)


def integers(low: int, high: int) -> Distribution:
    """Whole numbers from `low` to `high`, both included, all as likely."""
    bounds = _bounds(low, high)
    if int(low) != low or int(high) != high:
        raise ValueError(f"integers({low}, {high}) needs whole bounds")
    return Distribution("integers", tuple(map(int, bounds)))


def choice(*values) -> Distribution:
    """One of the values, all as likely."""
    return Distribution("choice", _values("choice", values))


def _same(value, wanted) -> bool:
    return value == (tuple(wanted) if isinstance(wanted, list) else wanted) or to_coordinate(value) == wanted


def _values(name: str, column, distinct: bool = True) -> tuple:
    """A column as plain Python values."""
    try:
        values = [column] if isinstance(column, (str, dict)) or np.ndim(column) == 0 else list(column)
    except ValueError:  # lists of unequal length, such as widths
        values = list(column)
    values = tuple(_plain(name, value) for value in values)
    if not values:
        raise ValueError(f"{name}=[] must be a list of one value or more")
    if distinct and len(set(values)) < len(values):
        again = next(value for value in values if values.count(value) > 1)
        raise ValueError(f"{name}={show(again)} is given twice (seeds repeat a setting: num_seeds)")
    return values


def _plain(name: str, value):
    if isinstance(value, (jax.Array, np.ndarray, np.generic)) and np.ndim(value) == 0:
        value = np.asarray(value).item()
    if isinstance(value, (tuple, list)):
        return tuple(_plain(name, part) for part in value)
    if isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(f"{name}={value!r} must be a number, a word, True, False or a tuple of numbers")


def _length(axis: dict) -> int:
    return len(next(iter(axis.values())))


def _bounds(low, high) -> tuple:
    numbers = all(isinstance(x, (int, float)) and math.isfinite(x) for x in (low, high))
    if not numbers or not low < high:
        raise ValueError(f"low={low} must be a number below high={high}")
    return low, high
