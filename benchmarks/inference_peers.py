"""Ways to encode a batch, all with the weights of ours: each gives the real words, packed [T, D].

Kinds of grouping: `padded`, all in one batch; `sorted`, batches of 32 by length, as
sentence-transformers makes them; `one by one`, without padding; `equal lengths`, together only
what needs no padding.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from peers import autocast, make_peer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from workload import FIRST_WORD, Setting

from spanbert_fast import Model
from spanbert_fast.batch import PackedBatch
from spanbert_fast.tasks.texts import pack

BATCH = 32
Encode = Callable[[], Tensor]
Inputs = dict[str, Tensor]


def groups_of(lengths: list[int], kind: str) -> list[list[int]]:
    """Which sequences are taken together, in which order."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    if kind == "equal lengths":
        return [[i for i in order if lengths[i] == n] for n in sorted(set(lengths), reverse=True)]
    size = {"padded": len(lengths), "sorted": BATCH, "one by one": 1}[kind]
    return [order[begin : begin + size] for begin in range(0, len(order), size)]


def padding_of_groups(lengths: list[int], kind: str) -> float:
    """Share of padding in the batches of a kind."""
    groups = groups_of(lengths, kind)
    return 1 - sum(lengths) / sum(len(g) * max(lengths[i] for i in g) for g in groups)


def padded_inputs(batch: PackedBatch, groups: list[list[int]]) -> list[Inputs]:
    """Ids and mask of each group, int64 [B, S]."""
    lengths = batch.cu_seqlens.diff().tolist()
    parts, found = batch.input_ids.split(lengths), []
    for group in groups:
        ids = torch.nn.utils.rnn.pad_sequence([parts[i] for i in group], batch_first=True)
        sizes = torch.tensor([lengths[i] for i in group], device=ids.device)
        mask = (torch.arange(ids.shape[1], device=ids.device) < sizes[:, None]).long()
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


def packed_rows(lengths: list[int], groups: list[list[int]], hidden: list[Tensor]) -> Tensor:
    """Hidden states [B, S, D] of all groups, as packed rows of real words in the first order."""
    found: dict[int, Tensor] = {}
    for group, rows in zip(groups, hidden, strict=True):
        found |= {i: row[: lengths[i]] for i, row in zip(group, rows, strict=True)}
    return torch.cat([found[i] for i in range(len(lengths))])


def peer_encode(
    setting: Setting, encoder: torch.nn.Module, batch: PackedBatch, kind: str
) -> Encode:
    """By an encoder of Hugging Face."""
    lengths = batch.cu_seqlens.diff().tolist()
    groups = groups_of(lengths, kind)
    inputs = padded_inputs(batch, groups)
    for part in inputs:
        if bool(part["attention_mask"].all()):  # without padding no mask slows a peer down
            del part["attention_mask"]

    def encode() -> Tensor:
        with torch.inference_mode(), autocast(setting):
            hidden = [encoder(**part).last_hidden_state for part in inputs]
            return packed_rows(lengths, groups, hidden)

    return encode


def our_encode(setting: Setting, model: Model, batch: PackedBatch) -> Encode:
    """By one packed pass."""

    def encode() -> Tensor:
        with torch.inference_mode(), autocast(setting):
            return model.bert.encode_packed(batch).last_hidden_state

    return encode


def make_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Words `w00005` and so on, between [CLS] and [SEP]."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert len(names) == FIRST_WORD
    words = {name: index for index, name in enumerate(names)}
    words |= {f"w{index:05d}": index for index in range(FIRST_WORD, vocab_size)}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=512,
        **{f"{name[1:-1].lower()}_token": name for name in names},
    )


def make_texts(batch: PackedBatch) -> list[str]:
    """A text for each sequence, which has as many pieces with [CLS] and [SEP]."""
    parts = batch.input_ids.split(batch.cu_seqlens.diff().tolist())
    ids = (part[1:-1].clamp(min=FIRST_WORD).tolist() for part in parts)
    return [" ".join(f"w{index:05d}" for index in row) for row in ids]


def text_encoders(
    setting: Setting, model: Model, texts: list[str], folder: Path
) -> tuple[Encode, Encode]:
    """Mean vectors [B, D] of texts, by ours and by sentence-transformers' `encode`.

    Both read text with the same fast tokenizer; the peer sorts and batches as it does by default.
    """
    from sentence_transformers import SentenceTransformer

    tokenizer = make_tokenizer(setting.sizes.vocab_size)
    make_peer(model, "sdpa").bert.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    peer = SentenceTransformer(
        str(folder), device=str(setting.device), model_kwargs={"attn_implementation": "sdpa"}
    )

    def theirs() -> Tensor:
        with autocast(setting):
            return peer.encode(texts, convert_to_tensor=True, show_progress_bar=False)

    def ours() -> Tensor:
        batch = pack(tokenizer(texts)["input_ids"]).to(setting.device)
        with torch.inference_mode(), autocast(setting):
            hidden = model.bert.encode_packed(batch).last_hidden_state.float()
        sizes = batch.cu_seqlens.diff()
        row = torch.repeat_interleave(batch.sequence_ids, sizes)
        sums = hidden.new_zeros(batch.num_sequences, hidden.shape[1]).index_add(0, row, hidden)
        return sums / sizes[:, None]

    return ours, theirs
