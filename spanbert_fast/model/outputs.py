"""What `Model` is asked for, and what it returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor
from transformers.utils.generic import ModelOutput


@dataclass
class SpanBertOutput(ModelOutput):
    """What `Model` returns, in this order; what was not computed is None.

    Shapes: of `Model.forward`, with B rows and S columns; `Model.forward_packed` has [T] in place
    of [B, S].
    """

    loss: Tensor | None = None
    """Scalar, with a gradient."""
    logits: Tensor | None = None
    """[B, S, V] of the MLM head, zero in the padding."""
    hidden_states: tuple[Tensor, ...] | None = None
    """The embedding and the output of each layer, [B, S, D] each."""
    attentions: tuple[Tensor, ...] | None = None
    """Attention probabilities of each layer, [B, H, S, S] each."""
    mlm_loss: Tensor | None = None
    """Detached mean over the MLM labels of this batch."""
    sbo_loss: Tensor | None = None
    """Detached mean over the SBO targets of this batch."""
    sbo_logits: Tensor | None = None
    """[N, V] of the SBO head, one row per target, in the order of the batch."""

    def __getitem__(self, key: Any) -> Any:
        """The output of this name, or at this place among those that were computed.

        Raises:
            KeyError: It was not computed.
        """
        if isinstance(key, str) and key not in self.keys():
            raise KeyError(_absence(key))
        return super().__getitem__(key)  # type: ignore[no-untyped-call]

    def __setitem__(self, key: Any, value: Any) -> None:
        """Sets an output.

        Raises:
            KeyError: A pipeline adds its inputs to an output that has no logits for it. It would
                look for them in a copy, which cannot tell why they are not there.
        """
        if key == "input_ids" and self.logits is None:
            raise KeyError(_absence("logits"))
        super().__setitem__(key, value)  # type: ignore[no-untyped-call]


def _absence(name: str) -> str:
    return (
        f"{name} was not computed: losses need labels, and a head listed in "
        "config.untrained_heads gives no logits without targets, until it is trained"
    )


class Request(NamedTuple):
    """What is wanted of a packed batch, besides the batch."""

    learns: bool = True
    has_sbo_targets: bool = True
    """False: the SBO rows of the batch ask for predictions, their targets are not known."""
    num_items: int | Tensor | None = None
    num_sbo_items: int | Tensor | None = None
    dropout_seed: Tensor | None = None
    return_logits: bool | None = None
    output_hidden_states: bool | None = None
    output_attentions: bool | None = None
