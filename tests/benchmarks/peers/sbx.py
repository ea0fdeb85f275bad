"""sbx-rl: stable-baselines3 with networks in JAX."""

from sbx import PPO

from peers import gymnasium_vectors


def prepare(work):
    return gymnasium_vectors.prepare(PPO, work)
