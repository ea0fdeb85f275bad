"""The work that is compared: settings that every peer is given alike."""

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Work:
    """PPO on one environment: an actor and a critic of 64-64 tanh, and these settings.

    A recurrent one has one encoder and one GRU, and heads with a layer of their own, all of 128 units; it learns from
    whole rollouts of some environments in each minibatch.
    """

    env: str = "CartPole-v1"
    num_envs: int = 4
    num_steps: int = 128
    num_epochs: int = 4
    num_minibatches: int = 4
    total_steps: int = 500_000
    num_seeds: int = 1
    encoder: Literal["mlp", "cnn"] = "mlp"
    recurrent: bool = False
    normalize: bool = False  # observations standardised, rewards scaled
    learning_rate: float = 2.5e-4  # constant
    discount: float = 0.99
    gae_lambda: float = 0.95
    clip: float = 0.2
    entropy_coefficient: float = 0.01
    value_coefficient: float = 0.5  # of half the mean square
    max_grad_norm: float = 0.5

    @property
    def steps_per_update(self) -> int:
        return self.num_envs * self.num_steps

    @property
    def num_updates(self) -> int:
        return self.total_steps // self.steps_per_update

    @property
    def steps(self) -> int:
        """Environment steps of a whole run, of all seeds together."""
        return self.num_seeds * self.num_updates * self.steps_per_update


NARROW = Work()
PIXELS = Work(env="Breakout-MinAtar", num_envs=64, num_minibatches=8)

WORKS = {
    "narrow": NARROW,
    "wide": Work(num_envs=2048, num_steps=32, num_minibatches=32, total_steps=5_000_000),
    # The more seeds, the fewer steps of each, so that all take about as long.
    "seeds-1": NARROW,
    "seeds-8": replace(NARROW, num_seeds=8, total_steps=250_000),
    "seeds-32": replace(NARROW, num_seeds=32, total_steps=62_500),
    "seeds-128": replace(NARROW, num_seeds=128, total_steps=15_872),
    "seeds-256": replace(NARROW, num_seeds=256, total_steps=30_720),
    "seeds-512": replace(NARROW, num_seeds=512, total_steps=4_096),
    "pixels-mlp": replace(PIXELS, total_steps=500_000),
    "pixels-cnn": replace(PIXELS, total_steps=100_000, encoder="cnn"),
    "recurrent": Work(recurrent=True, total_steps=50_000),
    "continuous": Work(env="Pendulum-v1", num_envs=32, num_steps=64, normalize=True),
    "long-1M": replace(NARROW, total_steps=1_000_000),
    "long-10M": replace(NARROW, total_steps=10_000_000),
    "long-100M": replace(NARROW, total_steps=100_000_000),
}


def small(work: Work) -> Work:
    """The same work cut down until it only shows that the comparison still runs."""
    return replace(
        work, num_envs=min(work.num_envs, 8), num_steps=16, total_steps=3 * 16 * min(work.num_envs, 8),
        num_seeds=min(work.num_seeds, 2), num_minibatches=4,
    )  # fmt: skip
