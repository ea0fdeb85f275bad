"""The best policies of a run that is evaluated while it trains: for every agent that of its best evaluation."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from purejaxppo.experiment.files import ArrayFile, from_arrays
from purejaxppo.record import Record

BEST = "best_policy.npz"


class Best(Record):
    """The policies with the best evaluation so far, each agent's own.

    The best of several evaluations was lucky too: `evaluation_return` is too high on average, so play fresh episodes
    with the policy before you report a return.
    """

    policy: Any  # [(R,) ...]; of an agent without any evaluation that after the first evaluation of the others
    update: Any  # [(R,)] int32, after which it was evaluated; 0 without any evaluation
    evaluation_return: Any  # [(R,)] float32, nan without any evaluation


def best_like(state: Any) -> Best:
    """The shapes of the best policies of a run, from its state or the shapes of that."""
    shape = state.num_updates.shape
    policy = jax.eval_shape(lambda: state.policy) if isinstance(state.num_updates, jax.Array) else state.policy
    return Best(policy, jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.float32))


def better_of(best: Best | None, policy: Any, returns: ArrayLike, update: int) -> Best | None:
    """The best policies after an evaluation.

    Args:
        best: those before; None before the first evaluation.
        policy: what was evaluated, [(R,) ...].
        returns: of the evaluation, [(R,)]; nan for agents that were not evaluated.
        update: after which it was.
    """
    returns = np.asarray(returns, np.float32)
    if best is None and np.isfinite(returns).any():
        nothing = np.zeros(returns.shape, np.int32), np.full(returns.shape, np.nan, np.float32)
        best = Best(jax.device_get(policy), *nothing)
    if best is None:
        return None
    better = np.isfinite(returns) & ~(returns <= best.evaluation_return)
    if not better.any():
        return best

    def choose(new: np.ndarray, old: np.ndarray) -> np.ndarray:
        return np.where(better.reshape(better.shape + (1,) * (np.ndim(new) - better.ndim)), new, old)

    return jax.tree.map(choose, Best(jax.device_get(policy), np.int32(update), returns), best)


def read_best(path: Path, like: Best) -> Best:
    """The best policies from their file. Raises ValueError if it is damaged or of other shapes."""
    with ArrayFile(path) as arrays:
        return jax.device_get(from_arrays(arrays, like, str(path)))
