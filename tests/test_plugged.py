import sys

import pytest
import xarray

from purejaxppo.cli.main import main
from purejaxppo.cli.plugged import find, find_env, to_named
from purejaxppo.experiment.report.statistics import improvements, probability_of_improvement
from purejaxppo.experiment.runs.settings import read_settings

MODULE = """
from functools import partial
import flax.linen as nn
import purejaxppo as pjp

def surrogate(log_ratio, advantage, clip):
    return -(log_ratio * advantage).mean()

spo = partial(pjp.ppo_loss, surrogate=surrogate)

class Net(nn.Module):
    num_actions: int

    @nn.compact
    def __call__(self, obs):
        x = nn.relu(nn.Dense(4)(obs))
        return pjp.Categorical(nn.Dense(self.num_actions)(x)), nn.Dense(1)(x)[..., 0]

def net(env):
    return Net(env.action_space(env.params).n)

def short():
    return pjp.time_limit(pjp.make_env("CartPole-v1"), 9)._replace(name="short")

def halved(ppo, state):
    state, rollout = ppo.collect(state)
    return ppo.learn(state, rollout.replace(reward=rollout.reward / 2))

def broken(*args):
    raise RuntimeError("no luck")

def wrapped():
    return pjp.time_limit(3, 9)
"""
SIZES = "--num-envs 2 --num-steps 8 --num-minibatches 2 --num-updates 2 --widths 4".split()


@pytest.fixture
def module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_parts.py").write_text(MODULE)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("my_parts", None)


def refused(capsys, *arguments):
    assert main(list(arguments)) == 2
    return capsys.readouterr().err


def test_names_in_modules_are_found_in_this_directory(module):
    assert find_env("my_parts:short").name == "short"
    assert find("network", "my_parts:net", "CartPole-v1").num_actions == 2
    assert find("network", "my_parts:net", "Acrobot-v1").num_actions == 3
    assert to_named("loss", "default").value is None and to_named("env", "my_parts:short").value.name == "short"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("CartPole-v1 --loss spo", "--loss=spo must be module:name, such as my_module:my_loss"),
        ("CartPole-v1 --loss no_module:spo", "--loss=no_module:spo needs the module no_module"),
        ("CartPole-v1 --loss my_parts:sp0", "--loss=my_parts:sp0: there is no sp0 in my_parts (did you mean spo?)"),
        ("CartPole-v1 --network my_parts:broken", "--network=my_parts:broken failed as a function of the environment"),
        ("my_parts:broken", "RuntimeError: no luck (.*my_parts.py, line 30)"),
        ("my_parts:wrapped", "must be an Env.*my_parts.py, line 33)"),
        ("my_parts:", "must be module:name"),
    ],
)
def test_what_cannot_be_plugged_in_is_refused_in_one_sentence(module, capsys, arguments, message):
    error = refused(capsys, "train", *arguments.split(), *SIZES)
    assert error.count("\n") == 1
    for part in message.split(".*"):
        assert part in error


def test_every_value_of_a_field_is_compared_with_the_first_over_all_others():
    values = [[[1.0, 2.0], [5.0, 6.0]], [[3.0, 4.0], [5.0, 6.0]]]
    scores = xarray.DataArray(values, {"loss": ["ppo", "spo"]}, dims=("loss", "clip", "seed"))
    found = improvements(scores, "loss", num_resamples=0)
    assert list(found) == ["spo > ppo"] and found["spo > ppo"]["value"] == (1.0 + 0.5) / 2
    alone = probability_of_improvement(scores[1, 0], scores[0, 0], num_resamples=0)
    assert improvements(scores[:, 0], "loss", num_resamples=0)["spo > ppo"]["value"] == alone["value"] == 1


@pytest.mark.full
def test_a_run_with_custom_parts_needs_them_again_and_files_import_nothing(module, capsys):
    parts = ["--network", "my_parts:net", "--loss", "my_parts:spo", "--step", "my_parts:halved"]
    assert main(["train", "my_parts:short", *SIZES, "--out", "run", *parts]) == 0
    settings = read_settings("run")
    assert settings.identity.keys() >= {"env", "network", "loss", "step"} and settings.env == "short"
    assert "started with network=my_parts:net (add --network my_parts:net)" in refused(capsys, "resume", "run")
    assert "started with env=my_parts:short (add --env my_parts:short)" in refused(capsys, "evaluate", "run")
    acting = ["--env", "my_parts:short", "--network", "my_parts:net"]
    assert main(["evaluate", "run", *acting, "--episodes", "2"]) == 0
    assert "short: 2 episodes of 1 agent" in capsys.readouterr().out
    other = [*acting, "--step", "my_parts:halved", "--loss", "purejaxppo:ppo_loss"]
    assert "accept the change with --allow-changed loss)" in refused(capsys, "resume", "run", *other)
    assert main(["resume", "run", *other, "--allow-changed", "loss", "--total-steps", "48"]) == 0
    assert read_settings("run").identity["loss"] == "purejaxppo.ppo_loss"


@pytest.mark.full
def test_two_losses_are_compared_by_one_sweep(module, capsys):
    arguments = ["CartPole-v1", *SIZES, "--grid", "loss=default,my_parts:spo", "--num-seeds", "2", "--out", "sweep"]
    assert main(["sweep", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "P(my_parts:spo > default) = " in printed and "learning_curves.png" in printed
    assert main(["evaluate", "sweep", "--episodes", "2"]) == 0
