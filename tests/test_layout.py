"""The layout: who imports whom, and what importing costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import purejaxppo

ROOT = Path(purejaxppo.__file__).parent
ORDER = [
    "checks", "config", "envs.base", "envs.check", "envs.from_gymnax", "envs", "distributions", "messages", "normalize",
    "orthogonal", "layers", "networks", "rollout", "values", "advantages", "loss", "update", "summary", "evaluate",
    "ppo", "adaptive", "sharding", "table", "sweep", "population",
]  # fmt: skip


def path_of(module):
    path = ROOT / (module.replace(".", "/") + ".py")
    return path if path.exists() else ROOT / module / "__init__.py"


def imports(path):
    """What a module of ours imports of ours, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("purejaxppo"):
            yield node.module.removeprefix("purejaxppo").removeprefix(".")
        if isinstance(node, ast.Import):
            yield from (a.name.removeprefix("purejaxppo.") for a in node.names if a.name.startswith("purejaxppo."))


@pytest.mark.parametrize("index, module", list(enumerate(ORDER)))
def test_the_core_imports_only_what_stands_before(index, module):
    assert set(imports(path_of(module))) <= set(ORDER[:index])


def test_every_module_of_the_core_is_in_the_order():
    found = {p.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for p in ROOT.rglob("*.py")}
    found = {name.removesuffix(".__init__") for name in found if not name.startswith("experiment")}
    assert found - {"__init__", "__main__"} == set(ORDER)


@pytest.mark.full
def test_importing_brings_no_suite_and_no_host_library():
    heavy = ["gymnax", "gymnasium", "matplotlib", "xarray", "pandas", "tqdm", "tyro"]
    program = f"import sys, purejaxppo; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.full
@pytest.mark.parametrize("before", ["", "import matplotlib"])
def test_environments_of_gymnax_bring_no_library_for_pictures_until_one_is_drawn(before):
    program = f"""if True:
        import sys
        {before}
        from purejaxppo import make_env
        make_env("Catch-bsuite")
        print([m for m in ("matplotlib.pyplot", "seaborn", "pandas") if m in sys.modules])
        import gymnax.environments.bsuite.catch as catch, gymnax.environments.misc.pong as pong
        drawn = catch.plt.figure(), pong.colors.ListedColormap(["red"])
        import matplotlib.pyplot
        print(isinstance(drawn[0], matplotlib.pyplot.Figure), isinstance(drawn[1], matplotlib.colors.Colormap))
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "True True"]


def test_only_networks_and_their_layers_and_weights_know_flax_modules():
    words = "flax.linen", "flax.core", "import nnx"
    knowing = {module for module in ORDER if any(word in path_of(module).read_text() for word in words)}
    assert knowing == {"orthogonal", "layers", "networks"}
