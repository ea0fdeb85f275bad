"""One episode of a policy: its states, and a GIF of it."""

import importlib.util
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from purejaxppo.checks import check_whole
from purejaxppo.envs.base import action_space, bound_action, count_lost_as_zero
from purejaxppo.experiment.agents.load import check_agent
from purejaxppo.ppo import PPO, bind
from purejaxppo.record import Record
from purejaxppo.rollout import Policy, add_time, apply_policy
from purejaxppo.text import quote
from purejaxppo.validate import as_env_params, as_key

FRAMES_PER_SECOND = 25
CLASSIC = ("Acrobot-v1", "CartPole-v1", "MountainCar-v0", "MountainCarContinuous-v0", "Pendulum-v1")
GRIDS = (
    "Asterix-MinAtar", "Breakout-MinAtar", "Catch-bsuite", "Freeway-MinAtar", "FourRooms-misc", "MetaMaze-misc",
    "PointRobot-misc", "Pong-misc", "Seaquest-MinAtar", "SpaceInvaders-MinAtar",
)  # fmt: skip


class Episode(Record):
    """The L steps of one episode."""

    states: Any  # [L, ...] of the environment, before each step
    obs: Any  # [L, ...]
    actions: Any  # [L, ...], as the environment received them
    rewards: jax.Array  # [L] float32; a nan in the step that ends the episode counts as 0
    finished: bool  # whether it ended within `max_steps`


def record_episode(
    ppo: PPO, policy: Policy, key: jax.Array, env_params: Any = None, *, greedy: bool = False, max_steps: int = 1000
) -> Episode:
    """Plays one episode and keeps its states, observations, actions and rewards.

    Args:
        ppo: of one agent.
        policy: for example `agents.policy(0)`.
        key: of the episode.
        env_params: by default those of the environment.
        greedy: whether to take the most probable action instead of a sample.
        max_steps: steps to play at most.

    Raises:
        ValueError: for arguments of another kind, or a policy of another PPO.
    """
    check_agent(ppo, policy)
    check_whole("max_steps", max_steps)
    if not isinstance(greedy, (bool, np.bool_)):
        raise ValueError(f"greedy={quote(greedy)} must be True or False")
    env_params = as_env_params(env_params, ppo.env)
    space = action_space(ppo.env, env_params)
    reset_key, play_key = jax.random.split(as_key(key))

    def step(carry, step_key):
        state, obs, memory, first = carry
        act_key, env_key = jax.random.split(step_key)
        batch = jax.tree.map(lambda x: x[None], obs)
        memory, distribution, _ = apply_policy(
            policy, memory, add_time(batch), first[None], network=ppo.network, config=ppo.config
        )
        drawn = (distribution.mode() if greedy else distribution.sample(act_key))[0, 0]
        action = bound_action(drawn, space, ppo.config.bound_action)
        result = ppo.env.step(env_key, state, action, env_params)
        done = result.terminated | result.truncated
        carry = result.state, result.obs, memory, jnp.zeros_like(first)
        return carry, (state, obs, action, count_lost_as_zero(done, result.reward), done)

    def play():
        state, obs = ppo.env.reset(reset_key, env_params)
        start = state, obs, ppo.network.initial_memory(1), jnp.ones(1, bool)
        return jax.lax.scan(step, start, jax.random.split(play_key, max_steps))[1]

    *steps, done = jax.device_get(jax.jit(bind(ppo.config.matmul_precision, play))())
    length = int(done.argmax()) + 1 if done.any() else max_steps
    states, obs, actions, rewards = jax.tree.map(lambda x: x[:length], steps)
    return Episode(states=states, obs=obs, actions=actions, rewards=rewards, finished=bool(done.any()))


def render(env_name: str, episode: Episode, path: str | Path, env_params: Any = None) -> Any:
    """Draws an episode of a gymnax environment as a GIF.

    Args:
        env_name: of an environment that gymnax draws; those in `CLASSIC` need pygame.
        episode: from `record_episode`.
        path: the file to write, which ends in .gif.
        env_params: by default those of the environment.

    Returns:
        An IPython image, which a notebook shows, or the path if IPython is not installed.

    Raises:
        ValueError: for an environment that gymnax does not draw (the episode has its states).
    """
    path = Path(path)
    check_drawable(env_name, path)
    import gymnax

    env, params = gymnax.make(env_name)
    params = params if env_params is None else env_params
    states = [jax.tree.map(lambda x, i=i: x[i], episode.states) for i in range(len(episode.rewards))]
    if env_name in CLASSIC:
        _draw_classic(env_name, states, params, path)
    else:
        _draw_grid(env, states, params, np.cumsum(episode.rewards), path)
    if importlib.util.find_spec("IPython") is None:
        return path
    from IPython.display import Image  # pyright: ignore[reportPrivateImportUsage, reportAttributeAccessIssue]

    return Image(filename=str(path))


def _draw_classic(env_name: str, states, params, path: Path):
    """Draws with Gymnasium's environment of the same name; gymnax would make a new one for every frame."""
    for kind in ("VIDEO", "AUDIO"):  # pygame needs no screen and no loudspeaker
        os.environ.setdefault(f"SDL_{kind}DRIVER", "dummy")
    import gymnasium
    from gymnax.visualize import vis_gym
    from PIL import Image

    env: Any = gymnasium.make(env_name, render_mode="rgb_array")
    env.reset()
    vis_gym.set_gym_params(env.unwrapped, env_name, params)
    frames = []
    for state in states:
        env.unwrapped.state = vis_gym.get_gym_state(state, env_name)
        if env_name == "Pendulum-v1":
            env.unwrapped.last_u = np.float64(state.last_u)
        frames.append(Image.fromarray(env.render()).quantize(64))
    env.close()
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=1000 // FRAMES_PER_SECOND, loop=0)


def _draw_grid(env, states, params, returns, path: Path):
    import matplotlib

    matplotlib.use("Agg")
    from gymnax.visualize import Visualizer

    Visualizer(env, params, states, returns).animate(str(path))


def check_drawable(env_name: str, path: Path) -> None:
    """Raises ValueError for an environment that cannot be drawn, or a file that is not a GIF."""
    if path.suffix != ".gif":
        raise ValueError(f"path={path} must end in .gif")
    if env_name not in CLASSIC + GRIDS:
        raise ValueError(f"{env_name} cannot be drawn (gymnax can draw {', '.join(CLASSIC + GRIDS)})")
    if env_name in CLASSIC and importlib.util.find_spec("pygame") is None:
        raise ValueError(f"{env_name} needs pygame to be drawn (pip install pygame)")
