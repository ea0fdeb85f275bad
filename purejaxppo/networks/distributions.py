"""Action distributions: `sample`, `mode`, `log_prob`, `entropy`, `kl`; batch axes lead, an action's own comes last.

A sample is `place(noise(key))`: noise depends on shapes alone, so that a rollout can draw all of it ahead. A custom
distribution may leave `noise`, `place` and `kl` out.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

LOG_2PI = float(np.log(2 * np.pi))
# An even grid (the trapezoid rule) serves wide deviations far better than as many Gauss-Hermite nodes.
NODES = np.linspace(-6, 6, 48, dtype=np.float32)
WEIGHTS = np.exp(-(NODES**2) / 2)
WEIGHTS = WEIGHTS / WEIGHTS.sum()


class Drawn(struct.PyTreeNode):
    """A distribution whose samples are a function of noise that does not depend on its parameters."""

    def noise(self, key: jax.Array) -> jax.Array:
        """What is random in a sample."""
        raise NotImplementedError

    def place(self, noise: jax.Array) -> jax.Array:
        """The sample that the noise makes."""
        raise NotImplementedError

    def sample(self, key):
        """Actions as drawn, not bounded by any space."""
        return self.place(self.noise(key))


class Categorical(Drawn):
    """One of K choices; a logit of -inf masks its choice."""

    logits: jax.Array  # [..., K]

    def noise(self, key):
        """Gumbel noise [..., K]."""
        return jax.random.gumbel(key, (self.logits.size,), jnp.float32).reshape(self.logits.shape)

    def place(self, noise):
        """The choice that is largest with its noise (Gumbel, 1954), [...] int32."""
        return Categorical(self.logits + noise).mode()

    def mode(self):
        """The likeliest index, [...] int32."""
        return jnp.argmax(self.logits, axis=-1).astype(jnp.int32)

    def log_prob(self, action):
        """Log probability [...] of indices [...] from 0 to K - 1."""
        log_probs = self._log_probs()
        chosen = action[None] == jnp.arange(len(log_probs)).reshape(-1, *(1,) * action.ndim)
        return jax.lax.select(chosen, log_probs, jnp.zeros_like(log_probs)).sum(0)  # which broadcasts nothing

    def entropy(self):
        """Entropy in nats, [...]."""
        log_probs = self._log_probs()
        probs = jnp.exp(log_probs)
        return -jnp.where(probs > 0, probs * jnp.where(probs > 0, log_probs, 0), 0).sum(0)

    def kl(self, other):
        """Kullback-Leibler divergence of this distribution from another, in nats, [...]."""
        log_probs, others = self._log_probs(), other._log_probs()
        possible = jnp.isfinite(log_probs)
        ratio = jnp.where(possible, log_probs, 0) - jnp.where(possible, others, 0)
        return (jnp.exp(log_probs) * ratio).sum(0)

    def _log_probs(self):
        """Of all choices, [K, ...]: sums over a first axis are vectorised on a CPU, those over a short last one not."""
        return jax.nn.log_softmax(jnp.moveaxis(self.logits, -1, 0), axis=0)


class MultiCategorical(Categorical):
    """Independent choices, one of `sizes[i]` each; the logits of all of them in one row, [..., sum(sizes)]."""

    sizes: tuple[int, ...] = struct.field(pytree_node=False)

    def place(self, noise):
        """In each entry the choice that is largest with its noise, [..., len(sizes)] int32."""
        return MultiCategorical(self.logits + noise, self.sizes).mode()

    def mode(self):
        """The likeliest indices, [..., len(sizes)] int32."""
        return jnp.stack([part.mode() for part in self._parts()], axis=-1)

    def log_prob(self, action):
        """Joint log probability [...] of indices [..., len(sizes)]."""
        return sum(part.log_prob(action[..., i]) for i, part in enumerate(self._parts()))

    def entropy(self):
        """Joint entropy in nats, [...]."""
        return sum(part.entropy() for part in self._parts())

    def kl(self, other):
        """Kullback-Leibler divergence of this distribution from another, in nats, [...]."""
        return sum(part.kl(others) for part, others in zip(self._parts(), other._parts()))

    def _parts(self):
        return [Categorical(x) for x in jnp.split(self.logits, np.cumsum(self.sizes)[:-1], axis=-1)]


class Normal(Drawn):
    """Independent Gaussians, joint over the last axis."""

    loc: jax.Array  # [..., A]
    scale: jax.Array  # [..., A], positive

    def noise(self, key):
        """Standard normal noise [..., A]."""
        return jax.random.normal(key, (self.loc.size,), jnp.float32).reshape(self.loc.shape)

    def place(self, noise):
        """The noise, scaled and shifted, [..., A]."""
        return self.loc + self.scale * noise

    def mode(self):
        """The mean, [..., A]."""
        return self.loc

    def log_prob(self, action):
        """Joint log density [...] of actions [..., A]."""
        return self._log_density(action).sum(-1)

    def entropy(self):
        """Joint entropy in nats, [...]."""
        return (0.5 * (1 + LOG_2PI) + jnp.log(self.scale)).sum(-1)

    def kl(self, other):
        """Kullback-Leibler divergence of this distribution from another, in nats, [...]; no squash changes it."""
        ratio = self.scale / other.scale
        return (0.5 * (ratio**2 + ((self.loc - other.loc) / other.scale) ** 2 - 1) - jnp.log(ratio)).sum(-1)

    def _log_density(self, action):
        return -0.5 * ((action - self.loc) / self.scale) ** 2 - jnp.log(self.scale) - 0.5 * LOG_2PI


class TanhNormal(Normal):
    """Gaussians squashed into (low, high) by tanh, joint over the last axis; `loc` and `scale` are before the squash.

    Actions are represented by their value before the squash: `sample` and `mode` return it (the squashed mode is the
    median of the action), `log_prob` takes it and gives the density of the squashed action. Nothing is ever inverted:
    in float32 tanh(10) is 1.
    """

    low: float | jax.Array = -1.0  # [] or [..., A]
    high: float | jax.Array = 1.0  # [] or [..., A]

    def log_prob(self, action):
        """Joint log density [...] of the squashed actions, given before the squash [..., A]."""
        return (self._log_density(action) - self._log_slope(action)).sum(-1)

    def entropy(self):
        """Joint entropy of the squashed actions in nats, [...]; by quadrature, within 2e-4 up to a scale of 5."""
        slopes = jax.vmap(lambda node: self._log_slope(self.loc + self.scale * node))(jnp.asarray(NODES))
        return super().entropy() + jnp.tensordot(jnp.asarray(WEIGHTS), slopes.sum(-1), axes=1)

    def _log_slope(self, action):
        """log of the derivative of the squash, per dimension, without overflow for large actions."""
        log_sech2 = 2 * (jnp.log(2.0) - action - jax.nn.softplus(-2 * action))
        return log_sech2 + jnp.log((self.high - self.low) / 2)
