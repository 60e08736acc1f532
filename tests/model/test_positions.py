"""A longer position table: values by hand, and a folder that any BERT reader opens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from transformers import BertForMaskedLM
from transformers.utils import logging

from spanbert_fast.config import Config
from spanbert_fast.model.positions import extended_table
from spanbert_fast.model.pretrained import Model

TABLE = "bert.embeddings.position_embeddings.weight"


@pytest.fixture(autouse=True)
def quiet() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()


@pytest.fixture
def folder(config: Config, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    Model(config).save_pretrained(tmp_path / "short")
    return tmp_path / "short"


def test_values_by_hand() -> None:
    table = torch.tensor([[0.0, 1.0], [2.0, 1.0], [8.0, -3.0]])
    between = [[0, 1], [1, 1], [2, 1], [5, -1], [8, -3]]
    assert extended_table(table, 5, "interpolate").tolist() == between
    # Row 1 of 4 stands at 2/3, row 2 at 4/3.
    expected = torch.tensor([[0, 1], [4 / 3, 1], [4, -1 / 3], [8, -3]])
    torch.testing.assert_close(extended_table(table, 4, "interpolate"), expected)
    copies = [[0, 1], [2, 1], [8, -3], [0, 1], [2, 1], [8, -3], [0, 1]]
    assert extended_table(table, 7, "tile").tolist() == copies
    for way in ("interpolate", "tile"):
        assert torch.equal(extended_table(table, 3, way), table)
        assert torch.equal(extended_table(table[:1], 4, way), table[:1].expand(4, 2))


@settings(max_examples=40)
@given(
    st.integers(2, 40),
    st.integers(0, 200),
    st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
)
def test_rows_between_are_torchs_and_known_ones_exact(
    size: int, added: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(size)
    table = torch.randn(size, 5, generator=generator).to(dtype)
    longer = extended_table(table, size + added, "interpolate")
    assert longer.dtype == dtype
    for row in range(size + added):
        place, rest = divmod(row * (size - 1), size + added - 1)
        if rest == 0:
            assert torch.equal(longer[row], table[place])
    judge = torch.nn.functional.interpolate(
        table.double().T[None], size=size + added, mode="linear", align_corners=True
    )[0].T
    # Rounded once to the dtype of the table.
    torch.testing.assert_close(longer, judge.to(dtype), rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("way", ["interpolate", "tile"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_an_extended_model_loads_in_plain_transformers(
    folder: Path, tmp_path: Path, way: str, dtype: torch.dtype
) -> None:
    table = load_file(folder / "model.safetensors")[TABLE]
    model = Model.from_pretrained(
        folder, max_position_embeddings=100, position_extension=way, dtype=dtype
    )
    assert model.config.max_position_embeddings == 100
    assert model.bert.embeddings.position_embeddings.num_embeddings == 100
    assert torch.equal(
        model.bert.embeddings.position_embeddings.weight,
        extended_table(table.to(dtype), 100, way),
    )
    long = tmp_path / "long"
    model.save_pretrained(long)
    config = json.loads((long / "config.json").read_text())
    assert config["max_position_embeddings"] == 100
    assert not {key for key in config if "extension" in key}
    ids = torch.arange(90)[None] % 40
    with torch.no_grad():
        ours = Model.from_pretrained(long)(ids).logits
        assert torch.equal(ours, model(ids).logits)
        theirs = BertForMaskedLM.from_pretrained(long).eval()(ids).logits
    if dtype == torch.float32:
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert theirs.shape == ours.shape


def test_training_goes_on_with_all_of_the_table(folder: Path) -> None:
    model = Model.from_pretrained(
        folder, max_position_embeddings=80, position_extension="interpolate"
    ).train()
    ids = torch.arange(80)[None] % 40
    model(ids, labels=ids).loss.backward()
    grad = model.bert.embeddings.position_embeddings.weight.grad
    assert isinstance(grad, Tensor)
    assert bool((grad.abs().sum(1) > 0).all())


def test_another_length_without_a_way_is_refused(folder: Path, config: Config) -> None:
    size = config.max_position_embeddings
    for more in ({}, {"ignore_mismatched_sizes": True}):
        with pytest.raises(ValueError, match=rf"table has {size} rows, .* asks for 64; .*'tile'"):
            Model.from_pretrained(folder, max_position_embeddings=64, **more)
    with pytest.raises(ValueError, match=rf"table has {size} rows, max.* asks for 8$"):
        Model.from_pretrained(folder, max_position_embeddings=8)
    given = Config.from_pretrained(folder, max_position_embeddings=64)
    with pytest.raises(ValueError, match="position_extension='interpolate' or"):
        Model.from_pretrained(folder, config=given)
    model = Model.from_pretrained(folder, max_position_embeddings=size)
    assert model.config.max_position_embeddings == size


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"position_extension": "repeat"}, ValueError, "'interpolate' or 'tile', got 'repeat'"),
        ({"position_extension": "tile"}, ValueError, "needs max_position_embeddings"),
        (
            {"position_extension": "tile", "max_position_embeddings": 8},
            ValueError,
            "is 8, a table of 32 positions can only be made longer",
        ),
        (
            {"position_extension": "tile", "max_position_embeddings": 1 << 21},
            ValueError,
            "must be at most 1048576, got 2097152",
        ),
        (
            {"position_extension": "tile", "max_position_embeddings": 64.0},
            TypeError,
            r"must be an int, got 64\.0",
        ),
    ],
)
def test_wrong_extensions_are_named(
    folder: Path, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Model.from_pretrained(folder, **arguments)
