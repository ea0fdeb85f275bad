import dataclasses
from functools import partial

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from gymnax.environments import spaces
from gymnax.environments.environment import Environment, EnvParams
from gymnax.wrappers import (
    FlattenObservationWrapper,
    GymnaxToDmEnvWrapper,
    LegacyStepAPIWrapper,
    LogWrapper,
    StickyActionWrapper,
)
from gymnax.wrappers.purerl import GymnaxWrapper

from probes import SMALL, copy_cue, counter
from purejaxppo import ActionMask, Box, Discrete, Env, MultiDiscrete, Step, check_env, make_env, make_ppo, time_limit
from purejaxppo.envs import env_names
from purejaxppo.envs.base import action_space, observation_space
from purejaxppo.envs.check import REPORTED
from purejaxppo.experiment.agents.render import record_episode
from purejaxppo.summary import RESERVED


@pytest.mark.full
@pytest.mark.parametrize("name", env_names())
def test_every_environment_of_gymnax_makes_a_finite_update(name):
    config = dataclasses.replace(SMALL, normalize_observation=True, scale_reward=True)
    # gymnax's Swimmer itself subtracts a vector from a matrix.
    with jax.numpy_rank_promotion("allow" if name == "Swimmer-misc" else "raise"):
        ppo = make_ppo(name, config)
        state, metrics = jax.jit(ppo.step)(jax.jit(ppo.init)(jax.random.key(0)))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((state.policy, state.opt_state)))
    assert np.isfinite([metrics[k] for k in ("loss", "entropy", "approx_kl", "grad_norm")]).all()
    assert metrics["grad_norm"] > 0


@pytest.mark.parametrize("name", ["CartPole-v1", "DeepSea-bsuite", "UmbrellaChain-bsuite", "FrozenLake-misc"])
def test_steps_are_those_of_gymnax_to_the_bit(name, key):
    """Along a random episode through gymnax's own `step`, whose auto-reset ours leaves out."""
    theirs, params = gymnax.make(name)
    ours = make_env(name)
    step, our_step = jax.jit(theirs.step), jax.jit(ours.step)
    obs, state = theirs.reset(key, params)
    our_state, our_obs = ours.reset(key, ours.params)
    np.testing.assert_array_equal(obs, our_obs)
    for i in range(100):
        step_key = jax.random.fold_in(key, i)
        action = theirs.action_space(params).sample(step_key)
        obs, state, reward, terminated, truncated, info = step(step_key, state, action, params)
        result = our_step(jax.random.split(step_key)[0], our_state, action, ours.params)
        np.testing.assert_array_equal(result.obs, info["final_observation"])
        assert (result.reward, result.terminated, result.truncated) == (reward, terminated, truncated)
        our_state = result.state
        if terminated or truncated:
            return
    pytest.fail("no episode ended")


def test_an_environment_is_given_by_name_instance_pair_or_as_it_is():
    instance, params = gymnax.make("Pendulum-v1")
    own = dataclasses.replace(params, max_torque=7.0)
    assert make_env("Pendulum-v1").params == make_env(instance).params == params
    paired = make_env((instance, own))
    assert paired.params.max_torque == 7 and getattr(action_space(paired, own), "high") == 7
    env = copy_cue()
    assert make_env(env) is env


def test_an_instance_may_be_built_with_arguments_of_its_own():
    env = make_env(gymnax.environments.bsuite.deep_sea.DeepSea(size=5))
    assert observation_space(env).shape == (5, 5)


def test_action_bounds_follow_parameters_that_are_traced(key):
    env = make_env("Pendulum-v1")
    ppo = make_ppo(env, dataclasses.replace(SMALL, bound_action="tanh"))
    policy = ppo.init(key).policy

    def largest(max_torque):
        params = dataclasses.replace(env.params, max_torque=max_torque)
        act = lambda key: ppo.act(policy, jnp.zeros(3), key, env_params=params)[0]
        return jnp.abs(jax.vmap(act)(jax.random.split(key, 500))).max()

    small, large = jax.jit(jax.vmap(largest))(jnp.array([0.5, 8.0]))
    assert 0.4 < small <= 0.5 and 6.4 < large <= 8


@pytest.mark.parametrize(
    "name, hint", [("Cartpole", "CartPole-v1"), ("Breakout", "Breakout-MinAtar"), ("zzzzz", "purejaxppo envs")]
)
def test_an_unknown_name_is_answered_with_the_nearest(name, hint):
    with pytest.raises(ValueError, match=f"env='{name}' is not a known environment.*{hint}"):
        make_env(name)


def test_what_is_no_environment_is_refused():
    with pytest.raises(ValueError, match="is not an environment: pass a name"):
        make_env(42)


def test_sizes_of_spaces_are_whole_numbers():
    for space, sentence in [
        (lambda: Discrete(2.5), "n=2.5 must be a whole number"),  # pyright: ignore[reportArgumentType]
        (lambda: Discrete(0), "n=0 must be at least 1"),
        (lambda: MultiDiscrete([2, 0]), "sizes=0 must be at least 1"),
        (lambda: MultiDiscrete([]), r"sizes=\[\] of a MultiDiscrete space must hold"),
        (lambda: Box(shape=3), r"shape=3 of a Box must be a sequence"),  # pyright: ignore[reportArgumentType]
    ]:
        with pytest.raises(ValueError, match=sentence):
            space()


def test_a_time_limit_truncates_and_terminates_nothing(key):
    env = time_limit(counter(5, truncate=False), 3)
    state, _ = env.reset(key, ())
    flags = []
    for _ in range(5):
        result = env.step(key, state, 0, ())
        state = result.state
        flags.append((bool(result.terminated), bool(result.truncated)))
    assert flags == [(False, False), (False, False), (False, True), (False, True), (True, True)]


@struct.dataclass
class Count:
    time: jax.Array
    sum: jax.Array


class Counting(Environment):
    """Observes [time, sum of actions], rewards the action, terminates at a sum of 3, truncates after 5 steps."""

    @property
    def default_params(self):
        return EnvParams(max_steps_in_episode=5)

    def reset_env(self, key, params):
        return jnp.zeros((1, 2)), Count(jnp.int32(0), jnp.int32(0))

    def step_env(self, key, state, action, params):
        state = Count(state.time + 1, state.sum + action)
        return jnp.stack([state.time, state.sum])[None] * 1.0, state, action, self.is_terminal(state, params), {}

    def is_terminated(self, state, params):
        return state.sum >= 3

    def action_space(self, params):
        return spaces.Discrete(2)

    def observation_space(self, params):
        return spaces.Box(0, 5, (1, 2))


class Before(Counting):
    """As in gymnax before 1.0: the time limit terminates."""

    def is_terminal(self, state, params):
        return self.is_terminated(state, params) | (state.time >= params.max_steps_in_episode)


class Doubled(GymnaxWrapper):
    """Doubles observations and rewards, flips actions and starts at 7; leaves the final observation as it was."""

    def reset(self, key, params=None):
        obs, state = self._env.reset(key, params)
        return obs + 7, state

    def step(self, key, state, action, params=None):
        obs, state, reward, terminated, truncated, info = self._env.step(key, state, 1 - action, params)
        return obs * 2, state, reward * 2, terminated, truncated, info


class Limited:
    """Truncates after 2 steps and resets by itself."""

    def __init__(self, env):
        self.inner = env

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def reset(self, key, params):
        obs, state = self.inner.reset(key, params)
        return obs, (state, jnp.int32(0))

    @partial(jax.jit, static_argnames="self")
    def step(self, key, state, action, params):
        obs, inner, reward, terminated, truncated, info = self.inner.step(key, state[0], action, params)
        truncated |= state[1] >= 1
        done = terminated | truncated
        fresh, start = self.reset(key, params)
        state = jax.tree.map(partial(jnp.where, done), start, (inner, state[1] + 1))
        return jnp.where(done, fresh, obs), state, reward, terminated, truncated, info | {"final_observation": obs}


class Tripled(Counting):
    """Changes `step` by inheritance."""

    def step(self, key, state, action, params=None):
        obs, state, reward, terminated, truncated, info = super().step(key, state, action, params)
        return obs * 3, state, reward, terminated, truncated, info


class InParts(GymnaxWrapper):
    """Changes `step_env`, not `step`."""

    def step_env(self, key, state, action, params):
        obs, state, reward, terminated, info = self._env.step_env(key, state, action, params)
        return obs, state, reward - 1, terminated, info


def episode(env, action, num_steps=5):
    """Observations, rewards, and the step of the first end with its flags, under one action for ever."""
    env = make_env(env)
    state, obs = env.reset(jax.random.key(0), env.params)
    seen, step = [], jax.jit(env.step)
    for i in range(num_steps):
        result = step(jax.random.key(i), state, action, env.params)
        seen.append((result.obs.reshape(-1).tolist(), float(result.reward)))
        state = result.state
        if result.terminated or result.truncated:
            return seen, bool(result.terminated), bool(result.truncated)
    return seen, False, False


@pytest.mark.parametrize(
    "wrapped, action, last, flags",
    [
        (Counting(), 1, ([3, 3], 1), (True, False)),
        (Counting(), 0, ([5, 0], 0), (False, True)),
        (LogWrapper(FlattenObservationWrapper(Counting())), 1, ([3, 3], 1), (True, False)),
        (StickyActionWrapper(Counting(), 1.0), 1, ([5, 0], 0), (False, True)),  # repeats the action 0 of its start
        (Doubled(Counting()), 1, ([10, 0], 0), (False, True)),
        (Doubled(Counting()), 0, ([6, 6], 2), (True, False)),
        (Limited(Counting()), 1, ([2, 2], 1), (False, True)),
        (Doubled(Limited(Counting())), 0, ([4, 4], 2), (False, True)),
        (Limited(Doubled(Counting())), 0, ([4, 4], 2), (False, True)),
        (Tripled(), 1, ([9, 9], 1), (True, False)),
        (InParts(Counting()), 1, ([3, 3], 0), (True, False)),
        (Before(), 1, ([3, 3], 1), (True, False)),
        (Before(), 0, ([5, 0], 0), (False, True)),
        (Doubled(Before()), 1, ([10, 0], 0), (False, True)),
    ],
)
def test_a_wrapper_of_gymnax_does_what_it_does_and_shows_the_observation_reached(wrapped, action, last, flags):
    seen, *ended = episode(wrapped, action)
    assert (*seen[-1], *ended) == (*last, *flags)


def test_a_wrapper_begins_every_episode_and_is_part_of_the_name(key):
    env = make_env(Doubled(Counting()))
    assert env.reset(key, env.params)[1].tolist() == [[7, 7]] and env.name == "Doubled(Counting)"
    assert check_env(make_env(StickyActionWrapper(Counting(), 0.5))) == []


class FromOne(spaces.Discrete):
    start = 1


class Offset(Counting):
    def action_space(self, params):
        return FromOne(2)

    def observation_space(self, params):
        return spaces.Dict({"sum": FromOne(4)})

    def reset_env(self, key, params):
        _, state = super().reset_env(key, params)
        return {"sum": state.sum + 1}, state

    def step_env(self, key, state, action, params):
        _, state, *rest = super().step_env(key, state, action, params)
        return {"sum": state.sum + 1}, state, *rest


def test_discrete_spaces_that_begin_elsewhere_are_counted_from_zero(key):
    env = make_env(Offset())
    state, obs = env.reset(key, env.params)
    result = env.step(key, state, jnp.int32(1), env.params)
    assert (obs["sum"], result.obs["sum"], result.reward) == (0, 2, 2)
    assert repr((action_space(env, env.params), observation_space(env))) == "(Discrete(2), {'sum': Discrete(4)})"


class Closed(GymnaxWrapper):
    def __init__(self, env):
        super().__init__(env)
        self._step = env.step

    def step(self, *args):
        return self._step(*args)


class Hiding(GymnaxWrapper):
    def step(self, key, state, action, params):
        obs, state, reward, terminated, truncated, _ = self._env.step(key, state, action, params)
        fresh, start = self.reset(key, params)
        return jnp.where(truncated, fresh, obs), state, reward, terminated, truncated, {}


class Timeless(Counting):
    def is_truncated(self, state, params):
        return state.steps > params.max_steps_in_episode


@pytest.mark.parametrize(
    "env, sentence",
    [
        (
            LegacyStepAPIWrapper(Counting()),
            "step of LegacyStepAPIWrapper must return .* as in gymnax 1.0, not 5 values",
        ),
        (GymnaxToDmEnvWrapper(Counting()), r"reset of GymnaxToDmEnvWrapper must return \(obs, state\), not TimeStep"),
        (InParts(StickyActionWrapper(Counting())), "step_env of InParts does without the step of the wrapper"),
        (Closed(Counting()), "step of Closed must call step of the environment that it holds"),
        (Hiding(Counting()), r"step of Hiding resets by itself, so it must keep .* info\['final_observation'\]"),
        (Counting, r"env=Counting is a class \(pass an instance, such as Counting\(\)\)"),
    ],
)
def test_what_hides_the_observation_reached_is_refused(env, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_env(env)


def test_an_environment_that_does_not_tell_its_time_limit_is_refused():
    with pytest.raises(ValueError, match="Timeless does not tell when its time runs out.*define is_truncated"):
        make_ppo(Timeless(), SMALL)


def dictionary_env():
    def observe(time):
        return {"where": jnp.zeros((2, 3)), "kind": time % 3, "on": time > 1, "grid": jnp.ones((2, 2), jnp.uint8)}

    def step(key, time, action, params):
        return Step(time + 1, observe(time + 1), jnp.float32(action[0]), time > 2, jnp.bool_(False))

    space = {
        "where": Box(-1.0, 1.0, (2, 3)),
        "kind": Discrete(3),
        "on": Box(0, 1, (), bool),
        "grid": Box(0, 255, (2, 2), jnp.uint8),
    }
    return Env(lambda key, params: (jnp.int32(0), observe(jnp.int32(0))), step, (), MultiDiscrete([2, 3]), space)


@pytest.mark.full
@pytest.mark.parametrize("normalize", [False, True])
def test_dictionaries_of_every_kind_of_observation_are_learned_from(normalize, key):
    env = dictionary_env()
    assert check_env(env) == []
    ppo = make_ppo(env, dataclasses.replace(SMALL, normalize_observation=normalize))
    state, metrics = jax.jit(ppo.train)(ppo.init(key))
    assert np.isfinite(metrics["loss"]).all()
    assert state.policy.params["params"]["actor"]["MLP_0"]["Dense_0"]["weight"].shape == (8, 6 + 3 + 1 + 4)


def broken(**changes):
    """A sound environment with its step's result changed."""
    env = counter(3)

    def step(*args):
        result = env.step(*args)
        return result._replace(**{name: change(result) for name, change in changes.items()})

    return env._replace(step=step)


def broken_obs(obs):
    return counter(3)._replace(
        reset=lambda key, params: (jnp.int32(0), obs()),
        step=lambda key, time, action, params: Step(time + 1, obs(), jnp.ones(()), time > 2, jnp.bool_(False)),
    )


def _called_back(result):
    def fail(reward):
        raise RuntimeError("the licence of the simulator expired")

    shape = jax.ShapeDtypeStruct((), jnp.float32)
    return jax.pure_callback(fail, shape, jnp.float32(result.reward), vmap_method="sequential")


def in_parts(space):
    """Counts, and a mask that never allows anything."""

    def show(obs):
        return {"count": obs, "action_mask": jnp.zeros(2, bool)}

    def reset(key, params):
        state, obs = counter(3).reset(key, params)
        return state, show(obs)

    def step(key, state, action, params):
        result = counter(3).step(key, state, action, params)
        return result._replace(obs=show(result.obs))

    return counter(3)._replace(reset=reset, step=step, observation_space=space)


@pytest.mark.parametrize(
    "env, sentence",
    [
        (broken(reward=lambda r: jnp.ones(3)), "reward has shape (3,)"),
        (broken(terminated=lambda r: r.terminated * 1.0), "terminated is float32; it must be a bool"),
        (broken(obs=lambda r: r.obs.astype(jnp.int32)), "obs is float32 from reset and int32 from step"),
        (broken(obs=lambda r: jnp.zeros(2)), "obs has shape (1,) from reset and (2,) from step"),
        (broken(state=lambda r: (r.state[0] * 1.0, r.state[1])), "state[0] is int32 from reset and float32 from step"),
        (broken(state=lambda r: r.state[0]), "state from step has another structure"),
        (broken(obs=lambda r: r.obs * jnp.nan), "step 1 of random play returns an observation that is nan"),
        (broken(reward=lambda r: r.reward / (r.reward - 2)), "step 2 of random play returns a reward that is nan"),
        (broken(truncated=lambda r: jnp.bool_(False)), "no episode ended within 200 random steps"),
        (broken(reward=lambda r: r.reward + np.random.rand()), "step is not a pure function"),
        (broken_obs(lambda: jnp.full(1, np.random.rand())), "reset is not a pure function"),
        (
            broken(reward=lambda r: r.reward + np.random.choice([0.0, 0.0])),
            "reset or step draws from np.random or random",
        ),
        (broken_obs(lambda: jax.random.key(0)), "an observation is of key<fry>; it must be of floats"),
        (broken_obs(lambda: jnp.zeros(2, jnp.complex64)), "an observation is of complex64; it must be of floats"),
        (broken_obs(dict), "an observation is {}, which holds no number"),
        (broken(reward=_called_back), "failed when run: RuntimeError: the licence of the simulator expired"),
        (counter(3)._replace(action_space=3), "action_space is 3; it must be a Discrete"),
        (
            counter(3)._replace(observation_space=Box(0, 11, (1,))),
            "outside observation_space, which is Box(0, 11, (1,), float32): its numbers went from 11 to 13",
        ),
        (in_parts({"count": Box(0, 11, (1,)), "action_mask": ActionMask((2,))}), "outside observation_space['count']"),
        (
            in_parts({"count": Box(shape=(2,)), "action_mask": ActionMask((2,))}),
            "observation_space['count'] is Box(-inf",
        ),
        (
            in_parts({"count": Box(shape=(1,), dtype=jnp.uint8), "action_mask": ActionMask((2,))}),
            "observation_space['count'] is Box(-inf, inf, (1,), uint8), but reset returns float32; both must be of one",
        ),
        (
            in_parts(None),
            "obs['action_mask'] masks nothing, since nothing says that it is a mask",
        ),
        (in_parts({"count": Box(shape=(1,)), "action_mask": ActionMask((2,))}), "the action mask never allowed an"),
        (counter(3)._replace(observation_space=Discrete(4)), "returns an observation of shape (1,)"),
        (counter(3)._replace(reset=lambda key, params: jnp.zeros(1)), "reset(key, params) must return the pair"),
        (counter(3)._replace(reset=lambda key: 1), "reset(key, params) failed when traced: TypeError"),
        (counter(3)._replace(step=lambda *args: (1, 2)), "step must return a Step"),
        (
            broken(obs=lambda r: r.obs * 1e20),
            "an observation reached 1.3e+21; above 1e+18 its square overflows float32",
        ),
        (broken(reward=lambda r: r.reward - 1e19), "a reward reached 1e+19; above 1e+18"),
        (counter(3)._replace(action_space=Box(1.0, -1.0, (2,))), "low must be at most high"),
        (counter(3)._replace(action_space=Box(np.nan, 1.0, (2,))), "neither may be nan"),
        (
            counter(3)._replace(action_space=Box(np.zeros(3), 1.0, (2,))),
            "bounds must be numbers, or arrays of its shape",
        ),
        (counter(3)._replace(action_space=Box(0, 1, (0,))), "which holds no number"),
        (counter(3)._replace(observation_space=Box(11, 9, (1,))), "low must be at most high"),
    ],
)
def test_an_author_is_told_what_is_wrong(env, sentence):
    problems = check_env(env)
    assert len(problems) >= 1 and any(sentence in problem for problem in problems), problems
    assert len(set(problems)) == len(problems)


def test_an_environment_that_fails_names_its_file_and_line_and_is_the_cause(key):
    def step(key, state, action, params):
        return undefined_name  # noqa: F821  # pyright: ignore[reportUndefinedVariable]

    env = counter(3)._replace(step=step)
    place = f"(test_envs.py, line {step.__code__.co_firstlineno + 1})"
    message = "step(key, state, action, params) failed when traced: NameError: name 'undefined_name' is not defined "
    with pytest.raises(ValueError) as raised:
        make_ppo(env, SMALL)
    assert str(raised.value) == message + place and isinstance(raised.value.__cause__, NameError)
    assert check_env(env) == [message + place + "."]


def test_a_failure_in_a_notebook_names_the_cell_and_not_its_file_of_a_number():
    names: dict = {}
    source = "def step(key, state, action, params):\n    return undefined_name"
    exec(compile(source, "/tmp/ipykernel_17/3655367297.py", "exec"), names)
    (problem,) = check_env(counter(3)._replace(step=names["step"]))
    assert problem.endswith("NameError: name 'undefined_name' is not defined (notebook cell, line 2).")


@pytest.mark.parametrize("low, high", [(-3.4e38, 3.4e38), (-np.inf, 1), (1, 1)])
def test_tanh_is_refused_between_bounds_that_it_cannot_fill(low, high):
    env = counter(3)._replace(action_space=Box(low, high, (2,)))
    with pytest.raises(ValueError, match="bound_action='tanh' needs finite bounds with low < high, not Box"):
        make_ppo(env, dataclasses.replace(SMALL, bound_action="tanh"))
    make_ppo(env, SMALL)


def test_a_part_of_an_observation_may_be_empty(key):
    env = counter(3)
    pair = lambda obs: {"empty": jnp.zeros((0, 2)), "time": obs}

    def step(*args):
        result = env.step(*args)
        return result._replace(obs=pair(result.obs))

    def reset(key, params):
        state, obs = env.reset(key, params)
        return state, pair(obs)

    ppo = make_ppo(env._replace(reset=reset, step=step), dataclasses.replace(SMALL, normalize_observation=True))
    assert jax.eval_shape(ppo.step, jax.eval_shape(ppo.init, key))[1]["loss"].shape == ()


def broken_at_the_end():
    """Episodes of 3 steps of reward 1; the last one ends on `params` (number, truncate): reward, obs and metrics."""

    def step(key, time, action, params):
        done = time >= 2
        last = lambda x: jnp.where(done, params[0], x)
        obs = jnp.stack([1.0 + time, last(action)])
        return Step(
            time + 1, obs, last(1.0), done & ~params[1], done & params[1], {"height": last(1.0)}, {"last": last(1.0)}
        )

    return Env(lambda key, params: (jnp.int32(0), jnp.zeros(2)), step, (jnp.nan, jnp.bool_(False)), Discrete(2))


def test_an_episode_is_lost_on_a_metric_that_is_nan_at_its_end(key):
    env = broken_at_the_end()

    def step(*args):
        result = env.step(*args)
        return result._replace(metrics={}, reward=jnp.float32(1), obs=jnp.zeros(2))  # only the episode metric is nan

    ppo = make_ppo(env._replace(step=step), SMALL)
    metrics = jax.jit(ppo.step)(jax.jit(ppo.init)(key))[1]
    assert metrics["num_lost_episodes"] == metrics["num_episodes"] > 0 and metrics["last"] == 0


def test_nothing_is_learned_from_a_nan_that_ends_an_episode(key):
    """As from an episode that terminates there on zeros, to the bit; only its step counts."""
    ppo = make_ppo(broken_at_the_end(), dataclasses.replace(SMALL, normalize_observation=True, scale_reward=True))

    @jax.jit
    def train(number, truncate):
        state, metrics = ppo.step(ppo.init(key, env_params=(number, truncate)))
        _, rollout = ppo.collect(state)
        played = ppo.evaluate(key, state.policy, state.env_params, num_episodes=2)
        num_lost = metrics.pop("num_lost_episodes")
        return state.policy, metrics, rollout.terminated, rollout.next_obs, num_lost, played

    right = train(0.0, False)
    for truncate in (False, True):
        jax.tree.map(np.testing.assert_array_equal, train(jnp.nan, truncate)[:3], right[:3])
    nan = train(jnp.nan, True)
    assert (int(right[4]), int(nan[4])) == (0, int(right[1]["num_episodes"])) and nan[4] > 0
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((nan[0], nan[3]))) and nan[2].any()
    np.testing.assert_array_equal(nan[-1].episode_return, [2, 2])
    np.testing.assert_allclose(nan[1]["episode_return"], 2)
    episode = record_episode(ppo, nan[0], key)
    assert episode.finished and episode.rewards.tolist() == [1, 1, 0]
    assert check_env(ppo.env) == []


def test_a_sound_environment_has_no_problems():
    assert check_env(counter(3)) == check_env(make_env("CartPole-v1")) == []


def test_a_name_is_no_env_yet():
    assert "make_env makes one" in check_env("CartPole-v1")[0]


def test_an_unsound_environment_is_refused_before_anything_compiles():
    with pytest.raises(ValueError, match="failed its checks: reward has shape"):
        make_ppo(broken(reward=lambda r: jnp.ones(3)), SMALL)


@pytest.mark.full
def test_a_policy_trained_on_gymnax_acts_in_gymnasium_as_well():
    """The same CartPole by other hands: a policy does as well in the one as in the other."""
    gymnasium = pytest.importorskip("gymnasium")
    config = dataclasses.replace(
        SMALL, num_envs=8, num_steps=128, num_updates=50, num_epochs=4, num_minibatches=4, widths=(64, 64)
    )
    from purejaxppo import Hyperparams

    ppo = make_ppo("CartPole-v1", config)
    state, _ = jax.jit(ppo.train)(ppo.init(jax.random.key(0), Hyperparams(learning_rate=1e-3)))
    expected = ppo.evaluate(jax.random.key(1), state.policy, greedy=True).episode_return
    act = jax.jit(lambda obs: ppo.act(state.policy, obs)[0])
    env, returns = gymnasium.make("CartPole-v1"), []
    for seed in range(20):
        obs, _ = env.reset(seed=seed)
        total, done = 0.0, False
        while not done:
            obs, reward, terminated, truncated, _ = env.step(int(act(obs)))
            total, done = total + reward, terminated or truncated
        returns.append(total)
    assert expected.mean() > 100  # random actions come to 22
    assert abs(np.mean(returns) - expected.mean()) < 5 + 4 * expected.std() / np.sqrt(len(returns))


def resetting(env, derive):
    """An Env that resets itself, with a key that it derives from that of the step."""

    def step(key, state, action, params):
        result = env.step(key, state, action, params)
        done = result.terminated | result.truncated
        fresh = env.reset(derive(key), params)
        state, obs = jax.tree.map(
            lambda a, b: jnp.where(done, a, b).astype(jnp.result_type(b)), fresh, (result.state, result.obs)
        )
        return result._replace(state=state, obs=obs)

    return env._replace(step=step)


@pytest.mark.parametrize("derive", [lambda key: key, lambda key: jax.random.split(key)[1]])
def test_an_env_that_resets_itself_is_found(derive):
    env = make_env("CartPole-v1")
    assert check_env(env) == []
    assert [fault for fault in check_env(resetting(env, derive)) if "seems to reset the environment by itself" in fault]
    assert "resets" not in "".join(check_env(counter(3))) and check_env(counter(3)) == []
    assert "seems to reset" in check_env(resetting(counter(3), derive))[0]


def test_an_end_that_looks_like_a_start_is_no_reset():
    """A terminal observation of zeros, as the first one; the state counts on."""
    env = counter(3)

    def step(key, state, action, params):
        result = env.step(key, state, action, params)
        return result._replace(obs=jnp.where(result.truncated, 0.0, result.obs))

    zeros = env._replace(reset=lambda key, params: (env.reset(key, params)[0], jnp.zeros(1)), step=step)
    assert check_env(zeros) == []


def test_a_leaf_that_vmap_does_not_batch_is_found():
    @jax.custom_batching.custom_vmap
    def buffer(x):
        return jnp.zeros(100)

    @buffer.def_vmap
    def _(axis_size, in_batched, x):
        return jnp.zeros(1600), True  # of a simulator that all environments of a batch share

    env = counter(3)

    def reset(key, params):
        state, obs = env.reset(key, params)
        return (state, buffer(obs)), obs

    def step(key, state, action, params):
        result = env.step(key, state[0], action, params)
        return result._replace(state=(result.state, buffer(result.obs)))

    shared = env._replace(reset=reset, step=step)
    assert "gives an array of shape (1600,) instead of (3, 100)" in check_env(shared)[0]
    with pytest.raises(ValueError, match="one environment must not share it"):
        make_ppo(shared, SMALL)


@pytest.mark.parametrize("kind", ["metrics", "episode_metrics"])
@pytest.mark.parametrize("name", ["entropy", "episode_return", "seed"])
def test_a_metric_by_the_name_of_one_of_training_is_found(kind, name):
    env = counter()

    def step(key, state, action, params):
        return env.step(key, state, action, params)._replace(**{kind: {name: jnp.float32(0)}})

    named = f"metric '{name}' has the name of a metric of training; give it another one."
    assert named in check_env(env._replace(step=step))


def test_the_names_that_check_env_knows_are_those_that_training_reports():
    ppo = make_ppo(counter(), SMALL)
    _, metrics = jax.eval_shape(ppo.step, jax.eval_shape(ppo.init, jax.random.key(0)))
    assert REPORTED == metrics.keys() | RESERVED | {"parent"}


def test_a_reward_that_is_always_zero_and_metrics_that_are_no_dictionary_are_found():
    env = counter(3)
    poor = env._replace(step=lambda *args: env.step(*args)._replace(reward=jnp.float32(0)))
    assert "every reward within 200 random steps was 0" in check_env(poor)[0]
    listed = env._replace(step=lambda *args: env.step(*args)._replace(metrics=[1]))
    assert check_env(listed) == ["metrics of step is a list; it must be a dictionary of numbers."]


def test_the_check_of_an_env_says_what_it_costs():
    """A reset of 50 steps of work, one array of 100 numbers in the state, and two in what a rollout keeps."""

    def work(x, length):
        return jax.lax.scan(lambda x, _: (jnp.sin(x) + 0.1, None), x, length=length)[0]

    def reset(key, params):
        start = work(jax.random.uniform(key, (100,)), 5000)
        return start, start

    def step(key, state, action, params):
        state = work(state, 100)
        return Step(state, state, state[0], jnp.bool_(False), jax.random.uniform(key) < 0.1)

    faults = check_env(Env(reset, step, (), Discrete(2)))
    assert (
        faults == []
        and faults.costs is not None
        and faults.costs.start_bytes == 800
        and faults.costs.transition_bytes == 800 + 4 + 4 + 1
    )
    assert 10 < faults.costs.start_seconds / faults.costs.step_seconds < 250
    assert "a start takes the time of" in str(faults) and "a step in a rollout takes 809 bytes" in str(faults)
    assert check_env(3).costs is None
