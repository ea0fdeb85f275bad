"""Settings that are known to work: one preset per environment, and A2C as a special case of PPO."""

import math
from dataclasses import fields
from typing import NamedTuple

from purejaxppo.config import Config, Hyperparams


class Preset(NamedTuple):
    """Settings that belong together."""

    config: Config
    hyperparams: Hyperparams


def preset(env: str) -> Preset:
    """The preset of an environment by name; the defaults for a name that has none."""
    return PRESETS.get(env, Preset(Config(), Hyperparams()))


def a2c(**config) -> Preset:
    """Advantage actor-critic (Mnih et al., 2016) as PPO with one epoch, one minibatch and no clipping.

    With a single gradient step the ratio is 1, so its gradient is that of the plain log-likelihood loss. `config`
    sets other fields of Config.
    """
    return Preset(
        Config(
            **{"num_envs": 16, "num_steps": 5, "num_updates": 6250, "normalize_advantage": "off"} | config,
            num_epochs=1,
            num_minibatches=1,
            clip_value_loss=False,
        ),
        Hyperparams(learning_rate=7e-4, clip=math.inf, gae_lambda=1.0),
    )


def changed_settings(config: Config, hyperparams: Hyperparams) -> dict:
    """The fields in which settings differ from the defaults, the number of updates aside."""
    return {
        field.name: getattr(settings, field.name)
        for settings, default in ((config, Config()), (hyperparams, Hyperparams()))
        for field in fields(settings)
        if getattr(settings, field.name) != getattr(default, field.name) and field.name != "num_updates"
    }


def _preset(total_steps: int, config: dict = {}, **hyperparams) -> Preset:
    return Preset(Config(**config).with_total_steps(total_steps), Hyperparams(**hyperparams))


MINATAR = {"num_envs": 64, "num_minibatches": 8, "widths": (128,), "encoder": "cnn", "activation": "relu"}

PRESETS = {
    "CartPole-v1": _preset(500_000),
    "Acrobot-v1": _preset(500_000),
}
