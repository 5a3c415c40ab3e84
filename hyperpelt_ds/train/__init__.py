"""Training: the engine, the loop, checkpoints, figures and scores."""
