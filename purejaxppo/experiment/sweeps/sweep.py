"""A sweep as data: an environment, a table of settings, and a number of seeds."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property, partial
from typing import Any, Literal, NamedTuple, NotRequired, TypedDict

import numpy as np

from purejaxppo.checks import check_whole
from purejaxppo.config import EXTRA, Config, Hyperparams, rename_older, show_older, spec_of, suggest
from purejaxppo.envs import is_env_name
from purejaxppo.experiment.presets import DEFAULTS, find_preset
from purejaxppo.experiment.records import as_record, complete_hyperparams
from purejaxppo.ppo import PPO, make_ppo, with_step
from purejaxppo.table import PLUGGED, Named, Table, named, paired
from purejaxppo.text import align, count, quote, show_setting
from purejaxppo.validate import check_config, check_target_kl, check_type

NAMES = [field.name for field in fields(Config)]
# Tables of older versions have `gru_width`, which stood in the place of `memory`.
CONFIG_FIELDS = (*NAMES[: NAMES.index("memory")], "gru_width", *NAMES[NAMES.index("memory") :])
HYPERPARAM_FIELDS = Hyperparams().names
ENV_PREFIX = "env."
MAX_RUNS = 10**6
# The fields of `Config` when `Group.old_name` was in use, in their order. Later fields do not belong here.
OLD_FIELDS = (
    "num_envs", "num_steps", "num_updates", "num_epochs", "num_minibatches", "segment_length", "normalize_advantage",
    "clip_value_loss", "stop_on_kl", "bootstrap_on_truncation", "normalize_observation", "observation_clip",
    "scale_reward", "reward_clip", "bound_action", "state_dependent_std", "initial_std", "encoder", "widths",
    "activation", "share_encoder", "gru_width", "resets_per_step", "matmul_precision",
)  # fmt: skip


Value = bool | int | float | str


class SweepData(TypedDict):
    """A sweep as JSON holds it."""

    env: str
    axes: list[dict[str, list[Value | list[Value]]]]
    num_seeds: int
    seed: int
    config: Config
    hyperparams: dict[str, float | Literal["inf", "-inf"]]
    evaluate_every: NotRequired[int | None]


class Group(NamedTuple):
    """The settings of a sweep that share one compiled program."""

    env: str
    config: Config
    plugged: tuple[tuple[str, str], ...] = ()  # fields in `PLUGGED` with the names of their values
    settings: tuple[int, ...] = ()  # rows of the table

    def old_name(self) -> str:
        """The name of the group in folders of before `Sweep.name_group`: with a digest of all fields of then."""
        values = show_older(self.config)
        config = {name: values[name] for name in OLD_FIELDS} | {"num_updates": None}
        digest = hashlib.sha256(json.dumps(config).encode()).hexdigest()[:12]
        return f"{self.env} {show_setting(dict(self.plugged))} {digest}"


@dataclass(frozen=True)
class Sweep:
    """A sweep: every setting of a table times `num_seeds` seeds; seeds vary fastest.

    A field of the table is a field of `Config` or of `Hyperparams` (`extra.NAME` for a custom coefficient), `env`,
    `env.NAME` (a parameter of the environment), or `network`, `loss`, `optimizer` or `step`, whose values are what
    `make_ppo` and `with_step` take (a pair for `step` and `init`, None for the default; see `grid`). Settings that
    change the size of a rollout (`num_envs`, `num_steps`) get as many updates as keep the number of environment steps,
    unless `num_updates` is swept too. Raises ValueError for an unknown field or a value out of range.
    """

    env: Any
    """What `make_ppo` takes; kept as its name."""
    table: Table = Table()
    num_seeds: int = 1
    config: Config = None  # pyright: ignore[reportAssignmentType]
    """Shared by all settings; by default that of the environment's preset."""
    hyperparams: Hyperparams = None  # pyright: ignore[reportAssignmentType]
    """Shared by all settings; by default those of the environment's preset."""
    seed: int = 0
    """Random seed; agent i of every setting gets the same key from it."""
    evaluate_every: int | None = None
    """Updates between two evaluations, in which every run plays 128 whole episodes in fresh environments; there is one
    more after its last update. Their mean return is the metric `evaluation_return`, by which settings are then ranked.
    By default there are none, and the last 100 training episodes count."""

    def __post_init__(self):
        if isinstance(self.env, Table):
            raise ValueError(f"env={quote(self.env)} is a table (the environment comes first: Sweep(env, table))")
        if not isinstance(self.env, str):
            environment = self.env[0] if type(self.env) is tuple and self.env else self.env
            object.__setattr__(self, "env", Named(named("env", environment), self.env))
        if not isinstance(self.table, Table):
            raise ValueError(f"table={quote(self.table)} must be a Table, such as grid(learning_rate=[1e-4, 1e-3])")
        check_whole("num_seeds", self.num_seeds)
        check_whole("seed", self.seed, at_least=0)
        if self.evaluate_every is not None:
            check_whole("evaluate_every", self.evaluate_every)
            object.__setattr__(self, "evaluate_every", int(self.evaluate_every))
        if self.num_runs > MAX_RUNS:
            raise ValueError(
                f"num_seeds={self.num_seeds} of {len(self.table):,} settings make {self.num_runs:,} runs, more than "
                f"the {MAX_RUNS:,} that a sweep can hold"
            )
        object.__setattr__(self, "num_seeds", int(self.num_seeds))
        object.__setattr__(self, "seed", int(self.seed))
        if self.config is None or self.hyperparams is None:
            default = DEFAULTS if isinstance(self.env, Named) else find_preset(str(self.env))
            object.__setattr__(self, "config", self.config or default.config)
            object.__setattr__(self, "hyperparams", self.hyperparams or default.hyperparams)
        check_config(self.config)
        check_type("hyperparams", self.hyperparams, Hyperparams, "such as Hyperparams(learning_rate=3e-4)")
        scheduled = [name for name in self.hyperparams.names if callable(self.hyperparams.get(name))]
        if scheduled:
            raise ValueError(
                f"{scheduled[0]} is a schedule, which a sweep cannot save (learning_rate_annealing anneals the rate)"
            )
        for name in self.table.names:
            check_field(name)
        if "gru_width" in self.table.names and ("memory" in self.table.names or self.config.memory not in ("", "gru")):
            raise ValueError(
                "gru_width, of older versions, stands for memory='gru' and its memory_width, but the sweep has another "
                "memory (sweep over memory_width)"
            )
        self._check_hyperparams()
        for row, config in zip(self.table.rows(), self.configs):
            _check_effect(row, config, row.get("target_kl", self.hyperparams.target_kl))

    def __str__(self) -> str:
        swept = ", ".join(self.table.names) or "nothing"
        lines = [f"{self.env}: {self.describe_size()} over {swept}"]
        return "\n".join(lines + ([align(self.table.rows())] if self.table.names else []))

    def describe_size(self) -> str:
        """How many settings, seeds and runs there are, in words."""
        settings, seeds = count(len(self.table), "setting"), count(self.num_seeds, "seed")
        return f"{settings} x {seeds} = {count(self.num_runs, 'run')}"

    @property
    def num_runs(self) -> int:
        """Settings times seeds."""
        return len(self.table) * self.num_seeds

    def env_of(self, row: dict) -> str:
        """The environment's name under a setting."""
        return row.get("env", self.env)

    @cached_property
    def configs(self) -> tuple[Config, ...]:
        """The static settings under every setting; those that are equal are one object."""
        found: dict[str, Config] = {}
        static = [{name: value for name, value in row.items() if name in CONFIG_FIELDS} for row in self.table.rows()]
        return tuple(found.get(key) or found.setdefault(key, self.config_of(x)) for x in static for key in [repr(x)])

    def config_of(self, row: dict) -> Config:
        """The static settings under a setting."""
        static = {name: value for name, value in row.items() if name in CONFIG_FIELDS}
        if "num_updates" not in static:
            changed = static.keys() & {"num_envs", "num_steps"}
            sizes = [static.get(name, getattr(self.config, name)) for name in ("num_envs", "num_steps")]
            if changed and all(isinstance(size, int) and size > 0 for size in sizes):
                static["num_updates"] = max(1, self.config.total_steps // (sizes[0] * sizes[1]))
        return replace(self.config, **rename_older(static))

    def hyperparams_of(self, row: dict) -> Hyperparams:
        """The hyperparameters under a setting."""
        changed = {name: _as_number(name, value) for name, value in row.items() if spec_of(name)}
        return self.hyperparams.set(changed)

    def _check_hyperparams(self):
        """Refuses values of hyperparameters that are out of range, a whole column at a time."""
        columns = {name: axis[name] for axis in self.table.axes for name in axis if spec_of(name)}
        self.hyperparams.set({name: np.array([_as_number(name, x) for x in xs]) for name, xs in columns.items()})

    def groups(self) -> list[Group]:
        """The settings by all that is static: each group shares one compiled program."""
        return list(self._groups)

    @cached_property
    def _groups(self) -> tuple[Group, ...]:
        groups: dict[Group, list[int]] = {}
        for i, (row, config) in enumerate(zip(self.table.rows(), self.configs)):
            groups.setdefault(Group(self.env_of(row), config, _plugged_of(row)), []).append(i)
        return tuple(group._replace(settings=tuple(settings)) for group, settings in groups.items())

    def group_of(self, row: dict) -> Group:
        """The group of a setting, without its members."""
        return Group(self.env_of(row), self.config_of(row), _plugged_of(row))

    def name_group(self, group: Group) -> str:
        """The group in one line of text, by which its identity is kept: what is swept and makes a group.

        The number of updates does not count, since runs may be extended. Fields that are not swept are compared with
        those of the folder anyway, and a later version may have more of them.
        """
        swept = [name for name in CONFIG_FIELDS if name in self.table.names and name != "num_updates"]
        config = show_older(group.config)
        return show_setting({"env": group.env, **dict(group.plugged), **{name: config[name] for name in swept}})

    def name_program(self, group: Group) -> str:
        """The group as JSON, by which its slice size is kept: unlike `name_group`, no two groups share it."""
        swept = [name for name in CONFIG_FIELDS if name in self.table.names or name == "num_updates"]
        config = show_older(group.config)
        return json.dumps({"env": group.env, **dict(group.plugged), **{name: config[name] for name in swept}})

    def with_values(self, values: Mapping[str, Mapping[str, Any]]) -> "Sweep":
        """The same sweep with values for names that were read from disk, as {"loss": {"spo": spo_loss}}.

        Raises ValueError for a name that the sweep lacks.
        """
        for field, named_values in values.items():
            known = [x for axis in self.table.axes for x in axis.get(field, ())] + [self.env] * (field == "env")
            unknown = [name for name in named_values if name not in known]
            if unknown:
                raise ValueError(f"values={{{field!r}: {unknown}}} are no values of the sweep (it has {known})")

        def fill(field: str, name: Any) -> Any:
            return Named(name, values[field][name]) if name in values.get(field, {}) else name

        axes = [{field: tuple(fill(field, x) for x in axis[field]) for field in axis} for axis in self.table.axes]
        return replace(self, env=fill("env", self.env), table=Table(tuple(axes)))

    def runs(self, settings: Iterable[int] | None = None) -> dict[str, tuple[int, int]]:
        """All runs, or those of some settings: name on disk -> (setting, seed)."""
        names, seeds = self._names, range(self.num_seeds)
        settings = range(len(self.table)) if settings is None else settings
        return {names[i * self.num_seeds + seed]: (i, seed) for i in settings for seed in seeds}

    @cached_property
    def _names(self) -> tuple[str, ...]:
        return tuple(name_run(row, seed) for row in self.table.rows() for seed in range(self.num_seeds))

    def shared(self) -> dict[str, Any]:
        """What all settings have in common, as flat JSON data: name -> value."""
        data = self.to_json()
        values = {name: data[name] for name in ("env", "seed", "evaluate_every")}
        values |= data["config"] | data["hyperparams"]
        return {name: list(x) if isinstance(x, tuple) else x for name, x in values.items()}

    def to_json(self) -> dict:
        """Plain data that `from_json` reads back."""
        hyperparams = {name: _to_number(self.hyperparams.get(name)) for name in self.hyperparams.names}
        axes = self.table.axes
        return {
            "env": self.env,
            "axes": [{name: list(map(_to_number, column)) for name, column in axis.items()} for axis in axes],
            "num_seeds": self.num_seeds,
            "seed": self.seed,
            "config": asdict(self.config),
            "hyperparams": hyperparams,
            "evaluate_every": self.evaluate_every,
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: Any, lacking: list[str] | None = None) -> "Sweep":
        """The sweep that `to_json` wrote. Raises ValueError for other data.

        `lacking` receives the names of fields that the data lack, which have their defaults.
        """
        lacking = [] if lacking is None else lacking
        plain = as_record(SweepData, data, lacking)
        axes = [
            {name: tuple(map(partial(_from_number, name), x)) for name, x in axis.items()} for axis in plain["axes"]
        ]
        for axis in axes:
            if not paired(**axis).names:  # raises for columns that are empty or not equally long
                raise ValueError("axes must not be empty")
        hyperparams = complete_hyperparams(plain["hyperparams"], lacking)
        return cls(
            env=plain["env"],
            table=Table(tuple(axes)),
            num_seeds=plain["num_seeds"],
            seed=plain["seed"],
            config=plain["config"],
            hyperparams=Hyperparams().set({name: float(value) for name, value in hyperparams.items()}),
            evaluate_every=plain.get("evaluate_every"),
        )


def check_sweep(sweep: Any) -> None:
    """Refuses what is not a sweep."""
    check_type("sweep", sweep, Sweep, "such as Sweep('CartPole-v1', grid(learning_rate=[1e-4, 1e-3]))")


def make_group(group: Group, make: Callable = make_ppo, *, loaded: bool = False) -> PPO:
    """The PPO of a group of settings.

    Args:
        group: of a sweep.
        make: `make(env, config, **plugged)` makes it, where `plugged` are those of network, loss and optimizer that are
            swept.
        loaded: whether the sweep comes from disk, where custom values are names alone. Its PPO can act without a loss,
            an optimizer or a step, so that the defaults take their places.

    Raises:
        ValueError: for a name without a value.
    """
    values = {}
    for field, name in (("env", group.env), *group.plugged):
        known = field == "env" and (is_env_name(name) or not loaded or make is not make_ppo)
        bare = not isinstance(name, Named) and not known
        if bare and not (loaded and field in ("loss", "optimizer", "step")):
            remedy = f"values={{{field!r}: {{{name!r}: ...}}}}" if loaded else f"{field}={{{name!r}: ...}}"
            raise ValueError(f"{field}={name!r} is only a name here (give what it stands for: {remedy})")
        if field != "env" and isinstance(name, Named) and name.value is not None:
            values[field] = name.value
    step = values.pop("step", ())
    ppo = make(group.env.value if isinstance(group.env, Named) else group.env, group.config, **values)
    return with_step(ppo, *(step if isinstance(step, tuple) else (step,))) if step else ppo


def name_run(row: dict, seed: int) -> str:
    """A run's name on disk."""
    return json.dumps({name: _to_number(value) for name, value in row.items()} | {"seed": seed})


def check_field(name: str):
    """Refuses a name that no field of a sweep has, with the nearest."""
    if name.startswith(ENV_PREFIX) or name in ("env", *PLUGGED, *CONFIG_FIELDS) or spec_of(name):
        return
    if name.startswith(EXTRA):
        raise ValueError(f"{name} must be {EXTRA}NAME with a name such as beta")
    if name in ("seed", "seeds", "num_seeds", "n_seeds"):
        raise ValueError(f"{name} cannot be swept: num_seeds says how many seeds every setting gets")
    near = suggest(name, CONFIG_FIELDS + HYPERPARAM_FIELDS + PLUGGED + ("env",))
    raise ValueError(
        f"{name} is not a field of a sweep ({near}); parameters of environments are env.NAME, custom coefficients "
        "extra.NAME"
    )


def _plugged_of(row: dict) -> tuple[tuple[str, str], ...]:
    """The fields of a setting whose values are plugged in."""
    return tuple((name, row[name]) for name in PLUGGED if name in row)


def _as_number(name: str, value: Any) -> float:
    """A value of a hyperparameter. Raises ValueError for anything but a number."""
    try:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError
        return float(value)
    except (TypeError, OverflowError):
        raise ValueError(f"{name}={quote(value)} must be a number") from None


def _check_effect(row: dict, config: Config, target_kl: Any):
    """Refuses a setting with one of `target_kl` and `stop_on_kl`, unless the sweep compares it with the other."""
    set_alone = "stop_on_kl" if config.stop_on_kl else "target_kl"
    lacking = "target_kl" if config.stop_on_kl else "stop_on_kl"
    if set_alone in row or lacking not in row:
        check_target_kl(target_kl, config)


def _to_number(value):
    """A value as JSON can hold it: infinities as words."""
    return str(value) if isinstance(value, float) and abs(value) == float("inf") else value


def _from_number(name: str, value):
    if isinstance(value, list):
        return tuple(value)
    return float(value) if value in ("inf", "-inf") and spec_of(name) else value
