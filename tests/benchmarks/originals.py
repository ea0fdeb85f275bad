"""The games that gymnax's environments reimplement: Gymnasium's classic control, and those of `minatar`."""

from importlib.metadata import version
from importlib.util import find_spec

import gymnasium
import numpy as np

from purejaxppo.experiment.agents.evaluation import evaluate_in_gymnasium
from purejaxppo.experiment.agents.load import Agents

CLASSIC_CONTROL = "CartPole-v1", "Acrobot-v1", "Pendulum-v1", "MountainCar-v0", "MountainCarContinuous-v0"
# Environment -> the game in minatar, and the time limit of gymnax's environment, as minatar has none.
MINATAR = {
    "Asterix-MinAtar": ("asterix", 1000),
    "Breakout-MinAtar": ("breakout", 1000),
    "Freeway-MinAtar": ("freeway", 2500),
    "Seaquest-MinAtar": ("seaquest", 1000),
    "SpaceInvaders-MinAtar": ("space_invaders", 1000),
}


def play_original(name: str, agents: Agents) -> dict | None:
    """The mean returns of agents, with sampled actions, in the game that an environment reimplements.

    None if there is no such game, or if its package is not installed.
    """
    if name in CLASSIC_CONTROL:
        env_id, where = name, "gymnasium"
    elif name in MINATAR and find_spec("minatar"):
        env_id, where = register(*MINATAR[name]), "minatar"
    else:
        return None
    played = evaluate_in_gymnasium(agents, env_id)
    returns = np.asarray(played["episode_return"].mean("episode"))
    return {"where": f"{where} {version(where)}", "sampled": returns.round(4).tolist()}


def register(game: str, max_steps: int) -> str:
    """The name in Gymnasium of a game of minatar with the actions and the time limit of gymnax's version.

    minatar repeats the last action in one of ten steps unless told otherwise; gymnax does not.
    """
    env_id = f"{game}-without-sticky-actions-v0"
    if env_id not in gymnasium.registry:
        gymnasium.register(
            env_id,
            entry_point="minatar.gym:BaseEnv",
            max_episode_steps=max_steps,
            kwargs={"game": game, "use_minimal_action_set": True, "sticky_action_prob": 0.0},
        )
    return env_id
