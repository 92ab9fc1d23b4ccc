"""Notebooks run from top to bottom, and what is committed of them is readable: outputs of one run, small, without errors."""
import re
import runpy
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError

from mmx.compilers import schedule

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
BADGE = "https://colab.research.google.com/github/YOUR_ACCOUNT/mmx/blob/main/notebooks/"
SHORTER = {     # of what takes minutes
    "train.steps=200": "train.steps=20", "limit=65_536": "limit=4_096", "steps=160": "steps=16",
    "range(10, 17)": "range(10, 12)", "range(10, 14)": "range(10, 12)",
    "train.length=1024": "train.length=256", "train.loss_chunk=8192": "train.loss_chunk=2048"}
LARGEST = 150_000       # bytes of a picture
run = runpy.run_path(str(ROOT / "notebooks" / "run.py"))["run"]
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A copy, in which runs may leave checkpoints."""
    place = tmp_path_factory.mktemp("notebooks")
    for name in ("notebooks", "experiments"):
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("run*"))
    for path in (place / "notebooks").glob("*.ipynb"):
        text = path.read_text()
        for long, short in SHORTER.items():
            text = text.replace(long, short)
        path.write_text(text)
    texts = [path.read_text() for path in NOTEBOOKS]
    assert all(any(long in text for text in texts) for long in SHORTER)
    return place / "notebooks"


def code(book):
    return [cell for cell in book.cells if cell.cell_type == "code"]


@each
def test_runs(path, folder):
    if path.stem.startswith("06") and schedule.missing():
        pytest.skip(schedule.missing())
    if path.stem.startswith("03"):
        pytest.importorskip("torch")
    committed, found = nbformat.read(path, 4), run(folder / path.name)
    kinds = [[{output.output_type for output in cell.outputs} for cell in code(book)] for book in (committed, found)]
    assert kinds[0] == kinds[1], "make notebooks: a cell shows another kind of output than is committed"


def test_a_cell_that_raises_fails(tmp_path):
    cells = [nbformat.v4.new_code_cell(source) for source in ("1 + 1", "1 / 0")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "bad.ipynb")
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        run(tmp_path / "bad.ipynb")


@each
def test_committed(path):
    book = nbformat.read(path, 4)
    cells = code(book)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert "google.colab" in cells[0].source and not cells[0].outputs
    assert f"({BADGE}{path.name})" in book.cells[0].source
    outputs = [output for cell in cells for output in cell.outputs]
    assert outputs and not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    for output in outputs:
        data = output.get("data", {})
        assert 3 / 4 * len(data.pop("image/png", "")) < LARGEST
        assert not re.search(r"Warning|/(home|root|tmp|work)/", str(output)), output


def test_the_readme_lists_them():
    said = re.findall(r"\]\(notebooks/(\S+\.ipynb)\)", (ROOT / "README.md").read_text())
    assert said == [path.name for path in NOTEBOOKS]
