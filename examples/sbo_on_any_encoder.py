"""The span boundary objective on an encoder that is no BERT: a small ModernBERT, a few steps.

Three lines carry it: the collator, the head, and the sum of the two losses.
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path

import torch
import zstandard
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import DataLoader
from transformers import ModernBertConfig, ModernBertForMaskedLM, PreTrainedTokenizerFast

import spanbert_fast as sf

TEXT = Path(__file__).resolve().parent / "state_of_the_union.jsonl.zst"
SPECIALS = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}


def read_paragraphs(count: int) -> list[str]:
    """The first paragraphs of the addresses that have more than a line."""
    with TEXT.open("rb") as file:
        lines = io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(file), "utf-8")
        texts = [json.loads(line)["text"] for _, line in zip(range(10), lines, strict=False)]
    paragraphs = [part.strip() for text in texts for part in text.split("\n")]
    return [part for part in paragraphs if len(part) > 80][:count]


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, as ModernBERT has."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIALS.values()),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIALS)


def main() -> None:
    """Trains, and prints both losses."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--paragraphs", type=int, default=256)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    texts = read_paragraphs(arguments.paragraphs)
    tokenizer = train_tokenizer(texts, 1000)
    encoder = ModernBertForMaskedLM(
        ModernBertConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=192,
            max_position_embeddings=64,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.cls_token_id,
            eos_token_id=tokenizer.sep_token_id,
            cls_token_id=tokenizer.cls_token_id,
            sep_token_id=tokenizer.sep_token_id,
        )
    )
    collator = sf.SpanMaskingCollator(tokenizer)
    head = sf.SBOHead(encoder.config.hidden_size, len(tokenizer))
    rows = [{"input_ids": tokenizer(text, truncation=True, max_length=64).input_ids}
            for text in texts]  # fmt: skip
    loader = DataLoader(rows, batch_size=32, shuffle=True, collate_fn=collator)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=2e-3)

    for epoch in range(arguments.epochs):
        collator.set_epoch(epoch)
        sums = torch.zeros(4)
        for batch in loader:
            spans, targets = batch.pop("sbo_spans"), batch.pop("sbo_targets")
            num_labels, num_targets = (batch["labels"] != -100).sum(), (targets != -100).sum()
            output = encoder(**batch, output_hidden_states=True)
            # Divided by the number of labels, the sum of both is SpanBERT's loss per masked token.
            sbo = head(
                output.hidden_states[-1],
                spans,
                targets,
                decoder_weight=encoder.get_output_embeddings().weight,
                num_items=num_labels,
            )
            optimizer.zero_grad()
            (output.loss + sbo.loss).backward()
            optimizer.step()
            losses = torch.stack([output.loss, sbo.loss]).detach() * num_labels
            sums += torch.cat([losses, torch.stack([num_labels, num_targets])])
        mlm_loss, sbo_loss = (sums[:2] / sums[2:]).tolist()
        print(f"epoch {epoch}: mlm_loss {mlm_loss:.3f}, sbo_loss {sbo_loss:.3f}")


if __name__ == "__main__":
    main()
