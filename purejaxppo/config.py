"""Settings: `Config` compiles, `Hyperparams` flows through the program and may be swept."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

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
        for setting in fields(self):
            check_choice(setting, getattr(self, setting.name))
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


class Spec(NamedTuple):
    """What values a hyperparameter may have."""

    low: float = 0.0
    high: float = math.inf
    open_high: bool = False  # whether `high` itself is excluded
    schedulable: bool = False
    decay: bool = False  # lives near 1 and looks 1 / (1 - x) steps far, so it is 1 - x that evolution multiplies


EXTRA = "extra."
EXTRA_SPEC = Spec(low=-math.inf, schedulable=True)


def number(default: float, **spec) -> Any:
    """A field of `Hyperparams`: its default, and what values it may have."""
    return field(default=default, metadata={"spec": Spec(**spec)})


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True, kw_only=True)
class Hyperparams:
    """What is traced: one number each, or an array with a leading axis R in a batch of runs.

    `learning_rate`, `clip`, `entropy_coefficient` and those in `extra` may also be schedules: callable pytrees of the
    progress, from 0 at the first update towards 1, such as `linear(3e-4, 0)`, or `schedule(f)` of an optax schedule f.
    Raises ValueError at construction.
    """

    learning_rate: float = number(2.5e-4, open_high=True, schedulable=True)
    """Adam's step size, or a schedule."""
    learning_rate_annealing: float = number(1.0, high=1)
    """Share of a plain `learning_rate` that is annealed away linearly over the run: 1 ends at 0, 0 is constant."""
    discount: float = number(0.99, high=1, decay=True)
    """Worth of the next step's return, in [0, 1]."""
    gae_lambda: float = number(0.95, high=1, decay=True)
    """Trace decay of the advantage estimate, in [0, 1]."""
    clip: float = number(0.2, schedulable=True)
    """How far the probability ratio may move from 1, or a schedule; inf is no clipping."""
    value_clip: float = number(0.2)
    """How far the value may move from the old value, where `clip_value_loss` is on."""
    entropy_coefficient: float = number(0.01, open_high=True, schedulable=True)
    """Weight of the entropy bonus, or a schedule."""
    value_coefficient: float = number(0.5, open_high=True)
    """Weight of the value loss, which is half a mean square."""
    max_grad_norm: float = number(0.5)
    """Global gradient norm above which gradients are scaled down; inf is no bound."""
    adam_eps: float = number(1e-5, open_high=True)
    """Added to the denominator of Adam's step."""
    adam_b1: float = number(0.9, high=1, open_high=True, decay=True)
    """Decay of Adam's first moment."""
    adam_b2: float = number(0.999, high=1, open_high=True, decay=True)
    """Decay of Adam's second moment."""
    target_kl: float = number(math.inf)
    """Approximate KL at which an update stops, where `stop_on_kl` is on; inf never stops."""
    extra: dict[str, float] = field(default_factory=dict)
    """Coefficients of a custom loss or step, by name; `extra.NAME` in tables and sweeps."""

    def __post_init__(self):
        if not isinstance(self.extra, Mapping) or not all(str(name).isidentifier() for name in self.extra):
            raise ValueError(f"extra={self.extra!r} must be a dict of numbers by name, such as {{'beta': 0.1}}")
        object.__setattr__(self, "extra", dict(self.extra))
        for name in self.names:
            _check_value(name, self.get(name))

    def tree_flatten_with_keys(self):
        return [(jax.tree_util.GetAttrKey(f.name), getattr(self, f.name)) for f in fields(self)], None

    @classmethod
    def tree_unflatten(cls, _, values):
        # Without __post_init__: inside a transformation the leaves need not be numbers.
        hyperparams = object.__new__(cls)
        for name, value in zip((f.name for f in fields(cls)), values):
            object.__setattr__(hyperparams, name, value)
        return hyperparams

    @property
    def names(self) -> tuple[str, ...]:
        """All hyperparameters by name; those in `extra` as `extra.NAME`."""
        return (*HYPERPARAM_SPECS, *(EXTRA + name for name in self.extra))

    def get(self, name: str) -> Any:
        """The value of a hyperparameter by its name in `names`."""
        return self.extra[name.removeprefix(EXTRA)] if name.startswith(EXTRA) else getattr(self, name)

    def set(self, values: Mapping[str, Any]) -> "Hyperparams":
        """The same hyperparameters with other values for some, by name. Raises ValueError as the constructor does."""
        extra = {name.removeprefix(EXTRA): x for name, x in values.items() if name.startswith(EXTRA)}
        changed = {name: x for name, x in values.items() if not name.startswith(EXTRA)}
        unknown = [name for name in changed if name not in HYPERPARAM_SPECS]
        unknown += [EXTRA + name for name in extra if self.extra and name not in self.extra]
        if unknown:
            raise ValueError(f"{unknown[0]} is not a hyperparameter (these are: {', '.join(self.names)})")
        return replace(self, extra=self.extra | extra, **changed)

    def at(self, num_updates: jax.Array | int, config: Config) -> "Hyperparams":
        """The hyperparameters of the update that follows `num_updates` of a run, every schedule as its number there."""
        progress = jnp.minimum(num_updates / config.num_updates, 1.0).astype(jnp.float32)
        num_steps = num_updates * (config.num_epochs * config.num_minibatches)

        def now(value):
            if not callable(value):
                return value
            return value(num_steps if isinstance(value, OptaxSchedule) else progress)

        values = {name: now(self.get(name)) for name in self.names}
        if not callable(self.learning_rate):
            values["learning_rate"] *= 1 - self.learning_rate_annealing * progress
        return self.set(values)


HYPERPARAM_SPECS = {f.name: f.metadata["spec"] for f in fields(Hyperparams) if f.name != "extra"}


def spec_of(name: str) -> Spec | None:
    """What values a hyperparameter may have, by its name; None for a name that is none."""
    if name.startswith(EXTRA) and name.removeprefix(EXTRA).isidentifier():
        return EXTRA_SPEC
    return HYPERPARAM_SPECS.get(name)


def linear(start, end) -> jax.tree_util.Partial:
    """A schedule from `start` at the first update to `end` after the last; both are traced and may be swept."""
    return jax.tree_util.Partial(_interpolate, start, end)


def _interpolate(start, end, progress):
    return start + (end - start) * progress


class OptaxSchedule(struct.PyTreeNode):
    """A schedule over optimizer steps."""

    function: Callable = struct.field(pytree_node=False)

    def __call__(self, num_steps):
        return jnp.asarray(self.function(num_steps), jnp.float32)


def schedule(optax_schedule: Callable) -> OptaxSchedule:
    """A schedule of optax, a function of the optimizer steps done, as one for `Hyperparams`.

    A run makes `num_epochs * num_minibatches` optimizer steps per update; all of an update have the value of its first.
    """
    return OptaxSchedule(optax_schedule)


def _check_value(name: str, value: Any):
    spec = spec_of(name)
    if not callable(value):
        check_range(name, value, spec.low, spec.high, open_high=spec.open_high)
        return
    if not spec.schedulable:
        able = [name for name, spec in HYPERPARAM_SPECS.items() if spec.schedulable]
        raise ValueError(f"{name} must be a number; only {', '.join(able)} and those in extra may be schedules")
    for leaf in jax.tree.leaves(value):
        if callable(leaf):
            raise ValueError(
                f"{name}={value!r} is no pytree of numbers: make it linear(start, end), schedule(f) of an optax "
                "schedule f, or jax.tree_util.Partial(f, ...) of a function f of the progress in [0, 1]"
            )
        check_range(f"{name} (schedule)", leaf, -math.inf, math.inf)


def as_arrays(hyperparams: Hyperparams) -> Hyperparams:
    """The same hyperparameters with every leaf a strongly typed float32 array."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), hyperparams)
