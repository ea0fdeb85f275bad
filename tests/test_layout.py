"""The layout: who imports whom, and what importing costs."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import purejaxppo
from purejaxppo.envs import SUITES

ROOT = Path(purejaxppo.__file__).parent
CORE = [
    "text", "checks", "record", "dependence", "platforms", "config", "envs.base", "envs.roles", "envs.errors",
    "envs.costs", "envs.random_play", "envs.check", "envs.import_gymnax",
    "envs.without_reset", "envs.from_gymnax", "envs.memory_inputs", "envs.wrappers", "envs.suite", "envs.from_brax",
    "envs.from_craftax", "envs.from_jumanji", "envs.from_navix", "envs.from_pgx", "envs.from_playground",
    "envs.from_xland", "envs", "collectives", "normalize", "networks.distributions", "networks.orthogonal",
    "networks.layers", "networks.memories", "networks.network", "networks.actor_critic", "networks", "starts",
    "rollout", "advantages", "loss", "summary", "validate", "update", "evaluate", "ppo", "adaptive", "sharded",
    "table", "batched", "evolving",
]  # fmt: skip
# Of the host: a module imports from its own folder and from those before it.
FOLDERS = [
    "experiment", "experiment.report", "experiment.runs", "experiment.sweeps", "experiment.agents", "cli",
]  # fmt: skip


def name_of(path):
    return path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")


MODULES = {name_of(path): path for path in ROOT.rglob("*.py")}
HOST = [module for module in MODULES if module.startswith(("experiment", "cli"))]


def imports(module):
    """What a module of ours imports of ours, inside functions too."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("purejaxppo"):
            package = node.module.removeprefix("purejaxppo").removeprefix(".")
            for alias in node.names:
                inner = f"{package}.{alias.name}".removeprefix(".")
                yield inner if inner in MODULES else package
        if isinstance(node, ast.Import):
            yield from (a.name.removeprefix("purejaxppo.") for a in node.names if a.name.startswith("purejaxppo."))


def folder_of(module):
    """The folder of a module, or of a package the package itself."""
    return module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]


@pytest.mark.parametrize("index, module", list(enumerate(CORE)))
def test_the_core_imports_only_what_stands_before(index, module):
    assert set(imports(module)) <= set(CORE[:index])


def test_every_module_is_in_the_order():
    assert MODULES.keys() - {"__init__", "__main__"} == {*CORE, *HOST}
    assert {folder_of(module) for module in HOST} == set(FOLDERS)


@pytest.mark.parametrize("module", HOST)
def test_the_host_imports_only_from_folders_that_stand_before(module):
    allowed = FOLDERS[: FOLDERS.index(folder_of(module)) + 1]
    known = [name for name in imports(module) if name in HOST]
    assert {folder_of(name) for name in known} <= set(allowed)


def test_no_module_imports_itself_in_a_circle():
    graph = {module: set(imports(module)) & MODULES.keys() - {"__init__"} for module in MODULES}
    list(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.full
def test_importing_brings_no_suite_and_no_host_library():
    heavy = ["gymnax", "gymnasium", "matplotlib", "plotly", "xarray", "pandas", "tqdm", "tyro", *SUITES.values()]
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


def test_only_networks_know_flax_modules():
    words = "flax.linen", "flax.core", "import nnx"
    knowing = {module for module in CORE if any(word in MODULES[module].read_text() for word in words)}
    names = "orthogonal", "layers", "memories", "network", "actor_critic"
    assert knowing == {f"networks.{name}" for name in names}
