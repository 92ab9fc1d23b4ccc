"""The paper's claims against our rows: figures, and the table of docs/findings.md.

    python -m experiments.findings              # reads results/*.jsonl here; writes results/*.png and docs/findings.md

The rule of the verdicts is evidence.py's, the claims are claims.py's, the figures figures.py's.
"""
import argparse
import hashlib
from pathlib import Path

import matplotlib

from experiments.findings import claims, evidence, figures

BEGIN, END = "<!-- python -m experiments.findings -->\n", "<!-- end -->\n"
NAMES = [of.__name__ for part in claims.PARTS.values() for of in part]


def table() -> str:
    lines = []
    for title, part in claims.PARTS.items():
        lines += [f"## {title}\n", "| claim | our test | what came out | |", "|---|---|---|---|"]
        lines += [f"| {c.text} | {c.test} | {c.measured or 'not run'} | **{c.verdict}** |" for of in part for c in of()]
        lines += [f"\n![{of.__name__}](../experiments/results/{of.__name__}.png)"
                  for of in part if evidence.rows(of.__name__)] + [""]
    return "\n".join(lines)


def page(text: str) -> str:
    """The page with its table as the rows have it."""
    head, _, rest = text.partition(BEGIN)
    return head + BEGIN + table() + END + rest.partition(END)[2]


def stamp(name: str) -> str:
    """Of an experiment's rows and of figures.py; the figure has it, so that a test can tell what it is of."""
    path = evidence.ROOT / "experiments" / "results" / f"{name}.jsonl"
    return hashlib.sha256(path.read_bytes() + Path(figures.__file__).read_bytes()).hexdigest()


def main():
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    matplotlib.use("Agg")
    from matplotlib import pyplot

    for name in NAMES:
        if figure := getattr(figures, name)(pyplot):
            path = evidence.ROOT / "experiments" / "results" / f"{name}.png"
            figure.savefig(path, dpi=110, metadata={"Software": None, "Of": stamp(name)})
            pyplot.close(figure)
            print(f"figure: {path.relative_to(evidence.ROOT)}")
    path = evidence.ROOT / "docs" / "findings.md"
    path.write_text(page(path.read_text()))
    print(f"page: {path.relative_to(evidence.ROOT)}")
