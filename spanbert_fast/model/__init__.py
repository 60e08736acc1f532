"""Packed batches to hidden states and losses. Knows no data and no ranks."""
