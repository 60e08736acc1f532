"""How foreign checkpoints come in."""
