"""Presets for suites, as data: name -> (environment steps, fields of `Config`, fields of `Hyperparams`).

Those in `TRIED` learn, as tests/benchmarks/scores.json shows. Those in `UNTRIED` are meant for two CPU cores, but have
not been trained yet. Those in `PUBLISHED` are settings that a suite or its baselines publish, translated but not tried
with this package; a name there may be a pattern. The last that matches counts.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Settings(NamedTuple):
    """A preset as data."""

    total_steps: int
    config: Mapping[str, Any]
    hyperparams: Mapping[str, Any]


NORMALIZED = {"normalize_observation": True, "scale_reward": True}
PHYSICS = NORMALIZED | {"num_envs": 64, "num_steps": 64, "num_epochs": 8, "num_minibatches": 16, "stagger": 1000}
GRID = {"num_envs": 32, "num_steps": 64, "num_minibatches": 8}
BOARD = {"num_envs": 64, "num_steps": 64, "num_minibatches": 8, "widths": (128, 128), "activation": "relu"}
MINATAR = {"num_envs": 64, "num_steps": 128, "num_minibatches": 8, "widths": (128, 128), "activation": "relu"}

TRIED = {
    "brax/inverted_pendulum": Settings(300_000, PHYSICS, {"learning_rate": 1e-3, "entropy_coefficient": 0.0}),
    "playground/CartpoleBalance": Settings(
        1_000_000, PHYSICS, {"learning_rate": 1e-3, "discount": 0.995, "entropy_coefficient": 0.0}
    ),
    "navix/Navix-Empty-5x5-v0": Settings(50_000, GRID, {"learning_rate": 1e-3}),
    "navix/Navix-DoorKey-5x5-v0": Settings(300_000, GRID, {"learning_rate": 1e-3}),
    "xland/MiniGrid-Empty-5x5": Settings(50_000, GRID, {"learning_rate": 1e-3}),
    "jumanji/Snake-v1": Settings(1_000_000, BOARD, {"learning_rate": 1e-3}),
}
UNTRIED = {
    "brax/reacher": Settings(1_000_000, PHYSICS, {"learning_rate": 1e-3, "discount": 0.95, "entropy_coefficient": 0.0}),
    "brax/hopper": Settings(1_000_000, PHYSICS, {"learning_rate": 5e-4, "entropy_coefficient": 0.0}),
    "jumanji/Game2048-v1": Settings(
        1_000_000, BOARD | {"scale_reward": True}, {"learning_rate": 1e-3, "discount": 0.997}
    ),
    "pgx/minatar-breakout": Settings(2_000_000, MINATAR, {"learning_rate": 1e-3}),
    "pgx/minatar-asterix": Settings(3_000_000, MINATAR, {"learning_rate": 1e-3}),
    "craftax/Craftax-Classic-Symbolic-v1": Settings(
        1_000_000,
        {"num_envs": 64, "num_steps": 64, "num_minibatches": 8, "widths": (256, 256)},
        {"learning_rate": 3e-4, "gae_lambda": 0.8, "max_grad_norm": 1.0},
    ),
}

# google/brax, notebooks/training.ipynb: batches of 5 to 50 steps, here as one rollout of as many transitions.
BRAX = NORMALIZED | {"num_envs": 2048, "num_steps": 80, "num_epochs": 4, "num_minibatches": 32, "stagger": 1000}
BRAX_PPO = {"learning_rate": 3e-4, "learning_rate_annealing": 0.0, "discount": 0.97, "clip": 0.3}
# mujoco_playground/config, dm_control_suite_params.py, locomotion_params.py and manipulation_params.py.
CONTROL = NORMALIZED | {"num_envs": 2048, "num_steps": 480, "num_epochs": 16, "num_minibatches": 32, "stagger": 1000}
CONTROL_PPO = {"learning_rate": 1e-3, "learning_rate_annealing": 0.0, "discount": 0.995, "clip": 0.3}
ROBOT = NORMALIZED | {"num_envs": 8192, "num_steps": 20, "num_minibatches": 32, "widths": (512, 256, 128)}
ROBOT_PPO = {"learning_rate": 3e-4, "discount": 0.97, "clip": 0.3, "max_grad_norm": 1.0}
# MichaelTMatthews/Craftax_Baselines, ppo.py.
CRAFTAX = {"num_envs": 1024, "num_steps": 64, "num_minibatches": 8, "widths": (512, 512, 512)}
# jumanji/training/configs/env: A2C, so only the discount, the steps and the number of environments are theirs.
JUMANJI = {"num_envs": 128, "num_steps": 32, "num_minibatches": 8, "widths": (128, 128), "activation": "relu"}

PUBLISHED = {
    "brax/*": Settings(50_000_000, BRAX, BRAX_PPO),
    "brax/halfcheetah": Settings(50_000_000, BRAX | {"num_epochs": 8}, BRAX_PPO | {"discount": 0.95}),
    "brax/humanoid*": Settings(50_000_000, BRAX | {"num_epochs": 8}, BRAX_PPO | {"entropy_coefficient": 1e-3}),
    "brax/pusher": Settings(50_000_000, BRAX | {"num_epochs": 8}, BRAX_PPO | {"discount": 0.95}),
    "playground/*": Settings(60_000_000, CONTROL, CONTROL_PPO),
    "playground/BallInCup": Settings(60_000_000, CONTROL, CONTROL_PPO | {"discount": 0.95}),
    "playground/FingerSpin": Settings(60_000_000, CONTROL, CONTROL_PPO | {"discount": 0.95}),
    "playground/*Joystick*": Settings(200_000_000, ROBOT, ROBOT_PPO),
    "playground/Go1Getup": Settings(50_000_000, ROBOT, ROBOT_PPO),
    "playground/Go1*stand": Settings(100_000_000, ROBOT, ROBOT_PPO),
    "playground/Spot*": Settings(100_000_000, ROBOT, ROBOT_PPO),
    "craftax/*": Settings(
        1_000_000_000, CRAFTAX, {"learning_rate": 2e-4, "gae_lambda": 0.8, "max_grad_norm": 1.0}
    ),
    "navix/*": Settings(1_000_000, {"num_envs": 16, "num_minibatches": 8, "num_epochs": 1}, {}),
    "xland/*": Settings(
        1_000_000_000,
        {
            "num_envs": 8192, "num_steps": 256, "num_epochs": 1, "num_minibatches": 16, "segment_length": 256,
            "memory": "gru", "memory_width": 1024, "widths": (256,),
        },
        {"learning_rate": 1e-3},
    ),
    "xland/MiniGrid-*": Settings(1_000_000, {"num_envs": 128, "num_steps": 64, "num_minibatches": 8}, {}),
    "jumanji/*": Settings(100_000_000, JUMANJI, {}),
    "pgx/*": Settings(
        20_000_000, {"num_envs": 4096, "num_epochs": 3, "num_minibatches": 128},
        {"learning_rate": 3e-4, "discount": 0.999},
    ),
}  # fmt: skip
