"""Draws the figures and writes the table of docs/findings.md, which compares the paper's claims with our rows.

    python -m experiments.findings

It reads experiments/results/*.jsonl, and writes experiments/results/*.png and docs/findings.md. The rules of the verdicts are
in evidence.py, the claims in claims.py, and the figures in figures.py.
"""
import argparse
import hashlib
from pathlib import Path

import matplotlib

from experiments.findings import claims, evidence, figures

BEGIN, END = "<!-- python -m experiments.findings -->\n", "<!-- end -->\n"
NAMES = [make_claims.__name__ for part in claims.PARTS.values() for make_claims in part]


def format_tables() -> str:
    lines = []
    for title, part in claims.PARTS.items():
        lines += [f"## {title}\n", "| claim | our test | result | verdict |", "|---|---|---|---|"]
        lines += [f"| {c.text} | {c.test} | {c.measured or 'not run'} | **{c.verdict}** |"
                  for make_claims in part for c in make_claims()]
        names = [make_claims.__name__ for make_claims in part]
        lines += [f"\n![{name}](../experiments/results/{name}.png)" for name in names if evidence.read_rows(name)] + [""]
    return "\n".join(lines)


def update_page(text: str) -> str:
    """Returns the page's text with its tables replaced by those of the current rows."""
    head, _, rest = text.partition(BEGIN)
    return head + BEGIN + format_tables() + END + rest.partition(END)[2]


def fingerprint(name: str) -> str:
    """A hash of an experiment's rows and of figures.py. Each figure contains it, so that a test can find outdated figures."""
    path = evidence.ROOT / "experiments" / "results" / f"{name}.jsonl"
    return hashlib.sha256(path.read_bytes() + Path(figures.__file__).read_bytes()).hexdigest()


def main():
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    matplotlib.use("Agg")
    from matplotlib import pyplot

    for name in NAMES:
        if figure := getattr(figures, name)(pyplot):
            path = evidence.ROOT / "experiments" / "results" / f"{name}.png"
            figure.savefig(path, dpi=110, metadata={"Software": None, "Fingerprint": fingerprint(name)})
            pyplot.close(figure)
            print(f"figure: {path.relative_to(evidence.ROOT)}")
    path = evidence.ROOT / "docs" / "findings.md"
    path.write_text(update_page(path.read_text()))
    print(f"page: {path.relative_to(evidence.ROOT)}")
