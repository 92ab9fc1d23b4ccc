"""The limits that keep the code readable: lengths of files and functions, parameters, and the README's size."""
import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(path for folder in ("mmx", "experiments", "benchmarks", "notebooks") for path in (ROOT / folder).rglob("*.py"))
MOST_FILE, MOST_FUNCTION, MOST_PARAMETERS = 450, 70, 8


def functions(path: Path):
    """(name, lines, parameters but for self) of each function in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            yield node.name, node.end_lineno - node.lineno + 1, len(set(names) - {"self", "cls"})


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path):
    lines = len(path.read_text().splitlines())
    assert lines <= MOST_FILE, f"{lines} lines, at most {MOST_FILE}: split the file by purpose"
    if "kernels" in path.parts:         # kernels may be long and flat
        return
    for name, length, parameters in functions(path):
        assert length <= MOST_FUNCTION, f"{name} has {length} lines, at most {MOST_FUNCTION}"
        assert parameters <= MOST_PARAMETERS, f"{name} has {parameters} parameters, at most {MOST_PARAMETERS}"


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150 and max(map(len, lines)) <= 120
    assert len(" ".join(lines).split()) <= 1500


def test_links_lead_to_files():
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "experiments").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.relative_to(ROOT)} links to {link}, which does not exist"


def test_the_index_lists_every_page():
    index = (ROOT / "docs" / "README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"({page.name})" in index, f"docs/README.md has no line for {page.name}"
