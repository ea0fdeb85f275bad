"""The flags of the command line, made from `Config` and `Hyperparams`, on top of the preset of an environment."""

import datetime
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

import tyro

from purejaxppo.config import Config, Hyperparams


@dataclass(frozen=True)
class Settings:
    """What every command that trains takes. Flags that are not given come from the preset of the environment."""

    env: tyro.conf.Positional[str]
    """A name that `purejaxppo envs` lists."""
    compile_cache: Path | None = None
    """Folder that keeps compiled programs for the next time."""
    config: tyro.conf.OmitArgPrefixes[Config] = field(default_factory=Config)
    hyperparams: tyro.conf.OmitArgPrefixes[Hyperparams] = field(default_factory=Hyperparams)


@dataclass(frozen=True)
class Train(Settings):
    """Train PPO on an environment. Flags that are not given come from its preset."""

    num_seeds: int = 1
    """Agents, trained side by side in one program."""
    num_devices: int = 1
    """Devices, of a CPU its cores, among which the environments of every agent are shared out; it pays from about 512
    transitions per minibatch."""
    seed: int = 0
    """Where the random keys of all agents come from."""
    total_steps: int | None = None
    """Environment steps of each agent; sets num_updates to as many whole updates as fit."""
    out: Path | None = None
    """Folder for the results; runs/ENV-TIME if none is given."""


@dataclass(frozen=True)
class Bench(Settings):
    """Measure training on this machine. Flags that are not given come from the preset of the environment."""

    num_seeds: tuple[int, ...] = (1, 8, 32)
    """Numbers of agents to be measured, each in one program."""
    rounds: int = 5
    """Repetitions; medians are printed, with the least and the most."""
    seconds: float = 2.0
    """Length of a repetition, about."""
    out: Path | None = None
    """File for the figures as JSON; none is written if none is given."""


@dataclass(frozen=True)
class Sweep(Settings):
    """Train many settings with several seeds each, rank them, and draw them. Flags that are not given come from the
    preset of the environment."""

    grid: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """FIELD=VALUE,VALUE,...; given several times, every combination. A field is any flag of `train` that sets the
    algorithm, `env`, or `env.NAME` for a parameter of the environment; widths are written 64x64."""
    sample: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """FIELD=log_uniform:LOW:HIGH, uniform:LOW:HIGH, integers:LOW:HIGH or choice:VALUE:VALUE..."""
    num_samples: int = 0
    """Settings to draw from what `sample` says."""
    sobol: bool = False
    """Whether the drawn settings are points of a Sobol sequence, which fill the space evenly."""
    num_seeds: int = 8
    """Agents under every setting."""
    seed: int = 0
    """Where the random keys of all agents come from."""
    total_steps: int | None = None
    """Environment steps of each agent; sets num_updates to as many whole updates as fit."""
    slice_size: int | None = None
    """Agents that go through the program together; chosen for this machine if not given."""
    dry_run: bool = False
    """Whether to stop after the plan."""
    out: Path | None = None
    """Folder for the results, of a new sweep or of this one to go on with; runs/sweep-ENV-TIME if none is given."""


@dataclass(frozen=True)
class Plot:
    """Draw the pictures of a sweep, or of a training run, anew from its folder."""

    folder: tyro.conf.Positional[Path]
    """What `sweep` or `train` left."""
    line: str | None = None
    """Field with a line for each of its values."""
    panel: str | None = None
    """Field with a panel for each of its values."""
    statistic: Literal["iqm", "mean", "median"] = "iqm"
    """What a line shows of the seeds: interquartile mean, mean or median."""
    out: Path | None = None
    """Folder for the pictures; that of the results if none is given."""


def parse_train(arguments: list[str]) -> Train:
    """The options of `train`."""
    options = parse(Train, "train", arguments)
    check_whole(num_seeds=(options.num_seeds, 1), seed=(options.seed, 0), num_devices=(options.num_devices, 1))
    return _complete(options, options.env)


def parse_sweep(arguments: list[str]):
    """The options of `sweep`, and the table that they describe."""
    from purejaxppo.table import Table, grid, sample

    options = parse(Sweep, "sweep", arguments)
    check_whole(num_seeds=(options.num_seeds, 1), seed=(options.seed, 0))
    columns = dict(_parse_column(text) for text in options.grid)
    if len(columns) < len(options.grid):
        raise ValueError(f"grid={' '.join(options.grid)} names a field twice (write all its values in one)")
    table = grid(**columns)
    distributions = dict(_parse_distribution(text) for text in options.sample)
    if bool(distributions) != bool(options.num_samples):
        raise ValueError(
            f"num_samples={options.num_samples} must be the number of settings to draw where --sample is given"
        )
    if distributions:
        import jax

        # A branch of its own: the seeds of the agents come from the same number.
        key = jax.random.fold_in(jax.random.key(options.seed), 2**31)
        table *= sample(key, options.num_samples, sobol=options.sobol, **distributions)
    if table == Table():
        raise ValueError("nothing is swept: give --grid FIELD=VALUE,VALUE,... (or train with --num-seeds)")
    return _complete(options, f"sweep-{options.env}"), table


def _complete(options, name: str):
    if options.total_steps is not None:
        options = replace(options, config=options.config.with_total_steps(options.total_steps))
    time = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return options if options.out else replace(options, out=Path("runs") / f"{name}-{time}")


def _parse_column(text: str) -> tuple[str, list]:
    name, equals, values = text.partition("=")
    name = name.strip().replace("-", "_") if not name.startswith("env") else name.strip()
    if not equals or not name or not values.strip():
        raise ValueError(f"grid={text} must be FIELD=VALUE,VALUE,..., such as learning_rate=1e-4,1e-3")
    return name, [_parse_value(name, value.strip()) for value in values.split(",")]


def _parse_distribution(text: str):
    from purejaxppo.table import choice, integers, log_uniform, uniform

    known = {"uniform": uniform, "log_uniform": log_uniform, "integers": integers, "choice": choice}
    name, _, description = text.partition("=")
    kind, *values = description.split(":")
    number_wanted = None if kind == "choice" else 2
    if kind not in known or not values or number_wanted not in (None, len(values)):
        raise ValueError(
            f"sample={text} must be FIELD=KIND:LOW:HIGH, such as learning_rate=log_uniform:1e-4:1e-2 "
            f"(kinds: {', '.join(known)})"
        )
    return name, known[kind](*(_parse_value(name, value) for value in values))


def _parse_value(name: str, text: str):
    """A value as the type of its field; what does not fit stays text, for the sweep to refuse."""
    kinds = {field.name: field.type for field in fields(Config)} | {field.name: float for field in fields(Hyperparams)}
    kind = kinds.get(name, str)
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if kind == tuple[int, ...]:
            return tuple(int(width) for width in text.split("x") if width)
        if name.startswith("env.") or kind is int:
            return _parse_number(text)
        return kind(text) if kind is float else text
    except (ValueError, KeyError):
        return text


def _parse_number(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        number = float(text)
        return int(number) if number.is_integer() and "e" in text.lower() else number


def parse_plot(arguments: list[str]) -> Plot:
    """The options of `plot`."""
    return tyro.cli(Plot, args=arguments, prog="purejaxppo plot")


def parse(kind, command: str, arguments: list[str]):
    """The flags of a command on top of the preset of the environment, which comes first."""
    from purejaxppo.envs import env_names, make_env
    from purejaxppo.experiment.presets import preset

    env, asks_help = arguments[0] if arguments else "-", {"--help", "-h"} & set(arguments)
    if env.startswith("-"):
        if not asks_help:
            raise ValueError(
                f"name an environment first: purejaxppo {command} ENV [flags] (`purejaxppo envs` lists them)"
            )
        env = "CartPole-v1"
    elif env not in env_names():
        make_env(env)
    return tyro.cli(kind, args=arguments, default=kind(env, **preset(env)._asdict()), prog=f"purejaxppo {command}")


def check_whole(**least):
    """Refuses a number below its least, or too large for a key; each is given as (number, least)."""
    for name, (number, low) in least.items():
        if not low <= number < 2**31:
            raise ValueError(f"{name}={number} must be from {low} to 2**31 - 1")
