"""The package's own network: an actor-critic that `Config` describes."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from purejaxppo.config import Config
from purejaxppo.envs.base import Box, Discrete, MultiDiscrete
from purejaxppo.networks.distributions import Categorical, MultiCategorical, Normal, TanhNormal
from purejaxppo.networks.layers import CNN, MLP, Dense, Gaussian, Logits, to_columns
from purejaxppo.networks.memories import MEMORIES
from purejaxppo.networks.network import Network, draw_orthogonal
from purejaxppo.platforms import map_each


def make_network(config: Config, observation_space: Any, action_space: Any) -> Network:
    """The network that `config` describes for these spaces.

    Raises ValueError if they do not fit: `cnn` for observations that are not grids.
    """
    _check_fit(config, observation_space)
    activation = {"tanh": nn.tanh, "relu": nn.relu}[config.activation]
    encoder = {"mlp": MLP, "cnn": CNN}[config.encoder]
    module = ActorCritic(
        observation_space=observation_space,
        head=make_head(config, action_space),
        encoder=lambda: encoder(config.widths, activation, as_columns=True),
        memory=(lambda: MEMORIES[config.memory](config.memory_width)) if config.memory else None,
        share_encoder=config.share_encoder,
    )
    num_trunks = 1 if config.share_encoder else 2

    def initial_memory(batch: int):
        return (MEMORIES[config.memory](config.memory_width).empty(batch),) * num_trunks if config.memory else ()

    return Network(initial_memory=initial_memory, init=draw_orthogonal(module.init), apply=module.apply)


def make_head(config: Config, space: Any) -> Callable:
    """Makes the module that maps features [T, B, F] to a distribution [T, B] over the actions of a space."""
    if isinstance(space, Discrete):
        return lambda: Logits(space.n, Categorical)
    if isinstance(space, MultiDiscrete):
        return lambda: Logits(sum(space.sizes), lambda logits: MultiCategorical(logits, space.sizes))
    distribution = TanhNormal if config.bound_action == "tanh" else Normal
    size = int(np.prod(space.shape))
    return lambda: Gaussian(size, distribution, config.initial_std, config.state_dependent_std)


def _check_fit(config, observation_space):
    if config.encoder == "cnn" and not (isinstance(observation_space, Box) and len(observation_space.shape) == 3):
        raise ValueError(
            f"encoder='cnn' reads grids [height, width, channels], not {observation_space!r} (try encoder='mlp')"
        )
    if config.encoder == "cnn" and min(observation_space.shape[:2]) < 3:
        raise ValueError(f"encoder='cnn' needs grids of 3 x 3 or more, not {observation_space!r} (try encoder='mlp')")


class ActorCritic(nn.Module):
    """Encoder, memory if any, and heads; actor and critic are separate unless `share_encoder`."""

    observation_space: Any
    head: Callable  # makes the module: features [T, B, F] -> distribution [T, B]
    encoder: Callable  # makes the module: space, obs [T, B, ...] -> features [T, B, F]
    memory: Callable | None = None  # makes the module: memory [B, ...], features, first [T, B] -> memory, features
    share_encoder: bool = False

    @nn.compact
    def __call__(self, memory: Any, obs: Any, first: jax.Array):
        """The memory after observations [T, B, ...], a distribution [T, B] and values [T, B]."""
        trunk = Trunk(self.encoder, self.memory, parent=None)

        def read(own: tuple, obs: Any, first: jax.Array):
            params, memory = own
            return trunk.apply({"params": params}, memory, self.observation_space, obs, first)

        names = ("actor",) if self.share_encoder else ("actor", "critic")
        memories = memory or ((),) * len(names)
        start = lambda key, memory: trunk.init(key, memory, self.observation_space, obs, first)["params"]
        each = [(self.param(name, start, memory), memory) for name, memory in zip(names, memories)]
        after, features = zip(*map_each(read, each, obs, first))
        value = Dense(1, 1.0, name="value")(to_columns(features[-1])).values.reshape(first.shape)
        return after if memory else memory, self.head()(features[0]), value


class Trunk(nn.Module):
    """From observations to features, through a memory if there is one."""

    encoder: Callable
    memory: Callable | None

    @nn.compact
    def __call__(self, memory: Any, space: Any, obs: Any, first: jax.Array):
        """The memory after observations [T, B, ...], and their features [T, B, F]."""
        features = self.encoder()(space, obs)
        return (memory, features) if self.memory is None else self.memory()(memory, features, first)
