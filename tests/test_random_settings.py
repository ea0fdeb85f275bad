"""Settings drawn at random from valid and invalid values of every field give a result, or one sentence."""

import math
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import purejaxppo as pjp
from purejaxppo.cli.main import main
from purejaxppo.config import HYPERPARAM_SPECS, Config, Hyperparams

ENVS = ("CartPole-v1", "Pendulum-v1", "Catch-bsuite", "MemoryChain-bsuite", "PointRobot-misc")
JUNK: list[Any] = [
    None, True, "0.99", "", "mlp ", b"x", -1, 0, -0.5, 1.5, 3, 10**30, 2**31, 1e-50, 1e39, math.nan, math.inf,
    -math.inf, 1 + 2j, (1,), [], {}, [[1, 2], [3]], np.float32(0.5), np.int64(3), np.array([1, 2, 3]), np.array("x"),
    jnp.float32(2), object, lambda x: x, jax.random.key(0), pjp.linear(1, 0),
]  # fmt: skip
SIZES: dict[str, Any] = {
    "num_envs": 2,
    "num_steps": 4,
    "num_updates": 2,
    "num_epochs": 1,
    "num_minibatches": 2,
    "widths": (4,),
}
SMALL = {
    "num_envs": [1, 2, 3, 4], "num_steps": [1, 2, 4, 8], "num_updates": [1, 2], "num_epochs": [1, 2],
    "num_minibatches": [1, 2, 4], "segment_length": [1, 2, 4], "memory_width": [1, 3], "resets_per_step": [0, 1],
    "stagger": [0, 5],
    "widths": [(), (3,), [3, 2], np.array([4, 4])], "observation_clip": [0.1, 10.0, math.inf],
    "reward_clip": [0.1, math.inf], "initial_std": [1e-3, 1.0],
}  # fmt: skip


def valid_of_config(field: Any) -> st.SearchStrategy:
    if get_origin(field.type) is Literal:
        return st.sampled_from(get_args(field.type))
    return st.booleans() if field.type is bool else st.sampled_from(SMALL[field.name])


def valid_of_hyperparam(name: str) -> st.SearchStrategy:
    spec = HYPERPARAM_SPECS[name]
    high = spec.high if spec.high < math.inf else 10.0
    numbers = st.floats(spec.low, high, exclude_max=spec.open_high and high == spec.high, width=32)
    numbers = numbers.filter(lambda x: x == 0 or abs(x) > 1e-37)
    return numbers | st.just(pjp.linear(spec.low, high * 0.9)) if spec.schedulable else numbers


def some_of(strategies: dict[str, st.SearchStrategy], most_invalid: int) -> st.SearchStrategy:
    """A dictionary with a few of the fields, of which at most so many have invalid values."""

    @st.composite
    def draw_fields(draw):
        names = draw(st.lists(st.sampled_from(sorted(strategies)), max_size=5, unique=True))
        wrong = draw(st.integers(0, most_invalid)) if draw(st.booleans()) else 0
        return {n: draw(st.sampled_from(JUNK)) if i < wrong else draw(strategies[n]) for i, n in enumerate(names)}

    return draw_fields()


CONFIGS = {field.name: valid_of_config(field) for field in fields(Config)}
HYPERPARAMS = {name: valid_of_hyperparam(name) for name in HYPERPARAM_SPECS}
DRAWN = {
    "env": st.sampled_from(ENVS),
    "config": some_of(CONFIGS, 2),
    "hyperparams": some_of(HYPERPARAMS, 1),
}


def make(env: str, config: dict[str, Any], hyperparams: dict[str, Any]):
    """The PPO and its hyperparameters, or None where they were refused in one sentence."""
    try:
        whole = Config(**SIZES | config)
        ppo, numbers = pjp.make_ppo(env, whole), Hyperparams(**hyperparams)
        state = jax.eval_shape(lambda key: ppo.init(key, numbers), jax.random.key(0))
    except ValueError as error:
        sentence = str(error)
        assert sentence and "\n" not in sentence and len(sentence) < 500, sentence
        return None
    return ppo, numbers, state


def check_abstractly(env, config, hyperparams):
    made = make(env, config, hyperparams)
    if made:
        ppo, _, state = made
        after, _ = jax.eval_shape(ppo.step, state)
        assert jax.tree.structure(after) == jax.tree.structure(state)
        assert all(x.shape == y.shape and x.dtype == y.dtype for x, y in zip(*map(jax.tree.leaves, (after, state))))


quietly: dict[str, Any] = {
    "deadline": None, "derandomize": True, "database": None, "phases": [Phase.generate],
    "suppress_health_check": list(HealthCheck),
}  # fmt: skip


@settings(max_examples=60, **quietly)
@given(**DRAWN)
def test_settings_trace_or_are_refused_in_one_sentence(env, config, hyperparams):
    check_abstractly(env, config, hyperparams)


@pytest.mark.slow
@settings(max_examples=500, **quietly)
@given(**DRAWN)
def test_many_more_settings_trace_or_are_refused_in_one_sentence(env, config, hyperparams):
    check_abstractly(env, config, hyperparams)


@pytest.mark.slow
@settings(max_examples=25, **quietly)
@given(env=DRAWN["env"], config=some_of(CONFIGS, 0), hyperparams=some_of(HYPERPARAMS, 0))
def test_settings_train_or_are_refused_in_one_sentence(env, config, hyperparams):
    made = make(env, config, hyperparams)
    if made:
        ppo, numbers, _ = made
        result = pjp.fit(ppo, pjp.first_state(ppo, jax.random.key(0), numbers), progress=False)
        assert int(result.state.num_updates) <= ppo.config.num_updates == result.metrics.sizes["updates"]


def as_flags(values: dict) -> list[str]:
    flags = []
    for name, value in values.items():
        flag = f"--{'no-' if value is False else ''}{name.replace('_', '-')}"
        listed = isinstance(value, (list, tuple, np.ndarray))
        words = [] if isinstance(value, bool) else list(map(str, np.atleast_1d(value) if listed else [value]))
        flags += [flag, *words]
    return flags


@pytest.mark.slow
@settings(max_examples=50, **quietly)
@given(command=st.sampled_from(["train", "sweep --grid clip=0.1,0.2 --num-seeds 1", "bench"]), **DRAWN)
def test_command_lines_end_well_or_are_refused_in_one_sentence(tmp_path_factory, command, env, config, hyperparams):
    name, *rest = command.split()
    shown = {"train": [], "sweep": [], "bench": ["--rounds", "1", "--seconds", "0.01", "--num-seeds", "1"]}[name]
    out = [] if name == "bench" else ["--out", str(tmp_path_factory.mktemp("out"))]
    flags = as_flags({n: x for n, x in (SIZES | config | hyperparams).items() if not callable(x)})
    try:
        assert main([name, env, *rest, *shown, *out, *flags]) in (0, 2, 4)
    except SystemExit as error:  # of the parser
        assert error.code == 2
