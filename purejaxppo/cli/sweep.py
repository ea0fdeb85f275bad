"""`purejaxppo sweep` and `purejaxppo plot`."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from purejaxppo.cli.options import (
    ALL_FAILED,
    NOT_SAVED,
    TrainingOptions,
    check_counts,
    check_num_devices,
    complete,
    draw_without_screen,
    keep_programs,
    make_folder,
    parse,
    prepare_jax,
    say,
    whole_number,
)
from purejaxppo.cli.plugged import to_named
from purejaxppo.config import Config, spec_of
from purejaxppo.table import PLUGGED
from purejaxppo.text import count

if TYPE_CHECKING:
    from purejaxppo.experiment.sweeps.result import SweepResult
    from purejaxppo.experiment.sweeps.sweep import Sweep


@dataclass(frozen=True)
class SweepOptions(TrainingOptions):
    """Train many settings with several seeds each, rank and plot them. Flags that are not given come from the preset
    of the environment."""

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
    num_seeds: int = 8
    """Agents per setting."""
    seed: int = 0
    """Random seed."""
    total_steps: int | None = None
    """Environment steps of each agent; sets num_updates to as many whole updates as fit."""
    slice_size: int | None = None
    """Agents that train together in one program; chosen for this machine by default, and kept in the folder."""
    num_devices: int | None = None
    """Devices that the agents are distributed across; by default all GPUs or TPUs, or all cores of the CPU as one. With
    this flag the cores of a CPU are devices."""
    updates_per_chunk: int | None = None
    """Updates between two saves, or reactions to Ctrl-C; a fiftieth of the run by default."""
    share: Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="[I/N]")] = None
    """Train every N-th slice of the sweep from the I-th on, I from 0, as one of N processes that share --out and need
    not know each other; --share alone reads I/N from the variables of a SLURM job array. The same command without
    --share trains what is missing then, ranks and plots."""
    allow_changed: tuple[str, ...] = ()
    """What may differ from what the folder was trained with, such as loss or optimizer."""
    dry_run: bool = False
    """Print the plan and stop."""
    out: Path | None = None
    """Folder for the results, also of this sweep if it is to continue; runs/sweep-ENV-TIME by default."""


@dataclass(frozen=True)
class PlotOptions:
    """Redraw the plots of a sweep or of a run from its folder."""

    folder: tyro.conf.Positional[Path]
    """The folder that `sweep` or `train` wrote."""
    line: str | None = None
    """Field with a line for each of its values."""
    panel: str | None = None
    """Field with a panel for each of its values."""
    statistic: Literal["iqm", "mean", "median"] = "iqm"
    """The statistic over seeds: interquartile mean, mean or median."""
    out: Path | None = None
    """Folder for the plots; that of the results by default."""


def sweep(arguments: list[str]) -> int:
    """Prints the plan, trains, prints a ranking, and leaves data and plots."""
    prepare_jax(arguments)
    options, table = _parse_sweep(arguments)

    from purejaxppo.experiment.files import check_writable
    from purejaxppo.experiment.loop import Interrupted
    from purejaxppo.experiment.sweeps.plan import plan_sweep
    from purejaxppo.experiment.sweeps.run import run_sweep
    from purejaxppo.experiment.sweeps.sweep import Sweep

    check_num_devices(options.num_devices)
    share = _read_share(options)
    env = to_named("env", options.env) if ":" in options.env else options.env
    wanted = Sweep(env, table, options.num_seeds, options.config, options.hyperparams, options.seed)
    keep_programs(options.compile_cache)
    say(*str(wanted).split("\n"))
    if options.out is not None and not options.dry_run:
        check_writable(options.out)
    plan = plan_sweep(
        wanted, options.out, slice_size=options.slice_size, updates_per_chunk=options.updates_per_chunk,
        devices=options.num_devices, allow_changed=options.allow_changed, share=share,
    )  # fmt: skip
    say(*str(plan).split("\n"))
    if options.dry_run:
        return 0
    out = make_folder(f"sweep-{options.env}") if options.out is None else options.out
    if plan.share and not plan.groups:
        _say_missing(wanted, out)
        return 0
    try:
        result = run_sweep(plan, out)
    except Interrupted as error:
        result = error.result
    if plan.share:
        _say_speed(f"share {plan.share}: ", result)
        _say_missing(wanted, out)
    else:
        _report(result, out, options.env)
    if result.interrupted:
        ranked = "" if plan.share else " and ranked by what they have done"
        say(
            f"interrupted: {result.num_unfinished} of {count(wanted.num_runs, 'run')} are unfinished{ranked}; "
            f"the same command with --out {out} continues"
        )
        return NOT_SAVED if result.unsaved else 130
    if result.unsaved:
        return NOT_SAVED
    return ALL_FAILED if len(result.failed()) == wanted.num_runs else 0


def _report(result: "SweepResult", out: Path, title: str):
    """Prints a ranking, and draws plots beside the data."""
    from purejaxppo.experiment.report.ranking import as_table
    from purejaxppo.experiment.report.statistics import improvements

    say(*as_table(result.ranked()).split("\n"))
    for field in (field for field in PLUGGED if field in result.scores.dims):
        for versus, found in improvements(result.scores, field).items():
            low, value, high = (float(found[name]) for name in ("low", "value", "high"))
            say(f"  P({versus}) = {value:.2f}  [{low:.2f}, {high:.2f}] 95 %")
    saved = [] if result.unsaved else ["results.nc", *_draw_sweep(result.metrics, out, title)]
    if result.steps:
        _say_speed("", result)
    say(f"  {'not all ' * bool(result.unsaved)}saved in {out}: {', '.join(saved) or 'what fitted'}")


def _say_speed(whose: str, result: "SweepResult"):
    """Prints what a call trained."""
    rate = result.steps / max(result.run_seconds, 1e-9)
    say(f"  {whose}{result.steps:,} steps in {result.run_seconds:.1f} s, {rate:,.0f} per second")


def _say_missing(wanted: "Sweep", out: Path):
    """Prints what is missing of a sweep whose shares are trained, and what comes then."""
    from purejaxppo.experiment.sweeps.division import describe_missing
    from purejaxppo.experiment.sweeps.slices import find_slices

    say(f"  missing of the whole sweep: {describe_missing(wanted, find_slices(out, wanted).read(warn=False))}")
    say(f"  the same command without --share, with --out {out}, trains what is missing then, ranks and plots")


def _read_share(options: SweepOptions) -> str | None:
    """The share as the library reads it."""
    if options.share is None:
        return None
    share = " ".join(options.share) or "slurm"
    if options.out is None:
        raise ValueError(
            f"share={share} needs --out FOLDER, one that all shares see (default folders differ between machines)"
        )
    return share


def plot(arguments: list[str]) -> int:
    """Redraws the plots of a folder."""
    options = tyro.cli(PlotOptions, args=arguments, prog="purejaxppo plot")

    from purejaxppo.cli.train import draw
    from purejaxppo.experiment.files import kind_of, make_writable
    from purejaxppo.experiment.runs.saved import read_metrics
    from purejaxppo.experiment.runs.settings import read_settings
    from purejaxppo.experiment.sweeps.result import load_sweep

    out = options.out or options.folder
    make_writable(out)
    if kind_of(options.folder) == "sweep":
        loaded = load_sweep(options.folder)
        chosen = {"line": options.line, "panel": options.panel, "statistic": options.statistic}
        plots = _draw_sweep(loaded.metrics, out, loaded.sweep.env, **chosen)
    else:
        plots = [draw(read_metrics(options.folder), out, read_settings(options.folder).env)]
    say(f"drawn in {out}: {', '.join(plots)}")
    return 0


def _parse_sweep(arguments: list[str]):
    """The options of `sweep`, and the table of settings that they describe."""
    from purejaxppo.table import Table, grid, sample

    options = parse(SweepOptions, "sweep", arguments)
    check_counts(options, "num_seeds", "num_devices", "slice_size", "updates_per_chunk")
    check_counts(options, "seed", at_least=0)
    columns = dict(_parse_column(text, options.env) for text in options.grid)
    if len(columns) < len(options.grid):
        raise ValueError(f"grid={' '.join(options.grid)} names a field twice (put all its values in one --grid)")
    given = {field: [to_named(field, text, options.env)] for field, text in options.plugged.given().items()}
    table = grid(**given | columns)
    distributions = dict(_parse_distribution(text) for text in options.sample)
    if bool(distributions) != bool(options.num_samples):
        raise ValueError(f"num_samples={options.num_samples} and sample go together: give both, or neither")
    if distributions:
        import jax

        # A branch of its own: the seeds of the agents come from the same number.
        key = jax.random.fold_in(jax.random.key(options.seed), 2**31)
        table *= sample(key, options.num_samples, sobol=options.sobol, **distributions)
    if table == Table():
        raise ValueError("nothing is swept: give --grid FIELD=VALUE,VALUE,... (or train with --num-seeds)")
    return complete(options, arguments), table


def _parse_column(text: str, env: str) -> tuple[str, list]:
    name, equals, values = text.partition("=")
    name = name.strip().replace("-", "_") if not name.startswith("env") else name.strip()
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
    kind, *values = description.split(":")
    number_wanted = None if kind == "choice" else 2
    if kind not in known or not values or number_wanted not in (None, len(values)):
        raise ValueError(
            f"sample={text} must be FIELD=KIND:LOW:HIGH, such as learning_rate=log_uniform:1e-4:1e-2 "
            f"(kinds: {', '.join(known)})"
        )
    check_field(name)
    return name, known[kind](*(_parse_value(name, value) for value in values))


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


def _draw_sweep(metrics, out: Path, title: str, **chosen) -> list[str]:
    """Draws every plot that the swept fields allow; returns the names of the files."""
    draw_without_screen()
    from purejaxppo.experiment.files import replace_file
    from purejaxppo.experiment.report.sweep_plots import plot_sweep

    try:
        figures = plot_sweep(metrics, title=title, **chosen)
    except ValueError as error:
        if any(chosen.get(name) for name in ("line", "panel")):
            raise
        say(f"  no plots: {error}")
        return []
    for name, figure in figures.items():
        replace_file(out / f"{name}.png", lambda half, figure=figure: figure.savefig(half, dpi=150, format="png"))
    return [f"{name}.png" for name in figures]
