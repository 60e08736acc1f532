"""The model as one graph in plain operators, which `torch.export` and ONNX can take away.

`Model.forward` looks at values to refuse what is wrong, and a graph cannot. Inside, it runs the
same packed path: padding is taken out in front of the first layer and put back behind the last.

Shapes: B rows, S columns, T tokens that are not padding, R spans of a row, N tokens in all spans, D
hidden size, K slots of the SBO head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional

from spanbert_fast.batch import PackedBatch
from spanbert_fast.model.pretrained import Model
from spanbert_fast.model.targets import SpanTargets

OUTPUTS = ("last_hidden_state", "logits", "sbo_logits")
HEADS_OF_OUTPUTS = {"logits": "mlm", "sbo_logits": "sbo"}


class InferenceGraph(nn.Module):
    """Computes some of `OUTPUTS` from a padded batch."""

    def __init__(self, model: Model, outputs: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.outputs = tuple(outputs)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor,
        sbo_spans: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """The outputs, in their order: [B, S, D], [B, S, V], zero in the padding, or [N, V].

        Args:
            input_ids: int64 [B, S].
            attention_mask: int64 [B, S], zeros and ones.
            token_type_ids: int64 [B, S].
            sbo_spans: int64 [B, R, 2], columns left and right of each span, -1 = padding. A span
                beyond its row, next to padding, or of more than K tokens fails in an index.
        """
        shape = (input_ids.shape[0], input_ids.shape[1])
        is_kept = attention_mask != 0
        kept = is_kept.flatten().nonzero()[:, 0]
        spans = SpanTargets.empty(input_ids.device)
        if sbo_spans is not None:
            spans = _spans_of(sbo_spans, is_kept, kept)
        batch = _pack(input_ids, token_type_ids, is_kept, kept, spans)
        hidden = self.model.bert.encode_packed(batch).last_hidden_state
        found: dict[str, Tensor] = {}
        if "last_hidden_state" in self.outputs:
            found["last_hidden_state"] = _unpack(hidden, kept, shape)
        if "logits" in self.outputs:
            found["logits"] = _unpack(self.model.cls.mlm_logits(hidden), kept, shape)
        if "sbo_logits" in self.outputs:
            found["sbo_logits"] = self.model.cls.sbo_logits(hidden, batch)
        return tuple(found[name] for name in self.outputs)


def _pack(
    input_ids: Tensor, token_type_ids: Tensor, is_kept: Tensor, kept: Tensor, spans: SpanTargets
) -> PackedBatch:
    num_rows, length = input_ids.shape
    columns = torch.arange(length, device=kept.device).expand(num_rows, length)
    none = kept.new_zeros(0)
    ids, positions, types = (
        values.flatten().index_select(0, kept) for values in (input_ids, columns, token_type_ids)
    )
    return PackedBatch(
        input_ids=ids,
        position_ids=positions,
        token_type_ids=types,
        cu_seqlens=functional.pad(is_kept.sum(dim=1).cumsum(0), (1, 0)).int(),
        max_seqlen=length,
        sequence_ids=torch.arange(num_rows, device=kept.device),
        mlm_positions=none,
        mlm_labels=none,
        sbo_left=spans.left,
        sbo_right=spans.right,
        sbo_cu=spans.cu,
        sbo_targets=spans.targets,
    )


def _spans_of(spans: Tensor, is_kept: Tensor, kept: Tensor) -> SpanTargets:
    num_rows, length = is_kept.shape
    num_places, num_tokens = num_rows * length, kept.shape[0]
    counts = spans[..., 1] - spans[..., 0] - 1
    row, place = (counts > 0).nonzero().unbind(1)
    chosen = row * spans.shape[1] + place
    edges = spans.flatten(0, 1).index_select(0, chosen)
    counts = counts.flatten().index_select(0, chosen)
    # A graph cannot raise. What is wrong becomes an index past the end, which its runtime refuses.
    places = torch.where((edges >= 0) & (edges < length), row[:, None] * length + edges, num_places)
    row_of_place = torch.full_like(is_kept, num_tokens, dtype=torch.int64).flatten()
    row_of_place = row_of_place.index_copy(0, kept, torch.arange(num_tokens, device=kept.device))
    left, right = (row_of_place.index_select(0, edge) for edge in places.unbind(1))
    num_targets = cast(int, counts.sum().item())  # int() would ask for its value
    torch._check(num_targets >= 0)  # type: ignore[no-untyped-call]
    cu = functional.pad(counts.cumsum(0), (1, 0)).int()
    return SpanTargets(left, right, cu, kept.new_zeros(num_targets))


def _unpack(rows: Tensor, kept: Tensor, shape: tuple[int, int]) -> Tensor:
    grid = rows.new_zeros((shape[0] * shape[1], rows.shape[1]))
    return grid.index_copy(0, kept, rows).view(*shape, rows.shape[1])


def input_names(outputs: Sequence[str]) -> list[str]:
    """Names of the inputs of a graph with these outputs."""
    names = ["input_ids", "attention_mask", "token_type_ids"]
    return names + (["sbo_spans"] if "sbo_logits" in outputs else [])


@torch.no_grad()
def trace(model: Model, outputs: Sequence[str]) -> ExportedProgram:
    """The graph of some of `OUTPUTS`, for any number of rows, columns and spans.

    Args:
        model: Its training mode is left as it was; with the "sdpa" attention.
        outputs: Names and order of what the graph returns.
    """
    # Three rows of four columns, one padded; no two sizes are equal, so none is taken for another.
    ids = torch.full((3, 4), 1, device=model.device)
    mask = torch.ones_like(ids)
    mask[1, 3] = 0
    spans = torch.tensor([[[0, 2], [-1, -1]]], device=model.device).repeat(3, 1, 1)
    values = {"input_ids": ids, "attention_mask": mask, "token_type_ids": ids * 0}
    values["sbo_spans"] = spans
    batch, length = Dim("batch"), Dim("length", max=model.config.max_position_embeddings)
    dimensions = {name: {0: batch, 1: length} for name in values}
    dimensions["sbo_spans"] = {0: batch, 1: Dim("spans")}
    names = input_names(outputs)
    in_training = [module for module in model.modules() if module.training]
    try:
        return torch.export.export(
            InferenceGraph(model, outputs).eval(),
            (),
            {name: values[name] for name in names},
            dynamic_shapes={name: dimensions[name] for name in names},
        )
    finally:
        for module in in_training:
            module.training = True
