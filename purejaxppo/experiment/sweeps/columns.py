"""Hyperparameters and environment parameters of a sweep's runs as arrays, [R] each, as programs take them."""

from dataclasses import is_dataclass, replace

import jax
import numpy as np

from purejaxppo.experiment.sweeps.sweep import ENV_PREFIX, Sweep
from purejaxppo.ppo import PPO
from purejaxppo.text import show


def wave_arguments(sweep: Sweep, ppo: PPO, runs: list[tuple[int, int]]):
    """What `Part.start` takes for runs given as (setting, seed)."""
    rows = sweep.table.rows()
    settings = [setting for setting, _ in runs]
    each = [sweep.hyperparams_of(rows[setting]) for setting in settings]
    hyperparams = jax.tree.map(lambda *xs: np.array(xs, np.float32), *each)
    return np.array([seed for _, seed in runs], np.int32), hyperparams, env_columns(sweep, settings, ppo)


def env_columns(sweep: Sweep, settings: list[int], ppo: PPO):
    """Environment parameters [R] of runs under the given settings. Raises ValueError for what the env has not."""
    rows = sweep.table.rows()
    rows = [rows[setting] for setting in settings]
    params = jax.tree.map(lambda x: np.full((len(rows), *np.shape(x)), x), ppo.env.params)
    known = _fields_of(ppo.env.params)
    for name in sweep.table.names:
        if not name.startswith(ENV_PREFIX):
            continue
        field = name.removeprefix(ENV_PREFIX)
        if field not in known:
            raise ValueError(f"{name} is no parameter of {ppo.env.name} (it has {', '.join(known) or 'none'})")
        params = _with_field(params, field, _column(name, [row[name] for row in rows], known[field]))
    return params


def _fields_of(params) -> dict:
    """The named parameters of an environment."""
    if isinstance(params, dict):
        return params
    names = getattr(params, "__dataclass_fields__", None) or getattr(params, "_fields", ())
    return {name: getattr(params, name) for name in names}


def _with_field(params, name: str, column):
    if isinstance(params, dict):
        return params | {name: column}
    return replace(params, **{name: column}) if is_dataclass(params) else params._replace(**{name: column})


def _column(name: str, values: list, like) -> np.ndarray:
    """A swept environment parameter as an array of the type that the environment has it in."""
    kind = np.asarray(like).dtype
    whole = np.issubdtype(kind, np.integer)
    for value in values:
        if isinstance(value, (str, tuple)) or (whole and value != round(value)):
            raise ValueError(f"{name}={show(value)} must be a {'whole ' if whole else ''}number")
    if np.ndim(like):
        raise ValueError(f"{name} has the shape {np.shape(like)}; only single numbers can be swept")
    return np.asarray(values, kind)
