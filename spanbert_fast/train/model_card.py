"""A saved model with the card that says how it was made."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from spanbert_fast.train.events import EvaluationResult
from spanbert_fast.train.machine import without_progress_bars
from spanbert_fast.train.options import Settings
from spanbert_fast.train.run import Run

_NON_COMMERCIAL = "cc-by-nc-4.0"
# They say something about the machine, nothing about the model.
_PATHS = ("data", "output")


def save_model(run: Run, evaluation: EvaluationResult | None) -> Path:
    """The folder `model` of a run: weights, configuration, tokenizer and card.

    It is written under another name first, so that the folder is never half a model.
    """
    final = run.settings.output / "model"
    partial, old = final.with_name(".unfinished-model"), final.with_name(".old-model")
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    with without_progress_bars():
        run.model.save_pretrained(partial)
    run.source.tokenizer.save_pretrained(partial)
    (partial / "README.md").write_text(model_card(run, evaluation), encoding="utf-8")
    if final.exists():
        final.rename(old)
    partial.rename(final)
    shutil.rmtree(old, ignore_errors=True)
    return final


def model_card(run: Run, evaluation: EvaluationResult | None) -> str:
    """The text of a card in Hugging Face's form."""
    settings = run.settings
    licence = inherited_licence(settings.init)
    language = settings.language or run.source.shards.manifest.settings.get("language")
    header = {
        "language": language,
        "license": licence,
        "library_name": "spanbert_fast",
        "pipeline_tag": "fill-mask",
        "base_model": settings.init,
    }
    lines = ["---", *(f"{key}: {value}" for key, value in header.items() if value), "---", ""]
    lines += [
        f"# {_title(settings)}",
        "",
        "A BERT encoder with an MLM head and a span boundary head (Joshi et al. 2020). It loads in "
        "plain transformers as `BertForMaskedLM`; `spanbert_fast.Model.from_pretrained` loads the "
        "span boundary head as well.",
        "",
        f"- Language: {language or 'not stated'}",
        f"- Licence: {_licence_note(settings.init, licence)}",
        "",
        *_section("Results on held-out blocks", _result_rows(evaluation)),
        *_section("Data", _data_rows(run)),
        *_section("Settings", {k: v for k, v in settings.as_json().items() if k not in _PATHS}),
        *_section("Environment", run.environment),
    ]
    return "\n".join(lines)


def _title(settings: Settings) -> str:
    if settings.freeze_encoder:
        return f"Heads for {Path(settings.init or '').name}, trained on {settings.data.name}"
    return f"SpanBERT, {settings.preset}, pre-trained on {settings.data.name}"


def inherited_licence(init: str | None) -> str | None:
    """The licence that comes with the weights a run began from; None if it began from none."""
    if init is None:
        return None
    card = Path(init) / "README.md"
    if card.is_file():
        for line in card.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("license:"):
                return line.removeprefix("license:").strip()
    return _NON_COMMERCIAL if "spanbert" in init.lower() else "other"


def _licence_note(init: str | None, licence: str | None) -> str:
    if init is None:
        return "trained from random weights; the text's own terms apply"
    note = f"continued from `{init}`, whose terms ({licence}) these weights inherit"
    if licence == _NON_COMMERCIAL:
        note += ". The released SpanBERT weights, and all made from them, stay CC-BY-NC 4.0"
    elif licence == "other":
        note += "; if those come from the released SpanBERT weights, they stay CC-BY-NC 4.0"
    return note


def _result_rows(evaluation: EvaluationResult | None) -> dict[str, Any]:
    if evaluation is None:
        return {"evaluation": "none"}
    baselines = evaluation.baselines
    rows = {
        "MLM loss": evaluation.mlm_loss,
        "unigram law on the same targets": baselines.unigram_cross_entropy,
        "MLM accuracy": evaluation.mlm_accuracy,
        f"always {baselines.majority_token!r}": baselines.majority_accuracy,
        "SBO loss": evaluation.sbo_loss,
        "SBO accuracy": evaluation.sbo_accuracy,
    }
    shown = {name: "none" if v is None else f"{v:.4f}" for name, v in rows.items()}
    return {"blocks": evaluation.blocks, "MLM targets": evaluation.mlm_targets, **shown}


def _data_rows(run: Run) -> dict[str, Any]:
    manifest = run.source.shards.manifest
    return {
        "shards SHA-256": run.source.shards.manifest_hash,
        "tokenizer SHA-256": manifest.tokenizer_sha256,
        "vocabulary": manifest.vocab_size,
        "sequence length": manifest.seq_length,
        "training documents": manifest.counts.train.documents,
        "training tokens": manifest.counts.train.tokens,
        "held-out documents": manifest.counts.validation.documents,
        "held-out tokens": manifest.counts.validation.tokens,
    }


def _section(title: str, rows: dict[str, Any]) -> list[str]:
    table = [f"| {name} | {value} |" for name, value in rows.items()]
    return [f"## {title}", "", "| | |", "| --- | --- |", *table, ""]
