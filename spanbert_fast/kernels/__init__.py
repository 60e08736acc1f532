"""Triton twins of the ops: same names, same signatures. The only room that knows Triton."""
