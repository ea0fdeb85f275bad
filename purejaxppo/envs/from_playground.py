"""MuJoCo Playground, its physics in JAX: `make_env("playground/CheetahRun", traced=("dof_damping",))`."""

from collections.abc import Sequence
from typing import Any

import jax
from mujoco_playground import dm_control_suite, registry
from mujoco_playground._src import mjx_env

from purejaxppo.envs.base import Box, Env, privileged
from purejaxppo.envs.suite import Refusal, from_simulator
from purejaxppo.envs.wrappers import action_repeat, time_limit

DOWNLOAD = "from mujoco_playground._src import mjx_env; mjx_env.ensure_menagerie_exists()"


def names() -> list[str]:
    """The registered environments; all but those of the DM Control Suite need models that are downloaded once."""
    return sorted(registry.ALL_ENVS)


def downloads(name: str) -> bool:
    """Whether an environment needs models that are not there yet."""
    return name not in dm_control_suite.ALL_ENVS and not mjx_env.MENAGERIE_PATH.exists()


def make(
    name: str, impl: str = "jax", max_steps: int | None = None, traced: Sequence[str] = (), **overrides: Any
) -> Env:
    """An environment of Playground.

    Args:
        name: as `names` lists it.
        impl: of the physics; Playground's default, warp, has states that `vmap` does not batch.
        max_steps: after which an episode is truncated, by default those of its configuration.
        traced: the parts of the physics that are parameters, as paths in `mjx.Model`, such as opt.gravity.
        overrides: of its configuration.

    Raises:
        ValueError: for Warp, for models that are not downloaded yet, and for a path in `traced` that is no part of the
            physics.
    """
    if impl != "jax" or overrides.get("vision"):
        given = "vision=True needs Warp" if overrides.get("vision") else f"impl={impl!r} is not supported"
        raise Refusal(f"{given}, whose buffers a whole batch shares: leave it at the physics in JAX, impl='jax'")
    if downloads(name):
        raise Refusal(
            f"env='playground/{name}' needs the models of MuJoCo Menagerie, 550 MB, which Playground downloads: "
            f'run python -c "{DOWNLOAD}" once'
        )
    task = registry.load(name, config_overrides={"impl": impl, **overrides})
    config = task._config
    env = from_simulator(task, "_mjx_model", task.mjx_model, traced, _observation_space(task))
    num_repeats = config.get("action_repeat", 1)
    env = action_repeat(env, num_repeats) if num_repeats > 1 else env
    return time_limit(env, -(-config.episode_length // num_repeats) if max_steps is None else max_steps)


def _observation_space(task: Any) -> Any:
    obs = jax.eval_shape(task.reset, jax.random.key(0)).obs
    space = jax.tree.map(lambda x: Box(shape=x.shape, dtype=x.dtype), obs)
    if isinstance(space, dict) and "privileged_state" in space:
        space["privileged_state"] = privileged(space["privileged_state"])
    return space
