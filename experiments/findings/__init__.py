"""Turns the committed rows of the experiments into figures and verdicts: `python -m experiments.findings`."""
