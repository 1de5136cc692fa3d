"""The loop and what it stands on: views, steps, checkpoints, the memory plan."""
