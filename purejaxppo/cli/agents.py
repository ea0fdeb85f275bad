"""`purejaxppo evaluate`, `render`, `export` and `show`: what is done with trained agents."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from purejaxppo.cli.options import check_whole
from purejaxppo.text import count


@dataclass(frozen=True)
class Evaluate:
    """Play whole episodes with the agents of a run, or of the best setting of a sweep."""

    folder: tyro.conf.Positional[Path]
    """What `train` or `sweep` left."""
    where: Annotated[Literal["jax", "gymnasium"], tyro.conf.arg(name="in")] = "jax"
    """In which implementation of the environment: the one they were trained in, or Gymnasium's of the same name."""
    episodes: int = 128
    """Episodes of each agent."""
    greedy: bool = False
    """Whether they take the most probable action instead of a sample."""
    seed: int = 0
    """Where the draws come from."""


@dataclass(frozen=True)
class Render:
    """Draw an episode of an agent as a GIF."""

    folder: tyro.conf.Positional[Path]
    """What `train` or `sweep` left."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """File to write; episode.gif in the folder if none is given."""
    agent: int = 0
    """Which of the agents, by its seed."""
    greedy: bool = False
    """Whether it takes the most probable action instead of a sample."""
    max_steps: int = 500
    """Steps after which the picture ends, if the episode has not."""
    seed: int = 0
    """Where the draws come from."""


@dataclass(frozen=True)
class Export:
    """Write an agent as one file that acts where purejaxppo is not installed, and print how."""

    folder: tyro.conf.Positional[Path]
    """What `train` or `sweep` left."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("policy.stablehlo")
    """File to write: NAME.stablehlo for JAX, NAME.npz for NumPy."""
    agent: int = 0
    """Which of the agents, by its seed."""


@dataclass(frozen=True)
class Show:
    """Print what a run or a sweep is, how far it came, and which code, packages, device and command made it."""

    folder: tyro.conf.Positional[Path]
    """What `train` or `sweep` left."""


def evaluate(arguments: list[str]) -> int:
    """Plays, and prints returns with intervals."""
    options = tyro.cli(Evaluate, args=arguments, prog="purejaxppo evaluate")
    check_whole(episodes=(options.episodes, 1), seed=(options.seed, 0))

    from purejaxppo.cli.train import interval
    from purejaxppo.experiment.agents.evaluation import evaluate_agents, evaluate_in_gymnasium, summarize
    from purejaxppo.experiment.agents.load import load_agents

    agents = load_agents(options.folder)
    play = evaluate_in_gymnasium if options.where == "gymnasium" else evaluate_agents
    played = play(agents, num_episodes=options.episodes, greedy=options.greedy, seed=options.seed)
    where = " in Gymnasium" if options.where == "gymnasium" else ""
    how = "the most probable actions" if options.greedy else "sampled actions"
    print(f"{agents.title}{where}: {options.episodes} episodes of {count(agents.num, 'agent')}, {how}")
    for seed, returns in enumerate(played["episode_return"].values):
        print(f"  agent {seed:<4} {returns.mean():10.2f}  from {returns.min():.2f} to {returns.max():.2f}")
    over = "agents" if agents.num > 1 else "episodes"
    print(f"  mean       {interval(*summarize(played), over=over):>10}")
    cut = int((~played["finished"]).sum())
    if cut:
        print(f"  {count(cut, 'episode')} had not ended and counted as far as they came")
    return 0


def render(arguments: list[str]) -> int:
    """Draws one episode."""
    options = tyro.cli(Render, args=arguments, prog="purejaxppo render")
    check_whole(max_steps=(options.max_steps, 1), seed=(options.seed, 0))

    import jax

    from purejaxppo.experiment.agents.load import load_agents
    from purejaxppo.experiment.agents.render import check_drawable, record_episode, render

    agents, out = load_agents(options.folder), options.out or options.folder / "episode.gif"
    policy = agents.policy(options.agent)
    check_drawable(agents.ppo.env.name, out)
    _check_file(out)
    env_params = jax.tree.map(lambda x: x[options.agent], agents.env_params)
    episode = record_episode(
        agents.ppo, policy, jax.random.key(options.seed), env_params,
        greedy=options.greedy, max_steps=options.max_steps,
    )  # fmt: skip
    render(agents.ppo.env.name, episode, out, env_params)
    print(f"{out}: {len(episode.rewards)} steps, return {episode.rewards.sum():.2f}")
    return 0


def export(arguments: list[str]) -> int:
    """Writes one file."""
    options = tyro.cli(Export, args=arguments, prog="purejaxppo export")

    import jax

    from purejaxppo.experiment.agents.export import export
    from purejaxppo.experiment.agents.load import load_agents

    agents = load_agents(options.folder)
    policy = agents.policy(options.agent)
    _check_file(options.out)
    lines = export(agents.ppo, policy, options.out, jax.tree.map(lambda x: x[options.agent], agents.env_params))
    print(f"# {options.out} holds agent {options.agent} of {agents.title}; this uses it:\n\n{lines}")
    return 0


def show(arguments: list[str]) -> int:
    """Prints provenance."""
    options = tyro.cli(Show, args=arguments, prog="purejaxppo show")

    from purejaxppo.experiment.runs.saved import read_settings

    if (options.folder / "sweep.json").exists():
        from purejaxppo.experiment.sweeps.slices import load_sweep_of

        print(load_sweep_of(options.folder))
        sessions = json.loads((options.folder / "sweep.json").read_text())["sessions"]
    else:
        settings = read_settings(options.folder)
        sessions = [settings, *settings.get("sessions", [])]
        _show_run(options.folder, settings)
    for session in sessions:
        _show_session(session)
    return 0


def _show_run(folder: Path, settings: dict):
    from purejaxppo.config import Config
    from purejaxppo.experiment.runs.checkpoints import Checkpoints

    config = Config(**settings["config"])
    done = [settings.get("num_updates_done", 0), *(int(path.name) for path in Checkpoints(folder).paths())]
    print(f"{settings['env']}: {count(settings['num_runs'] or 1, 'agent')}, seed {settings.get('seed', 'not known')}")
    print(f"  {max(done)} of {config.num_updates} updates, {max(done) * config.steps_per_update:,} steps of each")
    for kind in ("config", "hyperparams"):
        values = ", ".join(f"{name}={value}" for name, value in settings[kind].items())
        print(f"  {kind:<12} {values}")
    print(f"  {'precision':<12} {config.matmul_precision}")


def _show_session(session: dict):
    versions = ", ".join(f"{name} {version}" for name, version in session["versions"].items())
    device = session["device"]
    print(f"  {session['started']}  {' '.join(session['command'])}")
    print(f"    {'code':<10} {session.get('code') or 'no checkout'}")
    print(f"    {'packages':<10} {versions}")
    print(f"    {'device':<10} {device['count']} x {device['kind']}, {session['cpu_cores']} CPU cores")


def _check_file(path: Path):
    """Refuses a file that cannot be written, before anything is computed for it."""
    there = path.exists()
    try:
        path.open("ab").close()
    except OSError as error:
        raise ValueError(f"out={path} cannot be written: {error.strerror} (name another file)") from None
    if not there:
        path.unlink()
