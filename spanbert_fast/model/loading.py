"""What is said and refused while weights are loaded."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from typing import NamedTuple

from spanbert_fast.config import HEADS

_HEAD_PREFIXES = {"mlm": "cls.predictions.", "sbo": "cls.span_boundary."}
_MAX_NAMES = 8


class LoadingReport(NamedTuple):
    """What a file of weights did not have, or had for nothing."""

    untrained_heads: list[str]
    """Heads, of "mlm" and "sbo", with at least one random tensor."""
    message: str
    """One warning for all of it; empty if the file held exactly the model."""


def refuse_unpickling(weights_only: object) -> None:
    """Raises ValueError unless `weights_only` is True: other pickles can run any code."""
    if weights_only is not True:
        raise ValueError(
            f"weights_only must be True, got {weights_only!r}: a pickle that holds more than "
            "tensors can run any code"
        )


def warn_of_pickle(checkpoint_files: Collection[str] | None) -> None:
    """Warns if weights come from pickles instead of safetensors."""
    pickles = [name for name in checkpoint_files or () if not name.endswith(".safetensors")]
    if pickles:
        warnings.warn(
            f"{pickles[0]} is a pickle, read with weights_only=True. `spanbert-fast convert` "
            "writes the same weights as safetensors; use_safetensors=True refuses pickles.",
            stacklevel=6,
        )


def describe_loading(
    source: str,
    missing: Collection[str],
    mismatched: Collection[str],
    unexpected: Collection[str],
) -> LoadingReport:
    """What follows from the names of the tensors in a file.

    Args:
        source: Folder or repository, for the messages.
        missing: Tensors of the model that the file lacks.
        mismatched: Tensors of another shape, which the user agreed to replace.
        unexpected: Tensors of the file that the model lacks.

    Raises:
        ValueError: The encoder is not complete.
    """
    prefixes = tuple(_HEAD_PREFIXES.values())
    if encoder := sorted(key for key in missing if not key.startswith(prefixes)):
        raise ValueError(
            f"{source} lacks {len(encoder)} tensors of the encoder, which must all be in the file: "
            f"{_listed(encoder)}"
        )
    random = {*missing, *mismatched}
    untrained = [
        head for head in HEADS if any(key.startswith(_HEAD_PREFIXES[head]) for key in random)
    ]
    parts = []
    if untrained:
        heads = " and ".join(head.upper() for head in untrained)
        parts.append(
            f"{source} has no complete {heads} head: its weights are random until trained. Such "
            "heads are listed in config.untrained_heads and give no logits without targets."
        )
    if unexpected:
        modules = sorted({key.rpartition(".")[0] or key for key in unexpected})
        parts.append(f"Ignored in {source}, for want of a place: {_listed(modules)}.")
    return LoadingReport(untrained, " ".join(parts))


def _listed(names: list[str]) -> str:
    more = len(names) - _MAX_NAMES
    return ", ".join(names[:_MAX_NAMES]) + (f" and {more} more" if more > 0 else "")
