"""purejaxrl from a checkout, whose folder is on the path: its scripts for discrete and for continuous actions."""

import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import MagicMock

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.initializers import constant, orthogonal

from program import Program, compiled
from works import Work


def prepare(work: Work) -> Program:
    return compiled(*training(work), work.steps)


def training(work: Work) -> tuple[Callable, Callable]:
    """The training of a work, and its arguments for a seed."""
    if work.encoder == "cnn":
        raise SystemExit("this peer does not offer this work")
    config = {
        "LR": work.learning_rate,
        "ANNEAL_LR": False,
        "NUM_ENVS": work.num_envs,
        "NUM_STEPS": work.num_steps,
        "TOTAL_TIMESTEPS": work.num_updates * work.steps_per_update,
        "UPDATE_EPOCHS": work.num_epochs,
        "NUM_MINIBATCHES": work.num_minibatches,
        "GAMMA": work.discount,
        "GAE_LAMBDA": work.gae_lambda,
        "CLIP_EPS": work.clip,
        "ENT_COEF": work.entropy_coefficient,
        "VF_COEF": work.value_coefficient,
        "MAX_GRAD_NORM": work.max_grad_norm,
        "ACTIVATION": "tanh",
        "ENV_NAME": work.env,
        "NORMALIZE_ENV": work.normalize,
        "DEBUG": False,
    }
    script = continuous() if work.normalize else recurrent() if work.recurrent else find_script("ppo")
    train = script.make_train(config)

    def arguments(seed):
        key = jax.random.PRNGKey(seed)
        return (jax.random.split(key, work.num_seeds) if work.num_seeds > 1 else key,)

    return jax.vmap(train) if work.num_seeds > 1 else train, arguments


def find_script(name: str) -> Any:
    """A script of the checkout, whose modules import each other by bare names, and suites that no script here uses."""
    import purejaxrl

    sys.path.append(*purejaxrl.__path__)
    suites = "navix", "brax", "brax.envs", "brax.envs.wrappers", "brax.envs.wrappers.training"
    missing = [suite for suite in ("navix", "brax") if importlib.util.find_spec(suite) is None]
    sys.modules.update({suite: MagicMock() for suite in suites if suite.split(".")[0] in missing})
    return importlib.import_module(name)


def continuous():
    """The script for continuous actions, on an environment of gymnax, with networks of the width that all have here."""
    import gymnax

    script = find_script("ppo_continuous_action")
    script.BraxGymnaxWrapper = lambda name: WithItsParams(*gymnax.make(name))
    script.ActorCritic = ActorCritic
    return script


def recurrent():
    """The recurrent script, with its GRU as today's flax spells it."""
    script = find_script("ppo_rnn")
    script.ScannedRNN = ScannedRNN
    return script


class ScannedRNN(nn.Module):
    """The GRU of the script; in its own, the cell does not say how wide it is, as flax asks today."""

    @partial(nn.scan, variable_broadcast="params", split_rngs={"params": False})
    @nn.compact
    def __call__(self, memory, inputs):
        features, first = inputs
        memory = jnp.where(first[:, None], jnp.zeros_like(memory), memory)
        return nn.GRUCell(features.shape[-1])(memory, features)

    @staticmethod
    def initialize_carry(batch, width):
        return jnp.zeros((batch, width))


class WithItsParams:
    """An environment of gymnax that knows its parameters; the script gives none."""

    def __init__(self, env, params):
        self.env, self.params = env, params

    def reset(self, key, _):
        return self.env.reset(key, self.params)

    def step(self, key, state, action, _):
        return self.env.step(key, state, action, self.params)

    def observation_space(self, _):
        return self.env.observation_space(self.params)

    def action_space(self, _):
        return self.env.action_space(self.params)


class ActorCritic(nn.Module):
    """What the script has, with 64 units instead of 256."""

    size: int
    activation: str

    @nn.compact
    def __call__(self, obs):
        import distrax

        def mlp(out, scale):
            x = obs
            for _ in range(2):
                x = nn.tanh(nn.Dense(64, kernel_init=orthogonal(2**0.5), bias_init=constant(0.0))(x))
            return nn.Dense(out, kernel_init=orthogonal(scale), bias_init=constant(0.0))(x)

        log_std = self.param("log_std", nn.initializers.zeros, (self.size,))
        policy = distrax.MultivariateNormalDiag(mlp(self.size, 0.01), jnp.exp(log_std))
        return policy, mlp(1, 1.0).squeeze(-1)
