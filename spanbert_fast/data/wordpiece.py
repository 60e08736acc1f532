"""A cased WordPiece vocabulary, trained on a corpus: the same corpus gives the same bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Final

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import BertTokenizer

SPECIAL_TOKENS: Final = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MAX_ALPHABET: Final = 1000


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> BertTokenizer:
    """A cased WordPiece tokenizer of (at most) `vocab_size` entries.

    Entries are the special tokens, the characters of the corpus (the 1,000 most frequent, as word
    starts and as continuations) and the merges that the trainer of `tokenizers` finds.

    Args:
        texts: the training text; read once and kept.
        vocab_size: number of entries, special tokens included.

    Raises:
        ValueError: the text is empty, or `vocab_size` does not hold its characters.
    """
    normalizer = normalizers.BertNormalizer(lowercase=False)
    kept = [normalizer.normalize_str(text) for text in texts]
    frequencies: Counter[str] = Counter()
    for text in kept:
        frequencies.update(text)
    ranked = sorted(frequencies, key=lambda character: (-frequencies[character], character))
    alphabet = sorted([character for character in ranked if not character.isspace()][:MAX_ALPHABET])
    if not alphabet:
        raise ValueError("the text to train a tokenizer on is empty, must hold words")
    # The trainer numbers continuations in the order of a hash map, and numbers break ties between
    # equally frequent merges. As "special tokens" they are numbered before it looks.
    # Punctuation stands alone and never continues a word.
    splitter = pre_tokenizers.BertPreTokenizer()
    continuations = [
        f"##{character}"
        for character in alphabet
        if len(splitter.pre_tokenize_str("a" + character)) == 1
    ]
    reserved = [*SPECIAL_TOKENS, *continuations]
    if vocab_size < len(reserved) + len(alphabet):
        raise ValueError(
            f"vocab_size is {vocab_size}, must be at least {len(reserved) + len(alphabet)}: the "
            f"special tokens and {len(alphabet)} characters, as word starts and as continuations"
        )
    draft = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    draft.pre_tokenizer = splitter
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=reserved,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    draft.train_from_iterator(kept, trainer)
    vocabulary = draft.get_vocab()
    entries = sorted(vocabulary, key=vocabulary.__getitem__)
    return BertTokenizer(
        vocab={entry: index for index, entry in enumerate(entries)}, do_lower_case=False
    )
