"""Docstrings: their examples run, and functions with many arguments describe each."""

import doctest
import inspect

import jax
import jax.numpy as jnp
import pytest

import purejaxppo as pjp
from purejaxppo.ppo import act

SHOWN = [
    pjp.batched, pjp.evolving, pjp.fit, pjp.gae, pjp.grid, pjp.load, pjp.make_ppo, pjp.run_sweep, pjp.runs,
    pjp.with_step, act,
]  # fmt: skip


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """What the examples take as given."""
    folder = tmp_path_factory.mktemp("run")
    ppo = pjp.make_ppo("CartPole-v1", pjp.Config(num_updates=2))
    state = pjp.fit(ppo, ppo.init(jax.random.key(0)), folder=folder, progress=False).state
    return {"pjp": pjp, "jax": jax, "jnp": jnp, "gae": pjp.gae, "folder": folder, "obs": jnp.zeros(4)} | {
        "ppo": ppo, "state": state
    }  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("function", SHOWN, ids=lambda function: function.__name__)
def test_the_example_of_a_docstring_runs(function, names):
    text = inspect.getdoc(function)
    test = doctest.DocTestParser().get_doctest(text or "", dict(names), function.__name__, None, None)
    assert test.examples
    found = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE).run(test)
    assert found.failed == 0


FUNCTIONS = [function for name in pjp.__all__ if inspect.isfunction(function := getattr(pjp, name))]


@pytest.mark.parametrize(
    "function", [f for f in FUNCTIONS if len(inspect.signature(f).parameters) > 3], ids=lambda f: f.__name__
)
def test_a_function_with_many_arguments_describes_each(function):
    described = (inspect.getdoc(function) or "").partition("Args:")[2]
    missing = [name for name in inspect.signature(function).parameters if f"\n    {name}: " not in described]
    assert not missing
