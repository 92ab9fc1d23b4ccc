"""Runs notebooks and writes what they show into them: `make notebooks`, or python notebooks/run.py FILE ..."""
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def run(path: Path) -> nbformat.NotebookNode:
    """The notebook with the outputs of a run of all its cells, in its folder; stderr, where progress bars are, is not kept.

    Raises nbclient's CellExecutionError, with the cell and its traceback, where one raises.
    """
    book = nbformat.read(path, 4)
    NotebookClient(book, timeout=600, kernel_name="python3", record_timing=False, coalesce_streams=True,
                   resources={"metadata": {"path": path.parent}}).execute()
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return book


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(name)
        nbformat.write(run(Path(name)), name)
