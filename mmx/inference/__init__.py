"""Inference: logits of whole sequences, generation, prefix files, and comparison of two checkpoints."""
