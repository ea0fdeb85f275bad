"""Layers for actor-critics, as flax modules over rows of features [..., F].

Inside, features may lie in columns [F, M], since with rows a CPU takes up to twice as long for the gradients of the
weights. `Columns` carries them from one of these layers to the next; every layer here takes both, and returns columns
if it was given columns or made with `as_columns=True`.
"""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from purejaxppo.envs.base import Box, MultiDiscrete, flatten_observation, read_box, read_categories
from purejaxppo.networks.orthogonal import orthogonal
from purejaxppo.platforms import faster_gradient

MIN_LOG_STD, MAX_LOG_STD = -20.0, 20.0


class Columns(struct.PyTreeNode):
    """Rows of features [*shape, F] as columns [F, M], M the product of `shape`."""

    values: jax.Array  # [F, M]
    shape: tuple[int, ...] = struct.field(pytree_node=False)


def to_columns(features: jax.Array | Columns) -> Columns:
    """Rows [..., F] as columns; columns as they are."""
    if isinstance(features, Columns):
        return features
    return Columns(features.reshape(-1, features.shape[-1]).T, features.shape[:-1])


def to_rows(features: jax.Array | Columns) -> jax.Array:
    """Columns as rows [..., F]; rows as they are."""
    if not isinstance(features, Columns):
        return features
    # Without the barrier XLA folds the gradient's transpose into the product behind it: ten times slower on a CPU.
    return jax.lax.optimization_barrier(features.values).T.reshape(*features.shape, len(features.values))


class Dense(nn.Module):
    """An affine map of features with an orthogonal weight [width, F]."""

    width: int
    scale: float
    """Of the orthogonal weight."""
    bias_init: Callable = nn.initializers.zeros

    @nn.compact
    def __call__(self, features: jax.Array | Columns) -> Any:
        """Features [..., width], as columns if they were given so."""
        columns = to_columns(features)
        weight: Any = self.param("weight", orthogonal(self.scale), (self.width, len(columns.values)))
        bias = self.param("bias", self.bias_init, (self.width,), jnp.float32)
        mapped = Columns(affine(weight, bias, columns.values), columns.shape)
        return mapped if isinstance(features, Columns) else to_rows(mapped)


def affine(weight: jax.Array, bias: jax.Array, columns: jax.Array) -> jax.Array:
    """weight @ columns + bias, both in the precision of products, from columns [F, M] to columns [width, M]."""

    def ones(columns):
        return jnp.ones((1, columns.shape[1]), columns.dtype)

    # As a product, the bias has a gradient that is a product too: a CPU sums along columns several times slower.
    def two_products(weight, bias, columns):
        return weight @ columns + bias[:, None] @ ones(columns)

    def one_product(weight, bias, columns):
        return jnp.concatenate([weight, bias[:, None]], axis=1) @ jnp.concatenate([columns, ones(columns)])

    return faster_gradient(two_products, one_product)(weight, bias, columns)


class MLP(nn.Module):
    """Dense layers with an activation behind each, over flattened observations."""

    widths: tuple[int, ...]
    activation: Callable = nn.tanh
    as_columns: bool = False

    @nn.compact
    def __call__(self, space: Any, obs: Any):
        """Features [..., width] of observations [..., *shape] of a space."""
        features = to_columns(flatten_observation(space, obs))
        return _hidden_layers(features, self.widths, self.activation, self.as_columns)


class CNN(nn.Module):
    """A 3 x 3 convolution of 16 channels over every grid, as in MinAtar (Young and Tian, 2019), then dense layers.

    The other parts of a dictionary join the features of the grids.
    """

    widths: tuple[int, ...]
    activation: Callable = nn.relu
    as_columns: bool = False

    @nn.compact
    def __call__(self, space: Any, obs: Any):
        """Features [..., width] of observations [..., *shape] of a space that holds a grid."""
        spaces, parts = jax.tree.leaves(space), jax.tree.leaves(obs)
        shape = parts[0].shape[: parts[0].ndim - len(spaces[0].shape)]
        grids = [read_grid(part, x) for part, x in zip(spaces, parts) if is_grid(part)]
        columns = [self._convolve(grid, f"_{i}" if i else "") for i, grid in enumerate(grids)]
        others = [(part, x) for part, x in zip(spaces, parts) if not is_grid(part)]
        if others:
            columns.append(to_columns(flatten_observation(*map(list, zip(*others)))).values)
        features = Columns(columns[0] if len(columns) == 1 else jnp.concatenate(columns), shape)
        return _hidden_layers(features, self.widths, self.activation, self.as_columns)

    def _convolve(self, grids: jax.Array, suffix: str) -> jax.Array:
        """Features [F, M] of grids [..., height, width, channels]."""
        grids = grids.reshape(-1, *grids.shape[-3:])
        kernel: Any = self.param(f"kernel{suffix}", orthogonal(2**0.5), (3, 3, grids.shape[-1], 16))
        bias = self.param(f"bias{suffix}", nn.initializers.zeros, (16,), jnp.float32)
        x = self.activation(convolve(grids, kernel) + bias[None, None, None])
        return x.reshape(x.shape[0], -1).T


def is_grid(space: Any) -> bool:
    """Whether a space is of grids [height, width, channels], or of integers [height, width], of 3 x 3 or more."""
    axes = {Box: (3,), MultiDiscrete: (2, 3)}.get(type(space), ())
    return len(space.shape) in axes and min(space.shape[:2]) >= 3


def read_grid(space: Any, x: jax.Array) -> jax.Array:
    """Grids [..., height, width, channels] as float32; integers are one-hot."""
    return read_categories(space, x) if isinstance(space, MultiDiscrete) else read_box(space, x)


def _hidden_layers(features: Any, widths: tuple[int, ...], activation: Callable, as_columns: bool):
    """Dense layers with an activation behind each, of the module that calls it."""
    for width in widths:
        features = Dense(width, 2**0.5)(features)
        features = features.replace(values=activation(features.values))
    return features if as_columns else to_rows(features)


def convolve(grids: jax.Array, kernel: jax.Array) -> jax.Array:
    """Grids [M, height, width, channels] convolved with a kernel [3, 3, channels, features], without padding."""

    def convolution(grids, kernel):
        return jax.lax.conv_general_dilated(grids, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def product(grids, kernel):
        height, width = grids.shape[1] - 2, grids.shape[2] - 2
        shifted = [grids[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
        return jnp.concatenate(shifted, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])

    # XLA's gradient of a convolution is several times slower than that of a product on a CPU. For a TPU, XLA compiles
    # large convolutions for minutes.
    return jax.lax.platform_dependent(grids, kernel, cpu=product, tpu=product, default=convolution)


class Logits(nn.Module):
    """A head with small weights, so that the first policy is nearly uniform."""

    size: int
    distribution: Callable  # of logits [..., size]

    @nn.compact
    def __call__(self, features: jax.Array | Columns):
        """A distribution [...] of features [..., F]."""
        return self.distribution(to_rows(Dense(self.size, 0.01, name="logits")(features)))


class Gaussian(nn.Module):
    """A head with a mean and a deviation per dimension; the deviation is a parameter, or an output of the network."""

    size: int
    distribution: Callable  # of loc and scale [..., size]
    initial_std: float
    state_dependent_std: bool

    @nn.compact
    def __call__(self, features: jax.Array | Columns):
        """A distribution [...] of features [..., F]."""
        loc = to_rows(Dense(self.size, 0.01, name="loc")(features))
        start = nn.initializers.constant(math.log(self.initial_std))
        if self.state_dependent_std:
            log_std = to_rows(Dense(self.size, 0.01, start, name="log_std")(features))
        else:
            log_std = jnp.broadcast_to(self.param("log_std", start, (self.size,), jnp.float32), loc.shape)
        return self.distribution(loc, jnp.exp(jnp.clip(log_std, MIN_LOG_STD, MAX_LOG_STD)))
