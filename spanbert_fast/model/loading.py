"""Loading of weights that says what a file lacked, and refuses what would be guesswork."""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from spanbert_fast.config import HEADS
from spanbert_fast.model.files import check_indices, unpickling_reason
from spanbert_fast.model.positions import POSITION_EXTENSIONS, check_extension, extend_positions

_HEAD_PREFIXES = {"mlm": "cls.predictions.", "sbo": "cls.span_boundary."}
_TIED_BIASES = ("cls.predictions.bias", "cls.predictions.decoder.bias")
_MAX_NAMES = 8


class LoadingReport(NamedTuple):
    """What follows from the names of the tensors in a file."""

    untrained_heads: list[str]
    """Heads, of "mlm" and "sbo", with at least one random tensor."""
    message: str
    """One warning for all of it; empty if the file held exactly the model."""


class ReportedLoading:
    """The `from_pretrained` of a model with both heads; mixed into a `PreTrainedModel`."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """A model with the weights of a folder or hub repository: ours, BERT's or SpanBERT's.

        Safetensors are preferred to `pytorch_model.bin`; weights keep their precision unless
        `dtype` is given. Heads that the file lacks are listed in `config.untrained_heads` and in
        one warning.

        Args:
            args: As in Hugging Face, first the folder or the name of the repository.
            kwargs: As in Hugging Face; `use_safetensors=True` forbids `pytorch_model.bin`. With
                `position_extension="interpolate"` or `"tile"` the position table is made
                `max_position_embeddings` long, for longer texts; see `extended_table`.

        Returns:
            The model in evaluation mode; with `output_loading_info=True` a pair of it and Hugging
            Face's report.

        Raises:
            ValueError: Weights of the encoder are missing, a file is damaged, wants to run code or
                does not fit its configuration, `weights_only=False`, or the position table is to
                have another length and no way is named, or an unknown one.
        """
        if kwargs.get("weights_only", True) is not True:
            raise ValueError(
                f"weights_only must be True, got {kwargs['weights_only']!r}: a pickle that holds "
                "more than tensors can run any code"
            )
        extension: tuple[str, int] | None = None
        if (way := kwargs.pop("position_extension", None)) is not None:
            # The weights are read at the length that they have.
            extension = check_extension(way, kwargs.pop("max_position_embeddings", None))
        wants_report = kwargs.pop("output_loading_info", False)
        source = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        if isinstance(source, str | os.PathLike) and os.path.isdir(source):
            check_indices(Path(source, kwargs.get("subfolder", "")))
        parent: Any = super()
        with _naming_damage(source):
            model, report = parent.from_pretrained(*args, output_loading_info=True, **kwargs)
        if extension is not None:
            extend_positions(model.bert, model.config, extension[1], extension[0])
        report |= model.__dict__.pop("_names_not_loaded", {})
        if kwargs.get("state_dict") == {}:  # no weights by request, as from a configuration
            return (model, report) if wants_report else model
        pickles = [name for name in model.__dict__.pop("_files", ()) if ".safetensors" not in name]
        if pickles:
            warnings.warn(
                f"{pickles[0]} is a pickle, read with weights_only=True. `spanbert-fast convert` "
                "writes the same weights as safetensors; use_safetensors=True refuses pickles.",
                stacklevel=2,
            )
        found = describe_loading(
            str(model.config.name_or_path),
            report["missing_keys"],
            {key for key, *_ in report["mismatched_keys"]},
            report["unexpected_keys"],
        )
        untrained = {*model.config.untrained_heads, *found.untrained_heads}
        model.config.untrained_heads = sorted(untrained)
        if found.message:
            warnings.warn(found.message, stacklevel=2)
        for parameter in model.parameters():
            # A mapped file puts tensors at odd addresses, by which products round differently;
            # and it must not be cut short while it is in use.
            if parameter.device.type == "cpu":
                parameter.data = parameter.data.clone()
        return (model, report) if wants_report else model

    @staticmethod
    def _load_pretrained_model(
        model: Any, state_dict: Any, checkpoint_files: list[str] | None, *args: Any, **kwargs: Any
    ) -> Any:
        model._files = checkpoint_files or []
        _check_files(model, model._files)
        load = super(ReportedLoading, type(model))._load_pretrained_model  # type: ignore[misc]
        try:
            loaded = load(model, state_dict, checkpoint_files, *args, **kwargs)
        # Pickles may hold anything where a state dict belongs.
        except (TypeError, AttributeError, KeyError) as error:
            where = ", ".join(map(str, model._files))
            raise ValueError(f"{where}: holds no state dict ({error})") from error
        _check_positions(model, loaded[0].mismatched_keys)
        return loaded

    def tie_weights(
        self, missing_keys: set[str] | None = None, recompute_mapping: bool = True
    ) -> None:
        """Shares the tied tensors; see Hugging Face."""
        parent: Any = super()
        # A file without an MLM head lacks both, for which Hugging Face would call it corrupted.
        # The first one holds its initial value by now, so it may count as present meanwhile.
        lacks_both = missing_keys is not None and missing_keys.issuperset(_TIED_BIASES)
        if missing_keys is not None and lacks_both:
            missing_keys.discard(_TIED_BIASES[0])
        parent.tie_weights(missing_keys=missing_keys, recompute_mapping=recompute_mapping)
        if missing_keys is not None and lacks_both:
            missing_keys.add(_TIED_BIASES[0])

    def _adjust_missing_and_unexpected_keys(self, loading_info: Any) -> None:
        parent: Any = super()
        parent._adjust_missing_and_unexpected_keys(loading_info)
        names = ("missing_keys", "unexpected_keys")
        # Said once, by us; Hugging Face's report would say it again, without the consequence.
        self._names_not_loaded = {name: getattr(loading_info, name) for name in names}
        for name in names:
            setattr(loading_info, name, set())


def _check_positions(model: Any, mismatched: Collection[tuple[str, Any, Any]]) -> None:
    """Refuses a position table of another length: a random one would ruin the encoder."""
    for name, found, expected in mismatched:
        if not name.endswith("embeddings.position_embeddings.weight") or found[1:] != expected[1:]:
            continue
        ways = " or ".join(f"position_extension={way!r}" for way in POSITION_EXTENSIONS)
        advice = f"; {ways} makes it longer" if found[0] < expected[0] else ""
        raise ValueError(
            f"{model.config.name_or_path}: the position table has {found[0]} rows, "
            f"max_position_embeddings asks for {expected[0]}{advice}"
        )


@contextmanager
def _naming_damage(source: object) -> Iterator[None]:
    """Turns what the readers of damaged or hostile files raise into ValueErrors that name them."""
    try:
        yield
    except UnpicklingError as error:
        raise ValueError(
            f"{source}: a pickle was refused, because it holds more than tensors or is damaged "
            f"({unpickling_reason(error)})"
        ) from error
    except (SafetensorError, EOFError) as error:
        raise ValueError(f"{source}: damaged weights ({error or type(error).__name__})") from error
    except RuntimeError as error:
        if "PytorchStreamReader" not in str(error):
            raise
        first = str(error).splitlines()[0]
        raise ValueError(f"{source}: damaged weights ({first})") from error


def _check_files(model: Any, files: Collection[str]) -> None:
    """Refuses weights by what their files say of them, before any memory is taken for them."""
    if not files:
        return
    held = sum(os.path.getsize(file) for file in files)
    # The heads may be missing, their sizes follow from the encoder's; it must be in the files.
    encoder = getattr(model, model.base_model_prefix, model)
    expected = sum(parameter.numel() for parameter in encoder.parameters())
    if expected > 2 * held:
        folder = os.path.dirname(next(iter(files)))
        raise ValueError(
            f"{folder}: config.json describes an encoder of {expected:,} values, the weights have "
            f"{held:,} bytes"
        )
    for file in files:
        if not str(file).endswith(".safetensors"):
            continue
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (not a dict)
                kind = tensors.get_slice(name).get_dtype()
                if name.endswith(("weight", "bias", "gamma", "beta")) and not _is_float(kind):
                    raise ValueError(f"{file}: {name} holds {kind}, weights must be floats")


def _is_float(kind: str) -> bool:
    return kind.startswith(("F", "BF"))


def describe_loading(
    source: str,
    missing: Collection[str],
    mismatched: Collection[str],
    unexpected: Collection[str],
) -> LoadingReport:
    """What follows from the names of the tensors in a file.

    Args:
        source: Folder or repository, for the messages.
        missing: Tensors of the model that the file lacks.
        mismatched: Tensors of another shape, which the user agreed to replace.
        unexpected: Tensors of the file that the model lacks.

    Raises:
        ValueError: The encoder is not complete.
    """
    prefixes = tuple(_HEAD_PREFIXES.values())
    if encoder := sorted(key for key in missing if not key.startswith(prefixes)):
        raise ValueError(
            f"{source} lacks {len(encoder)} tensors of the encoder, which must all be in the file: "
            f"{_listed(encoder)}"
        )
    random = {*missing, *mismatched}
    untrained = [
        head for head in HEADS if any(key.startswith(_HEAD_PREFIXES[head]) for key in random)
    ]
    parts = []
    if untrained:
        heads = " and ".join(head.upper() for head in untrained)
        parts.append(
            f"{source} has no complete {heads} head: its weights are random until trained. Such "
            "heads are listed in config.untrained_heads and give no logits without targets."
        )
    if unexpected:
        modules = sorted({key.rpartition(".")[0] or key for key in unexpected})
        parts.append(f"Ignored in {source}, for want of a place: {_listed(modules)}.")
    return LoadingReport(untrained, " ".join(parts))


def _listed(names: list[str]) -> str:
    more = len(names) - _MAX_NAMES
    return ", ".join(names[:_MAX_NAMES]) + (f" and {more} more" if more > 0 else "")
