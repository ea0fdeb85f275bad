"""Runs that their folder describes: begun by the command line, gone on with by anyone."""

import importlib.util
from pathlib import Path

import jax

from purejaxppo.experiment import sinks
from purejaxppo.experiment.fit import Fit, fit
from purejaxppo.experiment.folder import hyperparams_of, read_settings, remake
from purejaxppo.experiment.program import first_state
from purejaxppo.ppo import PPO
from purejaxppo.sweep import runs

HOW = ("seed", "num_devices", "save_every", "keep", "evaluate_every", "log")


def resume(folder, *, num_updates: int | None = None, progress: bool = True) -> Fit:
    """Goes on with the run that `purejaxppo train` began in a folder, to the numbers of one that was never stopped.

    With `num_updates`, of the whole run, it is extended: schedules then end there, as a warning says. Raises ValueError
    where the folder holds no run, one that was begun in Python (the same call of `fit` goes on with that), or
    checkpoints of which none is whole.
    """
    folder = Path(folder)
    settings = begun_settings(folder)
    if num_updates is not None:
        done = settings["config"]["num_updates"]
        if num_updates < done:
            raise ValueError(f"num_updates={num_updates} must be at least the {done} that the run in {folder} has")
        settings["config"]["num_updates"] = num_updates
    return train_as_described(remake(settings, settings["num_devices"]), settings, folder, progress)


def begun_settings(folder: Path) -> dict:
    """The settings of a run, which `fit` holds against those in its checkpoint.

    Raises ValueError where they do not say how to begin it.
    """
    settings = read_settings(folder)
    if not set(HOW) <= settings.keys():
        raise ValueError(
            f"the run in {folder} was begun in Python: the same call of fit, with folder=, goes on with it"
        )
    return settings


def train_as_described(ppo: PPO, settings: dict, folder: Path, progress: bool = True) -> Fit:
    """Trains the agents that settings describe, in a folder, from wherever they are."""
    key = jax.random.key(settings["seed"])
    keys, hyperparams = runs(key, num_seeds=settings["num_runs"], hyperparams=hyperparams_of(settings))
    return fit(
        ppo,
        first_state(ppo, keys, hyperparams),
        folder=folder,
        save_every=settings["save_every"],
        keep=settings["keep"],
        evaluate_every=settings["evaluate_every"],
        sinks=[make_sink(name, folder) for name in settings["log"]],
        settings={name: settings[name] for name in HOW},
        progress=progress,
    )


def make_sink(name: str, folder: Path) -> sinks.Sink:
    """What `--log` names, in the folder of a run. Raises ValueError where a package is missing."""
    package = {"tensorboard": "tensorboardX", "wandb": "wandb"}.get(name)
    if package and importlib.util.find_spec(package) is None:
        raise ValueError(f"log={name} needs {package} (pip install {package})")
    return {
        "console": sinks.console,
        "csv": lambda: sinks.csv_file(folder / "log.csv"),
        "json": lambda: sinks.json_lines(folder / "log.jsonl"),
        "tensorboard": lambda: sinks.tensorboard(folder / "tensorboard"),
        "wandb": lambda: sinks.wandb("purejaxppo", dir=folder, group=folder.name, id=folder.name),
    }[name]()
