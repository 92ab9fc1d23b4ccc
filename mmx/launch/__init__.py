"""What starts runs: experiment files, several processes, sweeps."""
