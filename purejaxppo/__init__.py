"""Proximal Policy Optimization as pure JAX functions, compiled end to end."""

from purejaxppo.config import Config, Hyperparams, linear
from purejaxppo.distributions import Categorical, MultiCategorical, Normal, TanhNormal
from purejaxppo.envs import Box, Discrete, Env, MultiDiscrete, Step, check_env, make_env, time_limit
from purejaxppo.networks import Network, from_linen, from_nnx
from purejaxppo.ppo import PPO, TrainState, make_ppo
from purejaxppo.sweep import batched, grid, runs
