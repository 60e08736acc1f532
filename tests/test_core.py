"""The extension: random bits against their twin, its stub against its own docstrings."""

import ast
import inspect
import re
from pathlib import Path

import numpy as np
import pytest
from oracles.span_masker import lane16, philox

import spanbert_fast
from spanbert_fast import _core

STUB = Path(spanbert_fast.__file__).with_name("_core.pyi")
CHECK_VECTORS = [  # of the authors' Random123: counter, key, words
    ([0, 0, 0, 0], 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([2**32 - 1] * 4, 2**64 - 1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        0x299F31D0A4093822,
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), CHECK_VECTORS)
def test_philox_gives_the_published_words(counter: list[int], key: int, words: list[int]) -> None:
    assert philox(counter, key) == words
    assert _core.philox4x32(np.array([counter], np.uint32), key).tolist() == [words]


def test_philox_equals_its_twin_for_any_key() -> None:
    counters = np.random.default_rng(0).integers(0, 2**32, (50, 4), np.uint32)
    for key in (1, 2**63, -1, -(2**63)):
        expected = [philox(counter, key % 2**64) for counter in counters.tolist()]
        assert _core.philox4x32(counters, key).tolist() == expected


@pytest.mark.parametrize("num_columns", [0, 1, 8, 13, 256, 300])
@pytest.mark.parametrize("threshold", [0, 6554, 65536])
def test_hidden_mask_equals_its_twin(num_columns: int, threshold: int) -> None:
    positions = np.array([0, 511, 70_000], np.int64)
    sequence_ids = np.array([0, -3, 2**40 + 5], np.int64)
    seed, site = -9, 12
    out = np.empty((3, num_columns), np.bool_)
    _core.fill_hidden_mask(out, positions, sequence_ids, site, seed, threshold, num_threads=2)
    expected = [
        [
            lane16([d // 8, position, sequence_id % 2**32, site], seed % 2**64, d % 8) >= threshold
            for d in range(num_columns)
        ]
        for position, sequence_id in zip(positions.tolist(), sequence_ids.tolist(), strict=True)
    ]
    assert out.tolist() == expected


@pytest.mark.parametrize("sequence_id", [0, 7, 2**31 - 1, -1])
def test_attention_mask_equals_its_twin(sequence_id: int) -> None:
    num_heads, num_queries, num_keys = 3, 2, 139
    out = np.empty((num_heads, num_queries, num_keys), np.bool_)
    _core.fill_attention_mask(out, sequence_id, 4, 2**63 + 1, 6554, num_threads=3)
    expected = [
        [
            [
                lane16([k // 8, q, (sequence_id * num_heads + h) % 2**32, 4], 2**63 + 1, k % 8)
                >= 6554
                for k in range(num_keys)
            ]
            for q in range(num_queries)
        ]
        for h in range(num_heads)
    ]
    assert out.tolist() == expected


def test_attention_mask_of_a_tile_is_cut_from_the_whole() -> None:
    whole, tile = np.empty((3, 40, 139), np.bool_), np.empty((3, 7, 101), np.bool_)
    _core.fill_attention_mask(whole, 5, 4, 9, 20_000)
    _core.fill_attention_mask(tile, 5, 4, 9, 20_000, num_threads=2, first_query=13, first_key=24)
    assert (tile == whole[:, 13:20, 24:125]).all()
    for place in ({"first_key": 4}, {"first_key": -8}, {"first_query": -1}):
        with pytest.raises(ValueError, match=r"must be >= 0, the key a multiple of 8"):
            _core.fill_attention_mask(tile, 5, 4, 9, 20_000, **place)


def test_mask_does_not_depend_on_threads() -> None:
    masks = []
    for num_threads in (1, 2, 7):
        out = np.empty((11, 40, 50), np.bool_)
        _core.fill_attention_mask(out, 3, 1, 5, 20_000, num_threads)
        masks.append(out)
    assert (masks[0] == masks[1]).all()
    assert (masks[0] == masks[2]).all()


def test_share_of_kept_is_right() -> None:
    out = np.empty((1000, 1000), np.bool_)
    _core.fill_hidden_mask(out, np.arange(1000), np.arange(1000), 1, 3, 6554)
    dropped = 6554 / 65536
    assert abs((1 - out.mean()) - dropped) < 5 * (dropped * (1 - dropped) / out.size) ** 0.5


def test_random_bits_refuse_wrong_arguments() -> None:
    hidden = np.empty((2, 8), np.bool_)
    zeros = np.zeros(2, np.int64)
    with pytest.raises(ValueError, match=r"positions has 3 items, must have 2"):
        _core.fill_hidden_mask(hidden, np.zeros(3, np.int64), zeros, 0, 0, 1)
    with pytest.raises(ValueError, match=r"threshold is 65537, must be in \[0, 65536\]"):
        _core.fill_hidden_mask(hidden, zeros, zeros, 0, 0, 65537)
    with pytest.raises(ValueError, match=r"site is -1"):
        _core.fill_hidden_mask(hidden, zeros, zeros, -1, 0, 1)
    with pytest.raises(ValueError, match=r"seed is 18446744073709551616"):
        _core.fill_hidden_mask(hidden, zeros, zeros, 0, 2**64, 1)
    with pytest.raises(ValueError, match=r"num_threads is 0, must be at least 1"):
        _core.fill_hidden_mask(hidden, zeros, zeros, 0, 0, 1, num_threads=0)
    with pytest.raises(TypeError):
        _core.fill_hidden_mask(hidden, zeros.astype(np.int32), zeros, 0, 0, 1)
    with pytest.raises(TypeError):
        _core.fill_hidden_mask(np.empty((8, 2), np.bool_).T, zeros, zeros, 0, 0, 1)
    with pytest.raises(ValueError, match=r"out must have shape \[H, Q, K\]"):
        _core.fill_attention_mask(hidden, 0, 0, 0, 1)
    hidden.flags.writeable = False
    with pytest.raises(ValueError, match="writeable"):
        _core.fill_hidden_mask(hidden, zeros, zeros, 0, 0, 1)


def arguments_of_docstring(doc: str, name: str) -> list[list[str]]:
    """The arguments, `name` or `name=default` or `*`, that pybind11 wrote for each overload."""
    signatures = []
    for line in doc.splitlines():
        match = re.match(rf"(?:\d+\. )?{name}\((.*)\) -> ", line)
        if match and "*args" not in line:
            without_types = re.sub(r'\[[^\[\]]*(?:\[[^\[\]]*\][^\[\]]*)*\]|"[^"]*"', "", match[1])
            arguments = [
                re.sub(r": [^=]*?(?= = |$)", "", part).replace(" = ", "=")
                for part in without_types.split(", ")
            ]
            signatures.append([argument for argument in arguments if argument != "self"])
    return signatures


def arguments_of_stub(function: ast.FunctionDef) -> list[str]:
    """The same of a function in the stub."""
    spec = function.args
    positional = [argument.arg for argument in spec.args]
    defaults = [None] * (len(positional) - len(spec.defaults)) + spec.defaults
    pairs = list(zip(positional, defaults, strict=True))
    keywords = zip([a.arg for a in spec.kwonlyargs], spec.kw_defaults, strict=True)
    pairs += [("*", None)] * bool(spec.kwonlyargs) + list(keywords)
    texts = [name if value is None else f"{name}={ast.unparse(value)}" for name, value in pairs]
    return [text for text in texts if text != "self"]


def test_stub_says_what_the_extension_takes() -> None:
    tree = ast.parse(STUB.read_text())
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    public = {name for name in dir(_core) if not name.startswith("_")}
    assert public == set(functions) | set(classes)
    members = [(getattr(_core, name), node) for name, node in functions.items()]
    for name, node in classes.items():
        methods = {child.name: child for child in node.body if isinstance(child, ast.FunctionDef)}
        cls = getattr(_core, name)
        public = {method for method in vars(cls) if not method.startswith("_")} | {"__init__"}
        assert public == set(methods)
        members += [(getattr(cls, method), child) for method, child in methods.items()]
    for member, node in members:
        overloads = arguments_of_docstring(inspect.getdoc(member) or "", node.name)
        assert overloads, f"{node.name} has no signature in its docstring"
        for arguments in overloads:
            assert arguments == arguments_of_stub(node), node.name


def test_every_function_says_what_it_does() -> None:
    for name in dir(_core):
        if not name.startswith("_"):
            assert re.search(r"(Returns|Sets|Tables)", getattr(_core, name).__doc__ or ""), name
