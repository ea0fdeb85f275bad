"""Action distributions: `sample`, `mode`, `log_prob`, `entropy`, `kl`; batch axes lead, the axis of an action is last.

A sample is `from_noise(noise(key))`: noise depends on shapes alone, so a rollout can draw all of it in advance. A
custom distribution may omit `noise`, `from_noise` and `kl`.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

LOG_2PI = float(np.log(2 * np.pi))
# An even grid (the trapezoid rule) is far more accurate at wide deviations than as many Gauss-Hermite nodes.
NODES = np.linspace(-6, 6, 48, dtype=np.float32)
WEIGHTS = np.exp(-(NODES**2) / 2)
WEIGHTS = WEIGHTS / WEIGHTS.sum()


class Drawn(struct.PyTreeNode):
    """A distribution whose samples are a function of noise that does not depend on its parameters."""

    def noise(self, key: jax.Array) -> jax.Array:
        """The randomness of a sample, in the shape that `from_noise` takes."""
        raise NotImplementedError

    def from_noise(self, noise: jax.Array) -> jax.Array:
        """The sample for this noise."""
        raise NotImplementedError

    def sample(self, key: jax.Array) -> jax.Array:
        """Random actions [...], not bounded by any space."""
        return self.from_noise(self.noise(key))


class Categorical(Drawn):
    """One of K choices; a logit of -inf masks its choice."""

    logits: jax.Array  # [..., K]

    def noise(self, key: jax.Array) -> jax.Array:
        """Gumbel noise [..., K]."""
        return jax.random.gumbel(key, (self.logits.size,), jnp.float32).reshape(self.logits.shape)

    def from_noise(self, noise: jax.Array) -> jax.Array:
        """The choice with the largest sum of logit and noise (Gumbel, 1954), [...] int32."""
        return self.replace(logits=self.logits + noise).mode()

    def masked(self, allowed: jax.Array) -> "Categorical":
        """The same distribution over the choices that are allowed, [..., K] bool; over all choices where none is."""
        return self.replace(logits=_mask(self.logits, allowed))

    def mode(self) -> jax.Array:
        """The most likely index, [...] int32."""
        return jnp.argmax(self.logits, axis=-1).astype(jnp.int32)

    def log_prob(self, action: jax.Array) -> jax.Array:
        """Log probability [...] of indices [...] from 0 to K - 1."""
        log_probs = self._log_probs()
        chosen = action[None] == jnp.arange(len(log_probs)).reshape(-1, *(1,) * action.ndim)
        return jax.lax.select(chosen, log_probs, jnp.zeros_like(log_probs)).sum(0)  # without broadcasting

    def entropy(self) -> jax.Array:
        """Entropy in nats, [...]."""
        log_probs = self._log_probs()
        probs = jnp.exp(log_probs)
        return -jnp.where(probs > 0, probs * jnp.where(probs > 0, log_probs, 0), 0).sum(0)

    def kl(self, other: "Categorical") -> jax.Array:
        """Kullback-Leibler divergence KL(self || other) in nats, [...]."""
        log_probs, others = self._log_probs(), other._log_probs()
        possible = jnp.isfinite(log_probs)
        ratio = jnp.where(possible, log_probs, 0) - jnp.where(possible, others, 0)
        return (jnp.exp(log_probs) * ratio).sum(0)

    def _log_probs(self) -> jax.Array:
        """Log probabilities [K, ...]: a CPU vectorises sums over the first axis, but not over a short last axis."""
        return jax.nn.log_softmax(jnp.moveaxis(self.logits, -1, 0), axis=0)


class MultiCategorical(Categorical):
    """Independent choices, the i-th among `sizes[i]`; `logits` [..., sum(sizes)] are those of all choices joined."""

    sizes: tuple[int, ...] = struct.field(pytree_node=False)

    def masked(self, allowed: jax.Array) -> "MultiCategorical":
        """The same distribution over the choices that are allowed, [..., sum(sizes)] bool, for each entry by itself."""
        if allowed.shape[-1] != sum(self.sizes):
            raise ValueError(
                f"a mask of shape {allowed.shape} allows combinations, which MultiCategorical cannot choose among "
                f"(make a JointCategorical of {math.prod(self.sizes)} logits)"
            )
        ends = np.cumsum(self.sizes)[:-1]
        pairs = zip(jnp.split(self.logits, ends, axis=-1), jnp.split(allowed, ends, axis=-1))
        return self.replace(logits=jnp.concatenate([_mask(logits, choices) for logits, choices in pairs], axis=-1))

    def mode(self) -> jax.Array:
        """The most likely indices, [..., len(sizes)] int32."""
        return jnp.stack([choice.mode() for choice in self._choices()], axis=-1)

    def log_prob(self, action: jax.Array) -> jax.Array:
        """Joint log probability [...] of indices [..., len(sizes)]."""
        joint: Any = sum(choice.log_prob(action[..., i]) for i, choice in enumerate(self._choices()))
        return joint

    def entropy(self) -> jax.Array:
        """Joint entropy in nats, [...]."""
        joint: Any = sum(choice.entropy() for choice in self._choices())
        return joint

    def kl(self, other: "MultiCategorical") -> jax.Array:
        """Kullback-Leibler divergence KL(self || other) in nats, [...]."""
        joint: Any = sum(choice.kl(others) for choice, others in zip(self._choices(), other._choices()))
        return joint

    def _choices(self) -> list[Categorical]:
        return [Categorical(x) for x in jnp.split(self.logits, np.cumsum(self.sizes)[:-1], axis=-1)]


class JointCategorical(Categorical):
    """One of all combinations of choices, the i-th among `sizes[i]`; `logits` [..., prod(sizes)]
    in C order.

    Where a mask allows combinations, choices depend on each other.
    """

    sizes: tuple[int, ...] = struct.field(pytree_node=False)

    def masked(self, allowed: jax.Array) -> "JointCategorical":
        """The same distribution over the combinations that are allowed, [..., *sizes] bool; over all where none is."""
        return self.replace(logits=_mask(self.logits, allowed.reshape(self.logits.shape)))

    def mode(self) -> jax.Array:
        """The most likely combination, [..., len(sizes)] int32."""
        return jnp.stack(jnp.unravel_index(super().mode(), self.sizes), axis=-1).astype(jnp.int32)

    def log_prob(self, action: jax.Array) -> jax.Array:
        """Log probability [...] of combinations [..., len(sizes)]."""
        strides = np.cumprod([1, *self.sizes[:0:-1]])[::-1]
        index: Any = sum(action[..., i] * int(stride) for i, stride in enumerate(strides))
        return super().log_prob(index)


def _mask(logits: jax.Array, allowed: jax.Array) -> jax.Array:
    """Logits [..., K], -inf for those that are not allowed, unless none is."""
    return jnp.where(allowed | ~allowed.any(-1, keepdims=True), logits, -jnp.inf)


class Normal(Drawn):
    """Independent Gaussians, joint over the last axis."""

    loc: jax.Array  # [..., A]
    scale: jax.Array  # [..., A], positive

    def noise(self, key: jax.Array) -> jax.Array:
        """Standard normal noise [..., A]."""
        return jax.random.normal(key, (self.loc.size,), jnp.float32).reshape(self.loc.shape)

    def from_noise(self, noise: jax.Array) -> jax.Array:
        """The noise, scaled and shifted, [..., A]."""
        return self.loc + self.scale * noise

    def mode(self) -> jax.Array:
        """The mean, [..., A]."""
        return self.loc

    def log_prob(self, action: jax.Array) -> jax.Array:
        """Joint log density [...] of actions [..., A]."""
        return self._log_density(action).sum(-1)

    def entropy(self) -> jax.Array:
        """Joint entropy in nats, [...]."""
        return (0.5 * (1 + LOG_2PI) + jnp.log(self.scale)).sum(-1)

    def kl(self, other: "Normal") -> jax.Array:
        """Kullback-Leibler divergence KL(self || other) in nats, [...]; the squash does not change it."""
        ratio = self.scale / other.scale
        return (0.5 * (ratio**2 + ((self.loc - other.loc) / other.scale) ** 2 - 1) - jnp.log(ratio)).sum(-1)

    def _log_density(self, action: jax.Array) -> jax.Array:
        return -0.5 * ((action - self.loc) / self.scale) ** 2 - jnp.log(self.scale) - 0.5 * LOG_2PI


class TanhNormal(Normal):
    """Gaussians squashed into (low, high) by tanh, joint over the last axis; `loc` and `scale` are before the squash.

    Actions are represented by their pre-tanh value: `sample` and `mode` return it (the squashed mode is the median of
    the action), and `log_prob` takes it but is the density of the squashed action. So tanh is never inverted, which
    would fail in float32, where tanh(10) is 1.
    """

    low: float | jax.Array = -1.0  # [] or [..., A]
    high: float | jax.Array = 1.0  # [] or [..., A]

    def log_prob(self, action: jax.Array) -> jax.Array:
        """Joint log density [...] of squashed actions, from their pre-tanh values [..., A]."""
        return (self._log_density(action) - self._log_slope(action)).sum(-1)

    def entropy(self) -> jax.Array:
        """Joint entropy of squashed actions in nats, [...], by quadrature: within 2e-4 up to a scale of 5."""
        slopes = jax.vmap(lambda node: self._log_slope(self.loc + self.scale * node))(jnp.asarray(NODES))
        return super().entropy() + jnp.tensordot(jnp.asarray(WEIGHTS), slopes.sum(-1), axes=1)

    def _log_slope(self, action: jax.Array) -> jax.Array:
        """Log derivative of the squash per dimension [..., A], without overflow for large actions."""
        log_sech2 = 2 * (jnp.log(2.0) - action - jax.nn.softplus(-2 * action))
        return log_sech2 + jnp.log((self.high - self.low) / 2)
