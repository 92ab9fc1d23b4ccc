"""`python -m experiments.findings` draws the figures and writes docs/findings.md."""
from experiments.findings.page import main

main()
