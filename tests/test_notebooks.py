"""The notebooks run from top to bottom, and are kept with their outputs."""

import json
from pathlib import Path

import numpy as np
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    folder = {"metadata": {"path": path.parent}}  # where Jupyter runs it
    nbclient.NotebookClient(nbformat.read(path, as_version=4), timeout=600, resources=folder).execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_short_and_kept_with_its_outputs(path):
    text = path.read_text()
    assert "site-packages" not in text and "/tmp/" not in text  # paths of the machine that ran it
    cells = json.loads(text)["cells"]
    assert len(cells) <= 12
    assert all(cell["outputs"] for cell in cells if cell["cell_type"] == "code")


def test_the_scores_in_a_notebook_are_those_that_are_kept():
    scores = json.loads((NOTEBOOKS[0].parents[1] / "tests" / "benchmarks" / "scores.json").read_text())
    cell = json.loads((NOTEBOOKS[0].parent / "6_many_seeds.ipynb").read_text())["cells"][-1]
    shown = {line.split()[0]: line.split()[1:] for line in "".join(cell["outputs"][0]["text"]).splitlines()[1:]}
    assert list(shown) == [name for name in scores if "/" not in name and " with" not in name]
    for name, (seeds, _, mean, worst) in shown.items():
        kept = scores[name]["sampled"]
        assert [seeds, mean, worst] == [str(len(kept)), f"{np.mean(kept):.4g}", f"{min(kept):.4g}"]
