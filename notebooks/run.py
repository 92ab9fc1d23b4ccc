"""Runs notebooks and saves their outputs in them: `make notebooks`, or python notebooks/run.py FILE ..."""
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def run(path: Path) -> nbformat.NotebookNode:
    """Returns the notebook with the outputs of all its cells. Its own folder is the working directory.

    stderr is left out, because it contains progress bars.

    Raises:
      nbclient.exceptions.CellExecutionError: if a cell raises; contains the cell and its traceback.
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
