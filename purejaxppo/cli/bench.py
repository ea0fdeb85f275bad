"""`purejaxppo bench` and `purejaxppo envs`."""

import json
from dataclasses import dataclass
from pathlib import Path

import tyro

from purejaxppo.cli.options import Settings, check_whole, make, parse, prepare_cpu


@dataclass(frozen=True)
class Bench(Settings):
    """Measure training on this machine. Flags that are not given come from the preset of the environment."""

    num_seeds: tuple[int, ...] = (1, 8, 32)
    """Numbers of agents to be measured, each in one program."""
    rounds: int = 5
    """Repetitions; medians are printed, with the least and the most."""
    seconds: float = 2.0
    """Length of a repetition, about."""
    one_thread: bool = False
    """Keep XLA to one thread of a CPU: faster for one agent with small minibatches, slower for all else."""
    out: Path | None = None
    """File for the figures as JSON; none is written if none is given."""


def bench(arguments: list[str]) -> int:
    """Measures, prints tables, and leaves a file if one is named."""
    prepare_cpu(arguments)
    options = parse(Bench, "bench", arguments)
    if not options.num_seeds:
        raise ValueError("num_seeds must be one number or more")
    for number in options.num_seeds:
        check_whole(num_seeds=(number, 1))
    check_whole(rounds=(options.rounds, 1))
    if not 0 < options.seconds < float("inf"):
        raise ValueError(f"seconds={options.seconds} must be a positive number")

    from purejaxppo.experiment import bench
    from purejaxppo.experiment.provenance import describe

    ppo = make(options)
    try:
        if options.out:
            options.out.open("a").close()  # what may stand there stays until there are new figures
    except OSError as error:
        raise ValueError(f"out={options.out} cannot be written: {error.strerror} (name another file)") from None
    settings = describe(options.env, options.config, options.hyperparams)
    device, cores = settings["device"], settings["cpu_cores"]
    print(
        f"{options.env}, {options.config.num_envs} environments x {options.config.num_steps} steps, on "
        f"{device['kind']} ({cores} CPU cores), jax {settings['versions']['jax']}; medians of {options.rounds}",
        flush=True,
    )
    results = bench.bench(
        ppo, options.hyperparams, options.num_seeds, rounds=options.rounds, seconds=options.seconds,
        report=lambda line: print(line, flush=True),
    )  # fmt: skip
    if options.out:
        options.out.write_text(json.dumps(settings | results, indent=2) + "\n")
    return 0


def envs(arguments: list[str]) -> int:
    """Lists every environment with its preset."""
    tyro.cli(_print_envs, args=arguments, prog="purejaxppo envs")
    return 0


def _print_envs():
    """List what can be trained: budget in steps, and the settings in which its preset differs from the defaults."""
    from purejaxppo.envs import env_names
    from purejaxppo.experiment.presets import changed_settings, preset

    width = max(map(len, env_names()))
    print(f"{'environment':{width}}  {'steps':>10}  preset, where it differs from the defaults")
    for name in env_names():
        config, hyperparams = preset(name)
        changed = ", ".join(f"{key}={value}" for key, value in changed_settings(config, hyperparams).items())
        print(f"{name:{width}}  {config.total_steps:>10,}  {changed}")
