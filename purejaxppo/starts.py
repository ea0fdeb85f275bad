"""Where episodes begin: start states, drawn ahead for a whole rollout.

If a start state is small, every environment gets a fresh one in every step. Otherwise one waits for each environment,
and `resets_per_step` of those that were used are drawn again in every step. So environments that end in the same step
begin from different states, whatever a reset costs.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from purejaxppo.config import Config
from purejaxppo.envs.base import Env
from purejaxppo.record import Record, size_of

USED = 2**30  # added to the age of a used start state, it comes before all that are fresh
RENEWED = 2**30  # folded into the key of a step, it gives the keys of start states that are used again
# Of how many environments one gets a new start state in a step, by the bytes of one. Measured on gymnax's: with small
# states it is fastest if all do; one of 16 is as fast for larger ones, takes little memory, and is enough for episodes
# of 16 steps. The largest belong to environments whose reset may cost a hundred steps, and whose episodes are longer.
SHARES = {1024: 1, 4096: 16, float("inf"): 64}


class Pool(Record):
    """The start state that waits for each of N environments."""

    start: Any  # (state, obs), [N, ...]
    age: jax.Array  # [N] int32, as in `Queue`


def starts_per_step(env: Env, config: Config) -> int:
    """The number of start states drawn per step: `config.resets_per_step`, or for 0 as many as their size suggests."""
    if config.resets_per_step:
        return config.resets_per_step
    size = size_of(jax.eval_shape(env.reset, jax.random.key(0), env.params))
    share = next(share for most, share in SHARES.items() if size <= most)
    return -(-config.num_envs // share)


def fill_pool(key: jax.Array, env_params: Any, *, env: Env, config: Config) -> Any:
    """A fresh start state for each environment, or () if all of them get one in every step.

    Args:
        key: draws the start states.
        env_params: of the environment.
        env: has the start states.
        config: sizes.
    """
    if starts_per_step(env, config) == config.num_envs:
        return ()
    start = draw_starts(key, env_params, (config.num_envs,), env=env)
    return Pool(start=start, age=jnp.zeros(config.num_envs, jnp.int32))


def draw_starts(key: jax.Array, env_params: Any, shape: tuple[int, ...], *, env: Env) -> Any:
    """Start states and observations (state, obs), [*shape, ...].

    They are drawn along one axis, since XLA compiles the generator for every axis.

    Args:
        key: draws them.
        env_params: of the environment.
        shape: of the batch.
        env: has the start states.
    """
    fresh = jax.vmap(env.reset, in_axes=(0, None))(jax.random.split(key, int(np.prod(shape))), env_params)
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)).reshape(*shape, *x.shape[1:]), fresh)


class Queue(NamedTuple):
    """Within a rollout: the row of the table that waits for each of N environments, and its age."""

    row: jax.Array  # [N] int32
    age: jax.Array  # [N] int32, steps since it was used first, above 0; or minus those since it was drawn


def open_pool(pool: Any, drawn: Any) -> tuple[Any, Any, jax.Array | None]:
    """A pool and the start states drawn for a rollout as one table, the queue into it, and the rows drawn per step.

    Without a pool all three are empty: `drawn` [T, N, ...] holds the starts of every step itself.

    Args:
        pool: of N start states, or ().
        drawn: (state, obs) [T, K, ...].
    """
    if not pool:
        return (), (), None
    num_steps, num_drawn = jax.tree.leaves(drawn)[0].shape[:2]
    num_envs = len(pool.age)
    flat = jax.tree.map(lambda x: x.reshape(num_steps * num_drawn, *x.shape[2:]), drawn)
    table = jax.tree.map(lambda x, new: jnp.concatenate([x, new]), pool.start, flat)
    rows = num_envs + jnp.arange(num_steps * num_drawn, dtype=jnp.int32).reshape(num_steps, num_drawn)
    return table, Queue(row=jnp.arange(num_envs, dtype=jnp.int32), age=pool.age), rows


def close_pool(table: Any, queue: Any) -> Any:
    """The pool after a rollout."""
    return Pool(start=rows_at(table, queue.row), age=queue.age) if queue else ()


def rows_at(table: Any, row: jax.Array) -> Any:
    """The rows of a table of start states, [*row.shape, ...]."""
    return jax.tree.map(lambda x: x[row], table)


def refill(queue: Queue, used: jax.Array, fresh: jax.Array) -> tuple[Queue, jax.Array]:
    """The queue after a step in which some start states were used, and which of these had been used before, [N] bool.

    The K that were used longest ago are replaced first. Where fewer were used, those drawn longest ago follow, so that
    none waits for more than N / K steps.

    Args:
        queue: before the step.
        used: [N] bool, where an episode began.
        fresh: [K] int32, rows of new start states.
    """
    again = used & (queue.age > 0)
    age = jnp.where(used | (queue.age > 0), jnp.maximum(queue.age, 0) + 1, queue.age - 1)
    oldest = jax.lax.top_k(jnp.where(age > 0, age + USED, -age), len(fresh))[1]
    return Queue(row=queue.row.at[oldest].set(fresh), age=age.at[oldest].set(0)), again


def renew_keys(state: Any, keys: jax.Array, where: jax.Array) -> Any:
    """States [N, ...] with new random keys `where` they were used before, so that they do not go on as the first time.

    A random key is an array of typed keys, or one uint32[2] under the name key or rng, or one that ends in _key or
    _rng. Keys of other generators than the run's stay as they are.

    Args:
        state: [N, ...].
        keys: [N], typed, of the step.
        where: [N] bool.
    """

    def renew(position: int, path: Any, x: Any) -> Any:
        typed = x.dtype == keys.dtype
        if not typed and not _is_plain_key(path, x):
            return x
        shape = x.shape[1:] if typed else ()
        # The environment splits the keys of the step itself.
        fresh = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, RENEWED + position), shape))(keys)
        fresh = fresh if typed else jax.random.key_data(fresh)
        return jnp.where(where.reshape(where.shape + (1,) * (x.ndim - 1)), fresh, x)

    leaves, structure = jax.tree_util.tree_flatten_with_path(state)
    return jax.tree.unflatten(structure, [renew(i, *leaf) for i, leaf in enumerate(leaves)])


def _is_plain_key(path: Any, x: Any) -> bool:
    name = jax.tree_util.keystr(path[-1:], simple=True)
    return x.dtype == jnp.uint32 and x.shape[1:] == (2,) and name.split("_")[-1] in ("key", "rng")
