import cmath
import copy
import dataclasses
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import warnings
from collections import deque
from dataclasses import replace
from fractions import Fraction
from functools import partial
from operator import itemgetter
from pathlib import Path

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import purejaxppo as pjp
from purejaxppo.experiment.identity import identify, identify_ppo
from purejaxppo.experiment.runs.journal import open_journal
from purejaxppo.experiment.runs.saved import load_run
from purejaxppo.experiment.sweeps.plan import Plan
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
    for load in (pjp.load, pjp.load_agents):
        with pytest.raises(ValueError, match=r"network=Network .*give the PPO that was trained as ppo=; load accepts"):
            load(tmp_path)
    with pytest.raises(ValueError, match="network=Network"):
        pjp.load(tmp_path, pjp.make_ppo("CartPole-v1", SMALL))
    assert pjp.load(tmp_path, ppo).metrics.sizes["updates"] == 1
    assert pjp.load(tmp_path, allow_changed=["network"]).metrics.sizes["updates"] == 1


@pytest.mark.parametrize(
    "many, words", [(False, "batched, but .* one run .give the"), (True, "of one run, but .* 2 runs")]
)
def test_a_run_is_loaded_by_a_ppo_of_as_many_runs(many, words, tmp_path, key):
    one = pjp.make_ppo("CartPole-v1", SMALL)
    ppos = [one, pjp.batched(one)]
    save_untrained(ppos[many], pjp.first_state(ppos[many], jax.random.split(key) if many else key), tmp_path)
    with pytest.raises(ValueError, match=f"ppo is {words}"):
        pjp.load(tmp_path, ppos[not many])
    if not many:
        with pytest.raises(ValueError, match=f"ppo is {words}"):
            pjp.load_agents(tmp_path, ppos[1])


@pytest.mark.parametrize("old", [False, True])
def test_a_sweep_is_not_continued_with_another_loss(old, tmp_path):
    sweep = pjp.Sweep("CartPole-v1", pjp.grid(clip=[0.1, 0.2], widths=[(4,), (5,)]), config=SMALL)
    names = {group: group.old_name() if old else sweep.name_group(group) for group in sweep.groups()}
    open_slices(tmp_path, sweep, {name: identify_ppo(make_group(group)) for group, name in names.items()})
    mine = partial(pjp.make_ppo, loss=partial(pjp.ppo_loss, surrogate=spo))
    with pytest.raises(ValueError, match="another loss, purejaxppo.ppo_loss instead of ppo_loss"):
        pjp.plan_sweep(sweep, tmp_path, make=mine)
    names = {sweep.name_group(group): identify_ppo(make_group(group, mine)) for group in sweep.groups()}
    before = (tmp_path / "sweep.json").read_bytes()
    with pytest.raises(ValueError, match="another loss"):  # planned without the folder, or before another call began
        pjp.run_sweep(Plan(sweep, [], mine, names), tmp_path)
    assert (tmp_path / "sweep.json").read_bytes() == before


@pytest.mark.parametrize("runs", [None, 2])
def test_a_run_with_schedules_is_loaded(runs, tmp_path, key):
    """settings.json keeps only the numbers of a schedule, and a policy needs none."""
    ppo = pjp.make_ppo("CartPole-v1", SMALL)
    ppo, key = (ppo, key) if runs is None else (pjp.batched(ppo), jax.random.split(key, runs))
    schedules = pjp.Hyperparams(
        learning_rate=pjp.linear(3e-4, 0.0), clip=pjp.schedule(optax.linear_schedule(0.2, 0.1, 10))
    )
    schedules = schedules.set({"extra.beta": pjp.linear(1.0, 0.0)})
    state = pjp.first_state(ppo, key, schedules)
    save_untrained(ppo, state, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        saved = load_run(tmp_path, ppo)
        assert load_run(tmp_path).settings.schedules == {"learning_rate", "clip", "extra.beta"}
    chex.assert_trees_all_equal(saved.policy, state.policy)
    with pytest.raises(ValueError, match="clip was a schedule, of which .*give hyperparams="):
        saved.state()


def test_the_names_of_groups_do_not_depend_on_fields_that_are_not_swept():
    table = pjp.grid(widths=[(4,), (5, 5)], loss={"spo": spo}, clip=[0.1, 0.2])
    sweeps = [pjp.Sweep("CartPole-v1", table, config=config) for config in (SMALL, replace(SMALL, num_updates=3))]
    sweeps.append(pjp.Sweep("CartPole-v1", table, config=replace(SMALL, activation="relu")))
    names = [[sweep.name_group(group) for group in sweep.groups()] for sweep in sweeps]
    assert names == [["env=CartPole-v1 loss=spo widths=4", "env=CartPole-v1 loss=spo widths=5,5"]] * 3
    group = pjp.Sweep("CartPole-v1", pjp.grid(clip=[0.1]), config=pjp.Config(widths=(4,))).groups()[0]
    assert group.old_name() == "CartPole-v1  4b2161b563a7"  # as written by the version before


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


HIDDEN = """
import collections, fractions, functools, operator, pathlib
import jax
def double(self, x, factor=2):
    return x * factor
class Private:
    _coef = 0.5
class Jitted:
    __call__ = jax.jit(lambda self, x: x * 0.5)
class Partial:
    __call__ = functools.partialmethod(double, factor=0.5)
class Cached:
    @functools.cached_property
    def _coef(self):
        return 0.5
class Slots:
    __slots__ = ("coef", "_other")
    def __init__(self, coef=0.5):
        self.coef = coef
class Coef(float):
    pass
class Table(dict):
    coef = 0.5
class Pair(collections.namedtuple("Pair", "x")):
    def double(self):
        return self.x * 0.5
def attribute(x):
    return x * attribute.coef
attribute.coef = 0.5
values = {
    "private": Private(), "jitted": Jitted(), "partialmethod": Partial(), "cached": Cached(), "slots": Slots(),
    "float": Coef(0.5), "dict": Table(), "tuple": Pair(1), "attribute": attribute,
}
"""


def test_whatever_a_class_and_its_instances_hold_changes_their_identity(tmp_path):
    found, same, changed = (
        module(tmp_path, source).values for source in (HIDDEN, HIDDEN, HIDDEN.replace("0.5", "0.25"))
    )
    assert {name: identify(x) for name, x in found.items()} == {name: identify(x) for name, x in same.items()}
    assert [name for name in found if identify(found[name]) == identify(changed[name])] == []
    before = identify(found["cached"])
    assert found["cached"]._coef == 0.5 and identify(found["cached"]) == before


@pytest.mark.parametrize(
    "first, second",
    [
        (range(3), range(4)), (slice(3), slice(4)), (deque([1]), deque([2])), (Fraction(1, 2), Fraction(1, 3)),
        (Path("a"), Path("b")), (itemgetter(1), itemgetter(2)), (math.sin, math.cos), (math.sin, cmath.sin),
        (np.add, np.subtract), (re.compile("a"), re.compile("b")), (jnp.arange(2), jnp.arange(3)),
    ],
)  # fmt: skip
def test_values_of_libraries_count_by_what_they_hold(first, second):
    assert identify(first) == identify(copy.copy(first)) != identify(second)


def test_defaults_of_a_dataclass_with_slots_count():
    def make(coef):
        return dataclasses.make_dataclass("Loss", [("coef", float, coef)], slots=True)

    assert identify(make(0.5)()) == identify(make(0.5)()) != identify(make(0.25)())


MODULES = {
    "pkg/__init__.py": "", "pkg/sub/__init__.py": "COEF = 0.5\ndef helper(x):\n    return x * 0.5\n",
    "pkg/inner.py": "def helper(x):\n    return x * 0.5\n",
}  # fmt: skip
READERS = {
    "attribute": "import pkg.sub\ndef loss(x):\n    return x * pkg.sub.COEF",
    "function": "import pkg.sub\ndef loss(x):\n    return pkg.sub.helper(x)",
    "import": "def loss(x):\n    from pkg.inner import helper\n    return helper(x)",
    "import of a package": "def loss(x):\n    import pkg.sub\n    return x * pkg.sub.COEF",
    "cell": "import pkg.sub\ndef make(m):\n    return lambda x: x * m.sub.COEF\nloss = make(pkg)",
}


@pytest.mark.parametrize("reader", READERS)
def test_modules_count_at_any_depth_and_where_they_are_imported_inside(reader, tmp_path, monkeypatch):
    identities = []
    for coef in ("0.5", "0.5", "0.25"):
        folder = tmp_path / str(len(identities))
        for path, source in MODULES.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(source.replace("0.5", coef))
        with monkeypatch.context() as patch:
            patch.syspath_prepend(folder)
            identities.append(identify(module(folder, READERS[reader]).loss))
        for name in [name for name in sys.modules if name.partition(".")[0] == "pkg"]:
            del sys.modules[name]
    assert identities[0] == identities[1] != identities[2]


def test_a_global_that_is_called_like_an_attribute_does_not_count(tmp_path):
    found = module(tmp_path, "def loss(state):\n    return state.policy")
    before = identify(found.loss)
    vars(found)["policy"] = 1
    assert identify(found.loss) == before


def test_an_import_of_a_library_inside_a_function_is_not_made(tmp_path):
    loss = module(tmp_path, "def loss(x):\n    import antigravity, missing_library\n    return x").loss
    assert identify(loss) and "antigravity" not in sys.modules


EXECUTED = """
import dataclasses
class Loss:
    def __call__(self, x):
        return x * 0.5 if x in {"a", "b", "c", "d"} else x in ({"e", "f", "g"},)
@dataclasses.dataclass
class Data:
    coef: float = 1.0
    def __call__(self, x):
        return x * 0.5
    def __repr__(self):
        return "data"
"""


@pytest.mark.parametrize("name", ["Loss", "Data"])
@pytest.mark.parametrize("namespace", [{}, {"__name__": "__main__"}])
def test_classes_of_executed_text_count_with_their_methods(name, namespace):
    def executed(source):
        found = dict(namespace)
        exec(source, found)
        return found[name]

    assert identify(executed(EXECUTED)) == identify(executed(EXECUTED))
    assert identify(executed(EXECUTED)) != identify(executed(EXECUTED.replace("0.5", "0.25")))


def test_identities_are_the_same_in_every_process():
    program = HIDDEN + EXECUTED + "\n".join(
        [
            "def f(x):\n    return g\ndef g(x):\n    return f",
            "names = frozenset('abcdefgh')",
            "def chosen(x):\n    return x in {'a', 'b', 'c', 'd'} or (lambda y: y in {'e', 'f', 'g', 'h'})",
            "values |= {'executed': Loss, 'data': Data, 'set': {f, g, len, max}, 'names': names, 'chosen': chosen}",
            "from purejaxppo.experiment.identity import identify",
            "print({name: identify(x) for name, x in values.items()})",
        ]
    )  # fmt: skip
    found = [
        subprocess.run(
            [sys.executable, "-c", program], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in "12"
    ]
    assert found[0] == found[1]


def test_docstrings_of_classes_do_not_change_an_identity():
    def executed(documentation):
        found = {}
        exec(f"class A:\n    {documentation!r}\n    def f(self):\n        {documentation!r}\n        return 1", found)
        return identify(found["A"])

    assert executed("One.") == executed("Two.")


@pytest.mark.parametrize("given, words", [("loss", "must be a list of names"), (["envv"], "did you mean env?")])
def test_an_unknown_name_that_may_differ_is_refused(given, words, tmp_path):
    ppo = pjp.make_ppo("CartPole-v1", SMALL)
    save_untrained(ppo, pjp.first_state(ppo, jax.random.key(0)), tmp_path)
    with pytest.raises(ValueError, match=f"allow_changed=.*{re.escape(words)}"):
        pjp.load(tmp_path, allow_changed=given)


def test_a_field_that_is_not_compared_counts():
    @dataclasses.dataclass(frozen=True)
    class Goal:
        where: object = dataclasses.field(compare=False)

        def step(self):
            return self.where

    assert identify(Goal(1.0).step) != identify(Goal(2.0).step)
