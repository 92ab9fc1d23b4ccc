"""The notebooks run from top to bottom, and their committed outputs come from one run, are small and contain no errors."""
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
SHORTER = {     # replacements that shorten runs of minutes
    "train.steps=200": "train.steps=20", "limit=65_536": "limit=4_096", "steps=160": "steps=16",
    "range(10, 17)": "range(10, 12)", "range(10, 14)": "range(10, 12)",
    "train.length=1024": "train.length=256", "train.loss_chunk=8192": "train.loss_chunk=2048"}
MAX_IMAGE_BYTES = 150_000
run = runpy.run_path(str(ROOT / "notebooks" / "run.py"))["run"]
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A copy of the notebooks, with shorter runs, in a folder that may be written to."""
    copy = tmp_path_factory.mktemp("notebooks")
    for name in ("notebooks", "experiments"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("run*"))
    for path in (copy / "notebooks").glob("*.ipynb"):
        text = path.read_text()
        for long, short in SHORTER.items():
            text = text.replace(long, short)
        path.write_text(text)
    texts = [path.read_text() for path in NOTEBOOKS]
    assert all(any(long in text for text in texts) for long in SHORTER)
    return copy / "notebooks"


def code_cells(book):
    return [cell for cell in book.cells if cell.cell_type == "code"]


def output_types(book):
    return [{output.output_type for output in cell.outputs} for cell in code_cells(book)]


@each_notebook
def test_notebook_runs(path, folder):
    if path.stem.startswith("06") and schedule.missing():
        pytest.skip(schedule.missing())
    if path.stem.startswith("03"):
        pytest.importorskip("torch")
    committed, executed = nbformat.read(path, 4), run(folder / path.name)
    assert output_types(committed) == output_types(executed), "a committed output has another type: run make notebooks"


def test_run_raises_if_a_cell_raises(tmp_path):
    cells = [nbformat.v4.new_code_cell(source) for source in ("1 + 1", "1 / 0")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "bad.ipynb")
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        run(tmp_path / "bad.ipynb")


@each_notebook
def test_committed_outputs_are_clean(path):
    book = nbformat.read(path, 4)
    cells = code_cells(book)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert "google.colab" in cells[0].source and not cells[0].outputs
    assert f"({BADGE}{path.name})" in book.cells[0].source
    outputs = [output for cell in cells for output in cell.outputs]
    assert outputs and not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    for output in outputs:
        data = output.get("data", {})
        assert 3 / 4 * len(data.pop("image/png", "")) < MAX_IMAGE_BYTES
        assert not re.search(r"Warning|/(home|root|tmp|work)/", str(output)), output


def test_readmes_list_all_notebooks():
    assert "](notebooks)" in (ROOT / "README.md").read_text()
    listed = re.findall(r"\]\((\S+\.ipynb)\)", (ROOT / "notebooks" / "README.md").read_text())
    assert listed == [path.name for path in NOTEBOOKS]
