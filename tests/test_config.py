import jax
import jax.numpy as jnp
import optax
import pytest

from purejaxppo import Config, Hyperparams, linear


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
        ({"widths": (64, 0)}, "widths=0 must be at least 1"),
        ({"widths": 64}, "widths=64 must be a sequence"),
        ({"encoder": "transformer"}, "encoder='transformer' must be one of 'mlp', 'cnn'"),
        ({"scale_reward": "yes"}, "scale_reward='yes' must be True or False"),
        ({"observation_clip": 0.0}, r"observation_clip=0 must be a number in \(0, inf\]"),
        ({"initial_std": float("nan")}, "initial_std=nan"),
        ({"num_envs": 1, "num_steps": 4}, "num_minibatches=4 leaves one transition"),
        ({"gru_width": 8}, "gru_width=8 learns nothing from segments of one step"),
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
        ({"learning_rate": jnp.array([1e-3, jnp.nan])}, "learning_rate=nan"),
        ({"adam_b1": 1.0}, r"adam_b1=1 must be a number in \[0, 1\)"),
        ({"entropy_coefficient": float("inf")}, "entropy_coefficient=inf"),
        ({"learning_rate": linear(float("nan"), 0.0)}, "learning_rate .schedule.=nan"),
        ({"learning_rate": optax.linear_schedule(1e-3, 0.0, 10)}, "is no pytree of numbers: make it linear.*schedule"),
        ({"discount": linear(0.9, 1.0)}, "discount must be a number; only .* may be schedules"),
    ],
)
def test_hyperparams_that_cannot_be_are_refused_in_one_sentence(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        Hyperparams(**settings)


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


def test_a_config_can_be_hashed_and_compared():
    assert Config(widths=[64, 64]) == Config() and hash(Config(widths=[64, 64])) == hash(Config())
