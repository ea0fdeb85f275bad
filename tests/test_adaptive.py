"""The learning rate that follows the KL divergence of the updates."""

from dataclasses import replace

import jax
import numpy as np
import pytest

import purejaxppo as pjp
from probes import SMALL, copy_cue


@pytest.mark.full
def test_the_rate_follows_the_kl_of_every_update_and_stays_in_its_bounds(key):
    """From the metrics of each update, computed again on the host, for three rates that begin too low and too high."""
    ppo = pjp.batched(
        pjp.adaptive_learning_rate(pjp.make_ppo(copy_cue(), replace(SMALL, num_updates=25)), highest=0.02)
    )
    rates = {"learning_rate": [1e-5, 1e-3, 1e-1]}
    hyperparams = pjp.Hyperparams(extra={"desired_kl": 0.001})
    state, metrics = jax.jit(ppo.train)(jax.jit(ppo.init)(*pjp.runs(key, rates, hyperparams=hyperparams)))
    rate, kl = (np.asarray(metrics[name], np.float64) for name in ("learning_rate", "approx_kl"))
    moved = np.where(kl > 0.002, rate / 1.5, np.where((kl < 0.0005) & (kl > 0), rate * 1.5, rate)).clip(1e-5, 0.02)
    after = np.column_stack([rate[:, 1:], state.hyperparams.learning_rate])
    np.testing.assert_allclose(after, moved, rtol=1e-5)
    assert (kl > 0.002).any() and (kl < 0.0005).any() and ((kl > 0.0005) & (kl < 0.002)).any()


def test_what_cannot_follow_a_kl_is_refused(key):
    ppo = pjp.make_ppo(copy_cue(), SMALL)
    for options, words in (({"desired_kl": 0.0}, "desired_kl=0 must be"), ({"factor": 1.0}, "factor=1 must be")):
        with pytest.raises(ValueError, match=words):
            pjp.adaptive_learning_rate(ppo, **options)
    own = pjp.adaptive_learning_rate(ppo)
    with pytest.raises(ValueError, match="learning_rate is a schedule"):
        jax.eval_shape(own.init, key, pjp.Hyperparams(learning_rate=pjp.linear(1e-3, 0.0)))
    with pytest.raises(ValueError, match="leave no KL divergence to measure"):
        pjp.adaptive_learning_rate(pjp.make_ppo("CartPole-v1", pjp.a2c().config))
