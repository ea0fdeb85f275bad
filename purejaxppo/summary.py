"""What a reader needs of a rollout, in a few numbers."""

import jax.numpy as jnp

from purejaxppo.normalize import measure, pool
from purejaxppo.update import Batch


def measure_rollout(transitions, batch: Batch) -> dict:
    """What `summarize` needs of a rollout, or of the part of it that lies in a shard."""
    ended = jnp.stack([jnp.ones_like(batch.value), transitions.episode_return, transitions.episode_length])
    values = jnp.stack([batch.value, batch.target, batch.target - batch.value])
    return {"ended": jnp.where(transitions.done[None], ended, 0).sum((1, 2)), "values": measure(values, (1, 2))}


def summarize(rollout: dict) -> dict:
    """What a reader needs of a rollout in D shards, each one number; means over episodes are nan where none ended."""
    num_episodes, episode_return, episode_length = rollout["ended"].sum(0)
    values = pool(rollout["values"])
    variance = values.variance[:, 0, 0]
    return {
        "episode_return": episode_return / num_episodes,
        "episode_length": episode_length / num_episodes,
        "num_episodes": num_episodes.astype(jnp.int32),
        "explained_variance": 1 - variance[2] / variance[1],
        "value_mean": values.mean[0, 0, 0],
    }
