from __future__ import annotations

import json
import shutil

import pytest
from invented_text import documents
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from spanbert_fast.config import Config
from spanbert_fast.data.collator import SpanMaskingCollator
from spanbert_fast.data.tokenizer import (
    is_cased,
    load_tokenizer,
    ordinary_ids,
    save_tokenizer,
    special_token_ids,
    tokenizer_hash,
    unmaskable_ids,
    word_starts,
)
from spanbert_fast.data.wordpiece import train_tokenizer
from spanbert_fast.model.pretrained import Model
from spanbert_fast.tasks.fill import fill_span

TEXT = "Anna walked under Berlin's bridges"


def test_a_trained_tokenizer_is_cased_wherever_it_is_loaded(tokenizer_folder):
    names = sorted(path.name for path in tokenizer_folder.iterdir())
    assert names == ["tokenizer.json", "tokenizer_config.json", "vocab.txt"]
    config = json.loads((tokenizer_folder / "tokenizer_config.json").read_text())
    assert config["do_lower_case"] is False
    ours, auto = load_tokenizer(tokenizer_folder), AutoTokenizer.from_pretrained(tokenizer_folder)
    raw = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    assert ours(TEXT).input_ids == auto(TEXT).input_ids == raw.encode(TEXT).ids
    assert "Anna" in ours.tokenize(TEXT)
    assert special_token_ids(ours) == {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
    entries = (tokenizer_folder / "vocab.txt").read_text().splitlines()
    assert [ours.convert_tokens_to_ids(entry) for entry in entries] == list(range(len(ours)))


def test_training_gives_the_same_bytes_every_time(tmp_path):
    # The trainer of `tokenizers` alone does not: it numbers pieces in the order of a hash map,
    # whose order is another in each call.
    texts = [line for text in documents(5, 400) for line in text]
    for name in "abcdef":
        save_tokenizer(train_tokenizer(texts, 150), tmp_path / name)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        assert len({(tmp_path / folder / name).read_bytes() for folder in "abcdef"}) == 1


def test_training_checks_its_arguments():
    with pytest.raises(ValueError, match="vocab_size is 20, must be at least"):
        train_tokenizer(["Many letters make a large alphabet."], 20)
    with pytest.raises(ValueError, match="the text to train a tokenizer on is empty"):
        train_tokenizer([" ", ""], 100)


def test_every_character_of_the_corpus_is_known():
    tokenizer = train_tokenizer(["Zażółć gęślą jaźń.", "naïve café 北京, e\u0301!"], 200)
    for word in ("jaźń", "gęślą", "naïve", "北", "e\u0301"):
        assert tokenizer.unk_token not in tokenizer.tokenize(word)
    assert not [entry for entry in tokenizer.get_vocab() if entry in ("##.", "##,", "##!")]


def test_a_vocabulary_alone_is_enough(tmp_path, tokenizer_folder):
    shutil.copy(tokenizer_folder / "vocab.txt", tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer_hash(tokenizer) == tokenizer_hash(load_tokenizer(tokenizer_folder))
    entries = (tmp_path / "vocab.txt").read_text().lower().splitlines()
    small = [e.upper() if e.startswith("[") else e for e in dict.fromkeys(entries)]
    (tmp_path / "vocab.txt").write_text("\n".join(small) + "\n")
    assert load_tokenizer(tmp_path).tokenize("Anna") == load_tokenizer(tmp_path).tokenize("anna")


def test_a_tokenizer_file_alone_is_enough(tmp_path, tokenizer_folder):
    shutil.copy(tokenizer_folder / "tokenizer.json", tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.tokenize(TEXT) == load_tokenizer(tokenizer_folder).tokenize(TEXT)
    assert special_token_ids(tokenizer)["mask"] == 4


def test_lower_casing_a_cased_vocabulary_is_refused(tmp_path, tokenizer_folder):
    for name in ("tokenizer.json", "vocab.txt"):
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(tokenizer_folder / name, folder)
        config = folder / "tokenizer_config.json"
        config.write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": true}')
        with pytest.raises(ValueError, match='"do_lower_case": false} into its tokenizer_config'):
            load_tokenizer(folder)
        config.write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": false}')
        assert "Anna" in load_tokenizer(folder).tokenize(TEXT)


def test_a_tokenizer_that_others_load_in_lower_case_is_refused_where_it_is_used(
    tmp_path, tokenizer_folder
):
    """`AutoTokenizer` lower-cases a vocabulary that comes without tokenizer_config.json."""
    shutil.copy(tokenizer_folder / "vocab.txt", tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    lowering = AutoTokenizer.from_pretrained(tmp_path)
    assert "Anna" not in lowering.tokenize(TEXT)
    message = "the tokenizer lower-cases text, .* do_lower_case=False"
    with pytest.raises(ValueError, match=message):
        SpanMaskingCollator(lowering)
    size = len(lowering)
    shape = {"hidden_size": 8, "num_attention_heads": 1, "intermediate_size": 8}
    model = Model(Config(vocab_size=size, num_hidden_layers=1, **shape)).eval()
    with pytest.raises(ValueError, match=message):
        fill_span(model, lowering, "Anna [MASK]")
    mended = AutoTokenizer.from_pretrained(tmp_path, do_lower_case=False)
    assert fill_span(model, mended, "Anna [MASK]")
    SpanMaskingCollator(mended)


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer.json nor vocab.txt, .* bert-base-cased"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        load_tokenizer(tmp_path / "nothing")


def make_fast(model, pre_tokenizer, decoder, **specials):
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=backend, **specials)


def test_word_starts_of_every_family(tokenizer_folder):
    wordpiece = load_tokenizer(tokenizer_folder)
    starts = word_starts(wordpiece)
    assert starts.shape == (len(wordpiece),)
    for token, index in wordpiece.get_vocab().items():
        assert starts[index] == (not token.startswith("##"))
    ids = wordpiece(TEXT, add_special_tokens=False).input_ids
    assert starts[ids].sum() == 7  # Five words, and the apostrophe and the s stand alone.

    vocabulary = {"<s>": 0, "Ġriver": 1, "s": 2, "Ċ": 3, "river": 4, "Ġ": 5, "</s>": 6}
    byte_level = make_fast(
        models.BPE(vocab=vocabulary, merges=[]),
        pre_tokenizers.ByteLevel(),
        decoders.ByteLevel(),
        bos_token="<s>",
        eos_token="</s>",
    )
    assert word_starts(byte_level).tolist() == [True, True, False, True, False, True, True]

    pieces = [("<unk>", 0.0), ("▁river", -1.0), ("s", -2.0), ("▁", -3.0)]
    sentence_piece = make_fast(
        models.Unigram(pieces, 0),
        pre_tokenizers.Metaspace(),
        decoders.Metaspace(),
        unk_token="<unk>",
    )
    assert word_starts(sentence_piece).tolist() == [True, True, False, True]

    # The same, written as Llama does: the normalizer puts the mark in.
    replacing = make_fast(
        models.BPE(vocab={"▁river": 0, "s": 1, "<unk>": 2}, merges=[], unk_token="<unk>"),
        None,
        decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()]),
        unk_token="<unk>",
    )
    assert word_starts(replacing).tolist() == [True, False, True]

    words = make_fast(
        models.WordLevel({"river": 0, "[UNK]": 1}, "[UNK]"),
        pre_tokenizers.Whitespace(),
        decoders.Fuse(),
    )
    with pytest.raises(ValueError, match=r"word starts? .*type WordLevel|cannot tell where words"):
        word_starts(words)
    with pytest.raises(ValueError, match="a object without a `tokenizers` backend"):
        word_starts(object())
    with pytest.raises(ValueError, match="has no pad, unk, cls, sep, mask token"):
        special_token_ids(words)


def test_added_tokens_start_words_and_specials_are_told_apart():
    vocabulary = {"<s>": 0, "<pad>": 1, "Ġriver": 2, "s": 3, "<unk>": 4, "<mask>": 5}
    tokenizer = make_fast(
        models.BPE(vocab=vocabulary, merges=[]),
        pre_tokenizers.ByteLevel(),
        decoders.ByteLevel(),
        cls_token="<s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
    )
    tokenizer.add_tokens(["GmbH"])
    tokenizer.add_special_tokens({"extra_special_tokens": ["<doc>"]})
    assert word_starts(tokenizer).tolist() == [True, True, True, False, True, True, True, True]
    assert unmaskable_ids(tokenizer) == [0, 1, 5, 7]
    assert ordinary_ids(tokenizer).tolist() == [2, 3, 6]
    tokenizer.pad_token = "<unk>"
    assert unmaskable_ids(tokenizer) == [0, 1, 4, 5, 7]


def test_saving_depends_on_the_tokenizer_only(tmp_path, tokenizer_folder):
    for name in ("a", "b"):
        source = tmp_path / f"source_{name}"
        shutil.copytree(tokenizer_folder, source)
        save_tokenizer(load_tokenizer(source), tmp_path / name)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
        assert str(tmp_path) not in path.read_text()


def test_the_hash_tells_tokenizers_apart(tokenizer_folder):
    tokenizer = load_tokenizer(tokenizer_folder)
    before = tokenizer_hash(tokenizer)
    tokenizer(TEXT, truncation=True, max_length=4)
    assert tokenizer_hash(tokenizer) == before
    other = train_tokenizer((line for text in documents(9, 100) for line in text), 190)
    assert tokenizer_hash(other) != before


def test_cased_vocabularies_are_recognised():
    assert is_cased(["[CLS]", "Anna", "river"])
    assert not is_cased(["[CLS]", "[unused1]", "<S>", "anna", "river"])
    assert not is_cased(["[CLS]"])
