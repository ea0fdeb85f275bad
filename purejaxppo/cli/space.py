"""The settings to try, in the words of `purejaxppo sweep` and `purejaxppo search`."""

from dataclasses import dataclass, fields
from pathlib import Path

import tyro

from purejaxppo.cli.distributed import Distributed
from purejaxppo.cli.options import TrainingOptions, whole_number
from purejaxppo.cli.plugged import to_named
from purejaxppo.config import Config, spec_of
from purejaxppo.table import PLUGGED, Distribution, Table


@dataclass(frozen=True)
class SpaceOptions(TrainingOptions):
    """Flags of the commands that try many settings."""

    grid: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """FIELD=VALUE,VALUE,...; given several times, every combination. A field is any flag of `train` that sets the
    algorithm, `env`, or `env.NAME` for a parameter of the environment; widths are written 64x64, custom losses,
    networks, optimizers, steps and environments module:name."""
    sample: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """FIELD=log_uniform:LOW:HIGH, uniform:LOW:HIGH, integers:LOW:HIGH or choice:VALUE:VALUE..."""
    num_samples: int = 0
    """Settings to draw from the distributions in `sample`."""
    sobol: bool = False
    """Draw settings from a Sobol sequence, which fills the space evenly."""
    seed: int = 0
    """Random seed."""
    total_steps: int | None = None
    """Environment steps of each agent; sets num_updates to as many whole updates as fit."""
    evaluate_every: int | None = None
    """Updates between two evaluations, in which every agent plays 128 whole episodes in fresh environments, by which
    settings are then compared; there is one more at the end. By default there are none."""
    allow_changed: tuple[str, ...] = ()
    """What may differ from what the folder was trained with, such as loss or optimizer."""
    dry_run: bool = False
    """Print the plan and stop."""
    out: Path | None = None
    """Folder for the results. The same command with the same folder resumes; by default a new one in runs/."""
    distributed: Distributed = None
    """Train as one of several processes, on the devices of all: the same command in each, with a folder that all see.
    SLURM, Open MPI and Kubernetes tell the rest; elsewhere 0/2 HOST:PORT is the first of two, at whose address they
    meet."""


def make_table(options: SpaceOptions) -> Table:
    """The table that `grid` and `sample` describe, custom parts included. Raises ValueError if nothing varies."""
    from purejaxppo.table import grid, sample

    columns = _read_columns(options)
    given = {field: [to_named(field, text, options.env)] for field, text in options.plugged.given().items()}
    table = grid(**given | columns)
    distributions = read_distributions(options)
    if bool(distributions) != bool(options.num_samples):
        raise ValueError(f"num_samples={options.num_samples} and sample go together: give both, or neither")
    if distributions:
        import jax

        # A branch of its own: the seeds of the agents come from the same number.
        key = jax.random.fold_in(jax.random.key(options.seed), 2**31)
        table *= sample(key, options.num_samples, sobol=options.sobol, **distributions)
    if table == Table():
        raise ValueError("nothing is swept: give --grid FIELD=VALUE,VALUE,... (or train with --num-seeds)")
    return table


def read_space(options: SpaceOptions) -> dict[str, Distribution]:
    """The distribution of every field, for a search that draws settings itself: a field in `grid` is a choice.

    Raises ValueError without any, or without a number of settings to draw.
    """
    from purejaxppo.table import choice

    given = {field: choice(to_named(field, text, options.env)) for field, text in options.plugged.given().items()}
    space = {name: choice(*values) for name, values in _read_columns(options).items()} | read_distributions(options)
    if not space or not options.num_samples:
        raise ValueError(
            f"num_samples={options.num_samples} and --sample go together: give both, such as --num-samples 32 "
            "--sample learning_rate=log_uniform:1e-4:1e-2"
        )
    return given | space


def _read_columns(options: SpaceOptions) -> dict[str, list]:
    """The values of every field in `grid`. Raises ValueError for text of another form, or a field given twice."""
    columns = dict(_parse_column(text, options.env) for text in options.grid)
    if len(columns) < len(options.grid):
        raise ValueError(f"grid={' '.join(options.grid)} names a field twice (put all its values in one --grid)")
    return columns


def read_distributions(options: SpaceOptions) -> dict[str, Distribution]:
    """The distribution of every field in `sample`. Raises ValueError for other text, or a field given twice."""
    distributions = dict(_parse_distribution(text) for text in options.sample)
    if len(distributions) < len(options.sample):
        raise ValueError(f"sample={' '.join(options.sample)} names a field twice (give it one distribution)")
    return distributions


def _parse_column(text: str, env: str) -> tuple[str, list]:
    name, equals, values = text.partition("=")
    name = _read_name(name)
    if not equals or not name or not values.strip():
        raise ValueError(f"grid={text} must be FIELD=VALUE,VALUE,..., such as learning_rate=1e-4,1e-3")
    words = [word.strip() for word in values.split(",")]
    if name in PLUGGED or name == "env":
        return name, [to_named(name, word, env) if ":" in word or name in PLUGGED else word for word in words]
    return name, [_parse_value(name, word) for word in words]


def _parse_distribution(text: str):
    from purejaxppo.experiment.sweeps.sweep import check_field
    from purejaxppo.table import choice, integers, log_uniform, uniform

    known = {"uniform": uniform, "log_uniform": log_uniform, "integers": integers, "choice": choice}
    name, _, description = text.partition("=")
    name = _read_name(name)
    kind, *values = description.split(":")
    number_wanted = None if kind == "choice" else 2
    if kind not in known or not values or number_wanted not in (None, len(values)):
        raise ValueError(
            f"sample={text} must be FIELD=KIND:LOW:HIGH, such as learning_rate=log_uniform:1e-4:1e-2 "
            f"(kinds: {', '.join(known)})"
        )
    check_field(name)
    return name, known[kind](*(_parse_value(name, value) for value in values))


def _read_name(text: str) -> str:
    """The name of a field; flags are understood too."""
    return text.strip() if text.startswith("env") else text.strip().replace("-", "_")


def _parse_value(name: str, text: str):
    """A value as the type of its field; what does not fit stays text, for the sweep to refuse."""
    kinds = {field.name: field.type for field in fields(Config)}
    kind = float if spec_of(name) else kinds.get(name, str)
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if kind == tuple[int, ...]:
            return tuple(int(width) for width in text.split("x"))
        if name.startswith("env.") or kind is int:
            return _parse_number(text)
        return kind(text) if kind is float else text
    except (ValueError, KeyError):
        return text


def _parse_number(text: str) -> int | float:
    try:
        return whole_number(text)
    except ValueError:
        return float(text)
