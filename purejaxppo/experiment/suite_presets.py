"""Presets for suites, as data: name -> (environment steps, fields of `Config`, fields of `Hyperparams`).

Those in `TRIED` learn, some of them little, as tests/benchmarks/scores.json shows. Those in `UNTRIED` are meant for two
CPU cores, but have not been trained yet. Those in `PUBLISHED` are settings that a suite or its baselines publish,
translated but not tried with this package: scaled rewards take the place of scales that are set by hand, and our
networks that of theirs. Names that are not tried may be patterns; the last that matches counts.
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
    "brax/reacher": Settings(1_000_000, PHYSICS, {"learning_rate": 1e-3, "discount": 0.95, "entropy_coefficient": 0.0}),
    "playground/CartpoleBalance": Settings(
        1_000_000, PHYSICS, {"learning_rate": 1e-3, "discount": 0.995, "entropy_coefficient": 0.0}
    ),
    "navix/Navix-Empty-5x5-v0": Settings(50_000, GRID, {"learning_rate": 1e-3}),
    "navix/Navix-DoorKey-5x5-v0": Settings(300_000, GRID, {"learning_rate": 1e-3}),
    "xland/MiniGrid-Empty-5x5": Settings(50_000, GRID, {"learning_rate": 1e-3}),
    "jumanji/Snake-v1": Settings(1_000_000, BOARD, {"learning_rate": 1e-3}),
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
UNTRIED = {
    "brax/hopper": Settings(1_000_000, PHYSICS, {"learning_rate": 5e-4, "entropy_coefficient": 0.0}),
    "brax/walker2d": Settings(1_000_000, PHYSICS, {"learning_rate": 5e-4, "entropy_coefficient": 0.0}),
    "brax/swimmer": Settings(1_000_000, PHYSICS, {"learning_rate": 5e-4, "entropy_coefficient": 0.0}),
    "jumanji/*": Settings(1_000_000, BOARD, {"learning_rate": 1e-3}),
    "xland/MiniGrid-*": Settings(1_000_000, GRID, {"learning_rate": 1e-3}),
    "xland/MiniGrid-Memory*": Settings(
        5_000_000, GRID | {"num_envs": 64, "memory": "gru", "segment_length": 64}, {"learning_rate": 1e-3}
    ),
    "pgx/2048": Settings(1_000_000, BOARD | {"scale_reward": True}, {"learning_rate": 1e-3, "discount": 0.997}),
}

# google/brax, notebooks/training.ipynb: batches of trajectories of 5 to 50 steps, here one rollout of as many steps.
BRAX = NORMALIZED | {"num_envs": 2048, "num_epochs": 4, "num_minibatches": 32, "stagger": 1000}
BRAX_PPO = {
    "learning_rate": 3e-4, "learning_rate_annealing": 0.0, "discount": 0.97, "clip": 0.3, "max_grad_norm": 1e9,
}  # fmt: skip
# mujoco_playground/config, dm_control_suite_params.py, locomotion_params.py and manipulation_params.py.
DM_CONTROL = BRAX | {"num_steps": 480, "num_epochs": 16}
DM_CONTROL_PPO = BRAX_PPO | {"learning_rate": 1e-3, "discount": 0.995}
ROBOT = BRAX | {"num_envs": 8192, "num_steps": 20, "widths": (512, 256, 128)}
ROBOT_PPO = BRAX_PPO | {"max_grad_norm": 1.0}
HUMANOID_PPO = ROBOT_PPO | {"clip": 0.2, "entropy_coefficient": 5e-3}
ARM = BRAX | {"num_steps": 80, "num_epochs": 8, "widths": (32, 32, 32, 32)}
ARM_PPO = BRAX_PPO | {"learning_rate": 1e-3, "entropy_coefficient": 0.02}
HAND = ROBOT | {"num_steps": 40}
# MichaelTMatthews/Craftax_Baselines, ppo.py.
CRAFTAX = {"num_envs": 1024, "num_steps": 64, "num_minibatches": 8, "widths": (512, 512, 512)}

PUBLISHED = {
    "brax/ant": Settings(50_000_000, BRAX | {"num_envs": 4096, "num_steps": 80}, BRAX_PPO),
    "brax/halfcheetah": Settings(
        50_000_000, BRAX | {"num_steps": 160, "num_epochs": 8},
        BRAX_PPO | {"discount": 0.95, "entropy_coefficient": 1e-3},
    ),
    "brax/humanoid": Settings(
        50_000_000, BRAX | {"num_steps": 160, "num_epochs": 8}, BRAX_PPO | {"entropy_coefficient": 1e-3}
    ),
    "brax/humanoidstandup": Settings(
        100_000_000, BRAX | {"num_steps": 240, "num_epochs": 8}, BRAX_PPO | {"learning_rate": 6e-4}
    ),
    "brax/pusher": Settings(
        50_000_000, BRAX | {"num_steps": 120, "num_epochs": 8, "num_minibatches": 16}, BRAX_PPO | {"discount": 0.95}
    ),
    "brax/inverted_double_pendulum": Settings(20_000_000, BRAX | {"num_steps": 80}, BRAX_PPO),
    "playground/*": Settings(60_000_000, DM_CONTROL, DM_CONTROL_PPO),
    "playground/Acrobot*": Settings(100_000_000, DM_CONTROL, DM_CONTROL_PPO),
    "playground/SwimmerSwimmer6": Settings(100_000_000, DM_CONTROL, DM_CONTROL_PPO),
    "playground/WalkerRun": Settings(100_000_000, DM_CONTROL, DM_CONTROL_PPO),
    "playground/BallInCup": Settings(60_000_000, DM_CONTROL, DM_CONTROL_PPO | {"discount": 0.95}),
    "playground/FingerSpin": Settings(60_000_000, DM_CONTROL, DM_CONTROL_PPO | {"discount": 0.95}),
    "playground/*Gait*": Settings(100_000_000, ROBOT | {"widths": (128,) * 4}, ROBOT_PPO),
    "playground/*Joystick": Settings(100_000_000, ROBOT | {"widths": (128,) * 4}, ROBOT_PPO),
    "playground/Spot*": Settings(100_000_000, ROBOT | {"widths": (128,) * 4}, ROBOT_PPO),
    "playground/*JoystickFlatTerrain": Settings(200_000_000, ROBOT, HUMANOID_PPO),
    "playground/*JoystickRoughTerrain": Settings(200_000_000, ROBOT, HUMANOID_PPO),
    "playground/Berkeley*": Settings(150_000_000, ROBOT, HUMANOID_PPO),
    "playground/Go1Joystick*": Settings(200_000_000, ROBOT, ROBOT_PPO),
    "playground/Go1Getup": Settings(50_000_000, ROBOT, ROBOT_PPO),
    "playground/Go1*stand": Settings(100_000_000, ROBOT, ROBOT_PPO),
    "playground/PandaPickCube*": Settings(20_000_000, ARM, ARM_PPO),
    "playground/PandaPickCubeCartesian": Settings(
        5_000_000, ARM | {"num_envs": 1024, "num_steps": 20, "num_minibatches": 8, "widths": (256, 256)},
        BRAX_PPO | {"learning_rate": 5e-4, "entropy_coefficient": 7.5e-3, "max_grad_norm": 1.0},
    ),
    "playground/PandaOpenCabinet": Settings(40_000_000, ARM, ARM_PPO),
    "playground/PandaRobotiqPushCube": Settings(
        1_800_000_000, ARM | {"num_envs": 8192, "num_steps": 200, "widths": (64,) * 4},
        BRAX_PPO | {"learning_rate": 6e-4, "discount": 0.994},
    ),
    "playground/AlohaHandOver": Settings(
        100_000_000, ARM | {"num_steps": 120, "widths": (256,) * 3}, ARM_PPO | {"max_grad_norm": 1.0}
    ),
    "playground/AlohaSinglePegInsertion": Settings(
        150_000_000, ARM | {"num_envs": 1024, "num_steps": 640, "widths": (256,) * 4}, BRAX_PPO
    ),
    "playground/LeapCubeReorient": Settings(200_000_000, HAND, BRAX_PPO | {"discount": 0.99}),
    "playground/LeapCubeRotateZAxis": Settings(100_000_000, HAND, BRAX_PPO),
    "playground/AeroCubeRotateZAxis": Settings(300_000_000, HAND, BRAX_PPO),
    "craftax/*": Settings(
        1_000_000_000, CRAFTAX, {"learning_rate": 2e-4, "gae_lambda": 0.8, "max_grad_norm": 1.0}
    ),
    "navix/*": Settings(1_000_000, {"num_envs": 16, "num_minibatches": 8, "num_epochs": 1}, {}),
    "xland/*": Settings(
        1_000_000_000,
        {
            "num_envs": 16384, "num_steps": 256, "num_epochs": 1, "num_minibatches": 16, "segment_length": 256,
            "memory": "gru", "memory_width": 1024, "widths": (256,), "memory_inputs": True,
        },
        {"learning_rate": 1e-3},
    ),
    "pgx/minatar-*": Settings(
        20_000_000, {"num_envs": 4096, "num_epochs": 3, "num_minibatches": 128}, {"learning_rate": 3e-4}
    ),
}  # fmt: skip
