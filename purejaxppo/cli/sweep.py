"""`purejaxppo sweep` and `purejaxppo plot`."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import tyro

from purejaxppo.cli.options import Settings, check_whole, complete, parse
from purejaxppo.config import Config, spec_of


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


def sweep(arguments: list[str]) -> int:
    """Prints the plan, trains, prints a ranking, and leaves data and pictures."""
    options, table = _parse_sweep(arguments)

    from purejaxppo.experiment.program import cache_compilation
    from purejaxppo.experiment.report.ranking import as_table
    from purejaxppo.experiment.sweeps.run import plan_missing, run_sweep
    from purejaxppo.experiment.sweeps.sweep import Sweep

    wanted = Sweep(options.env, table, options.num_seeds, options.config, options.hyperparams, options.seed)
    if options.compile_cache is not None:
        cache_compilation(options.compile_cache)
    print(wanted, flush=True)
    plan = plan_missing(wanted, options.out, slice_size=options.slice_size)
    print(plan, flush=True)
    if options.dry_run:
        return 0
    result = run_sweep(plan, options.out)
    print(as_table(result.ranked()))
    failed = result.failed()
    for sentence in failed[:5]:
        print(f"  {sentence}")
    if len(failed) > 5:
        print(f"  ... and {len(failed) - 5} more turned nan (failed_update in results.nc)")
    pictures = _draw_sweep(result.metrics, options.out, options.env)
    if result.steps:
        rate = result.steps / max(result.run_seconds, 1e-9)
        print(f"  {result.steps:,} steps in {result.run_seconds:.1f} s, {rate:,.0f} per second")
    print(f"  saved in {options.out}: {', '.join(['results.nc', *pictures])}")
    return 0


def plot(arguments: list[str]) -> int:
    """Draws pictures from what lies in a folder."""
    options = tyro.cli(Plot, args=arguments, prog="purejaxppo plot")

    from purejaxppo.cli.train import draw
    from purejaxppo.experiment.files import make_writable
    from purejaxppo.experiment.runs.saved import load
    from purejaxppo.experiment.sweeps.result import load_sweep

    out = options.out or options.folder
    make_writable(out)
    if (options.folder / "sweep.json").exists():
        result = load_sweep(options.folder)
        chosen = {"line": options.line, "panel": options.panel, "statistic": options.statistic}
        pictures = _draw_sweep(result.metrics, out, result.sweep.env, **chosen)
    else:
        saved = load(options.folder)
        pictures = [draw(saved.metrics, out, saved.settings["env"])]
    print(f"drawn in {out}: {', '.join(pictures)}")
    return 0


def _parse_sweep(arguments: list[str]):
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
    return complete(options, f"sweep-{options.env}"), table


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
    kinds = {field.name: field.type for field in fields(Config)}
    kind = float if spec_of(name) else kinds.get(name, str)
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


def _draw_sweep(metrics, out: Path, title: str, **chosen) -> list[str]:
    """Every picture that the sweep gives something to."""
    import matplotlib

    matplotlib.use("Agg")
    from purejaxppo.experiment.report.sweep_plots import plot_sweep

    try:
        figures = plot_sweep(metrics, title=title, **chosen)
    except ValueError as error:
        if any(chosen.get(name) for name in ("line", "panel")):
            raise
        print(f"  no pictures: {error}")
        return []
    for name, figure in figures.items():
        figure.savefig(out / f"{name}.png", dpi=150)
    return [f"{name}.png" for name in figures]
