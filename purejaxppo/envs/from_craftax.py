"""Craftax and Craftax-Classic: `make_env("craftax/Craftax-Classic-Symbolic-v1")`."""

from collections.abc import Mapping
from typing import Any

import craftax.craftax.constants as full
import craftax.craftax_classic.constants as classic
import jax
import jax.numpy as jnp
from craftax.craftax_env import make_craftax_env_from_name

from purejaxppo.envs.base import Discrete, Env, Step


def names() -> list[str]:
    """The four environments; those of pixels write a cache of textures into the package when they are first made."""
    return [f"Craftax-{kind}-v1" for kind in ("Symbolic", "Classic-Symbolic", "Pixels", "Classic-Pixels")]


def make(name: str, static: Mapping[str, Any] | None = None) -> Env:
    """An environment of Craftax, whose own parameters are those of the `Env`.

    Args:
        name: as `names` lists it.
        static: replaces sizes of the world, as {"map_size": (32, 32)}.
    """
    game = make_craftax_env_from_name(name, auto_reset=False)
    if static:
        game = type(game)(game.default_static_params().replace(**static))
    achievements = (classic if "Classic" in name else full).Achievement

    def reset(key, params):
        obs, state = game.reset_env(key, params)
        return state, obs

    def step(key, state, action, params):
        obs, state, reward, _, _ = game.step_env(key, state, action, params)
        # The game ends by death or by time alike: whether it is death shows a clock that never runs out.
        endless = params.replace(max_timesteps=jnp.iinfo(jnp.int32).max)
        reached = {f"achievement_{a.name.lower()}": state.achievements[a.value] for a in achievements}
        return Step(
            state=state,
            obs=obs,
            reward=reward,
            terminated=game.is_terminal(state, endless),
            truncated=state.timestep >= params.max_timesteps,
            episode_metrics=reached | {"achievements": state.achievements.sum()},
        )

    params = jax.tree.map(jnp.asarray, game.default_params)
    return Env(reset, step, params, Discrete(game.num_actions))
