"""Actor-critic networks over sequences; the only module that knows flax.

A network reads observations [T, B, ...] with flags `first` [T, B] that mark where an episode begins, from a memory
that a feed-forward network leaves empty: one path for both.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from purejaxppo.config import Config
from purejaxppo.distributions import Categorical, MultiCategorical, Normal, TanhNormal
from purejaxppo.envs.base import Box, Discrete, MultiDiscrete, flatten_observation
from purejaxppo.orthogonal import orthogonalize

MIN_LOG_STD, MAX_LOG_STD = -20.0, 20.0


class Network(NamedTuple):
    """Three pure functions; anything that offers them is a network."""

    initial_memory: Callable  # batch -> memory, leaves [B, ...]; () for feed-forward
    init: Callable  # key, memory, obs [T, B, ...], first [T, B] -> params
    apply: Callable  # params, memory, obs [T, B, ...], first [T, B] -> memory, distribution, value [T, B]


def make_network(config: Config, observation_space, action_space) -> Network:
    """The network that `config` describes for these spaces.

    Raises ValueError where they do not fit: a `cnn` on what is no grid, `tanh` on what has no bounds.
    """
    _check_fit(config, observation_space, action_space)
    activation = {"tanh": nn.tanh, "relu": nn.relu}[config.activation]
    module = ActorCritic(
        observation_space=observation_space,
        head=make_head(config, action_space),
        encoder=lambda: {"mlp": MLP, "cnn": CNN}[config.encoder](config.widths, activation),
        memory=(lambda: GRU(config.gru_width)) if config.gru_width else None,
        share_encoder=config.share_encoder,
    )
    num_trunks = 1 if config.share_encoder else 2

    def init(key, memory, obs, first):
        return orthogonalize(key, module.init(key, memory, obs, first))

    def initial_memory(batch):
        return (jnp.zeros((batch, config.gru_width)),) * num_trunks if config.gru_width else ()

    return Network(initial_memory=initial_memory, init=init, apply=module.apply)


def as_network(network) -> Network:
    """A network as it is, or made of a flax linen module. Raises ValueError for anything else."""
    if isinstance(network, nn.Module):
        return from_linen(network)
    if all(callable(getattr(network, name, None)) for name in Network._fields):
        return network
    raise ValueError(
        f"network={network!r} must be a Network, a flax linen module, or from_nnx(build) of a function that builds "
        "an nnx module"
    )


def from_linen(module: nn.Module) -> Network:
    """A network of a flax linen module that maps observations [B, ...] to (distribution, value [B])."""
    return _feed_forward(lambda key, obs: module.init(key, obs), module.apply)


def from_nnx(build: Callable) -> Network:
    """A network of a flax nnx module, given as the function from `nnx.Rngs` that builds it.

    The module maps observations [B, ...] to (distribution, value [B]) and has no variables but `nnx.Param`s.
    """
    from flax import nnx

    graph, _ = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))), nnx.Param)

    return _feed_forward(
        lambda key, obs: nnx.to_pure_dict(nnx.split(build(nnx.Rngs(key)), nnx.Param)[1]),
        lambda params, obs: nnx.merge(graph, nnx.State(params))(obs),
    )


def _feed_forward(init, apply) -> Network:
    """A network of two functions over one batch axis: init(key, obs) and apply(params, obs)."""

    def flat(obs):
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), obs)

    def init_sequences(key, memory, obs, first):
        return init(key, flat(obs))

    def apply_sequences(params, memory, obs, first):
        outputs = apply(params, flat(obs))
        return memory, *jax.tree.map(lambda x: x.reshape(*first.shape, *x.shape[1:]), outputs)

    # One run after another: a user's initialiser may call LAPACK, which must not run vmapped on a small thread pool.
    init_sequences = jax.custom_batching.sequential_vmap(init_sequences)
    return Network(initial_memory=lambda batch: (), init=init_sequences, apply=apply_sequences)


class Dense(nn.Module):
    """An affine map of features, from columns [F, M] to columns [width, M]; the weight is [width, F].

    Features come first inside the networks: with rows of features a CPU takes up to twice as long for the gradients
    of the weights. All modules here fill their weights with a scale, which `orthogonalize` turns into matrices: a
    module of your own that uses them has to do so too, or all units stay alike.
    """

    width: int
    scale: float
    bias_init: Callable = nn.initializers.zeros

    @nn.compact
    def __call__(self, columns):
        weight = self.param("weight", nn.initializers.constant(self.scale), (self.width, len(columns)), jnp.float32)
        bias = self.param("bias", self.bias_init, (self.width,), jnp.float32)
        return affine(weight, bias, columns)


def affine(weight, bias, columns):
    """weight @ columns + bias, both in the precision of products, from columns [F, M] to columns [width, M]."""
    # Added as a product, the bias has a gradient that is a product too: a CPU sums along columns several times slower.
    ones = jnp.ones((1, columns.shape[1]), columns.dtype)
    return weight @ columns + bias[:, None] @ ones


class ActorCritic(nn.Module):
    """Encoder, then memory if any, then heads; actor and critic apart unless `share_encoder`."""

    observation_space: Any
    head: Callable  # makes the module (columns, (T, B)) -> a distribution [T, B]
    encoder: Callable  # makes the module (space, obs [T, B, ...]) -> columns of features [F, T * B]
    memory: Callable | None = None  # makes the module (memory, columns, first) -> memory, columns
    share_encoder: bool = False

    @nn.compact
    def __call__(self, memory, obs, first):
        read = self.observation_space, obs, first
        memories = memory or (None, None)
        actor_memory, actor = Trunk(self.encoder, self.memory, name="actor")(memories[0], *read)
        critic_memory, critic = actor_memory, actor
        if not self.share_encoder:
            critic_memory, critic = Trunk(self.encoder, self.memory, name="critic")(memories[1], *read)
        value = Dense(1, 1.0, name="value")(critic).reshape(first.shape)
        if memory:
            memory = (actor_memory,) if self.share_encoder else (actor_memory, critic_memory)
        return memory, self.head()(actor, first.shape), value


class Trunk(nn.Module):
    """From observations to features, with a memory on the way if there is one."""

    encoder: Callable
    memory: Callable | None

    @nn.compact
    def __call__(self, memory, space, obs, first):
        features = self.encoder()(space, obs)
        return (memory, features) if self.memory is None else self.memory()(memory, features, first)


class MLP(nn.Module):
    """Dense layers over the flattened observation."""

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
        kernel = self.param("kernel", nn.initializers.constant(2**0.5), (3, 3, grids.shape[-1], 16), jnp.float32)
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

        cell = nn.GRUCell(self.width, kernel_init=nn.initializers.ones, recurrent_kernel_init=nn.initializers.ones)
        scan = nn.scan(step, variable_broadcast="params", split_rngs={"params": False})
        memory, features = scan(cell, memory, (columns.T.reshape(*first.shape, -1), first))
        return memory, features.reshape(-1, self.width).T


def make_head(config: Config, space) -> Callable:
    """Makes the module that turns columns of features into a distribution [T, B] over the actions of a space."""
    if isinstance(space, Discrete):
        return lambda: Logits(space.n, Categorical)
    if isinstance(space, MultiDiscrete):
        return lambda: Logits(sum(space.sizes), lambda logits: MultiCategorical(logits, space.sizes))
    distribution = TanhNormal if config.bound_action == "tanh" else Normal
    size = int(np.prod(space.shape))
    return lambda: Gaussian(size, distribution, config.initial_std, config.state_dependent_std)


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


def _check_fit(config, observation_space, action_space):
    if config.encoder == "cnn" and not (isinstance(observation_space, Box) and len(observation_space.shape) == 3):
        raise ValueError(
            f"encoder='cnn' reads grids [height, width, channels], not {observation_space!r} (try encoder='mlp')"
        )
    if config.encoder == "cnn" and min(observation_space.shape[:2]) < 3:
        raise ValueError(f"encoder='cnn' needs grids of 3 x 3 or more, not {observation_space!r} (try encoder='mlp')")
    if config.bound_action == "tanh" and isinstance(action_space, Box):
        bounds = [b for b in (action_space.low, action_space.high) if not isinstance(b, jax.core.Tracer)]
        if not all(np.isfinite(b).all() for b in map(np.asarray, bounds)):
            raise ValueError(f"bound_action='tanh' needs finite bounds, not {action_space!r} (try bound_action='clip')")
