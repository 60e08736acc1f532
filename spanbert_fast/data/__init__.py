"""Text to packed batches. Knows no model."""
