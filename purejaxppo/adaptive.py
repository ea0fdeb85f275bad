"""A learning rate that follows how far updates move the policy."""

import jax.numpy as jnp

from purejaxppo.checks import check_range
from purejaxppo.ppo import PPO, TrainState, with_step


def adaptive_learning_rate(
    ppo: PPO, desired_kl: float = 0.01, *, factor: float = 1.5, lowest: float = 1e-5, highest: float = 1e-2
) -> PPO:
    """The same PPO, whose learning rate keeps the KL divergence of its updates near `desired_kl`: again a PPO.

    After a cycle whose `approx_kl`, the mean over its minibatches, was above twice `desired_kl` the rate is divided by
    `factor`, after one below half of it multiplied, within [`lowest`, `highest`]. `hyperparams.extra["desired_kl"]`
    takes the place of `desired_kl` where it is given, and so can be swept. Nothing else anneals the rate. The rule and
    its constants are those of rsl_rl and Brax, which apply it in every minibatch, to the exact KL divergence, where the
    rate can move by factor ** (epochs * minibatches) in one cycle; here it moves once. Like theirs, each KL is measured
    before the step of its minibatch, so that the first is 0 and the last step is not in the mean. Raises ValueError for
    numbers that cannot be, for cycles of one minibatch, and, at tracing, for a rate that is a schedule.
    """
    if ppo.config.num_epochs * ppo.config.num_minibatches == 1:
        raise ValueError("num_epochs=1 and num_minibatches=1 measure no KL divergence (try num_epochs=2)")
    check_range("desired_kl", desired_kl, 0, jnp.inf, open_low=True, open_high=True)
    check_range("factor", factor, 1, jnp.inf, open_low=True, open_high=True)
    check_range("lowest", lowest, 0, highest, open_low=True)

    def init(ppo: PPO, key, hyperparams, env_params):
        if callable(hyperparams.learning_rate):
            raise ValueError("learning_rate is a schedule, which cannot follow the KL divergence (give a number)")
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
