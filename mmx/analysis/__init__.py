"""Costs of a model (parameters, FLOPs, memory), scaling laws of runs, and published figures to compare with."""
