"""Proximal Policy Optimization as pure JAX functions, compiled end to end."""

from purejaxppo.config import Config, Hyperparams, linear
from purejaxppo.distributions import Categorical, MultiCategorical, Normal, TanhNormal
from purejaxppo.envs import Box, Discrete, Env, MultiDiscrete, Step, check_env, make_env, time_limit
from purejaxppo.networks import Network, from_linen, from_nnx
from purejaxppo.ppo import PPO, TrainState, make_ppo
from purejaxppo.sharding import sharded
from purejaxppo.sweep import batched, concatenate, runs
from purejaxppo.table import Table, choice, grid, integers, log_uniform, paired, sample, uniform

__version__ = "0.1.0"

__all__ = [
    "Box", "Categorical", "Config", "Discrete", "Env", "Hyperparams", "MultiCategorical", "MultiDiscrete", "Network",
    "Normal", "PPO", "Step", "TanhNormal", "TrainState", "a2c", "batched", "cache_compilation", "check_env", "compile",
    "fit", "from_linen", "from_nnx", "grid", "linear", "load", "make_env", "make_ppo", "plot_learning_curve", "preset",
    "runs", "sharded", "time_limit",
]  # fmt: skip

LAZY = {
    "cache_compilation": "purejaxppo.experiment.program",
    "compile": "purejaxppo.experiment.program",
    "fit": "purejaxppo.experiment.fit",
    "load": "purejaxppo.experiment.folder",
    "plot_learning_curve": "purejaxppo.experiment.plots",
    "preset": "purejaxppo.experiment.presets",
    "a2c": "purejaxppo.experiment.presets",
}


def __getattr__(name):
    # The host's side brings xarray and matplotlib, which `import purejaxppo` should not cost.
    if name in LAZY:
        import importlib

        return getattr(importlib.import_module(LAZY[name]), name)
    raise AttributeError(f"module 'purejaxppo' has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *LAZY})
