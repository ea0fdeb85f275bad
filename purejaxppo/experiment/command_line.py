"""The commands `purejaxppo train`, `sweep`, `plot`, `bench` and `envs`."""

import json
import sys
from pathlib import Path

import tyro

from purejaxppo.experiment.options import Bench, Train, check_whole, parse, parse_plot, parse_sweep, parse_train

USAGE = """usage: purejaxppo COMMAND ...

  purejaxppo train ENV [flags]   train one agent or many, by the preset of the environment
  purejaxppo sweep ENV [flags]   train many settings with several seeds each, rank and draw them
  purejaxppo plot FOLDER         draw the pictures of a sweep or of a run anew
  purejaxppo bench ENV [flags]   measure compile time, steps per second, memory, and where the time goes
  purejaxppo envs                list what can be trained, with its preset
  purejaxppo COMMAND --help      all flags of a command
"""


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit status: 2 with one sentence on standard error for bad input."""
    arguments = sys.argv[1:] if arguments is None else arguments
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command in ("--help", "-h"):
        print(USAGE, end="")
        return 0
    if command not in COMMANDS:
        return _refuse(f"unknown command {command!r} (known: {', '.join(COMMANDS)})")
    try:
        return COMMANDS[command](rest)
    except ValueError as error:
        return _refuse(str(error))
    except KeyboardInterrupt:
        return _refuse("interrupted", status=130)


def train(arguments: list[str]) -> int:
    """Trains, prints a table, and leaves a folder."""
    import jax

    if any(argument.startswith(("--num-devices", "--num_devices")) for argument in arguments):
        from purejaxppo.experiment.program import cores_as_devices

        cores_as_devices()  # before all else: even to look the environment up has JAX begin
    options = parse_train(arguments)

    from purejaxppo.experiment import folder
    from purejaxppo.experiment.fit import fit
    from purejaxppo.sharding import sharded
    from purejaxppo.sweep import batched, runs

    config = options.config
    ppo = _make(options)
    if options.num_devices > jax.device_count():
        raise ValueError(
            f"num_devices={options.num_devices} must be at most {jax.device_count()}, the devices (of a CPU the cores) "
            "that there are"
        )
    ppo = batched(sharded(ppo, options.num_devices) if options.num_devices > 1 else ppo)
    keys, hyperparams = runs(jax.random.key(options.seed), num_seeds=options.num_seeds, hyperparams=options.hyperparams)
    folder.prepare(options.out)
    more = {"seed": options.seed, "num_seeds": options.num_seeds, "num_devices": options.num_devices}
    settings = folder.describe(options.env, config, options.hyperparams, **more)
    print(
        f"{options.env}: {_count(options.num_seeds, 'agent')} x {config.total_steps:,} steps "
        f"({config.num_updates} updates of {config.num_envs} environments x {config.num_steps} steps) "
        f"on {f'{options.num_devices} x ' if options.num_devices > 1 else ''}{jax.devices()[0].device_kind}",
        flush=True,
    )
    result = fit(ppo, jax.jit(ppo.init)(keys, hyperparams))
    metrics = result.metrics.rename(run="seed")
    settings |= {
        "num_updates_done": metrics.sizes["update"],
        "compile_seconds": result.compile_seconds,
        "run_seconds": result.run_seconds,
        "steps_per_second": result.steps_per_second,
    }
    folder.save(options.out, settings, metrics, result.state.policy)
    _draw(metrics, options.out, options.env)
    final = jax.device_get((result.state.policy, result.state.env_params))  # to be played on one device
    evaluation = jax.jit(ppo.evaluate)(keys, *final)
    print(_table(options, result, metrics, evaluation))
    return 0


def sweep(arguments: list[str]) -> int:
    """Prints the plan, trains, prints a ranking, and leaves data and pictures."""
    options, table = parse_sweep(arguments)

    from purejaxppo.experiment.program import cache_compilation
    from purejaxppo.experiment.ranking import as_table
    from purejaxppo.experiment.run import plan_missing, run_sweep
    from purejaxppo.experiment.sweeps import Sweep

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
    options = parse_plot(arguments)

    from purejaxppo.experiment import folder
    from purejaxppo.experiment.result import load_sweep

    out = options.out or options.folder
    folder.make_writable(out)
    if (options.folder / "sweep.json").exists():
        result = load_sweep(options.folder)
        chosen = {"line": options.line, "panel": options.panel, "statistic": options.statistic}
        pictures = _draw_sweep(result.metrics, out, result.sweep.env, **chosen)
    else:
        saved = folder.load(options.folder)
        pictures = [_draw(saved.metrics, out, saved.settings["env"])]
    print(f"drawn in {out}: {', '.join(pictures)}")
    return 0


def bench(arguments: list[str]) -> int:
    """Measures, prints tables, and leaves a file if one is named."""
    options = parse(Bench, "bench", arguments)
    if not options.num_seeds:
        raise ValueError("num_seeds must be one number or more")
    for number in options.num_seeds:
        check_whole(num_seeds=(number, 1))
    check_whole(rounds=(options.rounds, 1))
    if not 0 < options.seconds < float("inf"):
        raise ValueError(f"seconds={options.seconds} must be a positive number")

    from purejaxppo.experiment import bench, folder

    ppo = _make(options)
    try:
        if options.out:
            options.out.open("a").close()  # what may stand there stays until there are new figures
    except OSError as error:
        raise ValueError(f"out={options.out} cannot be written: {error.strerror} (name another file)") from None
    settings = folder.describe(options.env, options.config, options.hyperparams)
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


COMMANDS = {"train": train, "sweep": sweep, "plot": plot, "bench": bench, "envs": envs}


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


def _make(options):
    """The PPO of the options, refused now if anything in them does not fit."""
    import jax

    from purejaxppo.experiment.program import cache_compilation
    from purejaxppo.ppo import make_ppo

    if options.compile_cache is not None:
        cache_compilation(options.compile_cache)
    ppo = make_ppo(options.env, options.config)
    jax.eval_shape(lambda key: ppo.init(key, options.hyperparams), jax.random.key(0))
    return ppo


def _table(options: Train, result, metrics, evaluation) -> str:
    from purejaxppo.experiment.metrics import last_episodes, mean_interval

    played = evaluation.episode_return.shape[1]
    rows = [
        ("return, last 100 episodes", _interval(*mean_interval(last_episodes(metrics)))),
        (f"return, {played} fresh episodes", _interval(*mean_interval(evaluation.episode_return.mean(1)))),
        (
            "steps",
            f"{metrics.sizes['update'] * options.config.steps_per_update:,} x {_count(options.num_seeds, 'agent')}",
        ),
        ("steps per second", f"{result.steps_per_second:,.0f}"),
        ("compile", f"{result.compile_seconds:.1f} s"),
        ("run", f"{result.run_seconds:.1f} s"),
        ("saved in", str(options.out)),
    ]
    return "\n".join(f"  {name:<28}{value}" for name, value in rows)


def _interval(mean: float, low: float, high: float) -> str:
    if mean != mean:
        return "no episode ended"
    return f"{mean:.2f}" + (
        f"  [{low:.2f}, {high:.2f}] 95 % over agents" if low == low else "  (one agent: no interval)"
    )


def _draw(metrics, out: Path, title: str) -> str:
    import matplotlib

    matplotlib.use("Agg")
    from purejaxppo.experiment.plots import plot_learning_curve

    ax = plot_learning_curve(metrics, title=title)
    ax.figure.savefig(out / "learning_curve.png", dpi=150)
    return "learning_curve.png"


def _draw_sweep(metrics, out: Path, title: str, **chosen) -> list[str]:
    """Every picture that the sweep gives something to."""
    import matplotlib

    matplotlib.use("Agg")
    from purejaxppo.experiment.sweep_plots import plot_sweep

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


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _refuse(sentence: str, status: int = 2) -> int:
    print(f"purejaxppo: {sentence}", file=sys.stderr)
    return status
