"""A learning rate that adapts to the KL divergence of the updates."""

import jax.numpy as jnp

from purejaxppo.checks import check_number
from purejaxppo.ppo import PPO, TrainState, with_step
from purejaxppo.validate import check_hyperparams, check_type


def adaptive_learning_rate(
    ppo: PPO, desired_kl: float = 0.01, *, factor: float = 1.5, lowest: float = 1e-5, highest: float = 1e-2
) -> PPO:
    """The same PPO with a learning rate that keeps the KL divergence of its updates near `desired_kl`: again a PPO.

    After an update whose `approx_kl` (the mean over its minibatches) is above twice `desired_kl`, the rate is divided
    by `factor`; below half of `desired_kl` it is multiplied. Nothing else anneals the rate. The rule and its constants
    are those of rsl_rl and Brax. They apply it in every minibatch to the exact KL divergence, where the rate can change
    by factor ** (epochs * minibatches) in one update; here it changes once. As there, the KL of a minibatch is measured
    before its optimizer step, so that the first is 0 and the last step is not in the mean.

    Args:
        ppo: of one run.
        desired_kl: above 0; `hyperparams.extra["desired_kl"]` overrides it, and can be swept.
        factor: above 1.
        lowest: the lower bound of the rate.
        highest: the upper bound of the rate.

    Raises:
        ValueError: for values out of range, for updates of one minibatch, and, at tracing, for a rate that is a
            schedule.
    """
    check_type("ppo", ppo, PPO, "as make_ppo returns it")
    if ppo.config.num_epochs * ppo.config.num_minibatches == 1:
        raise ValueError("num_epochs=1 and num_minibatches=1 leave no KL divergence to measure (try num_epochs=2)")
    check_number("desired_kl", desired_kl, 0, jnp.inf, open_low=True, open_high=True)
    check_number("factor", factor, 1, jnp.inf, open_low=True, open_high=True)
    check_number("highest", highest, 0, jnp.inf, open_low=True)
    check_number("lowest", lowest, 0, highest, open_low=True)

    def init(ppo: PPO, key, hyperparams, env_params):
        check_hyperparams(hyperparams)
        if callable(hyperparams.learning_rate):
            raise ValueError("learning_rate is a schedule, which cannot adapt to the KL divergence (give a number)")
        return ppo.init(key, hyperparams.set({"learning_rate_annealing": 0.0}), env_params)

    def step(ppo: PPO, state):
        if not isinstance(state, TrainState):
            raise ValueError("a population has no learning rate: write evolving(adaptive_learning_rate(ppo), ...)")
        rate = state.hyperparams.learning_rate
        desired = state.hyperparams.at(state.num_updates, ppo.config).extra.get("desired_kl", desired_kl)
        state, metrics = ppo.step(state)
        if "approx_kl" not in metrics:
            raise ValueError("adaptive_learning_rate needs a loss that reports approx_kl")
        kl = metrics["approx_kl"]
        low = (kl < desired / 2) & (kl > 0)
        moved = jnp.where(kl > 2 * desired, rate / factor, jnp.where(low, rate * factor, rate))
        rate = jnp.clip(moved, lowest, highest)
        return state.replace(hyperparams=state.hyperparams.set({"learning_rate": rate})), metrics

    return with_step(ppo, step, init)
