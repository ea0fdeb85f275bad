"""pgx, its games of one player: `make_env("pgx/minatar-breakout")`, `make_env("pgx/2048")`."""

from typing import Any

import pgx

from purejaxppo.envs.base import ActionMask, Box, Discrete, Env, Step


def names() -> list[str]:
    """The games of one player."""
    return [name for name in pgx.available_envs() if name == "2048" or name.startswith("minatar-")]


def make(name: str, **options: Any) -> Env:
    """A game of pgx; those of MinAtar repeat the last action with probability 0.1, as MinAtar does.

    Freeway ends by its clock alone, which pgx calls a termination; here it is a truncation.

    Args:
        name: as `names` lists it.
        options: of the game in pgx.
    """
    game = pgx.make(name, **options)
    masked = not name.startswith("minatar-")  # there all actions are legal
    timed = name == "minatar-freeway"

    def show(state):
        return {"board": state.observation, "action_mask": state.legal_action_mask} if masked else state.observation

    def reset(key, params):
        state = game.init(key)
        return state, show(state)

    def step(key, state, action, params):
        state = game.step(state, action, key)
        terminated, truncated = state.terminated & (not timed), state.truncated | (state.terminated & timed)
        return Step(state, show(state), state.rewards[0], terminated, truncated)

    board = Box(0, 1, game.observation_shape, bool)
    space = {"board": board, "action_mask": ActionMask((game.num_actions,))} if masked else board
    return Env(reset, step, (), Discrete(game.num_actions), space)
