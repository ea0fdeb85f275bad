"""The metrics of an update: what each shard measures, and how these numbers become metrics."""

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp

from purejaxppo.advantages import Batch
from purejaxppo.normalize import measure, pool
from purejaxppo.rollout import Rollout

FAILURE = "failure"  # a metric of batches for the host: why a run is frozen
reports_failures = ContextVar("reports_failures", default=False)  # set by `batched.reported_failures`
# Names of coordinates of metrics, and of metrics that the host adds.
RESERVED = {"run", "seed", "setting", "updates", "step", "evaluation_return", "failed_update", "failed_metric", FAILURE}


def measure_rollout(rollout: Rollout, batch: Batch) -> dict[str, Any]:
    """Sums and moments of a rollout, or of one shard of it, for `summarize`."""
    of_episodes = rollout.episode_return, rollout.episode_length, *rollout.episode_metrics.values()
    ended = jnp.stack([jnp.ones_like(batch.value), *of_episodes])
    values = jnp.stack([batch.value, batch.target, batch.target - batch.value])
    return {
        "ended": jnp.where(rollout.ended[None], ended, 0).sum((1, 2)),
        "num_lost": jnp.int32(0) if rollout.lost is None else rollout.lost.sum(dtype=jnp.int32),
        "num_reused": jnp.int32(0) if rollout.reused is None else rollout.reused.sum(dtype=jnp.int32),
        "values": measure(values, (1, 2)),
        "steps": jax.tree.map(jnp.mean, rollout.metrics),
    }


def summarize(measured: Mapping[str, Any], rollout: Rollout) -> dict[str, jax.Array]:
    """The metrics of a rollout from the measurements of D shards, scalars; those of episodes are nan if none ended.

    Under `jax_debug_nans`, which stops a program at every nan, they are 0 then.
    """
    num_episodes, episode_return, episode_length, *of_episodes = measured["ended"].sum(0)
    values = pool(measured["values"])
    own = {
        "episode_return": _ratio(episode_return, num_episodes),
        "episode_length": _ratio(episode_length, num_episodes),
        "num_episodes": num_episodes.astype(jnp.int32),
        "num_lost_episodes": measured["num_lost"].sum(),  # which ended on nan
        "num_reused_starts": measured["num_reused"].sum(),  # of episodes that began where one had begun before
        "explained_variance": 1 - _ratio(values.variance[2], values.variance[1]),
        "value_mean": values.mean[0],
    }
    steps = {name: x.mean(0) for name, x in measured["steps"].items()}
    episodes = {name: _ratio(x, num_episodes) for name, x in zip(rollout.episode_metrics, of_episodes)}
    return join_metrics(own, {"metrics of the environment": steps, "episode_metrics of the environment": episodes})


def _ratio(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    if jax.config.jax_debug_nans:  # pyright: ignore[reportAttributeAccessIssue]
        return jnp.where(denominator > 0, numerator / jnp.where(denominator > 0, denominator, 1), 0)
    return numerator / denominator


def join_metrics(metrics: dict[str, Any], others: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Metrics with those of other reporters (reporter -> metrics) added. Raises ValueError for a name in use."""
    for reporter, added in others.items():
        known = metrics.keys() | RESERVED | {"learning_rate", "parent"}
        taken = [name for name in added if name in known or "/" in name]
        if taken:
            raise ValueError(
                f"{reporter} hold {taken[0]!r}, a name that is taken or has a '/' (use another name, here or for the "
                "metric of the environment that has it)"
            )
        metrics = metrics | added
    return metrics
