"""What a machine offers, and whether a folder is what it should be."""
