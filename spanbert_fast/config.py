"""What the user chose: the shape of the model and of its loss."""

from __future__ import annotations

from dataclasses import field
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import BertConfig

HEADS = ("mlm", "sbo")
LOSS_NORMALIZATIONS = ("tokens", "reference")
_DTYPES = ("float64", "float32", "float16", "bfloat16", "auto")

# The largest value of each size. No BERT comes near; a damaged or hostile file must not pass.
_SIZES = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 16,
    "num_hidden_layers": 512,
    "num_attention_heads": 1 << 12,
    "intermediate_size": 1 << 18,
    "max_position_embeddings": 1 << 20,
    "type_vocab_size": 1 << 16,
    "max_span_targets": 1 << 12,
    "span_position_embedding_size": 1 << 14,
}

# `base` and `large` are the paper's shapes (section 4.2); `tiny` and `small` are those of the small
# BERT models of Turc et al. 2019, which keep a head size of 64.
_PRESETS: dict[str, dict[str, int]] = {
    "tiny": {
        "num_hidden_layers": 2,
        "hidden_size": 128,
        "num_attention_heads": 2,
        "intermediate_size": 512,
    },
    "small": {
        "num_hidden_layers": 4,
        "hidden_size": 512,
        "num_attention_heads": 8,
        "intermediate_size": 2048,
    },
    "base": {
        "num_hidden_layers": 12,
        "hidden_size": 768,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
    },
    "large": {
        "num_hidden_layers": 24,
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
}
# What a saved folder calls our classes, so that plain transformers opens it without this package.
_ARCHITECTURES = {"Model": "BertForMaskedLM", "Backbone": "BertModel"}


@strict
class Config(BertConfig):  # type: ignore[no-untyped-call]
    """Settings of a `Model`: Hugging Face's `BertConfig` and what the span boundary objective adds.

    Raises:
        ValueError: A field is out of range, or asks for something this encoder does not do.
    """

    # Per-batch scalars and SBO rows would break the Trainer's concatenation over an evaluation set.
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "hidden_states",
        "attentions",
        "mlm_loss",
        "sbo_loss",
        "sbo_logits",
    ]

    max_span_targets: int = 15
    """K: slots of the SBO head; tokens of a span beyond it have an MLM loss only."""
    span_position_embedding_size: int = 200
    """Size of the vector that tells the SBO head which token of the span it predicts."""
    sbo_weight: float | int = 1.0
    """Weight of the SBO loss next to the MLM loss."""
    loss_normalization: str = "tokens"
    """"tokens": all losses summed, per MLM label (the paper, section 3.2). "reference": the sum of
    two means, as the released code computes it."""
    attention_window: int | None = None
    """A token sees those at a distance of at most this, on each side; None: its whole sequence.
    Longformer counts both sides: its 512 is 256 here."""
    untrained_heads: list[str] = field(default_factory=list)
    """Heads, of "mlm" and "sbo", that hold random weights because no file had them."""

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
        self._check_sizes()
        self._check_choices()

    def _number(self, name: str) -> float:
        if not isinstance(value := getattr(self, name), int | float):
            raise TypeError(f"{name} must be a number, got {value!r}")
        return value

    def _check_sizes(self) -> None:
        for name, largest in _SIZES.items():
            if self._number(name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
            if self._number(name) > largest:
                raise ValueError(f"{name} must be at most {largest}, got {getattr(self, name)}")
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"pad_token_id must be in [0, vocab_size={self.vocab_size}), got "
                f"{self.pad_token_id}"
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                "hidden_size must be a multiple of num_attention_heads "
                f"({self.num_attention_heads}), got {self.hidden_size}"
            )
        if self.attention_window is not None and self._number("attention_window") < 1:
            raise ValueError(
                "attention_window must be None or at least 1 (tokens on each side), got "
                f"{self.attention_window}"
            )
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            if not 0 <= (probability := self._number(name)) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {probability}")
        if not self._number("layer_norm_eps") > 0:
            raise ValueError(f"layer_norm_eps must be positive, got {self.layer_norm_eps}")
        if not 0 <= self._number("sbo_weight") < float("inf"):
            raise ValueError(f"sbo_weight must be finite and not negative, got {self.sbo_weight}")

    def _check_choices(self) -> None:
        choices: dict[str, tuple[object, ...]] = {
            "hidden_act": ("gelu",),
            "is_decoder": (False,),
            "add_cross_attention": (False,),
            "loss_normalization": LOSS_NORMALIZATIONS,
            # Old BERT configurations carry this one; its relative forms have more weights.
            "position_embedding_type": ("absolute",),
        }
        for name, allowed in choices.items():
            if (value := getattr(self, name, allowed[0])) not in allowed:
                listed = " or ".join(map(repr, allowed))
                raise ValueError(f"{name} must be {listed}, got {value!r}")
        if unknown := [head for head in self.untrained_heads if head not in HEADS]:
            raise ValueError(f"untrained_heads may hold {HEADS}, got {unknown[0]!r}")

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """The configuration of a folder or hub repository; as in Hugging Face.

        Raises:
            ValueError: The file holds no configuration of a BERT, or one that is out of range.
        """
        try:
            return super().from_pretrained(*args, **kwargs)
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{args[0] if args else cls.__name__}: config.json: {error}"
            ) from error

    @classmethod
    def from_dict(cls, config_dict: Any, **kwargs: Any) -> Any:
        """The configuration with these fields; as in Hugging Face.

        Raises:
            ValueError: A field has a wrong type, is out of range, or it is no BERT's configuration.
        """
        if not isinstance(config_dict, dict):
            raise ValueError(f"must be a JSON object, got a {type(config_dict).__name__}")
        if (kind := config_dict.get("model_type", "bert")) != "bert":
            raise ValueError(f"model_type must be 'bert', got {kind!r}")
        names = config_dict.get("architectures")
        if names is not None and not (isinstance(names, list) and set(map(type, names)) <= {str}):
            raise ValueError(f"architectures must be a list of names, got {names!r}")
        number = config_dict.get("dtype", config_dict.get("torch_dtype"))
        if isinstance(number, str) and number.removeprefix("torch.") not in _DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {number!r}")
        try:
            return super().from_dict(config_dict, **kwargs)
        except (StrictDataclassError, TypeError, AttributeError) as error:
            raise ValueError(" ".join(str(error).split())) from error

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> Config:
        """The configuration called `name`, with some fields replaced.

        Args:
            name: "tiny" (a demonstration on two CPU cores), "small", "base" or "large".
            overrides: Any field. The vocabulary has 28,996 entries, as BERT's cased one, unless
                given here.

        Raises:
            ValueError: No preset has this name, or an override is out of range.
        """
        if name not in _PRESETS:
            raise ValueError(f"preset must be one of {', '.join(_PRESETS)}, got {name!r}")
        return cls(**{"vocab_size": 28996, **_PRESETS[name], **overrides})

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values; `architectures` names Hugging Face's class for the weights."""
        values: dict[str, Any] = super().to_dict()
        names = values.get("architectures") or ["Model"]
        values["architectures"] = [_ARCHITECTURES.get(name, name) for name in names]
        return values
