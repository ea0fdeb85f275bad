"""`purejaxppo bench` and `purejaxppo envs`."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro

from purejaxppo.checks import check_whole
from purejaxppo.cli.options import TrainingOptions, check_counts, make, parse, prepare_jax, say


@dataclass(frozen=True)
class BenchOptions(TrainingOptions):
    """Measure training on this machine. Flags that are not given come from the preset of the environment."""

    compile_cache: str | None = "off"
    """Folder that keeps compiled programs for later commands; off by default, so that compiling is measured."""
    num_seeds: tuple[int, ...] = (1, 8, 32)
    """Numbers of agents to measure, each in one program."""
    rounds: int = 5
    """Repetitions; prints medians, least and most."""
    seconds: float = 2.0
    """Approximate length of a repetition."""
    one_thread: bool = False
    """Limit XLA to one CPU thread: faster for one agent with small minibatches, slower for everything else."""
    out: Path | None = None
    """JSON file for the figures; none by default."""


def bench(arguments: list[str]) -> int:
    """Measures, prints tables, and writes a file if asked."""
    prepare_jax(arguments)
    options = parse(BenchOptions, "bench", arguments)
    if not options.num_seeds:
        raise ValueError("num_seeds is empty (give one number or more, such as 1 8 32)")
    for number in options.num_seeds:
        check_whole("num_seeds", number)
    check_counts(options, "rounds")
    if not 0 < options.seconds < float("inf"):
        raise ValueError(f"seconds={options.seconds} must be a positive number")

    from purejaxppo.experiment.bench import bench as measure
    from purejaxppo.experiment.files import check_file
    from purejaxppo.experiment.provenance import as_json, describe_machine

    ppo = make(options)
    if options.out:
        check_file(options.out)
    machine = describe_machine()
    device, cores = machine["device"], machine["cpu_cores"]
    say(
        f"{options.env}, {options.config.num_envs} environments x {options.config.num_steps} steps, on "
        f"{device['kind']} ({cores} CPU cores), jax {machine['versions']['jax']}; medians of {options.rounds}",
    )
    results = measure(
        ppo, options.hyperparams, options.num_seeds, rounds=options.rounds, seconds=options.seconds,
        report=say,
    )  # fmt: skip
    if options.out:
        hyperparams = {name: as_json(options.hyperparams.get(name)) for name in options.hyperparams.names}
        work = {"env": options.env, "config": asdict(options.config), "hyperparams": hyperparams}
        options.out.write_text(json.dumps(work | machine | results, indent=2) + "\n")
    return 0


@dataclass(frozen=True)
class EnvsOptions:
    """List the environments of a suite: steps of the preset, and where it differs from the defaults."""

    suite: tyro.conf.Positional[str] = "gymnax"
    """The suite: gymnax, brax, craftax, jumanji, navix, pgx, playground or xland."""


def envs(arguments: list[str]) -> int:
    """Lists every environment of a suite with its preset, and which suites there are."""
    options = tyro.cli(EnvsOptions, args=arguments, prog="purejaxppo envs")

    from purejaxppo.envs import env_names
    from purejaxppo.envs.suite import SUITES, install_command, is_installed
    from purejaxppo.experiment.presets import PRESETS, changed_settings, preset

    names = env_names(options.suite)
    width = max(map(len, names))
    say(f"{'environment':{width}}  {'steps':>13}  preset, if different from the defaults")
    for name in names:
        config, hyperparams = preset(name)
        changed = ", ".join(f"{key}={value}" for key, value in changed_settings(config, hyperparams).items())
        untried = "untried: " if changed and name not in PRESETS else ""
        say(f"{name:{width}}  {config.total_steps:>13,}  {untried}{changed}")
    if options.suite == "gymnax":
        say("other suites (purejaxppo envs SUITE lists one):")
        for suite in SUITES:
            say(f"  {suite:10}  {'installed' if is_installed(suite) else install_command(suite)}")
    return 0
