"""The half of the TensorFlow converter that imports TensorFlow: files to files, without torch.

It runs in a process of its own (see `isolated`), so TensorFlow never meets torch in one process.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

from spanbert_fast.convert.isolated import Refusal, limit_memory, refuse

# What a SpanBERT has a place for; everything else is reported by name.
_ROOMS = ("bert/", "cls/predictions/", "cls/span_boundary/")
_FOREIGN_ROOMS = ("bert/pooler/",)
_OPTIMIZER_SLOTS = ("adam_m", "adam_v", "Adam", "Adam_1", "Momentum", "LAMB", "LAMB_1")


def main(memory_bytes: int, action: str, checkpoint: str, exchange: str) -> int:
    """Read or write the variables of a checkpoint; the exit status of the process.

    Args:
        memory_bytes: what may be taken on top of the imports.
        action: "read" or "write".
        checkpoint: the path without `.index`.
        exchange: the safetensors file on this package's side, which is written or read.
    """
    from tensorflow import errors  # noqa: F401  (the import is what takes the memory)

    limit_memory(memory_bytes)
    try:
        if action == "read":
            json.dump(_read(checkpoint, exchange), sys.stdout)
        else:
            _write(checkpoint, exchange)
    except (Refusal, MemoryError) as error:
        return refuse(error, memory_bytes)
    return 0


def is_wanted(name: str) -> bool:
    """Whether a variable is a weight of the encoder or of one of our heads."""
    if not name.startswith(_ROOMS) or name.startswith(_FOREIGN_ROOMS):
        return False
    return name.rpartition("/")[2] not in _OPTIMIZER_SLOTS


def _read(checkpoint: str, exchange: str) -> list[str]:
    """Write the wanted variables to `exchange`; the names of the others."""
    import tensorflow as tf
    from safetensors.numpy import save_file

    try:
        reader: Any = tf.train.load_checkpoint(checkpoint)
        shapes, types = reader.get_variable_to_shape_map(), reader.get_variable_to_dtype_map()
        wanted = sorted(filter(is_wanted, shapes))
        if not wanted:
            shown = ", ".join(sorted(shapes)[:5]) or "nothing"
            raise Refusal(f"holds no variables of a BERT (bert/...), but {shown}")
        claimed = sum(math.prod(shapes[name]) * types[name].size for name in wanted)
        held = sum(path.stat().st_size for path in _data_files(checkpoint))
        if claimed > held:
            raise Refusal(f"claims {claimed:,} bytes of weights, its data files hold {held:,}")
        if numberless := [name for name in wanted if not types[name].is_floating]:
            raise Refusal(f"{numberless[0]} holds {types[numberless[0]].name}, must be floats")
        arrays = {name: _plain(reader.get_tensor(name)) for name in wanted}
    # The reader raises its own errors for some damage and whatever Python has for the rest.
    except (tf.errors.OpError, ValueError, RuntimeError, TypeError, UnicodeError) as error:
        if isinstance(error, Refusal):
            raise
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise Refusal(f"damaged or no TensorFlow checkpoint ({first})") from error
    save_file(arrays, exchange)
    return sorted(set(shapes) - set(wanted))


def _data_files(checkpoint: str) -> list[Path]:
    path = Path(checkpoint)
    return sorted(path.parent.glob(f"{path.name}.data-*"))


def _plain(array: Any) -> np.ndarray[Any, Any]:
    """An array of a type that every reader has; bfloat16 becomes float32, exactly."""
    kept = array.dtype in (np.float16, np.float32, np.float64)
    return np.ascontiguousarray(array if kept else array.astype(np.float32))


def _write(checkpoint: str, exchange: str) -> None:
    """Write what `exchange` holds as a checkpoint in one piece, as `tf.train.Saver` does."""
    import tensorflow as tf
    from safetensors.numpy import load_file

    arrays = load_file(exchange)
    tf.raw_ops.SaveV2(
        prefix=checkpoint,
        tensor_names=list(arrays),
        shape_and_slices=[""] * len(arrays),
        tensors=list(arrays.values()),
    )
