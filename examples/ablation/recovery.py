"""What a pre-trained model knows of held-out text: MLM losses, and whole spans filled in."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import torch

import spanbert_fast as sf

SCHEMES = ("token", "whole_word", "spanbert")
LENGTHS = ("1", "2", "3", "4", "5+")
_SEED = 20_200_804  # of the masks of the evaluation, the same for every model
_BATCH = 32
_WRONG = 9


def held_out_blocks(data: Path, count: int) -> list[list[int]]:
    """Up to `count` blocks of the validation split, evenly spaced, as lists of ids.

    Raises:
        ValueError: Nothing was held out.
    """
    manifest = json.loads((data / "manifest.json").read_text("utf-8"))
    blocks: list[list[int]] = []
    for file in manifest["validation"]:
        with pa.memory_map(str(data / file["name"])) as source:
            blocks += pa.ipc.open_stream(source).read_all().column("input_ids").to_pylist()
    if not blocks:
        raise ValueError(f"{data} holds out no text: raise --validation-permille")
    count = min(count, len(blocks))
    return [blocks[index * len(blocks) // count] for index in range(count)]


def _masked(
    tokenizer: Any, blocks: Sequence[list[int]], scheme: str
) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    """Batches under the masks of a scheme, each with the number of its first block."""
    collator = sf.SpanMaskingCollator(tokenizer, scheme=scheme, seed=_SEED)
    collator.set_epoch(0)
    for first in range(0, len(blocks), _BATCH):
        part = blocks[first : first + _BATCH]
        yield (
            first,
            collator(
                [
                    {"id": first + index, "input_ids": _with_ends(tokenizer, ids)}
                    for index, ids in enumerate(part)
                ]
            ),
        )


def _with_ends(tokenizer: Any, ids: list[int]) -> list[int]:
    return [tokenizer.cls_token_id, *ids, tokenizer.sep_token_id]


@torch.no_grad()
def masked_losses(model: Any, tokenizer: Any, blocks: Sequence[list[int]]) -> dict[str, float]:
    """Mean MLM loss in nats per masked token, under the masks of every scheme."""
    model.eval()
    losses = {}
    for scheme in SCHEMES:
        total = count = 0.0
        for _, batch in _masked(tokenizer, blocks, scheme):
            labels = int((batch["labels"] != -100).sum())
            output = model(**batch, return_logits=False)
            total, count = total + labels * float(output.mlm_loss), count + labels
        losses[scheme] = total / count
    return losses


def unigram_law(data: Path) -> torch.Tensor:
    """[V], logarithm of how often each piece stands in the training text, one added to each."""
    with pa.memory_map(str(data / "unigram_counts.arrow")) as source:
        counts = pa.ipc.open_stream(source).read_all().column("count").to_numpy()
    law = torch.tensor(counts).double() + 1
    return (law / law.sum()).log().float()


@torch.no_grad()
def forget_context(model: Any, law: torch.Tensor) -> None:
    """Makes a model that predicts every piece by the same law, whatever stands around it."""
    decoder = model.get_output_embeddings()
    decoder.weight.zero_()
    decoder.bias.copy_(law)


class Answer(NamedTuple):
    """What stood in a span, and where."""

    begin: int
    """Position of its first piece in the sequence, [CLS] counted."""
    ids: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...] = ()
    """Contents of other spans of the same length, all different; none where there are too few."""


class SpanQuiz:
    """Held-out texts with whole geometric spans replaced by [MASK], and what was there."""

    def __init__(self, tokenizer: Any, blocks: Sequence[list[int]], slots: int) -> None:
        """Chooses the spans.

        Left out, and left unmasked, are spans that the span boundary head cannot predict (they
        touch an end of the block, or are longer than its `slots`) and those that the budget of the
        masks ends inside a word.
        """
        self.texts: list[str] = []
        self.sequences: list[list[int]] = []
        """The ids of the texts, as the tokenizer cuts them."""
        self.answers: list[list[Answer]] = []
        self.slots = slots
        self.num_left_out = 0
        """Texts that the tokenizer would not cut as they were cut before."""
        for first, batch in _masked(tokenizer, blocks, "spanbert"):
            for index, labels in enumerate(batch["labels"].tolist()):
                ids = _with_ends(tokenizer, blocks[first + index])
                self._add(tokenizer, ids, _runs(labels[: len(ids)]))
        self._add_choices()

    def _add(self, tokenizer: Any, ids: list[int], runs: list[tuple[int, int]]) -> None:
        tokens = tokenizer.convert_ids_to_tokens(ids)
        spans = [
            (begin, end)
            for begin, end in runs
            if begin > 1
            and end < len(ids) - 1
            and end - begin <= self.slots
            and not tokens[end].startswith("##")
        ]
        if not spans:
            return
        hidden = list(ids)
        for begin, end in spans:
            hidden[begin:end] = [tokenizer.mask_token_id] * (end - begin)
        shown = tokenizer.convert_ids_to_tokens(hidden[1:-1])
        text = " ".join(shown).replace(" ##", "")
        if tokenizer(text)["input_ids"] != hidden:
            self.num_left_out += 1
            return
        self.texts.append(text)
        self.sequences.append(hidden)
        self.answers.append([Answer(begin, tuple(ids[begin:end])) for begin, end in spans])

    def _add_choices(self) -> None:
        """Gives every answer nine wrong ones to be chosen from, frequent ones more often."""
        rng = random.Random(_SEED)
        contents: dict[int, list[tuple[int, ...]]] = {}
        for answer in (answer for own in self.answers for answer in own):
            contents.setdefault(len(answer.ids), []).append(answer.ids)
        for own in self.answers:
            for place, answer in enumerate(own):
                pool = contents[len(answer.ids)]
                if len({*pool} - {answer.ids}) < _WRONG:
                    continue
                wrong: dict[tuple[int, ...], None] = {}
                while len(wrong) < _WRONG:
                    if (ids := rng.choice(pool)) != answer.ids:
                        wrong[ids] = None
                own[place] = answer._replace(choices=tuple(wrong))

    def fill(self, model: Any, tokenizer: Any, head: str) -> dict[str, Any]:
        """Share of spans, and of their pieces, that the most probable filling has right."""
        exact, pieces = _Share(), _Share()
        for first in range(0, len(self.texts), _BATCH):
            part = slice(first, first + _BATCH)
            guesses = sf.fill_span(model, tokenizer, self.texts[part], top_k=1, head=head)
            answers = [answer for own in self.answers[part] for answer in own]
            for guess, answer in zip(guesses, answers, strict=True):
                hits = sum(a == b for a, b in zip(guess[0].token_ids, answer.ids, strict=True))
                exact.add(len(answer.ids), hits == len(answer.ids), 1)
                pieces.add(len(answer.ids), hits, len(answer.ids))
        return {"exact": exact.by_length(), "pieces": pieces.by_length(), "spans": exact.count}

    @torch.no_grad()
    def choose(
        self, model: Any, heads: Sequence[str], law: torch.Tensor
    ) -> dict[str, dict[str, Any]]:
        """For each head, how probable the answers are.

        Returns:
            `choice`: share of spans whose right content beats nine contents of other spans of the
            same length. The score is the probability given the context over the one by `law`: the
            wrong contents are as frequent as the right one, but frequent for no reason of this
            context. `nats`: mean of minus the logarithm of the probability of a right piece.
        """
        model.eval()
        choice, nats = ({head: _Share() for head in heads} for _ in range(2))
        for first in range(0, len(self.texts), _BATCH):
            part = slice(first, first + _BATCH)
            answers = [answer for own in self.answers[part] for answer in own]
            for head, rows in self._log_probabilities(model, part, heads).items():
                place = 0
                for answer in answers:
                    size = len(answer.ids)
                    own = rows[place : place + size]
                    place += size
                    candidates = torch.tensor([answer.ids, *answer.choices])
                    scores = own[torch.arange(size), candidates].sum(1)
                    nats[head].add(size, -float(scores[0]), size)
                    if answer.choices:
                        scores -= law[candidates].sum(1)
                        choice[head].add(size, bool(scores[0] > scores[1:].max()), 1)
        return {
            head: {"choice": choice[head].by_length(), "nats": nats[head].by_length()}
            for head in heads
        }

    def _log_probabilities(
        self, model: Any, part: slice, heads: Sequence[str]
    ) -> dict[str, torch.Tensor]:
        """[pieces of all spans of some texts, V] by head, in the order of the spans."""
        sequences, answers = self.sequences[part], self.answers[part]
        longest, most = max(map(len, sequences)), max(map(len, answers))
        input_ids = torch.zeros(len(sequences), longest, dtype=torch.int64)
        attention_mask = torch.zeros_like(input_ids)
        spans = torch.full((len(sequences), most, 2), -1)
        targets = torch.full((len(sequences), most, self.slots), -100)
        for row, (ids, own) in enumerate(zip(sequences, answers, strict=True)):
            input_ids[row, : len(ids)], attention_mask[row, : len(ids)] = torch.tensor(ids), 1
            for place, answer in enumerate(own):
                size = len(answer.ids)
                spans[row, place] = torch.tensor([answer.begin - 1, answer.begin + size])
                targets[row, place, :size] = torch.tensor(answer.ids)
        output = model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            sbo_spans=spans,
            sbo_targets=targets,
            return_logits=True,
        )
        positions = [
            row * longest + answer.begin + offset
            for row, own in enumerate(answers)
            for answer in own
            for offset in range(len(answer.ids))
        ]
        logits = {"mlm": output.logits.flatten(0, 1)[positions], "sbo": output.sbo_logits}
        rows = {head: logits[head].log_softmax(-1) for head in heads if head != "auto"}
        if "auto" in heads:  # as `fill_span` joins both heads
            rows["auto"] = (rows["mlm"] + rows["sbo"]).log_softmax(-1)
        return rows


class _Share:
    """Hits among chances, by the number of pieces of a span."""

    def __init__(self) -> None:
        self.hits = dict.fromkeys(LENGTHS, 0.0)
        self.count = dict.fromkeys(LENGTHS, 0)

    def add(self, length: int, hits: float, chances: int) -> None:
        key = LENGTHS[min(length, len(LENGTHS)) - 1]
        self.hits[key] += hits
        self.count[key] += chances

    def by_length(self) -> dict[str, float | None]:
        """The shares, and that of all lengths together; None where there was no chance."""
        pairs = {key: (self.hits[key], self.count[key]) for key in LENGTHS}
        pairs["all"] = (sum(self.hits.values()), sum(self.count.values()))
        return {key: hits / count if count else None for key, (hits, count) in pairs.items()}


def _runs(labels: Sequence[int]) -> list[tuple[int, int]]:
    """Maximal runs of labelled positions: first, and the one past the last."""
    runs, begin = [], None
    for index, label in enumerate([*labels, -100]):
        if label != -100 and begin is None:
            begin = index
        elif label == -100 and begin is not None:
            runs.append((begin, index))
            begin = None
    return runs
