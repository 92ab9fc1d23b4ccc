"""Starting runs: experiment files, runs of several processes, sweeps."""
