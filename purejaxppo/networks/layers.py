"""The layers of actor-critics, as flax modules; inside them features come first, in columns [F, M].

With rows of features a CPU takes up to twice as long for the gradients of the weights.
"""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from purejaxppo.envs.base import flatten_observation
from purejaxppo.networks.orthogonal import orthogonal

MIN_LOG_STD, MAX_LOG_STD = -20.0, 20.0


class Dense(nn.Module):
    """An affine map of features, from columns [F, M] to columns [width, M]; the weight is [width, F]."""

    width: int
    scale: float
    bias_init: Callable = nn.initializers.zeros

    @nn.compact
    def __call__(self, columns):
        weight = self.param("weight", orthogonal(self.scale), (self.width, len(columns)))
        bias = self.param("bias", self.bias_init, (self.width,), jnp.float32)
        return affine(weight, bias, columns)


def affine(weight, bias, columns):
    """weight @ columns + bias, both in the precision of products, from columns [F, M] to columns [width, M]."""
    # Added as a product, the bias has a gradient that is a product too: a CPU sums along columns several times slower.
    ones = jnp.ones((1, columns.shape[1]), columns.dtype)
    return weight @ columns + bias[:, None] @ ones


class MLP(nn.Module):
    """Dense layers over observations [..., *shape] of a space, flattened: columns [width, M]."""

    widths: tuple[int, ...]
    activation: Callable = nn.tanh

    @nn.compact
    def __call__(self, space, obs):
        rows = flatten_observation(space, obs)
        return dense_layers(rows.reshape(-1, rows.shape[-1]).T, self.widths, self.activation)


class CNN(nn.Module):
    """A 3 x 3 convolution of 16 channels, as in MinAtar (Young and Tian, 2019), then dense layers."""

    widths: tuple[int, ...]
    activation: Callable = nn.relu

    @nn.compact
    def __call__(self, space, obs):
        grids = obs.reshape(-1, *obs.shape[-3:]).astype(jnp.float32)
        kernel = self.param("kernel", orthogonal(2**0.5), (3, 3, grids.shape[-1], 16))
        bias = self.param("bias", nn.initializers.zeros, (16,), jnp.float32)
        x = self.activation(convolve(grids, kernel) + bias[None, None, None])
        return dense_layers(x.reshape(x.shape[0], -1).T, self.widths, self.activation)


def dense_layers(columns, widths, activation):
    """Dense layers with an activation behind each; to be called inside a flax module."""
    for width in widths:
        columns = activation(Dense(width, 2**0.5)(columns))
    return columns


def convolve(grids, kernel):
    """Grids [M, height, width, channels] convolved with a kernel [3, 3, channels, features], without padding."""

    def convolution(grids, kernel):
        return jax.lax.conv_general_dilated(grids, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def product(grids, kernel):
        height, width = grids.shape[1] - 2, grids.shape[2] - 2
        shifted = [grids[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
        return jnp.concatenate(shifted, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])

    # XLA's gradient of a convolution is several times slower than that of a product on a CPU.
    return jax.lax.platform_dependent(grids, kernel, cpu=product, default=convolution)


class GRU(nn.Module):
    """A gated recurrent unit (Cho et al., 2014) whose memory is emptied before every step that begins an episode."""

    width: int

    @nn.compact
    def __call__(self, memory, columns, first):
        def step(cell, memory, inputs):
            features, first = inputs
            return cell(jnp.where(first[:, None], 0, memory), features)

        cell = nn.GRUCell(self.width, kernel_init=orthogonal(), recurrent_kernel_init=orthogonal())
        scan = nn.scan(step, variable_broadcast="params", split_rngs={"params": False})
        memory, features = scan(cell, memory, (columns.T.reshape(*first.shape, -1), first))
        return memory, features.reshape(-1, self.width).T


class Logits(nn.Module):
    """A last layer of small weights: the first policy is nearly uniform."""

    size: int
    distribution: Callable

    @nn.compact
    def __call__(self, columns, batch_shape):
        logits = Dense(self.size, 0.01, name="logits")(columns)
        return self.distribution(to_rows(logits, batch_shape))


class Gaussian(nn.Module):
    """Mean and deviation per dimension; the deviation is a parameter, or an output where it depends on the state."""

    size: int
    distribution: Callable
    initial_std: float
    state_dependent_std: bool

    @nn.compact
    def __call__(self, columns, batch_shape):
        loc = to_rows(Dense(self.size, 0.01, name="loc")(columns), batch_shape)
        start = nn.initializers.constant(math.log(self.initial_std))
        if self.state_dependent_std:
            log_std = to_rows(Dense(self.size, 0.01, start, name="log_std")(columns), batch_shape)
        else:
            log_std = jnp.broadcast_to(self.param("log_std", start, (self.size,), jnp.float32), loc.shape)
        return self.distribution(loc, jnp.exp(jnp.clip(log_std, MIN_LOG_STD, MAX_LOG_STD)))


def to_rows(columns, batch_shape):
    """Columns [F, T * B] as rows [T, B, F]."""
    # Without the barrier XLA folds the gradient's transpose into the product behind it: ten times slower on a CPU.
    return jax.lax.optimization_barrier(columns).T.reshape(*batch_shape, len(columns))
