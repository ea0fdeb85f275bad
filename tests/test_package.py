"""The package as it is distributed."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with the wheel and the source distribution of what is committed."""
    folder = tmp_path_factory.mktemp("built")
    subprocess.run(["git", "clone", "--quiet", ROOT, folder / "clone"], check=True)
    python = make_environment(folder / "build-env")
    subprocess.run([python, "-m", "pip", "install", "-q", "build"], check=True)
    subprocess.run([python, "-m", "build", "--outdir", folder / "dist", folder / "clone"], check=True)
    return folder


def make_environment(folder):
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    return folder / "bin" / "python"


def test_wheel_and_source_hold_every_file_of_the_package_and_no_other(built):
    tracked = subprocess.run(["git", "ls-files"], cwd=built / "clone", capture_output=True, text=True, check=True)
    package = {name for name in tracked.stdout.splitlines() if name.startswith("purejaxppo/")}
    (wheel,) = (built / "dist").glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == package
    (source,) = (built / "dist").glob("*.tar.gz")
    names = {name.partition("/")[2] for name in tarfile.open(source).getnames()}
    assert set(tracked.stdout.splitlines()) - {".gitignore", ".ci/run"} <= names


def test_the_wheel_trains_in_an_empty_environment(built, tmp_path):
    python = make_environment(built / "env")
    (wheel,) = (built / "dist").glob("*.whl")
    subprocess.run([python, "-m", "pip", "install", "-q", wheel], check=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [python.with_name("purejaxppo"), "train", "CartPole-v1", "--out", "run"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "return, 128 fresh episodes" in done.stdout
    assert (tmp_path / "run" / "policy.npz").exists()
