"""Settings: `Config` holds those that are compiled in, `Hyperparams` those that are traced and may be swept."""

import difflib
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from purejaxppo.checks import MAX_INT, check_choice, check_number, check_range, check_whole, nearest_divisors
from purejaxppo.text import quote

if TYPE_CHECKING:
    Traced = Any  # a number, an array, or a schedule
else:
    Traced = float  # the command line takes numbers alone

Kind = TypeVar("Kind", bound=type)


def _with_hints(kind: Kind) -> Kind:
    """Has the constructor of a dataclass say what an unknown field may mean; it stays a TypeError."""
    construct = kind.__init__

    @functools.wraps(construct)
    def checked(self, *args, **values):
        for name in values:
            if name not in kind.__dataclass_fields__:
                raise TypeError(f"{name}={quote(values[name])} is not a field of {kind.__name__} ({_hint(kind, name)})")
        construct(self, *args, **values)

    kind.__init__ = checked
    return kind


@_with_hints
@dataclass(frozen=True, kw_only=True)
class Config:
    """The static settings: sizes, and which details are on.

    The defaults are CleanRL's for classic control.

    Raises:
        ValueError: at construction, in one sentence, for values that are not allowed or do not fit together.
    """

    num_envs: int = 4
    """Number of environments that step in parallel (N)."""
    num_steps: int = 128
    """Number of steps of each environment in one rollout (T)."""
    num_updates: int = 976
    """Number of updates (rollout and learning) in the whole run (U), which is the horizon of every schedule."""
    num_epochs: int = 4
    """Number of passes over each rollout."""
    num_minibatches: int = 4
    """Number of minibatches, and therefore of gradient steps, per pass."""
    segment_length: int = 1
    """Number of consecutive steps that shuffling keeps together (L), more than 1 for networks with a memory."""

    normalize_advantage: Literal["minibatch", "batch", "off"] = "minibatch"
    """Whether advantages are standardised over each minibatch, over the whole batch of an update, or not at all."""
    clip_value_loss: bool = True
    """Whether the value loss clips the value to within `value_clip` of the old value."""
    stop_on_kl: bool = False
    """Whether an update stops at the first minibatch whose approximate KL exceeds `target_kl`."""
    bootstrap_on_truncation: bool = True
    """Whether truncations bootstrap from the value of the last state, off if the time limit is part of the task."""

    normalize_observation: bool = False
    """Whether observations are standardised by their running mean and standard deviation."""
    observation_clip: float = 10.0
    """Largest absolute value of a standardised observation, in standard deviations."""
    scale_reward: bool = False
    """Whether rewards are divided by the running standard deviation of the discounted return."""
    reward_clip: float = 10.0
    """Largest absolute value of a scaled reward."""

    bound_action: Literal["clip", "tanh"] = "clip"
    """How a continuous action is kept within the bounds of its space: cut off at them, or squashed between them."""
    state_dependent_std: bool = False
    """Whether the standard deviation of a continuous action is an output of the network."""
    initial_std: float = 1.0
    """Initial standard deviation of a continuous action, in units of the action (for `tanh`, before the squash)."""

    encoder: Literal["mlp", "cnn"] = "mlp"
    """Kind of network that reads the observation, where `cnn` needs grids [height, width, channels]."""
    widths: tuple[int, ...] = (64, 64)
    """Widths of the hidden layers of the actor, and of those of the critic."""
    activation: Literal["tanh", "relu"] = "tanh"
    """Nonlinearity of the hidden layers."""
    share_encoder: bool = False
    """Whether the actor and the critic share all layers but the last."""
    memory: Literal["", "gru", "lstm", "mingru"] = ""
    """Kind of recurrent layer after the encoder, where "" means none; accelerators compute `mingru` in parallel."""
    memory_width: int = 64
    """Width of the recurrent layer."""
    memory_inputs: bool = False
    """Whether the network also reads the previous action and reward, as `previous_action` and `previous_reward`."""

    resets_per_step: int = 0
    """Number of start states drawn per step, rounded up to the same on every device; those drawn before wait, one for
    each environment. 0 means all of up to 1 KiB, one of 16 up to 4 KiB, and one of 64 above."""
    stagger: int = 0
    """Number of steps within which first episodes are truncated at evenly spread times, where 0 means not at all."""

    matmul_precision: Literal["highest", "high", "default", "bfloat16"] = "highest"
    """Precision of float32 matrix products on accelerators. "highest" is full float32; "high" is TF32 on recent NVIDIA
    GPUs and three bfloat16 passes on TPUs; "default" is TF32 and one pass; "bfloat16" rounds factors to bfloat16 and
    sums in float32, where convolutions are as under "default". A CPU always computes in float32."""

    def __post_init__(self) -> None:
        def keep(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)  # as Python's own types, which can be hashed and saved

        for name in ("num_envs", "num_steps", "num_updates", "num_epochs", "num_minibatches"):
            keep(name, check_whole(name, getattr(self, name), at_least=1))
        for name in ("segment_length", "memory_width"):
            keep(name, check_whole(name, getattr(self, name), at_least=1))
        for name in ("resets_per_step", "stagger"):
            keep(name, check_whole(name, getattr(self, name), at_least=0))
        widths: Any = self.widths
        if not isinstance(widths, (tuple, list)) and np.ndim(widths) != 1:
            raise ValueError(f"widths={quote(widths)} must be a sequence of whole numbers, such as (64, 64)")
        keep("widths", tuple(check_whole("widths", width, at_least=1) for width in widths))
        for option in fields(self):
            check_choice(option, getattr(self, option.name))
            if option.type is bool:
                keep(option.name, bool(getattr(self, option.name)))
        for name in ("observation_clip", "reward_clip", "initial_std"):
            value = getattr(self, name)
            check_number(name, value, 0, math.inf, open_low=True, open_high=name == "initial_std")
            keep(name, value if isinstance(value, (int, float)) else float(value))
        if self.num_epochs * self.steps_per_update > MAX_INT:
            raise ValueError(
                f"num_envs={self.num_envs} x num_steps={self.num_steps} x num_epochs={self.num_epochs} must be at most "
                f"{MAX_INT}, the transitions of an update"
            )
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
                f"num_minibatches={self.num_minibatches} leaves one transition per minibatch, whose standardised "
                "advantage is 0 (try fewer, or normalize_advantage='off')"
            )
        if self.normalize_advantage == "batch" and self.steps_per_update == 1:
            raise ValueError(
                "normalize_advantage='batch' standardises over one transition (num_envs=1 x num_steps=1), which gives "
                "advantage 0 (try more steps, or normalize_advantage='off')"
            )
        if self.memory and self.segment_length == 1:
            raise ValueError(
                f"memory={self.memory!r} needs segments of more than one step "
                f"(try segment_length={self.num_steps}, which is num_steps, or a divisor of it)"
            )
        if self.stagger and not self.bootstrap_on_truncation:
            raise ValueError(
                f"stagger={self.stagger} truncates episodes, which bootstrap_on_truncation=False would count as failed "
                "(leave one of them out)"
            )
        if self.resets_per_step > self.num_envs:
            raise ValueError(
                f"resets_per_step={self.resets_per_step} must not exceed num_envs={self.num_envs} "
                "(try 0, which chooses by the size of a start state)"
            )

    @property
    def steps_per_update(self) -> int:
        """Number of environment steps in one rollout, T x N."""
        return self.num_steps * self.num_envs

    @property
    def total_steps(self) -> int:
        """Number of environment steps in the whole run."""
        return self.steps_per_update * self.num_updates

    @property
    def num_segments(self) -> int:
        """Number of segments in one rollout; minibatches shuffle segments."""
        return self.steps_per_update // self.segment_length

    def with_total_steps(self, total_steps: int | float) -> "Config":
        """The same config with as many whole updates as fit into `total_steps` environment steps, such as 1e6.

        Raises ValueError if none fits.
        """
        if isinstance(total_steps, (float, np.floating)) and float(total_steps).is_integer():
            total_steps = int(total_steps)
        total_steps = check_whole("total_steps", total_steps, at_least=1, at_most=2**53)
        if total_steps < self.steps_per_update:
            raise ValueError(
                f"total_steps={total_steps} must be at least one rollout, num_envs x num_steps = "
                f"{self.steps_per_update}"
            )
        return replace(self, num_updates=total_steps // self.steps_per_update)


def rename_older(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `Config` by their names of today: older versions wrote `gru_width`, which was 0 without a memory."""
    values = dict(values)
    width = values.pop("gru_width", None)
    if width is None:
        return values
    return values | ({"memory": "gru", "memory_width": width} if width else {"memory": ""})


def show_older(config: Config) -> dict[str, Any]:
    """The fields of a config, also by the names of `rename_older`."""
    return vars(config) | {"gru_width": config.memory_width if config.memory == "gru" else 0}


class Spec(NamedTuple):
    """The values that a hyperparameter may have."""

    low: float = 0.0
    high: float = math.inf
    open_high: bool = False  # whether `high` itself is excluded
    schedulable: bool = False
    decay: bool = False  # x lies near 1 and means a horizon of 1 / (1 - x) steps, so evolution multiplies 1 - x


EXTRA = "extra."
EXTRA_SPEC = Spec(low=-math.inf, schedulable=True)


def number(default: float, **spec: Any) -> Any:
    """A field of `Hyperparams`, from its default and the fields of its `Spec`."""
    return field(default=default, metadata={"spec": Spec(**spec)})


@jax.tree_util.register_pytree_with_keys_class
@_with_hints
@dataclass(frozen=True, kw_only=True)
class Hyperparams:
    """The traced settings: one number each, or an array [R] in a batch of runs.

    `learning_rate`, `clip`, `entropy_coefficient` and those in `extra` may also be schedules. A schedule is
    a pytree that can be called with the progress of the run, which rises from 0 at the first update towards 1, such as
    `linear(3e-4, 0)`; `schedule(f)` makes one of an optax schedule f.

    Raises:
        ValueError: at construction, for a number outside its range, or a schedule where none is allowed.
    """

    learning_rate: Traced = number(2.5e-4, open_high=True, schedulable=True)
    """Step size of Adam, or a schedule."""
    learning_rate_annealing: Traced = number(1.0, high=1)
    """Fraction by which a constant `learning_rate` falls linearly over the run, where 1 ends at 0 and 0 is constant."""
    discount: Traced = number(0.99, high=1, decay=True)
    """Discount factor (gamma) of the return, in [0, 1]."""
    gae_lambda: Traced = number(0.95, high=1, decay=True)
    """Trace decay (lambda) of generalised advantage estimation, in [0, 1]."""
    clip: Traced = number(0.2, schedulable=True)
    """Distance from 1 beyond which the probability ratio is clipped, or a schedule, where inf never clips."""
    value_clip: Traced = number(0.2)
    """Distance from the old value beyond which the value is clipped if `clip_value_loss` is on."""
    entropy_coefficient: Traced = number(0.01, open_high=True, schedulable=True)
    """Weight of the entropy bonus, or a schedule."""
    value_coefficient: Traced = number(0.5, open_high=True)
    """Weight of the value loss, which is half the mean squared error."""
    max_grad_norm: Traced = number(0.5)
    """Global gradient norm above which gradients are scaled down, where inf never does."""
    adam_eps: Traced = number(1e-5, open_high=True)
    """Constant added to the denominator of Adam's step."""
    adam_b1: Traced = number(0.9, high=1, open_high=True, decay=True)
    """Decay of Adam's first moment, in [0, 1)."""
    adam_b2: Traced = number(0.999, high=1, open_high=True, decay=True)
    """Decay of Adam's second moment, in [0, 1)."""
    target_kl: Traced = number(math.inf)
    """Approximate KL above which an update stops if `stop_on_kl` is on, where inf never stops."""
    extra: dict[str, Traced] = field(default_factory=dict)
    """Coefficients of a custom loss or step by name, called `extra.NAME` in tables and sweeps."""

    def __post_init__(self) -> None:
        if not isinstance(self.extra, Mapping) or not all(str(name).isidentifier() for name in self.extra):
            raise ValueError(f"extra={quote(self.extra)} must be a dict of numbers by name, such as {{'beta': 0.1}}")
        object.__setattr__(self, "extra", dict(self.extra))
        for name in self.names:
            _check_value(name, self.get(name))

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], None]:
        """The fields as children of a pytree, for JAX."""
        return [(jax.tree_util.GetAttrKey(f.name), getattr(self, f.name)) for f in fields(self)], None

    @classmethod
    def tree_unflatten(cls, _: None, values: Iterable[Any]) -> "Hyperparams":
        """The hyperparameters of a pytree's children, for JAX."""
        # Not through __post_init__: inside a transformation the leaves need not be numbers.
        hyperparams = object.__new__(cls)
        for name, value in zip((f.name for f in fields(cls)), values):
            object.__setattr__(hyperparams, name, value)
        return hyperparams

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all hyperparameters, `extra.NAME` for those in `extra`."""
        return (*HYPERPARAM_SPECS, *(EXTRA + name for name in self.extra))

    def get(self, name: str) -> Any:
        """The value of the hyperparameter of a name in `names`."""
        return self.extra[name.removeprefix(EXTRA)] if name.startswith(EXTRA) else getattr(self, name)

    def set(self, values: Mapping[str, Any]) -> "Hyperparams":
        """The same hyperparameters with new values for some of `names`.

        Raises ValueError for an unknown name, and as the constructor does.
        """
        extra = {name.removeprefix(EXTRA): x for name, x in values.items() if name.startswith(EXTRA)}
        changed = {name: x for name, x in values.items() if not name.startswith(EXTRA)}
        unknown = [name for name in changed if name not in HYPERPARAM_SPECS]
        unknown += [EXTRA + name for name in extra if self.extra and name not in self.extra]
        if unknown:
            raise ValueError(f"{unknown[0]} is not a hyperparameter ({suggest(unknown[0], self.names)})")
        return replace(self, extra=self.extra | extra, **changed)

    def at(self, num_updates: jax.Array | int, config: Config) -> "Hyperparams":
        """The hyperparameters of the update that follows the first `num_updates`, with every schedule as its value.

        Raises ValueError for an optax schedule in a run of more optimizer steps than int32 counts.
        """
        progress = jnp.minimum(num_updates / config.num_updates, 1.0).astype(jnp.float32)
        per_update = config.num_epochs * config.num_minibatches
        num_steps = num_updates * per_update
        over_steps = [name for name in self.names if isinstance(self.get(name), OptaxSchedule)]
        if over_steps and config.num_updates * per_update > MAX_INT:
            raise ValueError(
                f"{over_steps[0]} is a schedule over optimizer steps, of which num_updates={config.num_updates} with "
                f"{per_update} each make more than the {MAX_INT} that are counted (give a function of the progress)"
            )

        def now(value: Any) -> Any:
            if not callable(value):
                return value
            return value(num_steps if isinstance(value, OptaxSchedule) else progress)

        values: dict[str, Any] = {name: now(self.get(name)) for name in self.names}
        if not callable(self.learning_rate):
            values["learning_rate"] *= 1 - self.learning_rate_annealing * progress
        return self.set(values)


# Names of the same settings elsewhere: their usual short forms, and those of other libraries.
OTHER_NAMES = {
    "adv_norm": "normalize_advantage", "alpha": "learning_rate", "anneal_lr": "learning_rate_annealing",
    "batch_size": "num_minibatches", "beta1": "adam_b1", "beta2": "adam_b2", "clip_coef": "clip", "clip_eps": "clip",
    "clip_param": "clip", "clip_range": "clip", "clip_range_vf": "value_clip", "clip_vloss": "clip_value_loss",
    "cliprange": "clip", "ent_coef": "entropy_coefficient", "ent_weight": "entropy_coefficient",
    "entropy_coef": "entropy_coefficient", "entropy_coeff": "entropy_coefficient", "epochs": "num_epochs",
    "eps": "adam_eps", "epsilon": "clip", "gae": "gae_lambda", "gamma": "discount", "gru": "memory",
    "gru_width": "memory_width", "hidden": "widths", "hidden_size": "widths", "hidden_sizes": "widths",
    "horizon": "num_steps", "lam": "gae_lambda", "lambda": "gae_lambda", "lambda_": "gae_lambda", "layers": "widths",
    "lmbda": "gae_lambda", "lr": "learning_rate", "lstm": "memory", "lstm_hidden_size": "memory_width",
    "max_norm": "max_grad_norm", "mingru": "memory", "minibatch_size": "num_minibatches", "n_envs": "num_envs",
    "n_epochs": "num_epochs", "n_layers": "widths", "n_minibatches": "num_minibatches", "n_steps": "num_steps",
    "n_updates": "num_updates", "net_arch": "widths", "norm_adv": "normalize_advantage",
    "norm_obs": "normalize_observation", "num_layers": "widths", "recurrent": "memory", "rnn": "memory",
    "rollout_length": "num_steps", "seq_len": "segment_length", "total_steps": "num_updates",
    "total_timesteps": "num_updates", "unroll_length": "num_steps", "update_epochs": "num_epochs",
    "value_coef": "value_coefficient", "vf_clip": "value_clip", "vf_coef": "value_coefficient",
    "vf_coeff": "value_coefficient",
}  # fmt: skip


def suggest(name: str, known: Sequence[str]) -> str:
    """The remedy of a message about an unknown name: the known name, or the field of `Config`, that is most like it."""
    near = nearest(name, known)
    if near and near not in known:
        return f"{near} is a field of Config"
    return f"did you mean {near}?" if near else "Config and Hyperparams have the names"


def nearest(name: str, known: Sequence[str]) -> str:
    """What an unknown name may mean: another name of a field, or the known name that is most like it; "" for none."""
    config = [field.name for field in fields(Config)]
    near = name if name in config else OTHER_NAMES.get(name.lower().replace("-", "_"), "")
    words = [other for other in known if name in other.split("_")]
    close = difflib.get_close_matches(name, known, n=1) or difflib.get_close_matches(name, words, n=1, cutoff=0)
    return near or next(iter(close), "")


def _hint(kind: type, name: str) -> str:
    """The remedy of a message about an unknown field of `Config` or `Hyperparams`."""
    if name in ("total_steps", "total_timesteps"):
        return "config.with_total_steps(...) sets num_updates by it"
    homes = {field.name: home for home in (Config, Hyperparams) for field in fields(home)}
    near = name if name in homes else nearest(name, [field.name for field in fields(kind)])
    if not near:
        return f"help(purejaxppo.{kind.__name__}) lists them"
    return f"did you mean {near}?" if homes[near] is kind else f"{near} is a field of {homes[near].__name__}"


HYPERPARAM_SPECS = {f.name: f.metadata["spec"] for f in fields(Hyperparams) if f.name != "extra"}


def spec_of(name: str) -> Spec | None:
    """The values that the hyperparameter of a name may have, or None if the name is not of a hyperparameter."""
    if name.startswith(EXTRA) and name.removeprefix(EXTRA).isidentifier():
        return EXTRA_SPEC
    return HYPERPARAM_SPECS.get(name)


def linear(start: jax.Array | float, end: jax.Array | float) -> jax.tree_util.Partial:
    """A linear schedule from `start` at the first update to `end` after the last; both are traced and can be swept."""
    return jax.tree_util.Partial(_interpolate, start, end)


def _interpolate(start, end, progress):
    return start + (end - start) * progress


class OptaxSchedule(struct.PyTreeNode):
    """A schedule over optimizer steps."""

    function: Callable[[Any], Any] = struct.field(pytree_node=False)  # num_steps -> value

    def __call__(self, num_steps: jax.Array | int) -> jax.Array:
        """The value after a number of optimizer steps."""
        return jnp.asarray(self.function(num_steps), jnp.float32)


def schedule(optax_schedule: Callable) -> OptaxSchedule:
    """A schedule for `Hyperparams`, from one of optax, which is a function of the number of optimizer steps done.

    A run makes `num_epochs * num_minibatches` optimizer steps per update; all of them use the value of the first.

    Raises ValueError for anything but a function.
    """
    if not callable(optax_schedule):
        raise ValueError(
            f"optax_schedule={quote(optax_schedule)} must be a function of the number of optimizer steps, such as "
            "optax.cosine_decay_schedule(1e-3, 1000) (a number needs no schedule)"
        )
    return OptaxSchedule(optax_schedule)


def _check_value(name: str, value: Any) -> None:
    spec = spec_of(name)
    assert spec is not None  # of a name in `names`
    if isinstance(value, (list, tuple)):
        raise ValueError(f"{name}={quote(value)} must be a number, or an array of one number per run (try jnp.array)")
    if not callable(value):
        check_range(name, value, spec.low, spec.high, open_high=spec.open_high)
        return
    if not spec.schedulable:
        able = [name for name, spec in HYPERPARAM_SPECS.items() if spec.schedulable]
        raise ValueError(f"{name} must be a number; only {', '.join(able)} and those in extra may be schedules")
    for leaf in jax.tree.leaves(value):
        if callable(leaf):
            raise ValueError(
                f"{name}={quote(value)} is not a pytree of numbers: make it linear(start, end), schedule(f) of an "
                "optax schedule f, or jax.tree_util.Partial(f, ...) of a function f of the progress in [0, 1]"
            )
        check_range(f"{name} (schedule)", leaf, -math.inf, math.inf)


def as_arrays(hyperparams: Hyperparams) -> Hyperparams:
    """The same hyperparameters with every leaf as a strongly typed float32 array."""
    return jax.tree.map(lambda x: jnp.asarray(float(x) if isinstance(x, int) else x, jnp.float32), hyperparams)
