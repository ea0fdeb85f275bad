"""Runs that their folder describes: begun by the command line, gone on with by anyone."""

from pathlib import Path

import jax

from purejaxppo.batched import runs
from purejaxppo.experiment.program import first_state
from purejaxppo.experiment.runs.fit import Fit, fit
from purejaxppo.experiment.runs.saved import hyperparams_of, read_settings, remake
from purejaxppo.experiment.runs.sinks import make_sink
from purejaxppo.ppo import PPO

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
