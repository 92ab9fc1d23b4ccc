"""What a model costs and what runs say: parameters, FLOPs, memory, scaling laws; figures that others published."""
