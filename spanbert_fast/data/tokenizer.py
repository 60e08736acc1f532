"""Tokenizers: loaded without losing case, asked where words start, and saved with all they need."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerFast

_ROLES: Final = ("pad", "unk", "cls", "sep", "mask")
_SPELLINGS: Final = {
    "pad": ("[PAD]", "<pad>"),
    "unk": ("[UNK]", "<unk>"),
    "cls": ("[CLS]", "<s>"),
    "sep": ("[SEP]", "</s>"),
    "mask": ("[MASK]", "<mask>"),
}
_CASED_SHARE: Final = 0.01
_MAX_BYTES: Final = {
    "vocab.txt": 64 << 20,
    "tokenizer.json": 256 << 20,
    "tokenizer_config.json": 16 << 20,
}


def load_tokenizer(path_or_name: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder or of a hub repository.

    A folder with `tokenizer.json` is loaded from it. A folder with only `vocab.txt` is WordPiece;
    it keeps case if its `tokenizer_config.json` says so or, without one, if the vocabulary has
    upper-case entries. Anything that is not a folder is a name for `AutoTokenizer`.

    Raises:
        ValueError: there is no tokenizer, it has no fast form, a file is damaged or out of all
            proportion, an entry stands twice in `vocab.txt`, or text would be lower-cased for a
            vocabulary that has upper-case entries.
    """
    folder = Path(path_or_name)
    if folder.is_dir():
        _check_sizes(folder)
        try:
            tokenizer = _load_folder(folder)
        # The tokenizers library raises bare Exceptions for files that it cannot read.
        except Exception as error:
            if str(error).startswith(str(folder)):
                raise
            raise ValueError(f"{folder} holds a damaged tokenizer: {error}") from error
    elif folder.is_absolute() or str(path_or_name).startswith("."):
        raise ValueError(f"tokenizer {str(path_or_name)!r} is not a folder")
    else:
        tokenizer = _load_named(str(path_or_name))
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(
            f"tokenizer {str(path_or_name)!r} is a {type(tokenizer).__name__} without a "
            "`tokenizers` backend, must have a fast form (tokenizer.json or vocab.txt)"
        )
    check_case(tokenizer, repr(str(path_or_name)))
    return tokenizer


def check_case(tokenizer: Any, name: str = "") -> None:
    """Refuses a tokenizer that lower-cases text although its vocabulary has upper-case entries.

    Such entries could never be found. It happens without a word: a folder with `vocab.txt` and
    without `tokenizer_config.json` makes `AutoTokenizer` and `BertTokenizer` lower-case.

    Args:
        tokenizer: of transformers; one without a `tokenizers` backend is let through.
        name: what the message calls it.

    Raises:
        ValueError: it does.
    """
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        return
    if lower_cases(tokenizer) and is_cased(list(tokenizer.get_vocab())):
        raise ValueError(
            f"{f'tokenizer {name}' if name else 'the tokenizer'} lower-cases text, but its "
            "vocabulary has upper-case entries. Load it with do_lower_case=False, or put "
            '{"tokenizer_class": "BertTokenizer", "do_lower_case": false} into its '
            "tokenizer_config.json, or give a folder with only its vocab.txt"
        )


def _check_sizes(folder: Path) -> None:
    for name, allowed in _MAX_BYTES.items():
        if (folder / name).is_file() and (size := (folder / name).stat().st_size) > allowed:
            raise ValueError(f"{folder / name} has {size:,} bytes, allowed are {allowed:,}")


def _load_folder(folder: Path) -> Any:
    config_path = folder / "tokenizer_config.json"
    config = json.loads(config_path.read_text("utf-8")) if config_path.is_file() else {}
    if (folder / "tokenizer.json").is_file():
        if config:
            return AutoTokenizer.from_pretrained(folder)
        make: Any = PreTrainedTokenizerFast  # Its constructor is not annotated.
        tokenizer = make(tokenizer_file=str(folder / "tokenizer.json"))
        vocabulary = tokenizer.get_vocab()
        for role, spellings in _SPELLINGS.items():
            for spelling in spellings:
                if spelling in vocabulary:
                    tokenizer.add_special_tokens({f"{role}_token": spelling})
        return tokenizer
    vocabulary_path = folder / "vocab.txt"
    if not vocabulary_path.is_file():
        raise ValueError(
            f"{folder} holds neither tokenizer.json nor vocab.txt, one is needed. Released "
            "SpanBERT archives have none: their vocabulary is that of bert-base-cased; name it as "
            "the tokenizer, or a folder with its vocab.txt, or copy vocab.txt into the folder"
        )
    entries = vocabulary_path.read_text("utf-8").splitlines()
    if len(set(entries)) < len(entries):
        twice = next(entry for entry, count in Counter(entries).items() if count > 1)
        raise ValueError(f"{vocabulary_path} holds {twice!r} twice, each entry must stand once")
    lower_case = bool(config.get("do_lower_case", not is_cased(entries)))
    return BertTokenizer(vocab=str(vocabulary_path), do_lower_case=lower_case)


def _load_named(name: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"tokenizer {name!r} is neither a folder nor a name that can be loaded: {error}"
        ) from error


def is_cased(entries: list[str]) -> bool:
    """Whether a vocabulary has upper-case entries: more than 1 in 100, special tokens apart."""
    words = [entry for entry in entries if not (entry[:1] in "[<" and entry[-1:] in "]>")]
    return sum(entry != entry.lower() for entry in words) > _CASED_SHARE * len(words)


def lower_cases(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether the tokenizer lower-cases text before it looks it up."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    return normalizer is not None and "A" not in normalizer.normalize_str("A")


def special_token_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """Ids of `pad`, `unk`, `cls`, `sep` and `mask`.

    Raises:
        ValueError: one of them is missing.
    """
    ids = {role: getattr(tokenizer, f"{role}_token_id") for role in _ROLES}
    missing = [role for role, token_id in ids.items() if token_id is None]
    if missing:
        raise ValueError(
            f"the tokenizer has no {', '.join(missing)} token, masked language models need "
            f"{', '.join(_ROLES)}"
        )
    return ids


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """sha256 of what the tokenizer does, whatever file it came from."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content.pop("truncation", None)
    content.pop("padding", None)
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def unmaskable_ids(tokenizer: Any) -> list[int]:
    """Ids that masking must leave alone: every special token but the one for unknown pieces.

    That one stands for a word of the text; it is special only where it has a second role.
    """
    added = tokenizer.added_tokens_decoder.items()
    ids = {*tokenizer.all_special_ids, *(index for index, token in added if token.special)}
    roles = ("bos", "eos", "pad", "cls", "sep", "mask")
    if tokenizer.unk_token_id not in [getattr(tokenizer, f"{role}_token_id") for role in roles]:
        ids.discard(tokenizer.unk_token_id)
    return sorted(ids)


def ordinary_ids(tokenizer: Any) -> npt.NDArray[np.int32]:
    """Int32 [any], ascending: the entries of the vocabulary that are pieces of text."""
    special = {*unmaskable_ids(tokenizer), tokenizer.unk_token_id}
    return np.array(sorted({*tokenizer.get_vocab().values()} - special), np.int32)


def word_starts(tokenizer: PreTrainedTokenizerFast) -> npt.NDArray[np.bool_]:
    """Bool [V], whether a vocabulary entry begins a word; V is the highest id + 1.

    WordPiece: without the continuation prefix (`##`). Byte-level BPE: a leading `Ġ` (space), or
    `Ċ`, `ĉ`, `č` (line feed, tab, carriage return). SentencePiece: a leading `▁`. Special tokens
    and tokens that were added to a vocabulary count as starts.

    Raises:
        ValueError: the family of the tokenizer does not mark word starts in its vocabulary.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"cannot tell where words start for a {type(tokenizer).__name__} without a "
            "`tokenizers` backend"
        )
    content = json.loads(backend.to_str())
    model = content["model"]
    described = json.dumps([content.get("pre_tokenizer"), content.get("decoder")])
    # Llama's way to write SentencePiece: the normalizer puts the mark in.
    replaced = json.dumps([content.get("normalizer"), content.get("decoder")], ensure_ascii=False)
    prefix = model.get("continuing_subword_prefix")
    marks: tuple[str, ...]
    if model["type"] == "WordPiece" and prefix:
        marks, expected = (prefix,), False
    elif '"ByteLevel"' in described:
        marks, expected = ("Ġ", "Ċ", "ĉ", "č"), True
    elif '"Metaspace"' in described or '"▁"' in replaced:
        marks, expected = ("▁",), True
    else:
        raise ValueError(
            f"cannot tell where words start for a tokenizer of type {model['type']}, must be "
            "WordPiece, byte-level BPE or SentencePiece"
        )
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    whole = added.union(tokenizer.all_special_tokens)
    vocabulary = tokenizer.get_vocab()
    starts = np.ones(max(vocabulary.values()) + 1, np.bool_)
    for token, index in vocabulary.items():
        starts[index] = token in whole or token.startswith(marks) == expected
    return starts


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Writes a folder from which `AutoTokenizer` and `load_tokenizer` load the same tokenizer.

    The bytes depend on the tokenizer only, not on where it was loaded from.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(directory)
    config_path = directory / "tokenizer_config.json"
    config = json.loads(config_path.read_text("utf-8"))
    for key in ("name_or_path", "vocab_file", "tokenizer_file", "is_local", "local_files_only"):
        config.pop(key, None)
    config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
    if json.loads(tokenizer.backend_tokenizer.to_str())["model"]["type"] == "WordPiece":
        vocabulary = tokenizer.get_vocab()
        entries = sorted(vocabulary, key=vocabulary.__getitem__)
        (directory / "vocab.txt").write_text("".join(f"{entry}\n" for entry in entries), "utf-8")
    if tokenizer_hash(load_tokenizer(directory)) != tokenizer_hash(tokenizer):
        raise ValueError(
            f"the tokenizer changes when it is saved to {directory} and loaded again; give it as a "
            "folder with a complete tokenizer.json and tokenizer_config.json"
        )
