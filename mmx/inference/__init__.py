"""Inference: the engine that generates, prefixes in files, and the comparison of two checkpoints' logits."""
