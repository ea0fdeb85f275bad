"""The metrics of a rollout, and what each shard of it has to measure for them."""

import jax.numpy as jnp

from purejaxppo.normalize import measure, pool
from purejaxppo.update import Batch


def measure_rollout(transitions, batch: Batch) -> dict:
    """What `summarize` needs of a rollout, or of the part of it that lies in a shard."""
    ended = jnp.stack([jnp.ones_like(batch.value), transitions.episode_return, transitions.episode_length])
    values = jnp.stack([batch.value, batch.target, batch.target - batch.value])
    return {"ended": jnp.where(transitions.done[None], ended, 0).sum((1, 2)), "values": measure(values, (1, 2))}


def summarize(measured: dict) -> dict:
    """What a reader needs of a rollout measured in D parts, each one number; nan for episodes where none ended."""
    num_episodes, episode_return, episode_length = measured["ended"].sum(0)
    values = pool(measured["values"])
    return {
        "episode_return": episode_return / num_episodes,
        "episode_length": episode_length / num_episodes,
        "num_episodes": num_episodes.astype(jnp.int32),
        "explained_variance": 1 - values.variance[2] / values.variance[1],
        "value_mean": values.mean[0],
    }
