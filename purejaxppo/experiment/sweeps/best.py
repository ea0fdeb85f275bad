"""The best setting of a search as a JSON file and as a command that trains it, and the winner of a population."""

import contextlib
import json
import shlex
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import xarray

from purejaxppo.config import Config, Hyperparams
from purejaxppo.experiment.files import save_json
from purejaxppo.experiment.presets import DEFAULTS, find_preset
from purejaxppo.experiment.provenance import as_json
from purejaxppo.experiment.report.lineage import Lineage
from purejaxppo.experiment.runs.settings import SEARCH, RunSettings
from purejaxppo.experiment.sweeps.sweep import ENV_PREFIX, Sweep
from purejaxppo.table import PLUGGED
from purejaxppo.text import to_coordinate

BEST = "best.json"
MEMBER, UPDATES = "member", "updates"  # in best.json: the winner of a population, and after how many updates it won


def save_best(folder: Path, sweep: Sweep, setting: Mapping[str, Any], score: float, **more: Any):
    """Writes best.json: the setting, its score, all that it trains with, and the command that does.

    Args:
        folder: of the search.
        sweep: what was searched; only what all settings share matters.
        setting: the best one, field -> value.
        score: of it.
        more: JSON data to keep beside them.
    """
    row = dict(setting)
    config, hyperparams = sweep.config_of(row), sweep.hyperparams_of(row)
    data = {
        "env": str(sweep.env_of(row)),
        "setting": {name: to_coordinate(value) for name, value in row.items()},
        "score": score,
        "command": train_command(sweep, setting),
        "config": {field.name: getattr(config, field.name) for field in fields(config)},
        "hyperparams": {name: as_json(hyperparams.get(name)) for name in hyperparams.names},
    }
    save_json(folder / BEST, data | more)


def read_winner(folder: Path, num_updates: int | None) -> int | None:
    """The agent that won the population in a folder after so many updates, as best.json says; None if it does not."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        best = json.loads((folder / BEST).read_text())
        member = best.get(MEMBER)
        return member if isinstance(member, int) and best.get(UPDATES) == num_updates else None
    return None


def find_lineage(folder: Path, settings: RunSettings, metrics: xarray.Dataset) -> Lineage | None:
    """The lineage of the population in a folder; None for another run, and without a winner in its best.json."""
    rule, winner = settings.notes.get(SEARCH), read_winner(folder, metrics.sizes["updates"])
    if not isinstance(rule, Mapping) or winner is None or winner >= len(np.atleast_2d(metrics["parent"])):
        return None
    return Lineage(metrics, tuple(rule["explore"]), winner)


def train_command(sweep: Sweep, setting: Mapping[str, Any]) -> str:
    """The command that trains an agent with a setting: `purejaxppo train`, with what differs from the preset.

    Parameters of the environment have no flags there, so that a setting with such becomes a sweep of this one setting.
    """
    row = dict(setting)
    env = str(sweep.env_of(row))
    default = DEFAULTS if ":" in env else find_preset(env)
    config, hyperparams = sweep.config_of(row), sweep.hyperparams_of(row)
    words = [
        word
        for kind, old in ((config, default.config), (hyperparams, default.hyperparams))
        for word in _flags(kind, old)
    ]
    extra = [str(word) for entry in hyperparams.extra.items() for word in entry]
    words += ["--extra", *extra] if extra else []
    for name in PLUGGED:
        words += [f"--{name}", str(row[name])] if row.get(name, "default") != "default" else []
    params = [f"{name}={x}" for name, x in row.items() if name.startswith(ENV_PREFIX)]
    grid = [word for text in params for word in ("--grid", text)]
    return shlex.join(["purejaxppo", "sweep" if grid else "train", env, *words, *grid])


def _flags(settings: Config | Hyperparams, default: Config | Hyperparams) -> list[str]:
    """The flags for what differs from the default."""
    words = []
    for field in fields(settings):
        value = getattr(settings, field.name)
        if field.name == "extra" or value == getattr(default, field.name):
            continue
        flag = field.name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *map(str, value if isinstance(value, tuple) else (value,))]
    return words
