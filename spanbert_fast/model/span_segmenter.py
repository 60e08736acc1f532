"""A trained segmenter: scores of spans from hidden states, learned from gold spans.

Shapes: T pieces, N words, B sequences, D hidden size, U units of the scorer, W longest span, L
labels. After Lee et al. (2017, section 3.2): a span is represented by its first word, its last
word, an attention-weighted mean of its words, and its width. The first layer of the scorer is
linear in the first three, so each is multiplied by it once for a word instead of once for a span.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spanbert_fast.model.segmentation import best_segmentation, segmentation_loss
from spanbert_fast.model.span_scores import Words


class SpanSegmenter(nn.Module):
    """Scores of all spans of up to `max_words` words, and their likelihood.

    Label 0 is "outside": a word on its own that is no span of interest. Labels 1 to
    `num_labels - 1` are kinds of spans. With `num_labels=1` spans have no kind, and label 0 is any.
    """

    def __init__(
        self, hidden_size: int, *, max_words: int = 10, num_labels: int = 1, num_units: int = 128
    ) -> None:
        super().__init__()
        sizes = {"hidden_size": hidden_size, "max_words": max_words}
        sizes |= {"num_labels": num_labels, "num_units": num_units}
        for name, value in sizes.items():
            if type(value) is not int:
                raise TypeError(f"{name} must be an int, got {value!r}")
            if value < 1:
                raise ValueError(f"{name} is {value}, must be at least 1")
        self.max_words, self.num_labels = max_words, num_labels
        self.attention = nn.Linear(hidden_size, 1)
        self.first = nn.Linear(hidden_size, num_units)
        self.last = nn.Linear(hidden_size, num_units, bias=False)
        self.pooled = nn.Linear(hidden_size, num_units, bias=False)
        self.width = nn.Embedding(max_words, num_units)
        self.score = nn.Linear(num_units, num_labels)

    def forward(self, hidden: Tensor, words: Words) -> Tensor:
        """Scores [N, W, L]; entry [i, n - 1] is the span of n words from word i.

        Entries of spans that would leave their sequence are finite and mean nothing.

        Args:
            hidden: [T, D].
            words: The words of the batch.
        """
        rows = mean_of_words(hidden, words)
        weight = _windows(self.attention(rows), self.max_words)[..., 0]
        weight = (weight - weight.amax(1, keepdim=True)).exp()
        values = _windows(self.pooled(rows), self.max_words)
        pooled = (weight[..., None] * values).cumsum(1) / weight.cumsum(1)[..., None]
        ends = _windows(self.last(rows), self.max_words)
        spans = self.first(rows)[:, None] + ends + pooled + self.width.weight
        scores: Tensor = self.score(nn.functional.gelu(spans))
        if self.num_labels > 1:
            outside = torch.zeros_like(scores, dtype=torch.bool)
            outside[:, 1:, 0] = True
            scores = scores.masked_fill(outside, float("-inf"))
        return scores

    def loss(self, scores: Tensor, words: Words, gold_lengths: Tensor, labels: Tensor) -> Tensor:
        """Minus the log-probability of the gold spans and labels, summed over words' sequences.

        Args:
            scores: [N, W, L], from `forward`.
            words: The words of the batch.
            gold_lengths: int64 [N], words of the gold span at its first word, 0 elsewhere.
            labels: int64 [N], its label there; not read elsewhere.

        Raises:
            ValueError: The spans do not tile the sequences, are too long, or a label is outside its
                range or impossible (0 for several words).
        """
        wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
        summed = wide.logsumexp(-1)
        nll = segmentation_loss(summed, words.cu_words, gold_lengths)
        starts = gold_lengths.nonzero()[:, 0]
        chosen = labels.index_select(0, starts)
        lengths = gold_lengths.index_select(0, starts)
        if chosen.numel() and not 0 <= int(chosen.min()) <= int(chosen.max()) < self.num_labels:
            raise ValueError(f"labels must be in [0, {self.num_labels}), got {chosen.tolist()}")
        if self.num_labels > 1 and bool(((chosen == 0) & (lengths > 1)).any()):
            raise ValueError("label 0 (outside) is for single words, a longer gold span has it")
        rows = starts * self.max_words + lengths - 1
        of_span = wide.flatten(0, 1).index_select(0, rows).log_softmax(-1)
        return nll - of_span.gather(1, chosen[:, None]).sum()

    def decode(self, scores: Tensor, words: Words) -> list[list[tuple[int, int, int]]]:
        """The best (first word in its sequence, number of words, label) of each sequence."""
        wide = scores.detach().float().cpu()
        best = best_segmentation(wide.amax(-1), words.cu_words)
        kinds = wide.argmax(-1)
        cu = words.cu_words.cpu().to(torch.int64)
        result: list[list[tuple[int, int, int]]] = [[] for _ in range(len(cu) - 1)]
        owners = torch.searchsorted(cu, best.starts, right=True) - 1
        for start, length, owner in zip(
            best.starts.tolist(), best.lengths.tolist(), owners.tolist(), strict=True
        ):
            kind = int(kinds[start, length - 1])
            result[owner].append((start - int(cu[owner]), length, kind))
        return result


def mean_of_words(hidden: Tensor, words: Words) -> Tensor:
    """The mean of the pieces of each word: [T, D] -> [N, D]."""
    pieces = (words.word_of >= 0).nonzero()[:, 0]
    owners = words.word_of.index_select(0, pieces)
    sums = hidden.new_zeros(words.num_words, hidden.shape[1])
    sums = sums.index_add(0, owners, hidden.index_select(0, pieces))
    return sums / words.bounds()[1][:, None]


def _windows(rows: Tensor, size: int) -> Tensor:
    """Each row with those after it: [N, D] -> [N, size, D]; the last row is repeated at the end."""
    index = torch.arange(rows.shape[0], device=rows.device)[:, None]
    index = index + torch.arange(size, device=rows.device)
    places = index.clamp(max=max(rows.shape[0] - 1, 0)).flatten()
    return rows.index_select(0, places).view(rows.shape[0], size, -1)
