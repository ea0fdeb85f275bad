"""Proximal Policy Optimization as pure JAX functions, compiled end to end."""

from typing import TYPE_CHECKING

from purejaxppo.adaptive import adaptive_learning_rate
from purejaxppo.advantages import Batch, gae
from purejaxppo.batched import batched, concatenate, runs, with_hyperparams
from purejaxppo.config import Config, Hyperparams, linear, schedule
from purejaxppo.envs import (
    ActionMask,
    Box,
    Discrete,
    Env,
    MultiDiscrete,
    Step,
    action_repeat,
    check_env,
    check_shapes,
    frame_stack,
    make_env,
    privileged,
    randomize,
    sticky_actions,
    time_limit,
)
from purejaxppo.evolving import evolving
from purejaxppo.loss import ppo_loss
from purejaxppo.networks import (
    Categorical,
    JointCategorical,
    MultiCategorical,
    Network,
    Normal,
    TanhNormal,
    from_linen,
    from_nnx,
    layers,
    memories,
)
from purejaxppo.ppo import PPO, TrainState, make_ppo, with_step
from purejaxppo.rollout import Policy, Rollout
from purejaxppo.sharded import sharded
from purejaxppo.table import Table, choice, grid, integers, log_uniform, paired, sample, uniform
from purejaxppo.update import adam

if TYPE_CHECKING:  # what LAZY imports when it is first used
    from purejaxppo.experiment.agents.evaluation import evaluate_agents, evaluate_in_gymnasium
    from purejaxppo.experiment.agents.export import export
    from purejaxppo.experiment.agents.load import load, load_agents
    from purejaxppo.experiment.agents.render import record_episode, render
    from purejaxppo.experiment.agents.report import write_report
    from purejaxppo.experiment.distributed import join_processes
    from purejaxppo.experiment.jax_setup import cache_compilation, use_deterministic_kernels, use_one_thread
    from purejaxppo.experiment.loop import Interrupted
    from purejaxppo.experiment.presets import a2c, preset
    from purejaxppo.experiment.program import compile_training, first_state
    from purejaxppo.experiment.report import statistics
    from purejaxppo.experiment.report.curve import plot_learning_curve
    from purejaxppo.experiment.report.sweep_plots import plot_curves, plot_heatmap, plot_importance, plot_parallel
    from purejaxppo.experiment.runs import sinks
    from purejaxppo.experiment.runs.fit import fit
    from purejaxppo.experiment.runs.launch import resume
    from purejaxppo.experiment.sweeps.halving import plan_halving, successive_halving
    from purejaxppo.experiment.sweeps.optuna_search import optuna_search, plan_trials
    from purejaxppo.experiment.sweeps.plan import plan_sweep
    from purejaxppo.experiment.sweeps.population import plan_population, population_search
    from purejaxppo.experiment.sweeps.result import SweepResult
    from purejaxppo.experiment.sweeps.run import run_sweep
    from purejaxppo.experiment.sweeps.sweep import Sweep

__version__ = "0.2.0"

__all__ = [
    "ActionMask", "Batch", "Box", "Categorical", "Config", "Discrete", "Env", "Hyperparams", "Interrupted",
    "JointCategorical", "MultiCategorical", "MultiDiscrete", "Network", "Normal", "PPO", "Policy", "Rollout", "Step",
    "Sweep", "SweepResult", "Table", "TanhNormal", "TrainState", "a2c", "action_repeat", "adam",
    "adaptive_learning_rate", "batched", "cache_compilation", "check_env", "check_shapes", "choice",
    "compile_training", "concatenate", "evaluate_agents", "evaluate_in_gymnasium", "evolving", "export",
    "first_state", "fit", "frame_stack", "from_linen", "from_nnx", "gae", "grid", "integers", "join_processes",
    "layers", "linear", "load", "load_agents", "log_uniform", "make_env", "make_ppo", "memories", "optuna_search",
    "paired", "plan_halving", "plan_population", "plan_sweep", "plan_trials", "plot_curves", "plot_heatmap",
    "plot_importance", "plot_learning_curve", "plot_parallel", "population_search", "ppo_loss", "preset",
    "privileged", "randomize", "record_episode", "render", "resume", "run_sweep", "runs", "sample", "schedule",
    "sharded", "sinks", "statistics", "sticky_actions", "successive_halving", "time_limit", "uniform",
    "use_deterministic_kernels", "use_one_thread", "with_hyperparams", "with_step", "write_report",
]  # fmt: skip

# The host needs xarray and matplotlib, which `import purejaxppo` should not load. Name -> module; a name that is not in
# its module is a module itself.
LAZY = {
    "Interrupted": "purejaxppo.experiment.loop",
    "Sweep": "purejaxppo.experiment.sweeps.sweep",
    "SweepResult": "purejaxppo.experiment.sweeps.result",
    "a2c": "purejaxppo.experiment.presets",
    "cache_compilation": "purejaxppo.experiment.jax_setup",
    "compile_training": "purejaxppo.experiment.program",
    "evaluate_agents": "purejaxppo.experiment.agents.evaluation",
    "evaluate_in_gymnasium": "purejaxppo.experiment.agents.evaluation",
    "export": "purejaxppo.experiment.agents.export",
    "first_state": "purejaxppo.experiment.program",
    "fit": "purejaxppo.experiment.runs.fit",
    "join_processes": "purejaxppo.experiment.distributed",
    "load": "purejaxppo.experiment.agents.load",
    "load_agents": "purejaxppo.experiment.agents.load",
    "optuna_search": "purejaxppo.experiment.sweeps.optuna_search",
    "plan_halving": "purejaxppo.experiment.sweeps.halving",
    "plan_population": "purejaxppo.experiment.sweeps.population",
    "plan_sweep": "purejaxppo.experiment.sweeps.plan",
    "plan_trials": "purejaxppo.experiment.sweeps.optuna_search",
    "plot_curves": "purejaxppo.experiment.report.sweep_plots",
    "plot_heatmap": "purejaxppo.experiment.report.sweep_plots",
    "plot_importance": "purejaxppo.experiment.report.sweep_plots",
    "plot_learning_curve": "purejaxppo.experiment.report.curve",
    "plot_parallel": "purejaxppo.experiment.report.sweep_plots",
    "population_search": "purejaxppo.experiment.sweeps.population",
    "preset": "purejaxppo.experiment.presets",
    "record_episode": "purejaxppo.experiment.agents.render",
    "render": "purejaxppo.experiment.agents.render",
    "resume": "purejaxppo.experiment.runs.launch",
    "run_sweep": "purejaxppo.experiment.sweeps.run",
    "sinks": "purejaxppo.experiment.runs",
    "statistics": "purejaxppo.experiment.report",
    "successive_halving": "purejaxppo.experiment.sweeps.halving",
    "use_deterministic_kernels": "purejaxppo.experiment.jax_setup",
    "use_one_thread": "purejaxppo.experiment.jax_setup",
    "write_report": "purejaxppo.experiment.agents.report",
}


def __getattr__(name: str):
    if name not in LAZY:
        raise AttributeError(f"module 'purejaxppo' has no attribute {name!r}")
    import importlib

    module = importlib.import_module(LAZY[name])
    return getattr(module, name) if hasattr(module, name) else importlib.import_module(f"{LAZY[name]}.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *LAZY})
