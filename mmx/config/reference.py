"""docs/configuration.md: every config key with its type, default and meaning, from the comments in schema.py.

    python -m mmx.config.reference > docs/configuration.md
"""
import ast
import dataclasses
import re
from pathlib import Path

from mmx.config import schema

HEAD = """\
# Configuration

An experiment is a Python file with `get_config()`, which starts from `mmx.config.default()` and sets what it changes. The
command line can override any key, as in `--config.train.steps=200`. Unknown keys and wrong types are errors. A run saves its
config in `WORKDIR/config.json`. A run that resumes must have the same values, except for keys that only change its speed, its
length or its output.

This page is generated from the comments in `mmx/config/schema.py` by `python -m mmx.config.reference > docs/configuration.md`.
Letters such as D and H are the dimensions of `mmx/dims.py`.
"""


def comments() -> dict[tuple[str, str], str]:
    """The comment of each field by (class, field): the one on its line, or the lines above it."""
    source = Path(schema.__file__).read_text()
    lines, found = source.splitlines(), {}
    for node in ast.parse(source).body:
        for field in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(field, ast.AnnAssign):
                own = re.search(r"  # (.*)$", lines[field.lineno - 1])
                above, at = [], field.lineno - 2
                while (line := lines[at].strip()).startswith("# "):
                    above.insert(0, line[2:])
                    at -= 1
                found[node.name, field.target.id] = own[1] if own else " ".join(above)
    return found


def rows(section: type, prefix: str):
    """(key, type, unit, default as Markdown, meaning) of each key of a section; nested sections follow."""
    meanings, nested = comments(), []
    for field in dataclasses.fields(section):
        if dataclasses.is_dataclass(field.type):
            nested.append((field.type, f"{prefix}{field.name}."))
            continue
        unit, meaning = re.fullmatch(r"(?:\[(\w+)\] )?(.*)", meanings[section.__name__, field.name]).groups()
        default = "28 grids of 1 to 18 tiles" if field.name == "grids" else f"`{field.default!r}`"
        yield f"{prefix}{field.name}", field.type.__name__, unit or "-", default, meaning
    for part, name in nested:
        yield from rows(part, name)


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for name, section in schema.SECTIONS.items():
        summary = " ".join(section.__doc__.split())
        parts.append(f"\n## {name}\n\n{summary}\n\n| key | type | unit | default | meaning |\n|---|---|---|---|---|\n")
        parts += [f"| `{key}` | {kind} | {unit} | {default} | {meaning} |\n"
                  for key, kind, unit, default, meaning in rows(section, f"{name}.")]
    return "".join(parts)


if __name__ == "__main__":
    print(page(), end="")
