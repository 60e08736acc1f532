"""Settings that every test shares; must run before torch or triton is imported."""

import os

# Small tensors on two threads spend more time waiting than computing.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
