"""The Python of README runs from top to bottom, in the order in which it stands there."""

import os
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import pytest

import purejaxppo as pjp

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.slow
def test_the_python_of_readme_runs(tmp_path, monkeypatch):
    matplotlib.use("agg")
    monkeypatch.chdir(tmp_path)
    ppo = pjp.batched(pjp.make_ppo("CartPole-v1", pjp.preset("CartPole-v1").config))
    # What README takes as given: a PPO with its state, a loss, an observation for each of eight agents.
    names = {"jnp": jnp, "ppo": ppo, "my_loss": my_loss, "obs": jnp.zeros((8, 4)), "env": "CartPole-v1"}
    names["state"] = jax.jit(ppo.init)(jax.random.split(jax.random.key(0), 8))
    for block in BLOCKS:
        folder = re.search(r'load\("(runs/CartPole[^"]*)"', block)
        if folder:
            shutil.copytree("runs/mine", folder[1])
        if "=..." not in block:  # which only names the arguments
            exec(compile(block, str(README), "exec"), names)
    assert names["actions"].shape == (8,)
    assert int(names["saved"].state().num_updates[0]) == ppo.config.num_updates
    assert os.path.exists("runs/losses/results.nc")


def my_loss(params, minibatch, hyperparams, *, network, config):
    return pjp.ppo_loss(params, minibatch, hyperparams, network=network, config=config)
