"""A run of 8 seeds with a checkpoint after every chunk, for tests that kill it: python resume_program.py FOLDER."""

import dataclasses
import sys

import jax

import purejaxppo as pjp
from probes import SMALL

NUM_UPDATES = 1000


def begin(num_updates=NUM_UPDATES):
    """The PPO, batched, and its first state."""
    ppo = pjp.batched(pjp.make_ppo("CartPole-v1", dataclasses.replace(SMALL, num_updates=num_updates)))
    return ppo, jax.jit(ppo.init)(*pjp.runs(jax.random.key(0), num_seeds=8))


if __name__ == "__main__":
    ppo, state = begin()
    pjp.fit(ppo, state, folder=sys.argv[1], updates_per_chunk=2, save_every=0, progress=False)
    print("done", flush=True)
