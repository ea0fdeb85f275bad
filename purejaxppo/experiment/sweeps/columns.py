"""The hyperparameters and environment parameters of a sweep's runs as arrays [R], one column per field."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from purejaxppo.config import Hyperparams
from purejaxppo.envs import suite
from purejaxppo.experiment.sweeps.sweep import ENV_PREFIX, Sweep
from purejaxppo.ppo import PPO
from purejaxppo.text import show


def run_arguments(sweep: Sweep, ppo: PPO, runs: Sequence[tuple[int, int]]) -> tuple[np.ndarray, Hyperparams, Any]:
    """Seeds [R], hyperparameters [R] and environment parameters [R] of runs, which are pairs (setting, seed)."""
    rows = sweep.table.rows()
    settings = [setting for setting, _ in runs]
    each = [sweep.hyperparams_of(rows[setting]) for setting in settings]
    hyperparams = jax.tree.map(lambda *xs: np.array(xs, np.float32), *each)
    return np.array([seed for _, seed in runs], np.int32), hyperparams, env_columns(sweep, settings, ppo)


def env_columns(sweep: Sweep, settings: Sequence[int], ppo: PPO) -> Any:
    """The environment parameters [R] of the given settings. Raises ValueError for a parameter that the env lacks."""
    rows = sweep.table.rows()
    rows = [rows[setting] for setting in settings]
    params = jax.tree.map(lambda x: np.full((len(rows), *np.shape(x)), x), ppo.env.params)
    known = _fields_of(ppo.env.params)
    for name in sweep.table.names:
        if not name.startswith(ENV_PREFIX):
            continue
        field = name.removeprefix(ENV_PREFIX)
        if field not in known:
            raise ValueError(
                f"{name} is not a parameter of {ppo.env.name} (it has {', '.join(known) or 'none'}"
                f"{_instead(ppo.env.name, field)})"
            )
        params = _with_field(params, field, _column(name, [row[name] for row in rows], known[field]))
    return params


def _instead(env: str, field: str) -> str:
    """How an environment of a suite is given what is not one of its parameters; nothing for others."""
    owner = env.partition("/")[0]
    if owner not in suite.SUITES:
        return ""
    if owner in suite.SIMULATORS:
        return f"; make_env({env!r}, traced=({field!r},)) in Python makes it one, if it is a part of the physics"
    return f"; options of a suite are given in Python: make_env({env!r}, {field}=...) in a module, as my_envs:env"


def _fields_of(params: Any) -> dict[str, Any]:
    """The named parameters of an environment, without those that are static."""
    if isinstance(params, dict):
        return params
    fields = getattr(params, "__dataclass_fields__", {})
    names = [name for name, field in fields.items() if field.metadata.get("pytree_node", True)]
    return {name: getattr(params, name) for name in names or getattr(params, "_fields", ())}


def _with_field(params: Any, name: str, column: np.ndarray) -> Any:
    if isinstance(params, dict):
        return params | {name: column}
    changed = {name: column}
    return params._replace(**changed) if hasattr(params, "_replace") else replace(params, **changed)


def _column(name: str, values: Sequence, like: Any) -> np.ndarray:
    """The values of a swept environment parameter, in the dtype of the environment's own."""
    if jax.tree.structure(like) != jax.tree.structure(0) or np.ndim(like):
        shape = f"has shape {np.shape(like)}" if jax.tree.structure(like) == jax.tree.structure(0) else "is no number"
        raise ValueError(f"{name} {shape}; only scalars can be swept (randomize(env, sample_params) draws others)")
    kind = np.asarray(like).dtype
    whole = np.issubdtype(kind, np.integer)
    for value in values:
        if isinstance(value, (str, tuple)) or (whole and value != round(value)):
            raise ValueError(f"{name}={show(value)} must be a {'whole ' if whole else ''}number")
    return np.asarray(values, kind)
