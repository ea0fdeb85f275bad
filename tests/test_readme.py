"""What README and the guide say runs from top to bottom, in the order in which it stands there."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import pytest

import purejaxppo as pjp

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
GUIDE = (ROOT / "notebooks" / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README + GUIDE, re.DOTALL)
COMMANDS = re.findall(r"^    (.+)$", re.sub(r"```.*?```", "", README, flags=re.DOTALL), re.MULTILINE)
ELSEWHERE = "[cuda]", "&& pytest"  # needs a GPU; is what runs this test


def test_readme_is_short_and_its_links_lead_somewhere():
    assert README.count("\n") <= 150
    for text, folder in ((README, ROOT), (GUIDE, ROOT / "notebooks")):
        for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
            assert link.startswith("https://") or (folder / link).exists(), link


@pytest.mark.slow
def test_the_commands_of_readme_run_in_an_environment_made_as_it_says(tmp_path):
    subprocess.run(["git", "clone", "--quiet", ROOT, tmp_path / "clone"], check=True)
    unset = "PYTHONPATH", "XLA_FLAGS", "JAX_PLATFORMS", "VIRTUAL_ENV"
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    install, *commands = (
        command
        for command in sorted(COMMANDS, key=lambda command: "pip install" not in command)
        if not any(part in command for part in ELSEWHERE)
    )
    assert len(commands) >= 8
    for command in [install, *(f". .venv/bin/activate && {command}" for command in commands)]:
        done = subprocess.run(
            ["bash", "-ec", command], cwd=tmp_path / "clone", env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


@pytest.mark.slow
def test_the_python_of_readme_and_of_the_guide_runs(tmp_path, monkeypatch):
    matplotlib.use("agg")
    monkeypatch.chdir(tmp_path)
    ppo = pjp.batched(pjp.make_ppo("CartPole-v1", pjp.preset("CartPole-v1").config))
    # What they take as given: a PPO with its state, a loss, an observation for each of eight agents.
    names = {"jnp": jnp, "ppo": ppo, "my_loss": my_loss, "obs": jnp.zeros((8, 4)), "env": "CartPole-v1"}
    names["state"] = jax.jit(ppo.init)(jax.random.split(jax.random.key(0), 8))
    for block in BLOCKS:
        folder = re.search(r'load\("(runs/CartPole[^"]*)"', block)
        if folder:
            shutil.copytree("runs/mine", folder[1])
        if "=..." not in block:  # which only names the arguments
            exec(compile(block, "README.md", "exec"), names)
    assert names["actions"].shape == (8,)
    assert int(names["saved"].state().num_updates[0]) == ppo.config.num_updates
    assert os.path.exists("runs/losses/results.nc")


def my_loss(params, minibatch, hyperparams, *, network, config):
    return pjp.ppo_loss(params, minibatch, hyperparams, network=network, config=config)
