"""Sweeps: plans a grid of runs, executes them with submitit, resumes them and prints their results in a table.

A cell of the grid is an experiment with the keys that made it. DIR/runs/NAME is the workdir of its run, which resumes from
its own checkpoints, and DIR/runs/NAME/row.json is its result. DIR/runs.jsonl contains the rows of all runs. Both files are
replaced atomically, so no kill can lose or duplicate a row. The process that trains a run holds a lock (flock) on NAME/lock,
so that a sweep that was killed and started again leaves the run to that process.

    grid         cells and their hashes
    rows         the row of a run, runs.jsonl, the table of results
    worker       trains one cell, in whichever process executes it
    executors    where jobs execute: this process, local processes, SLURM
    plan         the expected duration
    scheduler    runs all cells, with a live table
"""
from mmx.launch.sweep.executors import ExecutorOptions
from mmx.launch.sweep.grid import Cell, cells
from mmx.launch.sweep.rows import collect, results_table
from mmx.launch.sweep.scheduler import run
from mmx.launch.sweep.worker import DONE, attempt

__all__ = ["DONE", "Cell", "ExecutorOptions", "attempt", "cells", "collect", "results_table", "run"]
