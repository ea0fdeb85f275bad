"""Proximal Policy Optimization as pure JAX functions, compiled end to end."""

from purejaxppo.adaptive import adaptive_learning_rate
from purejaxppo.advantages import gae
from purejaxppo.batched import batched, concatenate, runs
from purejaxppo.config import Config, Hyperparams, linear, schedule
from purejaxppo.envs import Box, Discrete, Env, MultiDiscrete, Step, check_env, make_env, time_limit
from purejaxppo.evolving import evolving
from purejaxppo.loss import ppo_loss
from purejaxppo.networks.distributions import Categorical, MultiCategorical, Normal, TanhNormal
from purejaxppo.networks.network import Network, from_linen, from_nnx
from purejaxppo.ppo import PPO, TrainState, make_ppo, with_step
from purejaxppo.rollout import Policy, Rollout
from purejaxppo.sharded import sharded
from purejaxppo.table import Table, choice, grid, integers, log_uniform, paired, sample, uniform
from purejaxppo.update import Batch, adam

__version__ = "0.1.0"

__all__ = [
    "Batch", "Box", "Categorical", "Config", "Discrete", "Env", "Hyperparams", "MultiCategorical", "MultiDiscrete",
    "Network", "Normal", "PPO", "Policy", "Result", "Rollout", "Step", "Sweep", "Table", "TanhNormal", "TrainState",
    "a2c", "adam", "adaptive_learning_rate",
    "batched", "cache_compilation", "check_env", "choice", "compile", "concatenate", "evaluate_agents",
    "evaluate_in_gymnasium", "evolving", "export", "first_state", "fit", "from_linen", "from_nnx", "gae", "grid",
    "integers", "linear", "load", "load_agents", "load_sweep", "log_uniform", "make_env", "make_ppo",
    "optuna_search", "paired", "plan_sweep", "plot_curves", "plot_heatmap", "plot_importance",
    "plot_learning_curve", "plot_parallel", "ppo_loss", "preset", "record_episode", "render", "resume", "run_sweep",
    "runs", "sample", "schedule", "sharded", "successive_halving", "time_limit", "uniform", "use_one_thread",
    "with_step",
]  # fmt: skip

LAZY = {
    "Result": "purejaxppo.experiment.sweeps.result",
    "Sweep": "purejaxppo.experiment.sweeps.sweep",
    "a2c": "purejaxppo.experiment.presets",
    "cache_compilation": "purejaxppo.experiment.program",
    "compile": "purejaxppo.experiment.program",
    "evaluate_agents": "purejaxppo.experiment.agents.evaluation",
    "evaluate_in_gymnasium": "purejaxppo.experiment.agents.evaluation",
    "export": "purejaxppo.experiment.agents.export",
    "first_state": "purejaxppo.experiment.program",
    "fit": "purejaxppo.experiment.runs.fit",
    "load": "purejaxppo.experiment.runs.saved",
    "load_agents": "purejaxppo.experiment.agents.load",
    "load_sweep": "purejaxppo.experiment.sweeps.result",
    "optuna_search": "purejaxppo.experiment.sweeps.optuna_search",
    "plan_sweep": "purejaxppo.experiment.sweeps.plan",
    "plot_curves": "purejaxppo.experiment.report.sweep_plots",
    "plot_heatmap": "purejaxppo.experiment.report.sweep_plots",
    "plot_importance": "purejaxppo.experiment.report.sweep_plots",
    "plot_learning_curve": "purejaxppo.experiment.report.curve",
    "plot_parallel": "purejaxppo.experiment.report.sweep_plots",
    "preset": "purejaxppo.experiment.presets",
    "record_episode": "purejaxppo.experiment.agents.render",
    "render": "purejaxppo.experiment.agents.render",
    "resume": "purejaxppo.experiment.runs.described",
    "run_sweep": "purejaxppo.experiment.sweeps.run",
    "successive_halving": "purejaxppo.experiment.sweeps.halving",
    "use_one_thread": "purejaxppo.experiment.program",
}


def __getattr__(name):
    # The host's side brings xarray and matplotlib, which `import purejaxppo` should not cost.
    if name in LAZY:
        import importlib

        return getattr(importlib.import_module(LAZY[name]), name)
    raise AttributeError(f"module 'purejaxppo' has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *LAZY})
