"""Trained agents out of a folder: played here and in Gymnasium, drawn, shown, by their commands."""

import json
from dataclasses import replace

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_command_line import TINY, run

from probes import SMALL
from purejaxppo import (
    ActionMask,
    Box,
    Categorical,
    Discrete,
    Env,
    Network,
    Step,
    Sweep,
    batched,
    fit,
    grid,
    make_ppo,
    preset,
    privileged,
    run_sweep,
    runs,
)  # fmt: skip
from purejaxppo.experiment.agents.evaluation import evaluate_agents, evaluate_in_gymnasium, mean_return
from purejaxppo.experiment.agents.load import Agents, load_agents
from purejaxppo.experiment.agents.render import record_episode, render

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of two agents that learned nothing much."""
    from purejaxppo.cli.main import main

    folder = tmp_path_factory.mktemp("runs") / "cartpole"
    assert main(["train", "CartPole-v1", *TINY, "--num-seeds", "2", "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def agents(folder):
    return load_agents(folder)


def alone(name, config=SMALL):
    """One agent that has not learned."""
    ppo = make_ppo(name, config)
    state = ppo.init(jax.random.key(0))
    first = lambda tree: jax.tree.map(lambda x: x[None], tree)
    return Agents(ppo, first(state.policy), first(state.env_params), ppo.env.name)


def test_a_preset_of_an_unknown_name_is_refused_with_the_nearest():
    assert preset("CartPole-v1").config.num_envs == 8
    with pytest.raises(ValueError, match="env='CartPole' is not a known environment .did you mean CartPole-v1"):
        preset("CartPole")


def test_each_agent_plays_as_its_own_ppo_evaluates(agents):
    played = evaluate_agents(agents, num_episodes=16, greedy=True, seed=5)
    assert played["episode_return"].dims == ("seed", "episode") and played["finished"].all()
    key = jax.random.fold_in(jax.random.key(5), 1)
    expected = agents.ppo.evaluate(key, agents.policy(1), num_episodes=16, greedy=True)
    np.testing.assert_array_equal(played["episode_return"][1], expected.episode_return)


def test_cartpole_is_the_same_task_in_gymnasium(agents):
    """The returns of the same policies, some 20 steps, agree within what 300 episodes of each can tell."""
    ours = evaluate_agents(agents, num_episodes=300, greedy=True)["episode_return"]
    theirs = evaluate_in_gymnasium(agents, num_episodes=300, greedy=True)["episode_return"]
    error = np.sqrt(ours.var("episode") / 300 + theirs.var("episode") / 300)
    assert (abs(ours.mean("episode") - theirs.mean("episode")) < 4 * error).all()
    again = evaluate_in_gymnasium(agents, num_episodes=300, greedy=True)["episode_return"]
    np.testing.assert_array_equal(theirs, again)


def test_agents_begin_their_episodes_in_gymnasium_each_in_its_own_states():
    agent = alone("CartPole-v1")
    policies, env_params = jax.tree.map(lambda x: jnp.concatenate([x, x]), (agent.policies, agent.env_params))
    twins = Agents(agent.ppo, policies, env_params, agent.title)
    first, second = evaluate_in_gymnasium(twins, num_episodes=16, greedy=True)["episode_return"].values
    assert (first != second).any()


@pytest.mark.parametrize("name", ["Acrobot-v1", "Pendulum-v1", "MountainCar-v0", "MountainCarContinuous-v0"])
def test_classic_control_is_played_in_gymnasium_to_its_time_limit(name):
    played = evaluate_in_gymnasium(alone(name, preset(name).config), num_episodes=2)
    limit = {"Acrobot-v1": 500, "MountainCarContinuous-v0": 999}.get(name, 200)
    assert played["finished"].all() and (played["episode_length"] <= limit).all()


def test_gymnasium_is_refused_where_it_has_another_task(agents):
    with pytest.raises(ValueError, match="Gymnasium has no environment 'Catch-bsuite' \\(leave out --in"):
        evaluate_in_gymnasium(alone("Catch-bsuite"))
    with pytest.raises(ValueError, match="Gymnasium has no environment 'navix/Navix-Empty-5x5-v0'"):
        evaluate_in_gymnasium(agents, "navix/Navix-Empty-5x5-v0")
    with pytest.raises(ValueError, match="Gymnasium cannot make 'CartPole-v9'"):
        evaluate_in_gymnasium(agents, "CartPole-v9")
    with pytest.raises(ValueError, match="has the observations"):
        evaluate_in_gymnasium(agents, "Acrobot-v1")
    with pytest.raises(ValueError, match="has the actions Discrete"):
        evaluate_in_gymnasium(alone("MountainCarContinuous-v0"), "MountainCar-v0")


class Endless(gymnasium.Env):
    """Rewards the action, observes it plus 5; no episode ends."""

    def __init__(self):
        self.action_space = gymnasium.spaces.Discrete(2, start=1)
        self.observation_space = gymnasium.spaces.Discrete(3, start=5)

    def reset(self, *, seed=None, options=None):
        return 5, {}

    def step(self, action):
        return int(action) + 5, float(action), False, False, {}


def test_gymnasium_gets_actions_from_its_own_start_and_episodes_stop_after_max_steps():
    """A policy whose logits favour what it observes: from observation 0 it takes action 1 of 0 and 1, a 2 there."""

    def apply(params, memory, obs, first):
        logits = jnp.where(obs[..., None] == 0, jnp.array([0.0, 9.0]), jnp.array([9.0, 0.0]))
        return memory, Categorical(logits + params), jnp.zeros(obs.shape)

    gymnasium.register("Endless-v0", entry_point="test_agents:Endless", order_enforce=False, disable_env_checker=True)
    step = lambda key, state, action, params: Step(state, action + 1, action * 1.0, action > 2, action > 2)
    env = Env(lambda key, params: ((), jnp.int32(0)), step, (), Discrete(2), Discrete(3), "Endless-v0")
    ppo = make_ppo(env, SMALL, network=Network(lambda batch: (), lambda *_: jnp.zeros(()), apply))
    policies = jax.tree.map(lambda x: x[None], ppo.init(jax.random.key(0)).policy)
    played = evaluate_in_gymnasium(Agents(ppo, policies, (), "endless"), num_episodes=2, greedy=True, max_steps=3)
    np.testing.assert_array_equal(played["episode_return"], [[4, 4]])  # 2, then 1 from the observations 7 and 6
    np.testing.assert_array_equal(played["episode_length"], [[3, 3]])
    assert not played["finished"].any()


def test_gymnasium_shows_previous_actions_and_rewards():
    """A policy that takes action 1 unless it took it before, which paid 2: so 1, 0 and 1."""

    def apply(params, memory, obs, first):
        before = (obs["previous_action"][..., 1] == 1) & (obs["previous_reward"] == 2)
        logits = jnp.where(before[..., None], jnp.array([9.0, 0.0]), jnp.array([0.0, 9.0]))
        return memory, Categorical(logits + params), jnp.zeros(first.shape)

    gymnasium.register("Endless-v1", entry_point="test_agents:Endless", order_enforce=False, disable_env_checker=True)
    step = lambda key, state, action, params: Step(state, action + 1, action * 1.0, action > 2, action > 2)
    env = Env(lambda key, params: ((), jnp.int32(0)), step, (), Discrete(2), Discrete(3), "Endless-v1")
    network = Network(lambda batch: (), lambda *_: jnp.zeros(()), apply)
    ppo = make_ppo(env, replace(SMALL, memory_inputs=True), network=network)
    policies = jax.tree.map(lambda x: x[None], ppo.init(jax.random.key(0)).policy)
    played = evaluate_in_gymnasium(Agents(ppo, policies, (), "endless"), num_episodes=2, greedy=True, max_steps=3)
    np.testing.assert_array_equal(played["episode_return"], [[5, 5]])


class Masked(gymnasium.Env):
    """Allows one action, which changes in every step: it pays 1, another -100. Episodes have six steps."""

    def __init__(self):
        self.action_space = gymnasium.spaces.Discrete(3)
        self.observation_space = gymnasium.spaces.Dict(
            {"allowed": gymnasium.spaces.MultiBinary(3), "x": gymnasium.spaces.Box(-1, 1, (2,))}
        )

    def reset(self, *, seed=None, options=None):
        self.time = 0
        return self.observe(), {}

    def step(self, action):
        reward = 1.0 if action == self.time % 3 else -100.0
        self.time += 1
        return self.observe(), reward, self.time == 6, False, {}

    def observe(self):
        return {"allowed": np.eye(3, dtype=np.int8)[self.time % 3], "x": np.ones(2, np.float32)}


@pytest.mark.parametrize("greedy", [True, False])
def test_masks_of_gymnasium_are_respected_and_what_only_the_critic_sees_is_not_needed(greedy):
    spaces = {"allowed": ActionMask((3,)), "x": Box(-1, 1, (2,)), "clock": privileged(Box(shape=(1,)))}
    obs = {"allowed": jnp.ones(3, bool), "x": jnp.ones(2), "clock": jnp.zeros(1)}
    step = lambda key, state, action, params: Step(state, obs, action * 0.0, action > 2, action > 2)
    env = Env(lambda key, params: ((), obs), step, (), Discrete(3), spaces, "Masked-v0")
    gymnasium.register("Masked-v0", entry_point="test_agents:Masked", disable_env_checker=True)
    played = evaluate_in_gymnasium(alone(env), num_episodes=3, greedy=greedy)
    np.testing.assert_array_equal(played["episode_return"], np.full((1, 3), 6))


def test_the_interval_is_over_agents_or_over_the_episodes_of_one(agents):
    played = evaluate_agents(agents, num_episodes=8)
    means = played["episode_return"].mean("episode").values
    mean, low, high = mean_return(played)
    assert low < mean < high and mean == pytest.approx(means.mean())
    single = mean_return(played.isel(seed=[0]))
    assert single[0] == pytest.approx(means[0]) and np.isfinite(single).all()


def test_the_agents_of_a_sweep_are_those_of_its_best_setting(tmp_path):
    short = {"env.max_steps_in_episode": [4]}  # so that episodes end
    sweep = Sweep("Pendulum-v1", grid(**{"env.max_torque": [1.0, 3.0]}, **short), num_seeds=2, config=SMALL)
    result = run_sweep(sweep, tmp_path / "sweep", progress=False)
    agents = load_agents(tmp_path / "sweep")
    best = result.best()["env.max_torque"]
    assert agents.num == 2 and agents.title.startswith(f"Pendulum-v1, env.max_torque={best:g}")
    np.testing.assert_array_equal(agents.env_params.max_torque, [best, best])


def test_agents_play_under_the_environment_parameters_that_they_were_trained_with(tmp_path):
    ppo = batched(make_ppo("Pendulum-v1", SMALL))
    keys, hyperparams = runs(jax.random.key(0), num_seeds=2)
    env_params = ppo.env.params.replace(max_torque=np.array([1.0, 3.0], np.float32))
    fit(ppo, jax.jit(ppo.init)(keys, hyperparams, env_params), folder=tmp_path / "run", progress=False)
    found = load_agents(tmp_path / "run").env_params
    np.testing.assert_array_equal(found.max_torque, [1.0, 3.0])
    assert found.max_steps_in_episode.shape == (2,) and found.max_steps_in_episode.dtype == np.int32
    other = env_params.replace(max_torque=np.array([1.0, 4.0], np.float32))
    with pytest.raises(ValueError, match=r"env.max_torque=\[1.0, 3.0\] instead of \[1.0, 4.0\]"):
        fit(ppo, jax.jit(ppo.init)(keys, hyperparams, other), folder=tmp_path / "run")


def test_an_episode_keeps_the_states_of_any_environment(agents):
    episode = record_episode(agents.ppo, agents.policy(0), jax.random.key(0), max_steps=400)
    assert episode.finished and len(episode.rewards) == episode.rewards.sum() < 400
    np.testing.assert_array_equal(episode.states.x, episode.obs[:, 0])
    cut = record_episode(agents.ppo, agents.policy(0), jax.random.key(0), max_steps=3)
    assert not cut.finished and len(cut.rewards) == 3
    np.testing.assert_array_equal(cut.obs, episode.obs[:3])


def test_grids_are_drawn(tmp_path):
    from PIL import Image, ImageSequence

    agents = alone("Catch-bsuite")
    episode = record_episode(agents.ppo, agents.policy(0), jax.random.key(0))
    render("Catch-bsuite", episode, tmp_path / "catch.gif")
    assert len(list(ImageSequence.Iterator(Image.open(tmp_path / "catch.gif")))) > 1


def test_classic_control_is_drawn(agents, tmp_path):
    pytest.importorskip("pygame")
    from PIL import Image, ImageSequence

    episode = record_episode(agents.ppo, agents.policy(0), jax.random.key(0), max_steps=9)
    render("CartPole-v1", episode, tmp_path / "cartpole.gif")
    assert len(list(ImageSequence.Iterator(Image.open(tmp_path / "cartpole.gif")))) > 1  # equal ones are joined


def test_the_commands_evaluate_export_and_show(folder, tmp_path, capsys):
    status, printed, _ = run(capsys, "evaluate", str(folder), "--episodes", "4", "--in", "gymnasium")
    assert status == 0 and "in Gymnasium: 4 episodes of 2 agents" in printed and "95 % over agents" in printed
    status, printed, _ = run(capsys, "export", str(folder), "-o", str(tmp_path / "policy.npz"), "--agent", "1")
    assert status == 0 and "def act(obs):" in printed and (tmp_path / "policy.npz").exists()
    assert "holds agent 1 of" in printed and "takes the most probable actions" in printed and "--agent" not in printed
    status, printed, _ = run(capsys, "export", str(folder), "-o", str(tmp_path / "policy.npz"))
    assert status == 0 and "(--agent takes another of the 2;" in printed
    status, printed, _ = run(capsys, "show", str(folder))
    assert status == 0 and "6 of 6 updates" in printed and f"jax {jax.__version__}" in printed
    assert "precision    highest" in printed and "code" in printed


def test_resume_finds_nothing_to_do_extends_and_warns(folder, tmp_path, capsys):
    import shutil

    copy = shutil.copytree(folder, tmp_path / "copy")
    status, printed, _ = run(capsys, "resume", str(copy))
    assert status == 0 and "return, last " in printed and "compile" not in printed
    assert "complete before, nothing was left to train" in printed
    status, printed, warned = run(capsys, "resume", str(copy), "--total-steps", "512")
    assert status == 0 and "512 x 2 agents" in printed
    assert "purejaxppo: warning: the run in" in warned and "extended from num_updates=6 to 8" in warned
    settings = json.loads((copy / "settings.json").read_text())
    assert settings["num_updates_done"] == 8 and len(settings["sessions"]) == 2


REFUSALS = [
    (["resume", "{}/nothing"], "holds no run"),
    (["resume", "{}", "--total-steps", "64"], "--total-steps=64 must be at least the 384"),
    (["evaluate", "{}/nothing"], "holds no run"),
    (["evaluate", "{}", "--episodes", "0"], "episodes=0 must be"),
    (["export", "{}", "--agent", "2"], "--agent=2 must be from 0 to 1"),
    (["export", "{}", "-o", "policy.onnx"], "must end in .stablehlo or .npz"),
    (["export", "{}", "-o", "{}/no/policy.npz"], "cannot be written"),
    (["render", "{}", "--agent", "7"], "--agent=7 must be from 0 to 1"),
    (["render", "{}", "-o", "cartpole.png"], "--out=cartpole.png must end in .gif"),
    (["show", "{}/nothing"], "holds no run"),
]


@pytest.mark.parametrize("arguments, words", REFUSALS, ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_bad_input_is_one_sentence(folder, arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, printed, refused = run(capsys, *(argument.replace("{}", str(folder)) for argument in arguments))
    assert status == 2 and words in refused and refused.count("\n") == 1 and "Traceback" not in refused
    assert not printed and not list(tmp_path.iterdir())


def test_an_environment_of_ones_own_is_not_made_by_its_name(folder, tmp_path):
    path = tmp_path / "settings.json"
    settings = json.loads((folder / "settings.json").read_text()) | {"env": "mine"}
    settings["sessions"] = [session | {"identity": {}} for session in settings["sessions"]]
    path.write_text(json.dumps(settings))
    (tmp_path / "policy.npz").write_bytes((folder / "policy.npz").read_bytes())
    (tmp_path / "metrics.nc").write_bytes((folder / "metrics.nc").read_bytes())
    with pytest.raises(ValueError, match="'mine' is not a known environment"):
        load_agents(tmp_path)
    known = load_agents(folder)
    mine = known.ppo._replace(env=Env(*known.ppo.env)._replace(name="mine"))
    np.testing.assert_array_equal(
        jax.tree.leaves(load_agents(tmp_path, mine).policies)[0], jax.tree.leaves(known.policies)[0]
    )
