"""Triton twins of the ops: same names, same signatures. The only room that knows Triton."""

from spanbert_fast.kernels.cache import use_named_directory

# Before any kernel: what is compiled first has to go there as well.
use_named_directory()
