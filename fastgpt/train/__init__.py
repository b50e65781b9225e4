"""Training on text: data, loop, checkpoint."""
