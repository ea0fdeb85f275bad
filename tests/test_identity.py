import importlib.util
import json
import sys
import warnings
from dataclasses import replace
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import purejaxppo as pjp
from purejaxppo.experiment.identity import identify, identify_ppo
from purejaxppo.experiment.runs.journal import open_journal
from purejaxppo.experiment.sweeps.result import SweepResult, load_sweep
from purejaxppo.experiment.sweeps.slices import open_slices
from purejaxppo.experiment.sweeps.sweep import make_group

SMALL = pjp.Config(num_envs=2, num_steps=4, num_updates=2, num_minibatches=2, widths=(4,))


def spo(log_ratio, advantage, clip):
    return -(log_ratio * advantage).mean()


def halved(ppo, state):
    state, rollout = ppo.collect(state)
    return ppo.learn(state, rollout.replace(reward=rollout.reward / 2))


def module(tmp_path, source, name="mine"):
    """The module with this source, imported."""
    path = tmp_path / f"{name}{len(list(tmp_path.iterdir()))}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    found = importlib.util.module_from_spec(spec)
    sys.modules[name] = found
    spec.loader.exec_module(found)
    return found


LOSS = '''
import jax.numpy as jnp
SCALE = 2.0
def helper(x):
    return x * SCALE
def loss(x, *, weight=0.5):
    """Says what it does."""
    return helper(x).mean() * weight  # a comment
'''


@pytest.mark.parametrize(
    "changed",
    [
        LOSS.replace('    """Says what it does."""\n', ""),
        LOSS.replace("Says what it does", "Says it in other words"),
        LOSS.replace("  # a comment", ""),
        LOSS.replace("def loss", "\n\n\ndef loss").replace(
            "helper(x).mean() * weight", "(helper(x).mean()\n    * weight)"
        ),
        LOSS + "\ndef another(x):\n    return x\n",
    ],
)
def test_docstrings_comments_and_layout_do_not_change_an_identity(tmp_path, changed):
    assert identify(module(tmp_path, LOSS).loss) == identify(module(tmp_path, changed).loss)


@pytest.mark.parametrize(
    "changed",
    [
        LOSS.replace(".mean()", ".sum()"),
        LOSS.replace("weight=0.5", "weight=0.25"),
        LOSS.replace("SCALE = 2.0", "SCALE = 3.0"),
        LOSS.replace("x * SCALE", "x + SCALE"),
        LOSS.replace("def loss", "def other_loss") + "\nloss = other_loss\n",
    ],
)
def test_code_defaults_names_and_what_a_function_reads_change_its_identity(tmp_path, changed):
    assert identify(module(tmp_path, LOSS).loss) != identify(module(tmp_path, changed).loss)


def test_bound_constants_count_wherever_they_are_bound():
    def make(weight):
        return lambda x: x * weight

    class Callable:
        def __init__(self, weight):
            self.weight = weight

        def __call__(self, x):
            return x * self.weight

        def method(self, x):
            return x * self.weight

    array = lambda n: partial(spo, clip=jnp.arange(n))
    for bind in (make, Callable, lambda w: Callable(w).method, lambda w: partial(spo, clip=w), array):
        assert identify(bind(1)) == identify(bind(1)) != identify(bind(2))
    assert identify(jax.jit(spo)) == identify(spo)
    first, second = (lambda x: x + 1), (lambda x: x + 2)  # in one line
    assert identify(first) != identify(second)


def test_without_source_bytecode_and_constants_count():
    def compiled(source):
        namespace = {}
        exec(compile(source, "<nowhere>", "exec"), namespace)
        return namespace["f"]

    plain = identify(compiled("def f(x):\n    'doc'\n    return x + 1"))
    assert plain == identify(compiled("def f(x):\n    'other'\n\n    return x + 1"))
    assert plain != identify(compiled("def f(x):\n    'doc'\n    return x + 2"))


def test_what_ships_with_the_package_and_its_libraries_counts_by_name():
    ppo = pjp.make_ppo("CartPole-v1", SMALL)
    assert identify_ppo(ppo) == {
        "env": "CartPole-v1", "network": "purejaxppo.make_network", "loss": "purejaxppo.ppo_loss",
        "optimizer": "purejaxppo.adam",
    }  # fmt: skip
    assert identify_ppo(pjp.batched(ppo)) == identify_ppo(ppo)
    assert identify(nn.relu).startswith("jax.") and identify(optax.sgd) == "optax.sgd"
    schedules = identify_ppo(
        ppo, pjp.Hyperparams(learning_rate=pjp.linear(1, 0), clip=pjp.schedule(optax.constant_schedule(1)))
    )
    assert schedules.keys() - identify_ppo(ppo).keys() == {"learning_rate", "clip"}


def test_every_part_of_a_ppo_counts():
    class Net(nn.Module):
        width: int

        @nn.compact
        def __call__(self, obs):
            x = nn.Dense(self.width)(obs)
            return pjp.Categorical(nn.Dense(2)(x)), nn.Dense(1)(x)[..., 0]

    env = pjp.make_env("CartPole-v1")
    plain = identify_ppo(pjp.make_ppo(env, SMALL))
    changed = {
        "env": pjp.make_ppo(pjp.time_limit(env, 9), SMALL),
        "network": pjp.make_ppo(env, SMALL, network=Net(4)),
        "loss": pjp.make_ppo(env, SMALL, loss=partial(pjp.ppo_loss, surrogate=spo)),
        "optimizer": pjp.make_ppo(env, SMALL, optimizer=lambda h: optax.sgd(h.learning_rate)),
        "step": pjp.batched(pjp.with_step(pjp.make_ppo(env, SMALL), halved)),
    }
    for name, ppo in changed.items():
        found = identify_ppo(ppo)
        assert {n for n in {**found, **plain} if found.get(n) != plain.get(n)} == {name}
    assert identify(Net(4)) == identify(Net(4)) != identify(Net(5))
    assert identify(pjp.from_linen(Net(4))) != identify(pjp.from_linen(Net(5)))
    step = lambda fraction: identify_ppo(pjp.evolving(pjp.make_ppo(env, SMALL), every=1, fraction=fraction))["step"]
    assert step(0.25) == step(0.25) != step(0.5)


def save_untrained(ppo, state, folder, **options):
    """The folder of a run after one update, without any training."""
    with open_journal(ppo, state, folder, **options) as journal:
        if not journal.num_updates:
            journal.add(journal.state, {"learning_rate": np.zeros(1, np.float32)})
        journal.save()
        journal.finish()


def test_a_run_is_not_continued_with_another_loss_unless_that_is_allowed(tmp_path, key):
    def make(**plugged):
        return pjp.make_ppo("CartPole-v1", SMALL, **plugged)

    state = pjp.first_state(make(), key)
    mine = partial(pjp.ppo_loss, surrogate=spo)
    save_untrained(make(), state, tmp_path)
    pattern = r"another loss, purejaxppo.ppo_loss instead of ppo_loss \w{12} .*allow_changed=\['loss'\]"
    with pytest.raises(ValueError, match=pattern):
        save_untrained(make(loss=mine), state, tmp_path)
    with pytest.raises(ValueError, match="another optimizer"):
        save_untrained(make(optimizer=lambda h: optax.sgd(h.learning_rate)), state, tmp_path)
    save_untrained(make(loss=mine), state, tmp_path, allow_changed=["loss"])
    sessions = json.loads((tmp_path / "settings.json").read_text())["sessions"]
    assert [session["identity"]["loss"].split()[0] for session in sessions] == ["purejaxppo.ppo_loss", "ppo_loss"]
    with pytest.warns(UserWarning, match="loss=ppo_loss"):
        pjp.load(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pjp.load(tmp_path, make(loss=mine))


def test_policies_are_not_loaded_into_another_network_or_environment(tmp_path, key):
    config = replace(SMALL, activation="relu")
    ppo = pjp.make_ppo("CartPole-v1", SMALL, network=pjp.make_ppo("CartPole-v1", config).network)
    save_untrained(ppo, pjp.first_state(ppo, key), tmp_path)
    with pytest.raises(ValueError, match="network=Network .* instead of purejaxppo.make_network .*allow_changed"):
        pjp.load(tmp_path)
    with pytest.raises(ValueError, match="network=Network"):
        pjp.load(tmp_path, pjp.make_ppo("CartPole-v1", SMALL))
    assert pjp.load(tmp_path, ppo).metrics.sizes["updates"] == 1
    assert pjp.load(tmp_path, allow_changed=["network"]).metrics.sizes["updates"] == 1


def test_a_sweep_is_not_continued_with_another_loss(tmp_path):
    sweep = pjp.Sweep("CartPole-v1", pjp.grid(clip=[0.1, 0.2]), config=SMALL)
    open_slices(tmp_path, sweep, {str(group): identify_ppo(make_group(group)) for group in sweep.groups()})
    mine = partial(pjp.make_ppo, loss=partial(pjp.ppo_loss, surrogate=spo))
    with pytest.raises(ValueError, match="another loss, purejaxppo.ppo_loss instead of ppo_loss"):
        pjp.plan_sweep(sweep, tmp_path, make=mine)


@pytest.mark.full
def test_losses_steps_and_environments_are_axes_of_one_sweep(tmp_path):
    env = pjp.time_limit(pjp.make_env("CartPole-v1"), 9)._replace(name="short")
    mine = partial(pjp.ppo_loss, surrogate=spo)
    values = {
        "env": {"long": "CartPole-v1", "short": env},
        "loss": {"ppo": pjp.ppo_loss, "spo": mine},
        "step": {"plain": None, "halved": halved},
    }
    sweep = pjp.Sweep("CartPole-v1", pjp.paired(**values), num_seeds=2, config=SMALL)
    result = pjp.run_sweep(sweep, tmp_path, progress=False)
    assert result.metrics["loss"].values.tolist() == ["ppo", "spo"] and "current_loss" in result.metrics

    ppo = pjp.with_step(pjp.make_ppo(env, SMALL, loss=mine), halved)
    state, metrics = jax.jit(ppo.train)(ppo.init(jax.random.fold_in(jax.random.key(0), 1), sweep.hyperparams))
    found = result.metrics.isel(setting=1, seed=1)
    np.testing.assert_allclose(found["entropy"], metrics["entropy"], rtol=1e-4)
    close = partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4)
    jax.tree.map(close, result.policy(seed=1, loss="spo").params, state.policy.params)

    with pytest.raises(ValueError, match="env='short' is only a name here .*values={'env': {'short'"):
        load_sweep(tmp_path).ppo(loss="spo")
    with pytest.warns(UserWarning, match="loss=ppo_loss .* instead of purejaxppo.ppo_loss"):
        load_sweep(tmp_path, values={"env": values["env"]}).ppo(loss="spo")
    with pytest.raises(ValueError, match="loss='spo' is only a name here"):
        pjp.plan_sweep(pjp.Sweep("CartPole-v1", pjp.grid(loss=["spo"]), config=SMALL))
    loaded = pjp.load(tmp_path, values=values)
    assert isinstance(loaded, SweepResult) and loaded.ppo(loss="spo").env is env
    assert pjp.plan_sweep(sweep, tmp_path).groups == []
    values["loss"]["spo"] = pjp.ppo_loss
    with pytest.raises(ValueError, match=r"another loss, ppo_loss \w+ instead of purejaxppo.ppo_loss"):
        pjp.plan_sweep(sweep := pjp.Sweep("CartPole-v1", pjp.paired(**values), 2, config=SMALL), tmp_path)
    assert pjp.plan_sweep(sweep, tmp_path, allow_changed=["loss"]).groups == []


def test_a_sweep_takes_a_custom_environment(tmp_path):
    env = pjp.time_limit(pjp.make_env("CartPole-v1"), 9)._replace(name="short")
    sweep = pjp.Sweep(env, pjp.grid(clip=[0.1]), config=SMALL)
    assert make_group(sweep.groups()[0]).env is env and str(sweep).startswith("short")
    with pytest.raises(ValueError, match="loss=<function .* has no name .give one: loss="):
        pjp.grid(loss=[lambda x: x])
    with pytest.raises(ValueError, match="two values called spo"):
        pjp.grid(loss=[spo, spo])


DERIVED = """
import types
import jax
constants = types.ModuleType("constants")
constants.scale = 2.0
@jax.custom_vjp
def loss(x):
    return x * constants.scale
def forward(x):
    return loss(x), x
def backward(x, cotangent):
    return (cotangent,)
loss.defvjp(forward, backward)
"""


@pytest.mark.parametrize(
    "changed", [DERIVED.replace("(cotangent,)", "(2 * cotangent,)"), DERIVED.replace("scale = 2.0", "scale = 3.0")]
)
def test_derivatives_and_attributes_of_modules_change_an_identity(tmp_path, changed):
    assert identify(module(tmp_path, DERIVED).loss) != identify(module(tmp_path, changed).loss)
