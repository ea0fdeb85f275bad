"""Environments of suites by name: with a suite made up here, and with each suite that is installed."""

import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

import purejaxppo as pjp
from purejaxppo import Box, Discrete, Env
from purejaxppo.cli.main import main
from purejaxppo.envs import SUITES, env_names, suite
from purejaxppo.envs.check import check_shapes
from purejaxppo.envs.roles import allowed_actions, random_action
from purejaxppo.experiment.identity import identify, identify_ppo
from purejaxppo.experiment.presets import PRESETS, find_preset, preset
from purejaxppo.experiment.suite_presets import PUBLISHED, TRIED, UNTRIED

Step: Any = pjp.Step  # without its types: those of suites vary
api: Any = pjp
TINY = pjp.Config(num_envs=4, num_steps=8, num_updates=1, num_epochs=1, widths=(8,))


def made_up_suite():
    """An adapter whose environment draws from the key in its state, into which its step also writes."""
    adapter: Any = types.ModuleType("purejaxppo.envs.from_fake")

    def make(name, length=5, **options):
        """Options: length, and others such as view_size."""
        if "table" in options:
            raise KeyError("no 'key' of this name\n(the whole table)" + "x" * 300)
        if options:
            raise RuntimeError("no such option\n(a second line)")
        if length == 0:
            raise ValueError("length must be above 0")

        def reset(key, params):
            return {"key": key, "info": {"noise": 0.0}, "time": 0}, jnp.zeros(2)

        def step(key, state, action, params):
            state["info"]["noise"] = jax.random.normal(state["key"])
            state["key"], state["time"] = jax.random.split(state["key"])[0], state["time"] + 1
            obs = jnp.array([state["info"]["noise"], params["gravity"]])
            end = state["time"] >= length
            return Step(state, obs, 1, end * 1.0, False, {"reward/alive": 1, "vector": jnp.zeros(2)})

        return Env(reset, step, {"gravity": 9.81}, Discrete(2), Box(shape=(2,)))

    adapter.names, adapter.make = lambda: ["walk", "run"], make
    return adapter


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setitem(SUITES, "fake", "wave")  # a module that exists and is not imported
    monkeypatch.setitem(SUITES, "missing", "a_package_that_is_not_there")
    monkeypatch.setitem(SUITES, "broken", "wave")
    monkeypatch.setitem(sys.modules, "purejaxppo.envs.from_fake", made_up_suite())
    monkeypatch.setitem(sys.modules, "purejaxppo.envs.from_broken", None)


def test_a_suite_fits_the_interface_whatever_its_types_are(fake):
    env = pjp.make_env("fake/walk")
    assert env.name == "fake/walk" and env_names("fake") == ["fake/walk", "fake/run"]
    assert pjp.check_env(env) == []
    _, result = first_step(env, jax.random.key(1))
    assert result.metrics == {"reward_alive": 1.0}
    assert not any(getattr(x, "weak_type", False) for x in jax.tree.leaves(result))


def first_step(env, key, state_key=None, params=None):
    params = env.params if params is None else params
    state, _ = env.reset(jax.random.key(0), params)
    state = suite.with_keys(state, state_key) if state_key is not None else state
    return state, env.step(key, state, jnp.int32(1), params)


def test_the_randomness_of_a_step_comes_from_its_key_alone(fake):
    env, key = pjp.make_env("fake/walk"), jax.random.key(1)
    noise = [first_step(env, key, jax.random.key(i))[1].obs[0] for i in range(2)]
    assert noise[0] == noise[1] != first_step(env, jax.random.key(2))[1].obs[0]


def test_different_keys_in_one_state_get_different_keys():
    keys = {"a": jax.random.key(0), "b": jax.random.split(jax.random.key(0), 3), "c": jnp.arange(2)}
    renewed = suite.with_keys(keys, jax.random.key(5))
    data = np.concatenate([jax.random.key_data(renewed["a"])[None], jax.random.key_data(renewed["b"])])
    assert len(np.unique(data, axis=0)) == 4 and renewed["c"] is keys["c"]


def test_states_are_not_written_into(fake):
    state, _ = first_step(pjp.make_env("fake/walk"), jax.random.key(1))
    assert state["time"] == 0 and state["info"]["noise"] == 0


def test_parameters_of_a_suite_are_traced(fake):
    env, key = pjp.make_env("fake/walk"), jax.random.key(1)
    play: Any = jax.jit(lambda gravity: first_step(env, key, params={"gravity": gravity})[1].obs[1])
    assert (play(1.0), play(2.0)) == (1, 2) and play._cache_size() == 1


class Simulator:
    """Falls by the gravity that it holds, as simulators of physics do."""

    action_size = 1

    def __init__(self):
        self.physics = Physics(gravity=jnp.float32(10.0), friction=Physics(gravity=jnp.float32(2.0)))

    def reset(self, key):
        return self.show(jnp.float32(0))

    def step(self, state, action):
        return self.show(state.obs[0] - self.physics.gravity + self.physics.friction.gravity)

    def show(self, height):
        return types.SimpleNamespace(obs=height[None], reward=height, done=jnp.float32(0), metrics={})


class Physics(struct.PyTreeNode):
    gravity: Any
    friction: Any = None

    def tree_replace(self, parts):
        changed = self.replace(gravity=parts.get("gravity", self.gravity))
        if "friction.gravity" in parts:
            changed = changed.replace(friction=self.friction.replace(gravity=parts["friction.gravity"]))
        return changed


def test_the_physics_of_a_simulator_are_its_parameters_only_while_it_is_traced():
    simulator = Simulator()
    env = suite.from_simulator(simulator, "physics", simulator.physics, ("gravity", "friction.gravity"))
    assert env.params == {"gravity": 10, "friction.gravity": 2}
    state, _ = env.reset(jax.random.key(0), env.params)
    fall: Any = jax.jit(lambda gravity: env.step(jax.random.key(0), state, jnp.zeros(1), {"gravity": gravity}).obs[0])
    assert (fall(10.0), fall(3.0)) == (-8, -1) and simulator.physics.gravity == 10


@pytest.mark.parametrize(
    "traced, sentence",
    [("gravity", r"traced='gravity' must be a sequence of paths, such as \('gravity',\)"), (("mass",), "no part of")],
)
def test_what_is_no_part_of_the_physics_is_refused(traced, sentence):
    simulator = Simulator()
    with pytest.raises(ValueError, match=sentence):
        suite.from_simulator(simulator, "physics", simulator.physics, traced)


def test_a_part_of_the_physics_that_has_no_effect_is_refused():
    simulator = Simulator()
    physics = simulator.physics.replace(friction=simulator.physics.friction.replace(friction=jnp.float32(1.0)))
    with pytest.raises(ValueError, match="traced='friction.friction' has no effect on an episode"):
        suite.from_simulator(simulator, "physics", physics, ("friction.friction",))


def test_an_environment_of_a_suite_is_identified_by_its_name_and_options(fake):
    envs = [pjp.make_env("fake/walk", **options) for options in ({}, {"length": 5}, {"length": 9}, {"length": 9})]
    named, changed = (identify_ppo(pjp.make_ppo(env, TINY))["env"] for env in (envs[0], envs[2]))
    assert named == "fake/walk" and changed != named
    assert identify(envs[2]) == identify(envs[3]) == changed
    assert identify(pjp.time_limit(envs[2], 3)) != changed


@pytest.mark.full
def test_names_of_suites_are_trained_saved_loaded_and_resumed(fake, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sizes = ["--num-envs", "4", "--num-steps", "8", "--num-updates", "2", "--widths", "8", "--compile-cache", "off"]
    assert main(["train", "fake/walk", *sizes]) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("fake-walk-") and api.load(folder).settings.env == "fake/walk"
    assert main(["resume", str(folder), "--total-steps", "96"]) == 0
    assert pjp.load_agents(folder).title == "fake/walk"
    assert "3 updates" in capsys.readouterr().out


@pytest.mark.full
def test_names_of_suites_are_swept(fake, tmp_path):
    sweep = pjp.Sweep("fake/walk", pjp.grid(env=["fake/run"]), num_seeds=1, config=TINY)
    pjp.run_sweep(sweep, tmp_path / "sweep", progress=False)
    assert api.load(tmp_path / "sweep").sweep.env == "fake/walk"


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("fake/wlk", r"env='fake/wlk' is not a known environment \(did you mean fake/walk\?\)"),
        ("fake/zzzzzz", r"env='fake/zzzzzz' is not a known environment \(`purejaxppo envs fake` lists them\)"),
        ("fkae/walk", r"'fkae/walk' is not a known environment, and 'fkae' is no suite \(did you mean fake\?\)"),
        ("/ant", "env='/ant' is not a known environment, and '' is no suite"),
        ("fake", r"env='fake' is not a known environment \(`purejaxppo envs fake` lists them\)"),
        ("fake/rwalkun", r"\(did you mean fake/walk or fake/run\?\)"),
        ("MountainCar", r"\(did you mean MountainCar-v0, MountainCarContinuous-v0 or Breakout-MinAtar\?\)"),
        ("ALE/Pong-v5", r"env='ALE/Pong-v5' is not a known environment, and 'ALE' is no suite \(did you mean fake\?\)"),
        ("zzz/Pong-v5", r"'zzz' is no suite \(known: brax, craftax, jumanji, navix, pgx, playground, xland, fake"),
        (
            "missing/ant",
            r"env='missing/ant' cannot be made: missing is not installed \(pip install \"pure.*\[missing\]\"",
        ),
        ("broken/ant", r"broken cannot be imported: import of purejaxppo.envs.from_broken halted.* \(pip install"),
    ],
)
def test_a_wrong_name_is_answered_in_one_sentence(fake, capsys, name, sentence):
    for call in (pjp.make_env, preset, pjp.make_ppo):
        with pytest.raises(ValueError, match=sentence):
            call(name)
    assert main(["train", name]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_an_error_of_a_suite_is_one_sentence(fake):
    with pytest.raises(ValueError, match="with color='red' cannot be made: RuntimeError: no such option$"):
        pjp.make_env("fake/walk", color="red")
    with pytest.raises(ValueError, match="env='fake/walk' with length=0 cannot be made: ValueError: length must"):
        pjp.make_env("fake/walk", length=0)
    with pytest.raises(
        ValueError, match="backend is an option of suites such as brax/ant; env='CartPole-v1' takes none"
    ):
        pjp.make_env("CartPole-v1", backend="mjx")


def test_parameters_that_a_suite_lacks_are_refused_with_what_makes_them(fake, monkeypatch):
    monkeypatch.setattr(suite, "SIMULATORS", ("fake",))
    plan: Any = lambda: pjp.plan_sweep(pjp.Sweep("fake/walk", pjp.grid(**{"env.view": [1]}), num_seeds=1, config=TINY))
    with pytest.raises(ValueError, match=r"it has gravity; make_env\('fake/walk', traced=\('view',\)\) in Python"):
        plan()
    monkeypatch.setattr(suite, "SIMULATORS", ())
    with pytest.raises(ValueError, match=r"given in Python: make_env\('fake/walk', view=\.\.\.\) in a module"):
        plan()


def test_an_option_that_a_suite_refuses_is_named_with_one_like_it(fake):
    with pytest.raises(ValueError, match=r"with viewsize=3 .*: no such option \(did you mean view_size\?\)$"):
        pjp.make_env("fake/walk", viewsize=3)
    with pytest.raises(ValueError, match="with table=1 cannot be made: KeyError: no 'key' of this name$"):
        pjp.make_env("fake/walk", table=1)
    with pytest.raises(ValueError, match=r"with color='x{76}\.\.\. cannot be made"):
        pjp.make_env("fake/walk", color="x" * 999)


def test_envs_lists_the_environments_of_a_suite_and_which_presets_are_untried(fake, monkeypatch, capsys):
    monkeypatch.setitem(PRESETS, "fake/walk", preset("CartPole-v1"))
    monkeypatch.setitem(UNTRIED, "fake/r*", UNTRIED["brax/hopper"])
    assert main(["envs", "fake"]) == 0
    _, walk, run = capsys.readouterr().out.splitlines()
    assert walk.startswith("fake/walk ") and "untried" not in walk and "discount=0.98" in walk
    assert run.startswith("fake/run ") and " untried: num_envs=64" in run
    assert main(["envs", "fkae"]) == 2
    assert "'fkae' is not a known suite (did you mean fake?)" in capsys.readouterr().err
    assert main(["envs", "fake/walk"]) == 2
    assert "'fake/walk' is not a known suite (`purejaxppo envs fake` lists those of fake)" in capsys.readouterr().err


def test_every_suite_has_presets_that_fit_together():
    for name in [*PUBLISHED, *UNTRIED, *TRIED]:
        assert find_preset(name.replace("*", "any")).config.num_envs > 4
    assert find_preset("playground/Go1Getup").config.widths == (512, 256, 128)
    assert find_preset("xland/MiniGrid-MemoryS8").config.memory
    assert not find_preset("xland/MiniGrid-DoorKey-5x5").config.memory
    assert {name.partition("/")[0] for name in TRIED} == set(SUITES)


# One cheap environment of each suite, with a limit of three steps.
LIMITED = {
    "brax/inverted_pendulum": lambda: pjp.make_env("brax/inverted_pendulum", max_steps=3),
    "playground/CartpoleBalance": lambda: pjp.make_env("playground/CartpoleBalance", max_steps=3),
    "craftax/Craftax-Classic-Symbolic-v1": lambda: limited_craftax(),
    "navix/Navix-DoorKey-16x16-v0": lambda: pjp.make_env("navix/Navix-DoorKey-16x16-v0", max_steps=3),
    "xland/MiniGrid-DoorKey-16x16": lambda: pjp.make_env("xland/MiniGrid-DoorKey-16x16", max_steps=3),
    "jumanji/Maze-v0": lambda: pjp.make_env("jumanji/Maze-v0", time_limit=3),
    "pgx/2048": lambda: pjp.time_limit(pjp.make_env("pgx/2048"), 3),
}


def limited_craftax():
    env = pjp.make_env("craftax/Craftax-Classic-Symbolic-v1", static={"map_size": (16, 16)})
    return env._replace(params=env.params.replace(max_timesteps=jnp.int32(3)))


@pytest.fixture(params=LIMITED)
def limited(request):
    if not suite.is_installed(request.param.partition("/")[0]):
        pytest.skip("not installed")
    with jax.numpy_rank_promotion("allow"):  # that of the suites
        yield LIMITED[request.param]()


def test_an_environment_of_every_suite_fits_the_interface(limited):
    assert check_shapes(limited) == []


@pytest.mark.slow
def test_a_time_limit_of_a_suite_is_a_truncation(limited):
    @jax.jit
    def play(key):
        def step(start, key):
            result = limited.step(key, start[0], quiet_action(limited, start[1]), limited.params)
            return (result.state, result.obs), (result.terminated, result.truncated)

        return jax.lax.scan(step, limited.reset(key, limited.params), jax.random.split(key, 3))[1]

    terminated, truncated = play(jax.random.key(0))
    assert terminated.tolist() == [False] * 3 and truncated.tolist() == [False, False, True]


def test_freeway_ends_by_its_clock_which_is_a_truncation():
    if not suite.is_installed("pgx"):
        pytest.skip("not installed")
    env = pjp.make_env("pgx/minatar-freeway")
    state, _ = env.reset(jax.random.key(0), env.params)
    state = state.replace(_terminate_timer=jnp.int32(1))
    for ended in (False, True):
        state, _, _, terminated, truncated, *_ = env.step(jax.random.key(1), state, jnp.int32(0), env.params)
        assert (bool(terminated), bool(truncated)) == (False, ended)


@pytest.mark.slow
def test_the_time_limits_of_jumanji_are_truncations():
    if not suite.is_installed("jumanji"):
        pytest.skip("not installed")

    def first_step(env):
        state, obs = env.reset(jax.random.key(0), env.params)
        action = random_action(jax.random.key(1), env.action_space, allowed_actions(env.observation_space, obs))
        return env.step(jax.random.key(2), state, action, env.params)

    limited = []
    with jax.numpy_rank_promotion("allow"):
        for name in env_names("jumanji"):
            try:
                envs = [pjp.make_env(name, **options) for options in ({}, {"time_limit": 1})]
            except ValueError:  # it takes no time limit, or needs a download
                continue
            without, within = map(first_step, envs)
            assert bool(within.terminated) == bool(without.terminated) and not without.truncated, name
            assert bool(within.truncated) != bool(within.terminated), name
            limited.append(name)
    assert len(limited) >= 10


def quiet_action(env, obs):
    """No force, or the first action that is allowed."""
    if isinstance(env.action_space, Box):
        return jnp.zeros(env.action_space.shape)
    return jnp.argmax(obs["action_mask"]) if isinstance(obs, dict) else jnp.int32(0)


@pytest.mark.slow
def test_a_time_limit_of_a_suite_takes_nothing_from_what_a_state_is_worth(limited):
    """With a reward of 1 in every step, 1 / (1 - 0.9) = 10, although episodes have three steps."""

    def step(key, state, action, params):
        return limited.step(key, state, action, params)._replace(reward=jnp.float32(1))

    config = pjp.Config(num_envs=8, num_steps=16, num_updates=80, num_epochs=4, num_minibatches=2, widths=(16,))
    ppo = pjp.make_ppo(limited._replace(step=step), config)
    hyperparams = pjp.Hyperparams(learning_rate=1e-2, discount=0.9)
    state, _ = jax.jit(ppo.train)(jax.jit(ppo.init)(jax.random.key(0), hyperparams))
    _, rollout = jax.jit(ppo.collect)(state)
    memory = ppo.network.initial_memory(config.num_envs)
    _, _, value = ppo.network.apply(state.policy.params, memory, rollout.obs, rollout.first)
    np.testing.assert_allclose(value.mean(), 10, rtol=0.1)


@pytest.mark.slow
def test_episodes_begin_in_as_many_different_states_as_there_are_resets(limited):
    """1,000 of them, that end together."""
    config = pjp.Config(num_envs=1000, num_steps=3, num_updates=1, num_epochs=1, num_minibatches=1, widths=(8,))
    ppo = pjp.make_ppo(limited, config)
    keys = jax.random.split(jax.random.key(1), 1000)
    direct, _ = jax.jit(jax.vmap(limited.reset, (0, None)))(keys, limited.params)
    state, metrics = jax.jit(ppo.step)(jax.jit(ppo.init)(jax.random.key(0)))
    assert metrics["num_episodes"] == 1000 and np.isfinite(metrics["loss"])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.policy))
    print(limited.name, num_different(state.actors.env_state), num_different(direct))
    np.testing.assert_allclose(num_different(state.actors.env_state), num_different(direct), rtol=0.1)
    assert num_different(direct) > 200  # 2048 has few boards to begin with


def num_different(states):
    """The number of states [N, ...] that differ in more than their random keys."""
    leaves = [x for x in jax.tree.leaves(states) if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)]
    return len(np.unique(np.concatenate([np.asarray(x, float).reshape(len(x), -1) for x in leaves], 1), axis=0))


@pytest.mark.slow
def test_a_suite_draws_from_the_key_of_the_step_and_writes_into_no_state(limited):
    def step(key, state_key):
        state, obs = limited.reset(jax.random.key(0), limited.params)
        state = suite.with_keys(state, state_key)
        before = jax.tree.leaves(state)
        result = limited.step(key, state, quiet_action(limited, obs), limited.params)
        after = jax.tree.leaves(state)
        assert len(before) == len(after) and all(a is b for a, b in zip(before, after))
        return result.obs, result.reward, jax.tree.map(numbers, result.state)

    keys = jax.random.split(jax.random.key(3), 3)
    one, two = (jax.jit(step)(keys[0], key) for key in keys[1:])
    jax.tree.map(np.testing.assert_array_equal, one, two)


def numbers(x):
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def needs(name):
    return pytest.mark.skipif(not suite.is_installed(name), reason="not installed")


@pytest.mark.slow
@needs("jumanji")
def test_snake_terminates_at_a_wall_and_its_mask_says_so():
    env = pjp.make_env("jumanji/Snake-v1")
    state, obs = env.reset(jax.random.key(0), ())
    for _ in range(12):
        allowed = obs["action_mask"][0]
        result = env.step(jax.random.key(0), state, jnp.int32(0), ())
        state, obs = result.state, result.obs
        assert bool(result.terminated) != bool(allowed) and not result.truncated
        if result.terminated:
            return
    pytest.fail("the snake never met a wall")


@pytest.mark.slow
@needs("craftax")
def test_craftax_terminates_at_death_before_its_time():
    env = pjp.make_env("craftax/Craftax-Classic-Symbolic-v1", static={"map_size": (16, 16)})
    state, _ = env.reset(jax.random.key(0), env.params)
    result = jax.jit(env.step)(jax.random.key(0), state.replace(player_health=jnp.int32(0)), 0, env.params)
    assert result.terminated and not result.truncated and result.episode_metrics["achievements"] == 0


@pytest.mark.slow
@needs("brax")
def test_the_physics_of_brax_is_a_parameter():
    env = pjp.make_env("brax/inverted_pendulum", traced=("gravity",))
    step = jax.jit(env.step)
    state, obs = env.reset(jax.random.key(0), env.params)
    moon = {"gravity": env.params["gravity"] / 6}
    here, there = (step(jax.random.key(0), state, jnp.zeros(1), params).obs - obs for params in (env.params, moon))
    assert abs(here[3]) > 3 * abs(there[3]) > 0  # the angular velocity that the fall has gained


@pytest.mark.slow
@needs("xland")
def test_an_xland_without_goal_is_refused():
    with pytest.raises(ValueError, match="has no goal, since its ruleset is empty: give one"):
        pjp.make_env("xland/XLand-MiniGrid-R1-9x9")


@pytest.mark.slow
@needs("playground")
def test_presets_of_playground_are_its_own():
    from mujoco_playground import dm_control_suite, locomotion, manipulation
    from mujoco_playground.config import dm_control_suite_params, locomotion_params, manipulation_params

    for names, params in (
        (dm_control_suite.ALL_ENVS, dm_control_suite_params),
        (locomotion.ALL_ENVS, locomotion_params),
        (manipulation.ALL_ENVS, manipulation_params),
    ):
        for name in names:
            if f"playground/{name}" in TRIED:
                continue
            theirs = params.brax_ppo_config(name)
            config, ours = find_preset(f"playground/{name}")
            found = {
                "num_envs": config.num_envs,
                "num_minibatches": config.num_minibatches,
                "num_updates_per_batch": config.num_epochs,
                "learning_rate": ours.learning_rate,
                "discounting": ours.discount,
                "entropy_cost": ours.entropy_coefficient,
                "clipping_epsilon": ours.clip,
            }
            assert found == {field: theirs.get(field, 0.3) for field in found}, name
            transitions = theirs.batch_size * theirs.num_minibatches * theirs.unroll_length
            assert config.steps_per_update == transitions, name
            assert abs(config.total_steps - theirs.num_timesteps) < transitions, name


@pytest.mark.slow
@needs("playground")
def test_playground_refuses_warp_and_names_what_it_would_download():
    with pytest.raises(ValueError, match="impl='warp' is not supported, whose buffers"):
        pjp.make_env("playground/CheetahRun", impl="warp")
    with pytest.raises(ValueError, match="needs the models of MuJoCo Menagerie, 550 MB"):
        pjp.make_env("playground/Go1JoystickFlatTerrain")


@pytest.mark.slow
@needs("jumanji")
def test_every_environment_of_jumanji_begins_under_a_trace_as_its_space_says():
    tried = [name for name in env_names("jumanji") if name.startswith("jumanji/") and "Sokoban" not in name]
    with jax.numpy_rank_promotion("allow"):
        for name in tried:
            env = pjp.make_env(name)
            obs = jax.eval_shape(env.reset, jax.random.key(0), env.params)[1]
            assert jax.tree.map(np.shape, obs) == jax.tree.map(lambda space: space.shape, env.observation_space), name
    assert len(tried) >= 20


@pytest.mark.slow
@needs("jumanji")
def test_sokoban_names_what_it_would_download():
    with pytest.raises(ValueError, match="downloads its levels: allow it in Python by generator="):
        pjp.make_env("jumanji/Sokoban-v0")
