"""Limits that keep the code readable: lengths of files and functions, numbers of parameters, and the size of the README."""
import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(path for folder in ("mmx", "experiments", "benchmarks", "notebooks") for path in (ROOT / folder).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS = 450, 70, 8


def functions(path: Path):
    """(name, number of lines, number of parameters without self) of each function in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            yield node.name, node.end_lineno - node.lineno + 1, len(set(names) - {"self", "cls"})


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path):
    lines = len(path.read_text().splitlines())
    assert lines <= MAX_FILE_LINES, f"{lines} lines, at most {MAX_FILE_LINES}: split the file by purpose"
    if "kernels" in path.parts:         # kernels may be long and flat
        return
    for name, length, parameters in functions(path):
        assert length <= MAX_FUNCTION_LINES, f"{name} has {length} lines, at most {MAX_FUNCTION_LINES}"
        assert parameters <= MAX_PARAMETERS, f"{name} has {parameters} parameters, at most {MAX_PARAMETERS}"


@pytest.mark.parametrize("path", TESTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_of_tests_are_short(path):
    lines = len(path.read_text().splitlines())
    assert lines <= MAX_FILE_LINES, f"{lines} lines, at most {MAX_FILE_LINES}: split the file by purpose"


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150 and max(map(len, lines)) <= 120
    assert len(" ".join(lines).split()) <= 1500


def test_citations_of_the_specification_name_its_folder():
    for path in [file for folder in ("mmx", "tests", "experiments", "benchmarks") for file in (ROOT / folder).rglob("*.py")]:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert not re.search(r"(?<!docs/)\bmodel\.md", line), f"{path}:{number}: write docs/model.md, with its folder"


def test_links_point_to_existing_files():
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "experiments").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.relative_to(ROOT)} links to {link}, which does not exist"


def test_the_index_of_docs_lists_every_page():
    index = (ROOT / "docs" / "README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"({page.name})" in index, f"docs/README.md has no line for {page.name}"
