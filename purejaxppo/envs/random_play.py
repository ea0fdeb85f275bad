"""Random play of an environment: what it shows, and the faults that only play can find."""

import pickle
import random
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from purejaxppo.envs.base import Box, Discrete, Env, MultiDiscrete, Space, action_space, observation_space
from purejaxppo.envs.errors import call_env
from purejaxppo.envs.roles import allowed_actions, random_action

NUM_ENVS = 8  # that are played
NUM_ENDS = 8  # of episodes that are compared with starts
LARGEST = 1e18  # of a number whose square, summed over a rollout, stays finite in float32


class Begun(NamedTuple):
    """What the start states show; E = `NUM_ENVS`."""

    finite: jax.Array  # [E], of the observation
    largest: jax.Array  # [E], of the numbers of the observation that are finite
    same: jax.Array  # [E], whether the same reset gives the same result
    numbers: list[jax.Array]  # [E, ...] each, of the state and the observation


class Seen(NamedTuple):
    """What the steps show; L leaves of the observation."""

    obs_finite: jax.Array  # [E, T]; an episode may end on nan, see `Step`
    reward_finite: jax.Array  # [E, T]
    largest_obs: jax.Array  # [E, T], of the numbers that are finite
    largest_reward: jax.Array  # [E, T]
    within: jax.Array  # [E, T, L], whether a leaf lies in its space
    extremes: jax.Array  # [E, T, L, 2], the lowest and the highest number of a leaf
    allowed: jax.Array  # [E, T], whether the mask allows any action
    same: jax.Array  # [E, T], whether the same step gives the same result
    done: jax.Array  # [E, T]
    rewarded: jax.Array  # [E, T]
    numbers: list[jax.Array]  # [E, T, ...] each, of the state and the observation
    key: jax.Array  # [E, T], of the step


def play_faults(env: Env, num_steps: int, seed: int) -> list[str]:
    """The faults that show in `num_steps` random steps of `NUM_ENVS` environments, one sentence each.

    Raises ValueError, with the environment's own error as its cause, if a function of the environment fails.
    """
    keys = jax.random.split(jax.random.key(seed), NUM_ENVS)
    space = action_space(env, env.params)  # not traced
    play = jax.jit(jax.vmap(partial(_play, env, space, num_steps)))
    generators = _global_generators()
    begun, seen = call_env(f"playing {num_steps} random steps under jit and vmap", play, keys)
    problems = _faults_of_numbers(begun, seen)
    if _global_generators() != generators:
        problems.append(
            "reset or step draws from np.random or random, which happens once, when it is traced (use jax.random with "
            "the key)."
        )
    if not seen.within.all() and seen.obs_finite.all():
        problems.append(_outside(observation_space(env), seen))
    if not seen.allowed.any():
        problems.append("the action mask never allowed an action; where it allows none, all are allowed.")
    if not begun.same.all():
        problems.append("reset is not a pure function: the same key gave two different results.")
    if not seen.same.all():
        problems.append("step is not a pure function: the same key, state and action gave two different results.")
    if _resets_itself(env, begun, seen):
        problems.append(
            "step seems to reset the environment by itself: where an episode ends, it returns a state in which "
            "episodes begin, and must return the one that was reached (all is well if that is one of them, as in a "
            "round trip)."
        )
    if not seen.rewarded.any():
        problems.append(
            f"every reward within {num_steps} random steps was 0; if it always is, nothing can be learned "
            "(check_env(env, num_steps=...) plays longer)."
        )
    if not seen.done.any():
        problems.append(
            f"no episode ended within {num_steps} random steps; if none ever ends, no return is ever reported "
            "(time_limit(env, max_steps) truncates them, check_env(env, num_steps=...) plays longer)."
        )
    return problems


def _global_generators() -> bytes:
    """The states of the generators that NumPy and Python share among all of a program."""
    return pickle.dumps((np.random.get_state(), random.getstate()))


def _play(env: Env, space: Space, num_steps: int, key: jax.Array) -> tuple[Begun, Seen]:
    """Plays one environment."""
    reset_key, step_key = jax.random.split(key)
    state, obs = env.reset(reset_key, env.params)
    finite = jnp.array([jnp.isfinite(x).all() for x in _numbers(obs)]).all()
    same = _equal((state, obs), env.reset(reset_key, env.params))
    begun = Begun(finite, _largest(obs), same, _leaves_of(state, obs))
    start = jax.tree.map(jnp.asarray, (state, obs))
    return begun, jax.lax.scan(partial(_step, env, space), start, jax.random.split(step_key, num_steps))[1]


def _step(env: Env, space: Space, start: tuple, key: jax.Array) -> tuple[tuple, Seen]:
    """Takes one random step, twice; returns where the next begins, and what it shows."""
    state, obs = start
    spaces = observation_space(env)
    action_key, step_key, reset_key = jax.random.split(key, 3)
    action = random_action(action_key, space, allowed_actions(spaces, obs))
    result = env.step(step_key, state, action, env.params)
    again = env.step(step_key, state, action, env.params)
    # An Env that resets itself returns a start state where an episode ends.
    done = result.terminated | result.truncated
    next_start = jax.tree.map(
        lambda f, s: jnp.where(done, f, s).astype(jnp.result_type(f)),
        env.reset(reset_key, env.params),
        (result.state, result.obs),
    )
    fine = lambda x: jnp.isfinite(x) | (done & jnp.isnan(x))
    seen = Seen(
        obs_finite=jnp.array([fine(x).all() for x in _numbers(result.obs)]).all(),
        reward_finite=fine(result.reward),
        largest_obs=_largest(result.obs),
        largest_reward=_largest(result.reward),
        within=_within(spaces, result.obs, done),
        extremes=_extremes(result.obs),
        allowed=_allows(spaces, result.obs),
        same=_equal(result, again),
        done=done,
        rewarded=result.reward != 0,
        numbers=_leaves_of(result.state, result.obs),
        key=step_key,
    )
    return next_start, seen


def _faults_of_numbers(begun: Begun, seen: Seen) -> list[str]:
    """Numbers that are not finite, or too large."""
    problems = []
    if not begun.finite.all():
        problems.append("reset returns an observation that is nan or infinite.")
    largest_obs = max(float(begun.largest.max()), float(seen.largest_obs.max()))
    for name, largest in {"an observation": largest_obs, "a reward": float(seen.largest_reward.max())}.items():
        if largest > LARGEST:
            problems.append(
                f"{name} reached {largest:.3g}; above {LARGEST:g} its square overflows float32, so that it cannot be "
                "normalised (divide it by a constant)."
            )
    if not seen.obs_finite.all():
        problems.append(f"step {_when(~seen.obs_finite)} returns an observation that is nan or infinite.")
    if not seen.reward_finite.all():
        problems.append(f"step {_when(~seen.reward_finite)} returns a reward that is nan or infinite.")
    return problems


def _outside(spaces: Any, seen: Seen) -> str:
    """Which leaf of an observation left its space."""
    part = int(np.argmin(seen.within.all((0, 1))))
    path, space = jax.tree_util.tree_leaves_with_path(spaces)[part]
    extremes = seen.extremes[..., part, :]
    return (
        f"step {_when(~seen.within.all(-1))} returns an observation outside observation_space"
        f"{jax.tree_util.keystr(path)}, which is {space!r}: its numbers went from {extremes.min():g} to "
        f"{extremes.max():g}."
    )


def _leaves_of(state: Any, obs: Any) -> list[jax.Array]:
    """The numbers of a state and an observation as they are compared with those of a start."""
    return [jnp.asarray(x, jnp.float32) for x in _numbers((state, obs))]


def _resets_itself(env: Env, begun: Begun, seen: Seen) -> bool:
    """Whether episodes end in states in which others begin.

    All numbers that are equal in all start states and change within episodes, such as a count of steps, are then as at
    a start wherever an episode ends. Or the last states are those of resets with a key that the step derived.

    Args:
        env: that was played.
        begun: the start states.
        seen: of all steps.
    """
    done = np.asarray(seen.done)
    if not done.any() or done.all():
        return False
    at_start = []
    for start, x in zip(begun.numbers, seen.numbers):
        start, x = np.asarray(start).reshape(len(start), -1), np.asarray(x).reshape(*done.shape, -1)
        same = x == start[0]
        moves = (start == start[0]).all(0) & ~same[~done].all(0)
        at_start += [same[done][:, moves].all()] if moves.any() else []
    if at_start:
        return all(at_start)
    ends = tuple(np.argwhere(done)[:NUM_ENDS].T)
    last, keys = [np.asarray(x)[ends] for x in seen.numbers], seen.key[ends]

    def derived(key):
        others = jnp.stack([key, *jax.random.split(key), *jax.random.split(key, 3)])
        return _leaves_of(*jax.vmap(env.reset, (0, None))(others, env.params))

    resets = jax.jit(jax.vmap(derived))(keys)  # [NUM_ENDS, 6, ...] each
    equal = [(x[:, None] == np.asarray(y)).reshape(*y.shape[:2], -1).all(-1) for x, y in zip(last, resets)]
    return bool(np.logical_and.reduce(equal).any(-1).all())


def _within(spaces, obs, done):
    """Whether each leaf of an observation lies in its space, [L]."""
    checks = []
    for space, x in zip(jax.tree.leaves(spaces), jax.tree.leaves(obs)):
        if isinstance(space, Discrete):
            checks.append((x >= 0) & (x < space.n))
        elif isinstance(space, MultiDiscrete):
            checks.append(((x >= 0) & (x < jnp.array(space.sizes).reshape(space.shape))).all())
        elif isinstance(space, Box):
            low, high = (jnp.broadcast_to(jnp.asarray(b, jnp.float32), x.shape) for b in (space.low, space.high))
            checks.append((((x >= low) & (x <= high)) | (done & jnp.isnan(x))).all())
        else:
            checks.append(jnp.bool_(True))
    return jnp.stack(checks)


def _extremes(obs):
    """The lowest and the highest number of each leaf, [L, 2]."""
    leaves = [jnp.asarray(x, jnp.float32) for x in jax.tree.leaves(obs)]
    return jnp.stack([jnp.stack([jnp.nanmin(x, initial=jnp.inf), jnp.nanmax(x, initial=-jnp.inf)]) for x in leaves])


def _allows(space, obs):
    """Whether an observation allows any action."""
    allowed = allowed_actions(space, obs)
    return jnp.bool_(True) if allowed is None else allowed.any()


def _equal(first, second):
    """Whether all numbers of two trees are equal."""
    same = [jnp.array_equal(a, b, equal_nan=True) for a, b in zip(_numbers(first), _numbers(second))]
    return jnp.array(same).all()


def _largest(tree):
    """The largest absolute value that is finite, 0 for none."""
    numbers = [jnp.asarray(x, jnp.float32).reshape(-1) for x in _numbers(tree)]
    largest = [jnp.max(jnp.where(jnp.isfinite(x), jnp.abs(x), 0), initial=0) for x in numbers]
    return jnp.stack([jnp.float32(0), *largest]).max()


def _numbers(tree):
    """The leaves that are numbers, random keys left out."""
    leaves = [jnp.asarray(x) for x in jax.tree.leaves(tree)]
    return [x for x in leaves if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)]


def _when(failed):
    return f"{int(np.argwhere(np.asarray(failed))[:, 1].min()) + 1} of random play"
