"""The best return that can be expected of each environment of gymnax, or an upper bound; kept in `bounds.json`.

    python tests/benchmarks/bounds.py [--only Pendulum-v1 FrozenLake-misc] [--out tests/benchmarks/bounds.json]

A return is what `evaluate` counts: the sum of the rewards of one whole episode, not discounted, with the time limit of
the environment. An "optimum" is the best over all policies, with a memory or without. No policy exceeds an "upper
bound", and perhaps none comes near it. `error` says how far a value of a grid or of a sample may be off, and `why` is
the first line of the function that computes the value.
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.ndimage import map_coordinates
from scipy.optimize import linear_sum_assignment
from scipy.stats import binom, norm, qmc

from purejaxppo.envs.import_gymnax import import_gymnax

KEY = jax.random.key(0)  # where nothing is random


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=BOUNDS, default=sorted(BOUNDS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "bounds.json")
    options = parser.parse_args()
    kept = json.loads(options.out.read_text()) if options.out.exists() else {}
    for env in options.only:
        kept[env] = bound(env)
        print("{:<26}{value:>9} +- {error:<6} {kind:<12} {why}".format(env, **kept[env]), flush=True)
    options.out.write_text(json.dumps(dict(sorted(kept.items())), indent=1) + "\n")


def bound(env: str) -> dict:
    """The bound of an environment, as the file keeps it."""
    solved = BOUNDS[env](*import_gymnax().make(env))
    value, error = solved if isinstance(solved, tuple) else (solved, 0)
    return {
        "value": round(float(value), 3),
        "error": round(float(error), 3),
        "kind": "optimum" if env in OPTIMA else "upper bound",
        "why": str(BOUNDS[env].__doc__).partition("\n")[0],
    }


def time_limit(env, params):
    """Each step gives 1, and a good policy lives until the time limit."""
    return params.max_steps_in_episode


def acrobot(env, params):
    """The motor cannot give the energy of the goal in fewer steps; the bound is loose.

    A torque of 1 adds energy at the rate of the speed of the second joint, at most sqrt(2 inverse_mass energy), small
    errors of the integration aside.
    """
    cosine = np.linspace(-1, 1, 2001)  # of the second joint
    first, both, second = 3.5 + cosine, 1.25 + 0.5 * cosine, 1.25  # the matrix of masses
    inverse_mass = (first / (first * second - both**2)).max()
    start = 9.8 * (1.5 * (1 - np.cos(0.1)) + 0.5 * (1 - np.cos(0.2))) + (4.5 + 2 * 1.75 + 1.25) * 0.1**2 / 2  # at most
    goal = 9.8 * (1.5 + 0.5 + 0.5)  # at least: the first link level, the second upright
    return 1 - np.ceil((np.sqrt(goal) - np.sqrt(start)) / np.sqrt(inverse_mass / 2) / params.dt)


def pendulum(env, params):
    """Backward induction on two grids, extrapolated: the error is proportional to their spacing."""
    coarse, fine = (solve_pendulum(env, params, size) for size in (320, 640))
    return 2 * fine - coarse, abs(fine - coarse)


def solve_pendulum(env, params, size, num_torques=17):
    """The mean value of a start on a grid of angles and speeds, between whose points values are interpolated."""
    _, state = env.reset_env(KEY, params)
    angle, speed = np.arange(size) * 2 * np.pi / size, np.linspace(-params.max_speed, params.max_speed, size + 1)
    torque = np.linspace(-params.max_torque, params.max_torque, num_torques)

    def outcome(torque, angle, speed):
        _, reached, reward, *_ = env.step_env(KEY, state.replace(theta=angle, theta_dot=speed), torque, params)
        return reward, place(reached.theta, reached.theta_dot)

    def place(angle, speed):
        return angle / (2 * jnp.pi) * size, (speed / params.max_speed + 1) / 2 * size

    def at(value, place):
        return map_coordinates(value, list(place), order=1, mode="wrap")

    grid = jnp.meshgrid(torque, angle, speed, indexing="ij")
    reward, reached = jax.vmap(jax.vmap(jax.vmap(outcome)))(*grid)
    value = jnp.zeros((size, size + 1))
    value = jax.lax.fori_loop(0, params.max_steps_in_episode, lambda _, v: (reward + at(v, reached)).max(0), value)
    return at(value, place(*jnp.meshgrid(midpoints(-np.pi, np.pi, 400), midpoints(-1, 1, 100)))).mean()


def midpoints(low, high, number):
    """The middles of equal parts, whose mean is an integral."""
    return low + (high - low) * (np.arange(number) + 0.5) / number


def mountain_car(env, params):
    """From each of 400 starts, no way to push right, left and right, each for some steps, is faster."""
    _, state = env.reset_env(KEY, params)

    def steps(start, right, left):
        def step(time, carry):
            state, steps = carry
            action = jnp.where((right <= time) & (time < right + left), 0, 2)
            _, state, _, ended, _ = env.step_env(KEY, state, action, params)
            return state, jnp.where(ended, jnp.minimum(steps, time + 1), steps)

        start = state.replace(position=start), params.max_steps_in_episode
        return jax.lax.fori_loop(0, params.max_steps_in_episode, step, start)[1]

    every_way = [x.ravel() for x in jnp.meshgrid(jnp.arange(40), jnp.arange(60))]
    vectorized = jax.vmap(steps, (None, 0, 0))
    fewest = jax.lax.map(lambda start: vectorized(start, *every_way).min(), midpoints(-0.6, -0.4, 400))
    return -fewest.mean(), abs(fewest[::2].mean() - fewest[1::2].mean())


def mountain_car_continuous(env, params):
    """The goal gives 100, and actions cost little: weak pushes along the speed get 98.8."""
    return 100


def asterix(env, params):
    """A third of the entities that come is gold, and a player takes all of it at most."""

    def step(state, _):  # the clock of the entities heeds no action
        return env.step_env(KEY, state, 0, params)[1], state.spawn_timer == 0

    _, comes = jax.lax.scan(step, env.reset_env(KEY, params)[1], length=params.max_steps_in_episode)
    return comes.sum() / 3


def breakout(env, params):
    """The ball breaks at most one brick in two steps, and the next 30 are 10 steps away; the bound is loose."""
    steps = params.max_steps_in_episode
    return sum(min(30, (steps - first) // 2 + 1) for first in range(11, steps + 1, 2 * 29 + 10))


def freeway(env, params):
    """A crossing takes 9 moves and a move 3 steps, if no car is ever in the way."""
    return (params.max_steps_in_episode - 1) // params.player_speed // 9


def space_invaders(env, params):
    """A shot hits one alien at most."""
    return -(-params.max_steps_in_episode // params.shot_cool_down)


def seaquest(env, params):
    """A shot hits one enemy at most, and divers are enough for 4 rescues that give 9 each; the bound is loose."""
    divers = (params.max_steps_in_episode - 1) // params.diver_spawn_speed
    return space_invaders(env, params) + 9 * (1 + (divers - 6) // 7)  # the first takes 6 divers, the next 7


def whole_reward(env, params):
    """A policy that remembers what it was shown always gets 1 at the end; other rewards are 0 on average."""
    return 1


def deep_sea(env, params):
    """The last step of the way gives 1, less what all its moves cost."""
    return 1 - params.unscaled_move_cost


def discounting_chain(env, params):
    """One of the five rewards is the largest."""
    return params.optimal_return


def simple_bandit(env, params):
    """An episode is one step, and each episode shuffles the rewards, so every arm gives their mean."""
    return env.reset_env(KEY, params)[1].rewards.mean()


def four_rooms(env, params):
    """Backward induction over cells and steps: the goal is nearly always reached."""
    cells, entered = walk(env.env_map, env.directions)
    start, goal = (cells.index(tuple(x.tolist())) for x in (env.pos_fixed, env.goal_fixed))
    by_chance = params.fail_prob * 4 / 3  # how often any of the four directions is taken
    slips = (1 - by_chance) * np.eye(4) + by_chance / 4
    is_goal = np.arange(len(cells)) == goal
    return induce_backward(entered, slips, is_goal, is_goal, params.max_steps_in_episode)[0][-1, start]


def frozen_lake(env, params):
    """Backward induction over cells and steps."""
    return solve_frozen_lake(env, params)[0][-1, 0]


def solve_frozen_lake(env, params):
    """The values and the best actions, as `induce_backward` returns them."""
    _, entered = walk(np.ones(env.desc.shape), [(0, -1), (1, 0), (0, 1), (-1, 0)])
    slips = sum(np.roll(np.eye(4), turn, axis=1) for turn in (-1, 0, 1)) / 3
    is_hole, is_goal = (np.ravel(env.desc == tile) for tile in (2, 3))
    return induce_backward(entered, slips, is_goal, is_hole | is_goal, params.max_steps_in_episode)


def walk(is_open, directions):
    """The S open cells of a map, and the cell [S, D] that each direction leads to; walls and edges hold back."""
    cells = [tuple(cell) for cell in np.argwhere(is_open).tolist()]
    number = {cell: i for i, cell in enumerate(cells)}
    steps = np.asarray(directions).tolist()
    return cells, np.array([[number.get((y + dy, x + dx), i) for dy, dx in steps] for i, (y, x) in enumerate(cells)])


def induce_backward(entered, slips, reward, ends, steps):
    """The values [steps + 1, S] and the best actions [steps, S] of cells, by the steps that are left.

    `slips` [A, D] is the probability of each direction after an action; `reward` [S] is for entering a cell, and
    `ends` [S] says whether that ends the episode.
    """
    values, actions = [np.zeros(len(reward))], []
    for _ in range(steps):
        gains = (reward + np.where(ends, 0, values[-1]))[entered] @ slips.T
        values, actions = [*values, gains.max(1)], [*actions, gains.argmax(1)]
    return np.stack(values), np.stack(actions)


def meta_maze(env, params):
    """An agent that sees its place finds the goal in the best order of cells, then takes shortest paths.

    Until it has found the goal, no step enters more than one new cell, and none before the shortest path leads there.
    """
    cells, entered = walk(env.env_map, env.directions)
    size, steps = len(cells), params.max_steps_in_episode
    value, found, distance = np.zeros((size, size)), [], np.zeros((size, size))  # [goal, cell]
    for _ in range(steps):  # that are left
        found.append(params.reward + (value.sum(1) - value.diagonal()) / size)  # a start at the goal ends the episode
        np.fill_diagonal(value, found[-1])
        value = value[:, entered].max(2)
        distance += value == 0
    first = 1 + np.arange(2 * size)  # the step that finds the goal
    start = cells.index(tuple(env.center_position.tolist()))
    worth = np.where(first > distance[:, [start]], np.stack(found)[steps - first].T, 0)
    return worth[linear_sum_assignment(worth, maximize=True)].mean()


def point_robot(env, params):
    """An agent that knows the goal moves straight at full speed."""
    angle, radius = np.meshgrid(midpoints(0, np.pi, 200), midpoints(0, params.circle_radius, 200))
    moves, limit = np.arange(25)[:, None, None, None], params.max_steps_in_episode
    values = []
    for goal in midpoints(0, np.pi / 2, 40):
        apart = [params.circle_radius * f(goal) - radius * f(angle) for f in (np.cos, np.sin)]
        outside = np.linalg.norm(np.maximum(np.abs(apart) - params.max_force * moves, 0), axis=1) > params.goal_radius
        share = np.bincount(1 + outside.sum(0).ravel(), minlength=limit + 1) / radius.size  # by steps until a reward
        rewards = [0.0]  # by the steps that are left
        for left in range(1, limit + 1):
            rewards.append(share[1 : left + 1] @ (1 + np.array(rewards[::-1])))
        values.append(rewards[-1])
    return np.mean(values)


def bernoulli_bandit(env, params):
    """The arm that is likelier to be the better one by Bayes' rule is best, since both arms tell the same."""
    p, t = params.reward_prob, np.arange(params.max_steps_in_episode)[:, None]
    joint = np.stack([binom.pmf(t.T, t, chance) for chance in (1 - p, p)]) / 2  # [arm, steps, those that speak for it]
    return ((1 - p) * joint.max(0) + p * joint.min(0)).sum()


def gaussian_bandit(env, params):
    """Backward induction over the mean of the unknown arm by Bayes' rule: when to give it up for good."""
    noise = -np.diff(norm.pdf(norm.ppf(np.linspace(0, 1, 401)))) * 400  # the means of 400 equally likely parts
    variance = 1 / (params.sigma_p**-2 + np.arange(params.max_steps_in_episode + 1) / params.sigma_l**2)
    mean = params.mean_mu + params.sigma_p * np.linspace(-8, 8, 8001)
    value = np.zeros_like(mean)
    for n in reversed(range(params.max_steps_in_episode)):  # pulls so far
        spread = np.sqrt(variance[n] - variance[n + 1])
        value = np.maximum(0, mean + np.interp(mean[:, None] + spread * noise, mean, value).mean(1))
    return np.interp(params.mean_mu, mean, value)


def reacher(env, params):
    """After each step, taken by itself, the tip is as near to the goal as full torques can bring it."""
    high = np.repeat([np.pi, 1, 2], 2)
    samples = [qmc.scale(qmc.Sobol(6, rng=seed).random(1024), -high, high) for seed in range(8)]
    angle, speed, goal = np.split(np.concatenate(samples), 3, axis=1)
    values = []
    for step in range(1, params.max_steps_in_episode + 1):
        middle, reach = angle + params.dt * step * speed, min(params.dt**2 * step * (step + 1) / 2, np.pi)
        first = middle[:, :1] + reach * np.linspace(-1, 1, 65)
        x, y = goal[:, :1] - np.cos(first), goal[:, 1:] - np.sin(first)  # what is left for the second link
        turn = np.abs((np.arctan2(y, x) - middle[:, 1:] + np.pi) % (2 * np.pi) - np.pi)
        square = x**2 + y**2 + 1 - 2 * np.hypot(x, y) * np.cos(np.maximum(turn - reach, 0))
        nearest = np.sqrt(np.maximum(square, 0)).min(1) - reach / 64  # between two angles of the first link
        values.append(np.exp(-(np.maximum(nearest, 0) ** 2)))
    means = np.sum(values, 0).reshape(len(samples), -1).mean(1)
    return means.mean(), 3 * means.std(ddof=1) / np.sqrt(len(samples))


def swimmer(env, params):
    """After each step, taken by itself, the swimmer is as near to the goal as full forces can bring it; no urchins.

    The axes are independent: a start and a goal in [-1, 1] are `apart` with density (2 - apart) / 2.
    """
    step, apart = np.arange(1, params.max_steps_in_episode + 1)[:, None], midpoints(0, 2, 2000)
    left = np.maximum(apart - params.dt**2 * step * (step + 1) / 2, 0)
    return (((2 - apart) * np.exp(-(left**2) / 2)).mean(1) ** 2).sum()


OPTIMA = {
    "BernoulliBandit-misc": bernoulli_bandit, "CartPole-v1": time_limit, "Catch-bsuite": whole_reward,
    "DeepSea-bsuite": deep_sea, "DiscountingChain-bsuite": discounting_chain, "FourRooms-misc": four_rooms,
    "FrozenLake-misc": frozen_lake, "GaussianBandit-misc": gaussian_bandit, "MemoryChain-bsuite": whole_reward,
    "MountainCar-v0": mountain_car, "Pendulum-v1": pendulum, "Pong-misc": time_limit,
    "SimpleBandit-bsuite": simple_bandit, "UmbrellaChain-bsuite": whole_reward,
}  # fmt: skip
BOUNDS = OPTIMA | {
    "Acrobot-v1": acrobot, "Asterix-MinAtar": asterix, "Breakout-MinAtar": breakout, "Freeway-MinAtar": freeway,
    "MetaMaze-misc": meta_maze, "MountainCarContinuous-v0": mountain_car_continuous, "PointRobot-misc": point_robot,
    "Reacher-misc": reacher, "Seaquest-MinAtar": seaquest, "SpaceInvaders-MinAtar": space_invaders,
    "Swimmer-misc": swimmer,
}  # fmt: skip


if __name__ == "__main__":
    main()
