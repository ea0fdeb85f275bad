"""Settings: `Config` compiles, `Hyperparams` flows through the program and may be swept."""

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp

from purejaxppo.checks import check_choice, check_range, check_whole, nearest_divisors


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is static: sizes, and which details are on.

    The defaults are CleanRL's for classic control. Raises ValueError at construction, in one sentence.
    """

    num_envs: int = 4
    """Environments that step side by side (N)."""
    num_steps: int = 128
    """Steps of each environment in one rollout (T)."""
    num_updates: int = 976
    """Rollout-and-update cycles of the whole run (U); the horizon of every schedule."""
    num_epochs: int = 4
    """Passes over a rollout."""
    num_minibatches: int = 4
    """Minibatches, and so gradient steps, per pass."""
    segment_length: int = 1
    """Consecutive steps that stay together when minibatches are shuffled (L); more than 1 for a memory."""

    normalize_advantage: Literal["minibatch", "batch", "off"] = "minibatch"
    """Over what advantages are standardised."""
    clip_value_loss: bool = True
    """Whether the value loss is clipped to `value_clip` around the old value."""
    stop_on_kl: bool = False
    """Whether an update ends at the first minibatch whose approximate KL exceeds `target_kl`."""
    bootstrap_on_truncation: bool = True
    """Whether a truncated episode is worth the value of its last state; off where the horizon is the task."""

    normalize_observation: bool = False
    """Whether observations are standardised by their running mean and deviation."""
    observation_clip: float = 10.0
    """Bound of a standardised observation, in deviations."""
    scale_reward: bool = False
    """Whether rewards are divided by the running deviation of the discounted return."""
    reward_clip: float = 10.0
    """Bound of a scaled reward."""

    bound_action: Literal["clip", "tanh"] = "clip"
    """How a continuous action is kept within the bounds of its space."""
    state_dependent_std: bool = False
    """Whether the deviation of a continuous action is an output of the network."""
    initial_std: float = 1.0
    """Deviation of a continuous action before training, in units of the action (of its pre-squash for `tanh`)."""

    encoder: Literal["mlp", "cnn"] = "mlp"
    """What reads the observation; `cnn` wants grids [height, width, channels]."""
    widths: tuple[int, ...] = (64, 64)
    """Hidden widths of the actor, and of the critic."""
    activation: Literal["tanh", "relu"] = "tanh"
    """Nonlinearity of the hidden layers."""
    share_encoder: bool = False
    """Whether actor and critic share all but their last layer."""
    gru_width: int = 0
    """Width of a recurrent memory behind the encoder; 0 is none."""

    resets_per_step: int = 0
    """Start states drawn per step and shared out among episodes that end; 0 is one for each environment.

    Those of a whole rollout are drawn ahead: fewer save time and memory where states are large or dear."""

    matmul_precision: Literal["highest", "high", "default"] = "highest"
    """Of float32 products: exact, three passes of fewer bits, or the device's fastest (TF32 on recent GPUs)."""

    def __post_init__(self):
        for name in ("num_envs", "num_steps", "num_updates", "num_epochs", "num_minibatches", "segment_length"):
            check_whole(name, getattr(self, name), at_least=1)
        for name in ("gru_width", "resets_per_step"):
            check_whole(name, getattr(self, name), at_least=0)
        if not isinstance(self.widths, (tuple, list)):
            raise ValueError(f"widths={self.widths!r} must be a sequence of whole numbers, such as (64, 64)")
        object.__setattr__(self, "widths", tuple(self.widths))
        for width in self.widths:
            check_whole("widths", width, at_least=1)
        for field in fields(self):
            check_choice(field, getattr(self, field.name))
        for name in ("observation_clip", "reward_clip", "initial_std"):
            check_range(name, getattr(self, name), 0, math.inf, open_low=True, open_high=name == "initial_std")
        if self.num_steps % self.segment_length:
            raise ValueError(
                f"segment_length={self.segment_length} must divide num_steps={self.num_steps} "
                f"({nearest_divisors(self.num_steps, self.segment_length)})"
            )
        if self.num_segments % self.num_minibatches:
            unit = "transitions" if self.segment_length == 1 else "segments"
            raise ValueError(
                f"num_minibatches={self.num_minibatches} must divide the {self.num_segments} {unit} of a rollout "
                f"({nearest_divisors(self.num_segments, self.num_minibatches)})"
            )
        if self.normalize_advantage == "minibatch" and self.steps_per_update == self.num_minibatches:
            raise ValueError(
                f"num_minibatches={self.num_minibatches} leaves one transition to a minibatch, whose standardised "
                "advantage is 0 (try fewer, or normalize_advantage='off')"
            )
        if self.gru_width and self.segment_length == 1:
            raise ValueError(
                f"gru_width={self.gru_width} learns nothing from segments of one step "
                f"(try segment_length={self.num_steps}, which is num_steps, or a divisor of it)"
            )
        if self.resets_per_step > self.num_envs:
            raise ValueError(
                f"resets_per_step={self.resets_per_step} must not exceed num_envs={self.num_envs} (try 0: as many)"
            )

    @property
    def steps_per_update(self) -> int:
        """Environment steps of one rollout, T x N."""
        return self.num_steps * self.num_envs

    @property
    def total_steps(self) -> int:
        """Environment steps of the whole run."""
        return self.steps_per_update * self.num_updates

    @property
    def num_segments(self) -> int:
        """Segments of a rollout, the things that are shuffled."""
        return self.steps_per_update // self.segment_length

    def with_total_steps(self, total_steps: int) -> "Config":
        """The same settings with as many whole updates as fit into `total_steps` environment steps."""
        check_whole("total_steps", total_steps, at_least=1)
        if total_steps < self.steps_per_update:
            raise ValueError(
                f"total_steps={total_steps} must be at least one rollout, num_envs x num_steps = "
                f"{self.steps_per_update}"
            )
        return replace(self, num_updates=total_steps // self.steps_per_update)


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True, kw_only=True)
class Hyperparams:
    """What is traced: one number each, or an array with a leading axis R in a batch of runs.

    `learning_rate`, `clip` and `entropy_coefficient` may also be schedules: callable pytrees of the progress,
    from 0 at the first update towards 1, such as `linear(3e-4, 0)`. Raises ValueError at construction.
    """

    learning_rate: float = 2.5e-4
    """Adam's step size, or a schedule."""
    learning_rate_annealing: float = 1.0
    """Share of a plain `learning_rate` that is annealed away linearly over the run: 1 ends at 0, 0 is constant."""
    discount: float = 0.99
    """Worth of the next step's return, in [0, 1]."""
    gae_lambda: float = 0.95
    """Trace decay of the advantage estimate, in [0, 1]."""
    clip: float = 0.2
    """How far the probability ratio may move from 1, or a schedule; inf is no clipping."""
    value_clip: float = 0.2
    """How far the value may move from the old value, where `clip_value_loss` is on."""
    entropy_coefficient: float = 0.01
    """Weight of the entropy bonus, or a schedule."""
    value_coefficient: float = 0.5
    """Weight of the value loss, which is half a mean square."""
    max_grad_norm: float = 0.5
    """Global gradient norm above which gradients are scaled down; inf is no bound."""
    adam_eps: float = 1e-5
    """Added to the denominator of Adam's step."""
    adam_b1: float = 0.9
    """Decay of Adam's first moment."""
    adam_b2: float = 0.999
    """Decay of Adam's second moment."""
    target_kl: float = math.inf
    """Approximate KL at which an update stops, where `stop_on_kl` is on; inf never stops."""

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if callable(value) and field.name not in SCHEDULABLE:
                raise ValueError(f"{field.name} must be a number; only {', '.join(SCHEDULABLE)} may be schedules")
            if callable(value):
                _check_schedule(field.name, value)
            else:
                low, high = HYPERPARAM_RANGES[field.name]
                check_range(field.name, value, low, high, open_high=field.name in FINITE_OR_BELOW)

    def tree_flatten_with_keys(self):
        return [(jax.tree_util.GetAttrKey(f.name), getattr(self, f.name)) for f in fields(self)], None

    @classmethod
    def tree_unflatten(cls, _, values):
        # Without __post_init__: inside a transformation the leaves need not be numbers.
        hyperparams = object.__new__(cls)
        for field, value in zip(fields(cls), values):
            object.__setattr__(hyperparams, field.name, value)
        return hyperparams

    def at(self, progress) -> "Hyperparams":
        """The hyperparameters at a progress in [0, 1] of the run, every schedule evaluated to a number."""
        rate = self.learning_rate
        if not callable(rate):
            rate = rate * (1 - self.learning_rate_annealing * progress)
        values = {name: getattr(self, name) for name in SCHEDULABLE} | {"learning_rate": rate}
        return replace(self, **{name: v(progress) if callable(v) else v for name, v in values.items()})


SCHEDULABLE = ("learning_rate", "clip", "entropy_coefficient")

HYPERPARAM_RANGES = {
    "learning_rate": (0, math.inf),
    "learning_rate_annealing": (0, 1),
    "discount": (0, 1),
    "gae_lambda": (0, 1),
    "clip": (0, math.inf),
    "value_clip": (0, math.inf),
    "entropy_coefficient": (0, math.inf),
    "value_coefficient": (0, math.inf),
    "max_grad_norm": (0, math.inf),
    "adam_eps": (0, math.inf),
    "adam_b1": (0, 1),
    "adam_b2": (0, 1),
    "target_kl": (0, math.inf),
}


# Ranges whose upper end is not itself allowed.
FINITE_OR_BELOW = ("learning_rate", "entropy_coefficient", "value_coefficient", "adam_eps", "adam_b1", "adam_b2")


def linear(start, end) -> jax.tree_util.Partial:
    """A schedule from `start` at the first update to `end` after the last; both are traced and may be swept."""
    return jax.tree_util.Partial(_interpolate, start, end)


def _interpolate(start, end, progress):
    return start + (end - start) * progress


def _check_schedule(name: str, schedule: Any):
    for leaf in jax.tree.leaves(schedule):
        if callable(leaf):
            raise ValueError(
                f"{name}={schedule!r} is no pytree of numbers: make it linear(start, end) "
                "or jax.tree_util.Partial(f, ...)"
            )
        check_range(f"{name} (schedule)", leaf, -math.inf, math.inf)


def as_arrays(hyperparams: Hyperparams) -> Hyperparams:
    """The same hyperparameters with every leaf a strongly typed float32 array."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), hyperparams)
