"""Environments as pairs of pure functions, and the spaces of their actions and observations."""

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from purejaxppo.checks import check_whole
from purejaxppo.text import count, quote, shorten


class Step(NamedTuple):
    """The result of one step of one environment; state and observation are those reached, before any reset.

    A simulation that fails may end its episode on nan: in a step that ends an episode, a reward or a metric that is nan
    counts as 0, and a state whose observation holds a nan has value 0, whichever flag is set. In any other step a nan
    stops the run.
    """

    state: Any
    obs: Any
    reward: jax.Array  # []
    terminated: jax.Array  # [] bool: the task ended, and the state has value 0
    truncated: jax.Array  # [] bool: the time ran out, and the state still has a value
    metrics: dict[str, jax.Array] = {}  # numbers []; reported as means over all steps
    episode_metrics: dict[str, jax.Array] = {}  # numbers []; reported as means over the last steps of episodes


def count_lost_as_zero(done: jax.Array, x: jax.Array) -> jax.Array:
    """A reward or a metric of a `Step`, 0 where it is nan in one that ends an episode."""
    return jnp.where(done & jnp.isnan(x), 0, x)


class Env(NamedTuple):
    """One environment, without a batch axis; it never resets itself."""

    reset: Callable  # key, params -> state, obs
    step: Callable  # key, state, action, params -> Step
    params: Any  # pytree of numbers, traced; () for none
    action_space: Any  # a space, or params -> space if its bounds depend on the parameters
    observation_space: Any = None  # a space or a dictionary of spaces, some of which may have a role (`ActionMask`,
    # `privileged`); None: unbounded boxes shaped like `reset`'s
    name: str = "environment"

    def __repr__(self) -> str:
        params = count(len(jax.tree.leaves(self.params)), "parameter")
        actions = _shown(lambda: action_space(self, self.params))
        observations = _shown(lambda: observation_space(self))
        return f"Env {self.name!r}: actions {actions}, observations {observations}, {params}"


def _shown(space_of: Callable[[], Any]) -> str:
    """A space as short text, also of an environment whose functions fail."""
    try:
        return shorten(space_of(), 60)
    except Exception as error:  # of any kind: the functions are the user's
        return f"unknown ({type(error).__name__})"


def read_box(space: "Box", x: jax.Array) -> jax.Array:
    """Numbers [..., *shape] of a Box as float32; those of an image of uint8 are divided by `image_scale`."""
    x, scale = x.astype(jnp.float32), image_scale(space, x.dtype)
    return x if scale == 1 else x / scale


def image_scale(space: "Box", dtype: Any) -> float:
    """The largest number of an image: the upper bound of its space if there is one, else 255.

    An image is an array of uint8 with two axes or more. For anything else the scale is 1.
    """
    if dtype != jnp.uint8 or len(space.shape) < 2:
        return 1.0
    high = float(np.max(space.high))
    return high if 0 < high < np.inf else 255.0


class _Part:
    """A space of one array."""

    privileged = False

    def __repr__(self) -> str:
        return f"privileged({self._text()})" if self.privileged else self._text()

    def _text(self) -> str:
        raise NotImplementedError


class Discrete(_Part):
    """The integers 0 .. n - 1."""

    def __init__(self, n: int):
        self.n, self.shape = check_whole("n", n), ()

    def _text(self) -> str:
        return f"Discrete({self.n})"


class MultiDiscrete(_Part):
    """Arrays of integers: an entry where `sizes` holds n is one of 0 .. n - 1.

    A vector of choices has sizes [K]; a grid of categories, such as a board, has sizes [height, width] or
    [height, width, K].
    """

    def __init__(self, sizes: Any):
        shaped = np.atleast_1d(np.asarray(sizes))
        self.sizes = tuple(check_whole("sizes", n) for n in shaped.reshape(-1))  # of the entries one after the other
        if not self.sizes:
            raise ValueError("sizes=[] of a MultiDiscrete space must hold a number of choices for each entry")
        self.shape = shaped.shape

    def _text(self) -> str:
        if len(self.shape) == 1:
            return f"MultiDiscrete({list(self.sizes)})"
        return f"MultiDiscrete(<{' x '.join(map(str, self.shape))} sizes of up to {max(self.sizes)}>)"


class ActionMask(_Part):
    """Arrays of bool that say which actions are allowed, as a part of a dictionary of observations.

    Its shape is (n,) for actions of `Discrete(n)`. For those of `MultiDiscrete(sizes)` it is (sum(sizes),), which
    allows the choices of each entry whatever the others are, or `sizes`, which allows combinations. Where nothing is
    allowed, as on a lost board, everything is.
    """

    def __init__(self, shape: Sequence[int]):
        if np.ndim(shape) != 1 or not len(shape):
            raise ValueError(f"shape={quote(shape)} of an ActionMask must be a sequence of whole numbers, such as (4,)")
        self.shape = tuple(check_whole("shape", size) for size in shape)

    def _text(self) -> str:
        return f"ActionMask({self.shape})"


class Box(_Part):
    """Arrays of one shape between `low` and `high`, which are numbers or arrays, perhaps infinite or traced."""

    def __init__(self, low: Any = -np.inf, high: Any = np.inf, shape: Sequence[int] = (), dtype: Any = jnp.float32):
        if np.ndim(shape) != 1:
            raise ValueError(f"shape={quote(shape)} of a Box must be a sequence of whole numbers, such as (3,)")
        self.low, self.high, self.dtype = low, high, jnp.dtype(dtype)
        self.shape = tuple(check_whole("shape", size, at_least=0) for size in shape)

    def _text(self) -> str:
        return f"Box({_bound(self.low)}, {_bound(self.high)}, {self.shape}, {self.dtype.name})"


def _bound(bound: Any) -> Any:
    """A bound as it prints: one number where all are equal."""
    if isinstance(bound, Tracer) or not np.ndim(bound):
        return bound
    numbers = np.unique(bound)
    return numbers[0] if len(numbers) == 1 else bound


Space = Discrete | MultiDiscrete | Box


def privileged(space: Any) -> Any:
    """A space of observations, or a dictionary of them, that only the critic reads; acting does without it.

    >>> spaces = {"joints": pjp.Box(shape=(12,)), "terrain": pjp.privileged(pjp.Box(shape=(40,)))}

    Raises ValueError for anything else.
    """

    def mark(part: Space) -> Space:
        if not isinstance(part, Space):
            raise ValueError(f"space={quote(part)} must be a Discrete, a MultiDiscrete, a Box or a dictionary of them")
        part = copy.copy(part)
        part.privileged = True
        return part

    return jax.tree.map(mark, space)


def action_space(env: Env, params: Any) -> Space:
    """The space of actions of `env` under `params`; its kind and shape are static, its bounds may be traced."""
    space: Any = env.action_space(params) if callable(env.action_space) else env.action_space
    return space


def observation_space(env: Env) -> Any:
    """The space of observations of `env`: a space, or nested dictionaries of spaces."""
    if env.observation_space is not None:
        return env.observation_space
    _, obs = jax.eval_shape(env.reset, jax.random.key(0), env.params)
    return jax.tree.map(lambda x: Box(shape=x.shape, dtype=x.dtype), obs)


def in_32_bits(tree: Any) -> Any:
    """Every leaf as an array of a fixed dtype of at most 32 bits.

    A Python number in a state would change its dtype after a step, and in double precision mode the width of some
    leaves of other libraries varies.
    """
    narrow = {jnp.dtype("float64"): jnp.float32, jnp.dtype("int64"): jnp.int32}
    return jax.tree.map(lambda x: jnp.asarray(x, narrow.get(jnp.result_type(x), jnp.result_type(x))), tree)


def flatten_observation(space: Any, obs: Any) -> jax.Array:
    """An observation as one vector of float32 [..., F]: discrete parts one-hot, the parts of dictionaries joined.

    Images of uint8 are scaled to [0, 1].
    """
    parts = [_flatten_part(part, x) for part, x in zip(jax.tree.leaves(space), jax.tree.leaves(obs), strict=True)]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)


def _flatten_part(space: Space, x: jax.Array) -> jax.Array:
    if isinstance(space, Discrete):
        return jax.nn.one_hot(x, space.n, dtype=jnp.float32)
    read = read_categories(space, x) if isinstance(space, MultiDiscrete) else read_box(space, x)
    return read.reshape(*x.shape[: x.ndim - len(space.shape)], -1)


def read_categories(space: MultiDiscrete, x: jax.Array) -> jax.Array:
    """Integers [..., *shape] of a MultiDiscrete space as one-hot vectors of float32.

    The result is [..., C] for a vector, whose entries are joined, and [..., height, width, C] for a grid.
    """
    sizes: np.ndarray = np.asarray(space.sizes).reshape(space.shape)
    if sizes.ndim == 2:
        sizes, x = sizes[..., None], x[..., None]
    channels = sizes.reshape(-1, x.shape[-1]).max(0)  # of a grid: the most in any of its cells
    return jnp.concatenate([jax.nn.one_hot(x[..., i], n, dtype=jnp.float32) for i, n in enumerate(channels)], axis=-1)


def bound_action(action: jax.Array, space: Space, how: str) -> jax.Array:
    """The action that an environment receives for one that a distribution drew.

    A Box action [A] gets the shape of its space and is clipped to the bounds (`how="clip"`) or squashed between them
    (`how="tanh"`). Rollouts store the action as drawn.
    """
    if not isinstance(space, Box):
        return action
    low, high = (jnp.broadcast_to(jnp.asarray(b, action.dtype), space.shape) for b in (space.low, space.high))
    action = action.reshape(space.shape)
    if how == "tanh":
        action = low + (high - low) * (jnp.tanh(action) + 1) / 2
    action = jnp.clip(action, low, high)
    return (jnp.round(action) if jnp.issubdtype(space.dtype, jnp.integer) else action).astype(space.dtype)
