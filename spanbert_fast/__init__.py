"""SpanBERT pre-training and inference. Public names only; each is loaded at first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spanbert_fast import ops as ops
    from spanbert_fast.config import Config as Config
    from spanbert_fast.data.collator import SpanMaskingCollator as SpanMaskingCollator
    from spanbert_fast.data.masking import SpanMasker as SpanMasker
    from spanbert_fast.model.patch import PatchReport as PatchReport
    from spanbert_fast.model.patch import patch as patch
    from spanbert_fast.model.patch import unpatch as unpatch
    from spanbert_fast.model.pretrained import Model as Model
    from spanbert_fast.model.sbo_head import SBOHead as SBOHead
    from spanbert_fast.model.span_scores import SpanScoring as SpanScoring
    from spanbert_fast.model.span_segmenter import SpanSegmenter as SpanSegmenter
    from spanbert_fast.ops.dispatch import use_backend as use_backend
    from spanbert_fast.tasks.fill import FilledSpan as FilledSpan
    from spanbert_fast.tasks.fill import fill_span as fill_span
    from spanbert_fast.tasks.segment import Segment as Segment
    from spanbert_fast.tasks.segment import segment as segment
    from spanbert_fast.tasks.span_embeddings import SpanEmbeddings as SpanEmbeddings
    from spanbert_fast.tasks.span_embeddings import span_embeddings as span_embeddings
    from spanbert_fast.tasks.windows import Windows as Windows
    from spanbert_fast.train.callback import SpanMaskingCallback as SpanMaskingCallback
    from spanbert_fast.train.trainer import Trainer as Trainer

__version__ = "0.1.0"

# Public name -> module that defines it; loaded at first use, so that importing the package stays
# free of torch and transformers.
_HOMES = {
    "Config": "spanbert_fast.config",
    "FilledSpan": "spanbert_fast.tasks.fill",
    "Model": "spanbert_fast.model.pretrained",
    "PatchReport": "spanbert_fast.model.patch",
    "SBOHead": "spanbert_fast.model.sbo_head",
    "Segment": "spanbert_fast.tasks.segment",
    "SpanEmbeddings": "spanbert_fast.tasks.span_embeddings",
    "SpanMasker": "spanbert_fast.data.masking",
    "SpanMaskingCallback": "spanbert_fast.train.callback",
    "SpanMaskingCollator": "spanbert_fast.data.collator",
    "SpanScoring": "spanbert_fast.model.span_scores",
    "SpanSegmenter": "spanbert_fast.model.span_segmenter",
    "Trainer": "spanbert_fast.train.trainer",
    "Windows": "spanbert_fast.tasks.windows",
    "fill_span": "spanbert_fast.tasks.fill",
    "patch": "spanbert_fast.model.patch",
    "segment": "spanbert_fast.tasks.segment",
    "span_embeddings": "spanbert_fast.tasks.span_embeddings",
    "unpatch": "spanbert_fast.model.patch",
    "use_backend": "spanbert_fast.ops.dispatch",
}
__all__ = [*_HOMES, "__version__", "ops"]


def __getattr__(name: str) -> Any:
    if name == "ops":
        return importlib.import_module("spanbert_fast.ops")
    if name not in _HOMES:
        raise AttributeError(f"module 'spanbert_fast' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
