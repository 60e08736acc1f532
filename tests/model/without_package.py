"""The beginning of a program that cannot import this package, and proves it."""

BLOCKER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "spanbert_fast":
            raise ImportError("blocked: " + name)

sys.meta_path.insert(0, Blocker())
try:
    import spanbert_fast
except ImportError:
    pass
else:
    raise SystemExit("the blocker does not block")
"""
