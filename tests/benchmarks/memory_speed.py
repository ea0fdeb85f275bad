"""Times learning with each memory beside feed-forward networks of the same width, in turn.

    python tests/benchmarks/memory_speed.py [--width 64] [--num-envs 64] [--num-steps 128] [--rounds 15]

A memory is one more layer, so there are two yardsticks: the same network without it, and with a dense layer in its
place. Every program learns from its own rollout (`PPO.learn`), with segments of the whole rollout where it has a
memory. Prints seconds of one call, and the ratio to each yardstick: the median over rounds and its 95 % interval.
"""

import argparse
import time
from collections.abc import Callable

import jax
import numpy as np
import scipy

import purejaxppo as pjp
from purejaxppo.networks.memories import MEMORIES


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--num-envs", type=int, default=64)
    parser.add_argument("--num-steps", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    shared = {"num_envs": options.num_envs, "num_steps": options.num_steps}
    deep = {"two layers": (options.width,) * 2, "three layers": (options.width,) * 3}
    configs = {name: pjp.Config(**shared, widths=widths) for name, widths in deep.items()}
    for memory in MEMORIES:
        recurrent = {"memory": memory, "memory_width": options.width, "segment_length": options.num_steps}
        configs[memory] = pjp.Config(**shared, **recurrent, widths=deep["two layers"])
    learners = {name: learner(config) for name, config in configs.items()}
    seconds = np.array([[learn() for learn in learners.values()] for _ in range(options.rounds)])
    for name, times in zip(learners, seconds.T):
        ratios = "   ".join(f"{ratio(times, seconds[:, i])} x {yardstick}" for i, yardstick in enumerate(deep))
        print(f"{name:<14}{1e3 * np.median(times):8.1f} ms   {ratios}")


def learner(config: pjp.Config) -> Callable[[], float]:
    """A function that learns from one rollout and returns the seconds that it takes; compiled when this one returns."""
    ppo = pjp.make_ppo("CartPole-v1", config)
    state, rollout = jax.jit(ppo.collect)(jax.jit(ppo.init)(jax.random.key(0)))
    learn = jax.jit(ppo.learn)

    def timed() -> float:
        start = time.perf_counter()
        jax.block_until_ready(learn(state, rollout))
        return time.perf_counter() - start

    timed()
    return timed


def ratio(times: np.ndarray, others: np.ndarray) -> str:
    """The median of paired ratios with its bootstrap interval."""
    found = scipy.stats.bootstrap((times / others,), np.median, method="percentile", rng=0)
    low, high = found.confidence_interval
    return f"{np.median(times / others):5.2f} [{low:.2f}, {high:.2f}]"


if __name__ == "__main__":
    main()
