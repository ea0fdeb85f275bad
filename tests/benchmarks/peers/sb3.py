"""stable-baselines3, with its defaults for a multilayer perceptron: 64-64 tanh twice."""

from stable_baselines3 import PPO

from peers import gymnasium_vectors


def prepare(work):
    return gymnasium_vectors.prepare(PPO, work)
