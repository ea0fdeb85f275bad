import json
from dataclasses import asdict, fields, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from purejaxppo import Config, Hyperparams, linear, runs, schedule
from purejaxppo.config import OTHER_NAMES, as_arrays


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"num_minibatches": 6}, r"num_minibatches=6 must divide the 512 transitions of a rollout \(try 4 or 8\)"),
        ({"num_minibatches": 1000}, r"num_minibatches=1000 must divide .* \(try 512\)"),
        ({"segment_length": 48}, r"segment_length=48 must divide num_steps=128 \(try 32 or 64\)"),
        ({"segment_length": 64, "num_minibatches": 16}, r"num_minibatches=16 must divide the 8 segments .* \(try 8\)"),
        ({"num_envs": 0}, "num_envs=0 must be at least 1"),
        ({"num_steps": -3}, "num_steps=-3 must be at least 1"),
        ({"num_epochs": 2.5}, "num_epochs=2.5 must be a whole number"),
        ({"num_updates": True}, "num_updates=True must be a whole number"),
        ({"num_envs": 8.0}, r"num_envs=8.0 must be a whole number \(try 8\)"),
        ({"num_envs": "8"}, "num_envs='8' must be a whole number"),
        ({"num_envs": 10**12, "num_minibatches": 3}, "num_envs=1000000000000 must be at most 2147483647"),
        ({"num_steps": 10**8, "num_envs": 100}, "num_steps=100000000 x num_epochs=4 must be at most 2147483647"),
        ({"num_envs": 2**22 + 1, "num_epochs": 1, "num_minibatches": 3}, r"must divide .* \(try 2 or 4\)"),
        ({"widths": np.array([8.0])}, r"widths=np.float64\(8.0\) must be a whole number \(try 8\)"),
        ({"initial_std": np.ones(3)}, "initial_std=array.* must be one number"),
        ({"initial_std": "1"}, "initial_std='1' must be a number"),
        ({"reward_clip": 1e39}, "reward_clip=1e.39 is inf in float32"),
        ({"activation": None}, "activation=None must be one of"),
        (
            {"num_envs": 1, "num_steps": 1, "num_minibatches": 1, "normalize_advantage": "batch"},
            "normalize_advantage='batch' standardises over one transition",
        ),
        ({"widths": (64, 0)}, "widths=0 must be at least 1"),
        ({"widths": 64}, "widths=64 must be a sequence"),
        ({"encoder": "transformer"}, "encoder='transformer' must be one of 'mlp', 'cnn'"),
        ({"scale_reward": "yes"}, "scale_reward='yes' must be True or False"),
        ({"observation_clip": 0.0}, r"observation_clip=0 must be a number in \(0, inf\]"),
        ({"initial_std": float("nan")}, "initial_std=nan"),
        ({"num_envs": 1, "num_steps": 4}, "num_minibatches=4 leaves one transition per minibatch"),
        ({"memory": "gru"}, "memory='gru' needs segments of more than one step"),
        ({"memory": "rnn"}, "memory='rnn' must be one of '', 'gru', 'lstm', 'mingru'"),
        ({"memory_width": 0}, "memory_width=0 must be at least 1"),
        ({"resets_per_step": 9}, "resets_per_step=9 must not exceed num_envs=4"),
    ],
)
def test_a_config_that_cannot_be_is_refused_in_one_sentence(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        Config(**settings)


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"discount": 1.2}, r"discount=1.2 must be a number in \[0, 1\]"),
        ({"discount": float("nan")}, r"discount=nan must be a number in \[0, 1\]"),
        ({"gae_lambda": -0.1}, "gae_lambda=-0.1"),
        ({"learning_rate": -1e-3}, "learning_rate=-0.001"),
        ({"learning_rate": "fast"}, "learning_rate='fast' must be a number"),
        ({"discount": "0.99"}, "discount='0.99' must be a number"),
        ({"learning_rate": True}, "learning_rate=True must be a number"),
        ({"learning_rate": None}, "learning_rate=None must be a number"),
        ({"learning_rate": 1j}, "learning_rate=1j must be a number"),
        ({"learning_rate": np.array([True])}, "learning_rate=array.* must be a number"),
        ({"learning_rate": (1,)}, r"learning_rate=\(1,\) must be a number, or an array of one number per run"),
        ({"target_kl": 10**400}, "target_kl=1000.* must be a number"),
        ({"target_kl": 1e39}, "target_kl=1e.39 is inf in float32"),
        ({"adam_eps": 1e-50}, "adam_eps=1e-50 is 0 in float32"),
        (
            {"adam_b1": 0.99999999999},
            r"adam_b1=0.99999999999 must be a number in \[0, 1\), also when rounded to float32",
        ),
        ({"learning_rate": jnp.array([1e-3, jnp.nan])}, "learning_rate=nan"),
        ({"adam_b1": 1.0}, r"adam_b1=1 must be a number in \[0, 1\)"),
        ({"entropy_coefficient": float("inf")}, "entropy_coefficient=inf"),
        ({"learning_rate": linear(float("nan"), 0.0)}, "learning_rate .schedule.=nan"),
        ({"learning_rate": optax.linear_schedule(1e-3, 0.0, 10)}, "is not a pytree of numbers: make it linear"),
        ({"discount": linear(0.9, 1.0)}, "discount must be a number; only .* may be schedules"),
        ({"extra": {"a b": 1.0}}, "extra=.* must be a dict of numbers by name"),
        ({"extra": {"beta": float("nan")}}, "extra.beta=nan must be a number"),
        ({"extra": {"beta": "much"}}, "extra.beta='much' must be a number"),
    ],
)
def test_hyperparams_that_cannot_be_are_refused_in_one_sentence(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        Hyperparams(**settings)


def test_coefficients_of_a_custom_loss_have_the_rights_of_hyperparameters():
    hyperparams = Hyperparams(extra={"beta": 0.5, "late": linear(0.0, 2.0)})
    assert hyperparams.names[-2:] == ("extra.beta", "extra.late") and hyperparams.get("extra.beta") == 0.5
    assert hyperparams.set({"extra.beta": 3.0, "clip": 0.1}) == Hyperparams(
        clip=0.1, extra={"beta": 3.0, "late": hyperparams.extra["late"]}
    )
    now = hyperparams.at(3, Config(num_updates=4))
    np.testing.assert_allclose([now.extra["beta"], now.extra["late"]], [0.5, 1.5])
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(hyperparams)]
    assert ".extra['beta']" in paths


def test_a_schedule_of_optax_is_evaluated_by_optimizer_steps():
    """Four updates of 2 x 4 minibatches are 32 steps."""
    config = Config(num_updates=4, num_epochs=2, num_minibatches=4)
    rates = optax.piecewise_constant_schedule(1.0, {8: 0.5, 17: 0.1})
    hyperparams = Hyperparams(learning_rate=schedule(rates), clip=schedule(optax.linear_schedule(0.2, 0.0, 32)))
    seen = [hyperparams.at(jnp.int32(i), config) for i in range(4)]
    np.testing.assert_allclose([x.learning_rate for x in seen], [1, 0.5, 0.5, 0.05], rtol=1e-6)
    np.testing.assert_allclose([x.clip for x in seen], [0.2, 0.15, 0.1, 0.05], rtol=1e-6)
    assert seen[0].learning_rate.dtype == jnp.float32 and not seen[0].learning_rate.weak_type
    many = jax.vmap(lambda i: hyperparams.at(i, config).clip)(jnp.arange(4))
    np.testing.assert_allclose(many, [0.2, 0.15, 0.1, 0.05], rtol=1e-6)


def test_hyperparams_pass_through_transformations_unchecked():
    specs = jax.tree.map(lambda _: -1, Hyperparams())
    assert specs.discount == -1
    doubled = jax.jit(lambda h: jax.tree.map(lambda x: x * 2, h))(Hyperparams())
    assert doubled.discount == 0.99 * 2
    names = [jax.tree_util.keystr(path, simple=True) for path, _ in jax.tree_util.tree_leaves_with_path(Hyperparams())]
    assert tuple(names) == Hyperparams().names


def test_total_steps_are_whole_updates():
    config = Config().with_total_steps(500_000)
    assert (config.num_updates, config.total_steps, config.steps_per_update) == (976, 499_712, 512)
    with pytest.raises(ValueError, match="total_steps=511 must be at least one rollout"):
        Config().with_total_steps(511)


def test_total_steps_may_be_written_as_a_float():
    assert Config().with_total_steps(1e5) == Config().with_total_steps(100_000)
    wrong: list[Any] = [1e5 + 0.5, float("inf"), "1e5"]
    for total_steps in wrong:
        with pytest.raises(ValueError, match="total_steps=.* must be a whole number"):
            Config().with_total_steps(total_steps)


def test_numbers_of_numpy_and_jax_are_settings_too():
    given: dict[str, Any] = {"widths": np.array([8, 8]), "num_envs": jnp.array(8), "initial_std": jnp.float32(0.5)}
    config = Config(**given, scale_reward=np.True_, num_steps=np.int64(64))  # pyright: ignore[reportArgumentType]
    assert config == Config(widths=(8, 8), num_envs=8, initial_std=0.5, scale_reward=True, num_steps=64)
    assert hash(config) and json.dumps(asdict(config))
    assert as_arrays(Hyperparams(target_kl=10**30, learning_rate=np.float64(0.5))).target_kl == jnp.float32(1e30)


def test_a_config_can_be_hashed_and_compared():
    as_list: dict[str, Any] = {"widths": [64, 64]}
    assert Config(**as_list) == Config() and hash(Config(**as_list)) == hash(Config())


@pytest.mark.parametrize(
    "name, words",
    [
        ("lr", "did you mean learning_rate"), ("gamma", "did you mean discount"), ("lambda", "did you mean gae_lambda"),
        ("ent_coef", "did you mean entropy_coefficient"), ("vf-coef", "did you mean value_coefficient"),
        ("n_steps", "num_steps is a field of Config"), ("num_envs", "num_envs is a field of Config"),
        ("learning_rat", "did you mean learning_rate"), ("target-kl", "did you mean target_kl"),
    ],
)  # fmt: skip
def test_the_names_of_other_libraries_are_understood(name, words):
    with pytest.raises(ValueError, match=f"{name} is not a hyperparameter .{words}"):
        Hyperparams().set({name: 0.5})
    with pytest.raises(ValueError, match=f"{name} is not a hyperparameter .{words}"):
        runs(jax.random.key(0), {name: [0.5]})


@pytest.mark.parametrize(
    "kind, name, remedy",
    [
        (Config, "num_env", "did you mean num_envs?"),
        (Config, "n_steps", "did you mean num_steps?"),
        (Config, "total_timesteps", "config.with_total_steps(...) sets num_updates by it"),
        (Config, "lr", "learning_rate is a field of Hyperparams"),
        (Hyperparams, "gamma", "did you mean discount?"),
        (Hyperparams, "num_envs", "num_envs is a field of Config"),
        (Hyperparams, "zzzz", "help(purejaxppo.Hyperparams) lists them"),
    ],
)
def test_an_unknown_field_in_python_is_named_with_its_value_and_what_it_may_mean(kind, name, remedy):
    with pytest.raises(TypeError) as error:
        kind(**{name: 4})
    assert str(error.value) == f"{name}=4 is not a field of {kind.__name__} ({remedy})"
    with pytest.raises(TypeError, match=f"{name}=4 is not a field"):
        replace(kind(), **{name: 4})


def test_other_names_stand_for_settings():
    settings = {field.name for field in fields(Config)} | set(Hyperparams().names)
    assert set(OTHER_NAMES.values()) <= settings and not OTHER_NAMES.keys() & settings
