"""How a model is fitted: steps, checkpoints, reports."""
