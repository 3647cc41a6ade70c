"""The training loop, and what a real run needs around it: optimizer, checkpoints, progress."""
