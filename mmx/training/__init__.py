"""Training: the loop, its loss, optimizer, guards and metrics, and the loss on held-out text."""
