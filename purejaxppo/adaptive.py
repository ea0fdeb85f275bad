"""A learning rate that follows how far updates move the policy."""

import jax.numpy as jnp

from purejaxppo.checks import check_range
from purejaxppo.ppo import PPO, with_step


def adaptive_learning_rate(
    ppo: PPO, desired_kl: float = 0.01, *, factor: float = 1.5, lowest: float = 1e-5, highest: float = 1e-2
) -> PPO:
    """The same PPO, whose learning rate keeps the KL divergence of its updates near `desired_kl`: again a PPO.

    After a cycle whose `approx_kl`, the mean over its minibatches, was above twice `desired_kl` the rate is divided by
    `factor`, after one below half of it multiplied, within [`lowest`, `highest`]. `hyperparams.extra["desired_kl"]`
    takes the place of `desired_kl` where it is given, and so can be swept. The rule and its constants are those of
    rsl_rl and Brax, which apply it in every minibatch, to the exact KL divergence, where the rate can move by
    factor ** (epochs * minibatches) in one cycle; here it moves once. A `learning_rate_annealing` is applied on top, so
    it should be 0. Raises ValueError for numbers that cannot be, and, at tracing, for a rate that is a schedule.
    """
    check_range("desired_kl", desired_kl, 0, jnp.inf, open_low=True, open_high=True)
    check_range("factor", factor, 1, jnp.inf, open_low=True, open_high=True)
    check_range("lowest", lowest, 0, highest, open_low=True)

    def step(ppo: PPO, state):
        rate = state.hyperparams.learning_rate
        if callable(rate):
            raise ValueError("learning_rate is a schedule, which cannot follow the KL divergence (give a number)")
        state, metrics = ppo.step(state)
        desired, kl = state.hyperparams.extra.get("desired_kl", desired_kl), metrics["approx_kl"]
        moved = jnp.where(kl > 2 * desired, rate / factor, jnp.where(kl < desired / 2, rate * factor, rate))
        rate = jnp.clip(moved, lowest, highest)
        return state.replace(hyperparams=state.hyperparams.set({"learning_rate": rate})), metrics

    return with_step(ppo, step)
