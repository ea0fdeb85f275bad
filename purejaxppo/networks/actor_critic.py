"""The package's own network: an actor-critic that `Config` describes."""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from purejaxppo.config import Config
from purejaxppo.envs.base import Box, Discrete, MultiDiscrete
from purejaxppo.envs.roles import has_privileged, mask_of, seen_by
from purejaxppo.networks.distributions import Categorical, JointCategorical, MultiCategorical, Normal, TanhNormal
from purejaxppo.networks.layers import CNN, MLP, Dense, Gaussian, Logits, is_grid, to_columns
from purejaxppo.networks.memories import MEMORIES
from purejaxppo.networks.network import Network, draw_orthogonal, respect_mask
from purejaxppo.platforms import map_each


def make_network(config: Config, observation_space: Any, action_space: Any) -> Network:
    """The network that `config` describes for these spaces.

    Raises ValueError if they do not fit: `cnn` for observations without a grid, a shared encoder for privileged parts.
    """
    _check_fit(config, observation_space)
    activation = {"tanh": nn.tanh, "relu": nn.relu}[config.activation]
    encoder = {"mlp": MLP, "cnn": CNN}[config.encoder]
    module = ActorCritic(
        observation_space=observation_space,
        head=make_head(config, action_space, mask_of(observation_space)),
        encoder=lambda: encoder(config.widths, activation, as_columns=True),
        memory=(lambda: MEMORIES[config.memory](config.memory_width)) if config.memory else None,
        share_encoder=config.share_encoder,
    )
    num_trunks = 1 if config.share_encoder else 2

    def initial_memory(batch: int):
        return (MEMORIES[config.memory](config.memory_width).empty(batch),) * num_trunks if config.memory else ()

    network = Network(initial_memory=initial_memory, init=draw_orthogonal(module.init), apply=module.apply)
    return respect_mask(network, observation_space)


def make_head(config: Config, space: Any, mask: Any = None) -> Callable:
    """Makes the module that maps features [T, B, F] to a distribution [T, B] over the actions of a space."""
    if isinstance(space, Discrete):
        return lambda: Logits(space.n, Categorical)
    if isinstance(space, MultiDiscrete) and mask is not None and mask.shape == space.sizes:
        return lambda: Logits(math.prod(space.sizes), lambda logits: JointCategorical(logits, space.sizes))
    if isinstance(space, MultiDiscrete):
        return lambda: Logits(sum(space.sizes), lambda logits: MultiCategorical(logits, space.sizes))
    distribution = TanhNormal if config.bound_action == "tanh" else Normal
    size = int(np.prod(space.shape))
    return lambda: Gaussian(size, distribution, config.initial_std, config.state_dependent_std)


def _check_fit(config, observation_space):
    if config.share_encoder and has_privileged(observation_space):
        raise ValueError(
            "share_encoder=True shares what the actor and the critic read, but the observations have privileged parts, "
            "which only the critic may read (try share_encoder=False)"
        )
    parts = jax.tree.leaves(seen_by(observation_space, observation_space, critic=False)[0])
    if config.encoder != "cnn" or any(map(is_grid, parts)):
        return
    if len(parts) == 1 and isinstance(parts[0], Box) and len(parts[0].shape) == 3:
        raise ValueError(f"encoder='cnn' needs grids of 3 x 3 or more, not {observation_space!r} (try encoder='mlp')")
    raise ValueError(
        f"encoder='cnn' reads grids [height, width, channels], not {observation_space!r} (try encoder='mlp')"
    )


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

        def reader(space: Any):
            def read(own: tuple, obs: Any, first: jax.Array):
                params, memory = own
                return trunk.apply({"params": params}, memory, space, obs, first)

            return read

        names, own, seen = ("actor",) if self.share_encoder else ("actor", "critic"), [], []
        for name, kept in zip(names, memory or ((),) * len(names)):
            seen.append(seen_by(self.observation_space, obs, critic=name == "critic"))
            start = lambda key, kept, seen: trunk.init(key, kept, *seen, first)["params"]
            own.append((self.param(name, start, kept, seen[-1]), kept))
        if has_privileged(self.observation_space):  # the trunks read different parts
            read = [reader(space)(x, part, first) for x, (space, part) in zip(own, seen)]
        else:
            read = map_each(reader(seen[0][0]), own, seen[0][1], first)
        after, features = zip(*read)
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
