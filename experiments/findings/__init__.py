"""Figures and verdicts of committed rows: `python -m experiments.findings`."""
