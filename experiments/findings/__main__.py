"""`python -m experiments.findings` draws the figures and writes the tables of docs/findings.md."""
from experiments.findings.page import main

main()
