"""`Network`, three functions over sequences, and adapters for flax modules.

A network reads observations [T, B, ...] with flags `first` [T, B], which mark where an episode begins, and a memory,
which is () for a feed-forward network: feed-forward and recurrent networks share one path.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.errors import InvalidRngError, ModifyScopeVariableError

from purejaxppo.config import Config
from purejaxppo.dependence import used_leaves
from purejaxppo.envs.base import Box, Discrete, MultiDiscrete, Space
from purejaxppo.envs.errors import place
from purejaxppo.envs.roles import allowed_actions, has_privileged, mask_of
from purejaxppo.networks.distributions import JointCategorical, MultiCategorical
from purejaxppo.networks.orthogonal import orthogonalize
from purejaxppo.text import shorten

PURE = "leave out Dropout and BatchNorm, which need more than params, memory, obs and first; LayerNorm does not"


class Network(NamedTuple):
    """Three pure functions; any object with these three is a network."""

    initial_memory: Callable  # batch -> memory, leaves [B, ...]; () for feed-forward
    init: Callable  # key, memory, obs [T, B, ...], first [T, B] -> params; `Orthogonal` weights may be left to draw
    apply: Callable  # params, memory, obs [T, B, ...], first [T, B] -> memory, distribution, value [T, B]

    def __repr__(self) -> str:
        return f"Network({', '.join(getattr(f, '__qualname__', type(f).__name__) for f in self)})"


def as_network(network: Any) -> Network:
    """A network as it is, or from a flax linen module. Raises ValueError for anything else."""
    if isinstance(network, nn.Module):
        return from_linen(network)
    if all(callable(getattr(network, name, None)) for name in Network._fields):
        return network
    made = " an instance of it, or" if isinstance(network, type) else ""
    raise ValueError(
        f"network={shorten(repr(network))} must be{made} a Network, a flax linen module, or from_nnx(build) of a "
        "function that builds an nnx module"
    )


def from_linen(module: nn.Module) -> Network:
    """A network from a flax linen module that maps observations [B, ...] to (distribution, value [B]).

    Layers of `pjp.layers` in it are initialised as in our own network. Raises ValueError for anything else.
    """
    if not isinstance(module, nn.Module):
        raise ValueError(f"module={shorten(repr(module))} must be an instance of a flax linen module")
    return _feed_forward(draw_orthogonal(lambda key, obs: module.init(key, obs)), module.apply)


def draw_orthogonal(init: Callable) -> Callable:
    """The init of a flax module, with its `Orthogonal` weights drawn."""
    # Flax draws nothing with the key itself, only with keys that it folds names into.
    return lambda key, *args: orthogonalize(key, init(key, *args))


def from_nnx(build: Callable) -> Network:
    """A network from a flax nnx module, given as the function that builds it from `nnx.Rngs`.

    The module maps observations [B, ...] to (distribution, value [B]); its only variables are `nnx.Param`s. Raises
    ValueError for anything else.
    """
    from flax import nnx

    example = "from_nnx(lambda rngs: MyModule(rngs))"
    if isinstance(build, nnx.Module):
        raise ValueError(f"build={type(build).__name__}(...) is a module; give the function that builds it: {example}")
    try:
        module = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
    except TypeError as error:
        raise ValueError(
            f"build={shorten(repr(build))} cannot build a module from nnx.Rngs: {error} ({example})"
        ) from None
    if not isinstance(module, nnx.Module):
        raise ValueError(f"build must return an nnx module, not a {type(module).__name__} ({example})")
    graph, _, others = nnx.split(module, nnx.Param, ...)
    if others:
        kinds = sorted({type(variable).__name__ for _, variable in nnx.to_flat_state(others)})
        raise ValueError(f"the module holds {', '.join(kinds)}, but may only hold nnx.Param ({PURE})")

    return _feed_forward(
        lambda key, obs: nnx.to_pure_dict(nnx.split(build(nnx.Rngs(key)), nnx.Param)[1]),
        lambda params, obs: nnx.merge(graph, nnx.State(params))(obs),
    )


def _feed_forward(init, apply) -> Network:
    """A network from two functions over one batch axis: init(key, obs) and apply(params, obs)."""

    def flat(obs):
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), obs)

    def init_sequences(key, memory, obs, first):
        return init(key, flat(obs))

    def apply_sequences(params, memory, obs, first):
        outputs = apply(params, flat(obs))
        if not isinstance(outputs, tuple) or hasattr(outputs, "log_prob"):
            what = "an array" if isinstance(outputs, jax.Array) else f"a {type(outputs).__name__}"
            raise ValueError(f"the module must return the pair (distribution, value [B]), not {what}")
        return memory, *jax.tree.map(lambda x: x.reshape(*first.shape, *x.shape[1:]) if jnp.ndim(x) else x, outputs)

    return Network(initial_memory=lambda batch: (), init=init_sequences, apply=apply_sequences)


def respect_mask(network: Network, observation_space: Any) -> Network:
    """The network with the action mask of its observations applied to its distribution, if they hold one.

    It keeps all other attributes, which a loss may read; further distributions that they return are not masked. Raises
    ValueError at tracing if the distribution has no `masked`.
    """
    return network if mask_of(observation_space) is None else cast(Network, Masked(network, observation_space))


@dataclass(frozen=True, eq=False)
class Masked:
    """A network whose distribution respects the action mask of its observations."""

    network: Network
    observation_space: Any

    def apply(self, params: Any, memory: Any, obs: Any, first: jax.Array) -> tuple[Any, Any, jax.Array]:
        """The memory, the masked distribution, and the values [T, B]."""
        memory, distribution, value = self.network.apply(params, memory, obs, first)
        if not hasattr(distribution, "masked"):
            raise ValueError(
                f"the observations hold an action mask, but {type(distribution).__name__} has no masked(allowed) (try "
                "Categorical, MultiCategorical or JointCategorical)"
            )
        return memory, distribution.masked(allowed_actions(self.observation_space, obs)), value

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "network"), name)


def check_network(network: Network, obs: Any, observation_space: Any, action_space: Space, config: Config) -> None:
    """Traces a network on two steps of N environments; compiles nothing.

    Args:
        network: to check.
        obs: shapes of one observation, as the network reads it.
        observation_space: of the environment.
        action_space: of the environment.
        config: sizes.

    Raises:
        ValueError: if the network does not fit the observations, the actions, or the segments of the config, or if
            actions depend on privileged parts of the observations.
    """
    num_envs = config.num_envs
    many = jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, num_envs, *x.shape), x.dtype), obs)

    def forward(key, many):
        memory = network.initial_memory(num_envs)
        first = jnp.zeros((2, num_envs), bool)
        params = network.init(key, memory, jax.tree.map(lambda x: x[:1], many), first[:1])
        return memory, network.apply(orthogonalize(key, params), memory, many, first)

    try:
        taken, outputs = jax.eval_shape(forward, jax.random.key(0), many)
    except Exception as error:
        text = str(error).split(" (https://")[0] + place(error)
        remedy = f" ({PURE})" if isinstance(error, (InvalidRngError, ModifyScopeVariableError)) else ""
        raise ValueError(f"network cannot be applied to observations [T, B, ...]: {text}{remedy}") from error
    if not isinstance(outputs, tuple) or len(outputs) != 3:
        what = f"{len(outputs)} values" if isinstance(outputs, tuple) else f"a {type(outputs).__name__}"
        raise ValueError(f"network must return a memory, a distribution and a value, not {what} (leave out the others)")
    given, distribution, value = outputs
    taken, given = (jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", memory) for memory in (taken, given))
    if taken != given:
        raise ValueError(
            f"network must return a memory with the shapes and dtypes of the one that it takes, {taken}, not {given}"
        )
    if jax.tree.leaves(taken) and config.segment_length == 1:
        raise ValueError(
            "segment_length=1 cuts gradients after one step, so a network with a memory cannot learn to remember "
            f"(try segment_length={config.num_steps}, which is num_steps, or a divisor of it)"
        )
    needed = ("sample", "mode", "log_prob", "entropy", *(["noise"] if hasattr(distribution, "from_noise") else []))
    missing = [name for name in needed if not hasattr(distribution, name)]
    if isinstance(distribution, jax.ShapeDtypeStruct):
        raise ValueError(
            f"network must return a distribution and then the value, but the first is an array "
            f"{list(distribution.shape)} (make a distribution of it, such as pjp.Categorical(logits))"
        )
    if missing:
        raise ValueError(f"network must return a distribution, but {type(distribution).__name__} has no {missing[0]}")
    for leaf in jax.tree.leaves(distribution):
        if jnp.ndim(leaf) and leaf.shape[:2] != (2, num_envs):
            raise ValueError(
                f"network must return a distribution over [T, B] = (2, {num_envs}), but {type(distribution).__name__} "
                f"holds an array of shape {leaf.shape} (broadcast it, or make it a scalar)"
            )
    shape = getattr(value, "shape", type(value).__name__)
    if shape != (2, num_envs):
        remedy = " (drop the last axis: value[..., 0])" if shape == (2, num_envs, 1) else ""
        raise ValueError(f"network must return values [T, B] = (2, {num_envs}), not {shape}{remedy}")
    _check_actions(distribution, action_space)
    if has_privileged(observation_space):
        _check_actor(lambda many: forward(jax.random.key(0), many)[1][1], many, observation_space)


def _check_actor(distribution: Callable, obs: Any, space: Any) -> None:
    """Refuses distributions, as a function of observations, that read what only the critic may read."""
    (used,) = used_leaves(distribution, obs)
    for (path, part), is_read in zip(jax.tree.leaves_with_path(space), jax.tree.leaves(used)):
        if part.privileged and is_read:
            raise ValueError(
                f"network computes the distribution of actions from {jax.tree_util.keystr(path)}, which is privileged: "
                "only the value may depend on it"
            )


def _check_actions(distribution: Any, space: Space) -> None:
    """Refuses a distribution over other actions than the environment's."""
    if isinstance(space, Discrete) and hasattr(distribution, "logits") and distribution.logits.shape[-1] != space.n:
        raise ValueError(f"network must choose among {space.n} actions, not {distribution.logits.shape[-1]}")
    if isinstance(space, MultiDiscrete) and isinstance(distribution, (MultiCategorical, JointCategorical)):
        count = sum if isinstance(distribution, MultiCategorical) else math.prod
        sizes, num_logits = tuple(distribution.sizes), distribution.logits.shape[-1]
        if sizes != tuple(space.sizes) or num_logits != count(sizes):
            raise ValueError(
                f"network must return {count(space.sizes)} logits for choices among {tuple(space.sizes)}, "
                f"not {num_logits} for {sizes}"
            )
    action = jax.eval_shape(lambda d, key: d.sample(key)[0, 0], distribution, jax.random.key(0))
    size = (int(np.prod(space.shape)),) if isinstance(space, Box) else space.shape
    if action.shape != size:
        raise ValueError(f"network must return actions of shape {size} for {space!r}, not {action.shape}")
