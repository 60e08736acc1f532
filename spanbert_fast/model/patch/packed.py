"""What a patched module is: Hugging Face's own, under a class that also takes packed rows.

The class derives from the module's own one and has its name, so that whatever looks at classes or
their names (saving, pipelines, the recording of hidden states) sees no difference.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, cast

from torch import Tensor, nn
from transformers.activations import GELUActivation

from spanbert_fast.model.encoder import is_plain
from spanbert_fast.model.inputs import PackedInputs
from spanbert_fast.model.layout import Layout

ATTENTIONS = ("sdpa", "eager")

_mixins: dict[str, type[Packed]] = {}
"""Name of a class of Hugging Face -> what a patched one does instead."""
_types: dict[type[nn.Module], type[Packed]] = {}
"""Class of a module -> its class when patched."""


class PackedCall(NamedTuple):
    """What patched modules hand down beside the rows."""

    layout: Layout
    inputs: PackedInputs
    states: list[Tensor] | None = None
    """Takes the input of each layer, [B, S, D]; None: nobody asks for them."""
    has_padding_token: bool = False
    """Whether the padding token stands in a place that is not padding."""
    layer: int = 0
    """Index of the layer."""


class Packed(nn.Module):
    """A patched module. Without a `PackedCall` it does what its own class does."""

    unpatched_class: ClassVar[type[nn.Module]]

    def __init_subclass__(cls, serves: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if serves is not None:
            _mixins[serves] = cls

    if TYPE_CHECKING:
        # The attributes are those of Hugging Face's class behind this one.
        def __getattr__(self, name: str) -> Any: ...

    def runs(self) -> str:
        """What this module computes with, in words; empty if others do."""
        return ""

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, so that it cannot be found by its name.
        state: Any = super().__reduce_ex__(protocol)
        return (_revive, (self.unpatched_class,), *state[2:])


def call_packed(module: nn.Module, *rows: Tensor | None, packed_call: PackedCall) -> Any:
    """`module(*rows)` on packed rows.

    Raises:
        TypeError: The module is not patched: it would mix the sequences.
    """
    if not isinstance(module, Packed):
        raise TypeError(
            f"a patched BERT contains a {type(module).__name__} that was put in after sf.patch; "
            "call sf.patch again"
        )
    return module(*rows, packed_call=packed_call)


def packed_type(own: type[nn.Module]) -> type[Packed]:
    """The class of a patched module whose class was `own`; the same one each time."""
    if own in _types:
        return _types[own]
    mixin = next(_mixins[base.__name__] for base in own.__mro__ if base.__name__ in _mixins)
    names = {
        "unpatched_class": own,
        "__new__": _new_unpatched,
        "__module__": own.__module__,
        "__qualname__": own.__qualname__,
        "__doc__": own.__doc__,
    }
    _types[own] = cast(type[Packed], type(own.__name__, (mixin, own), names))
    return _types[own]


def _new_unpatched(cls: type[Packed], *args: Any, **kwargs: Any) -> nn.Module:
    """`type(model)(config)` and `type(model).from_pretrained` make models that are not patched."""
    return cls.unpatched_class(*args, **kwargs)


def _revive(own: type[nn.Module]) -> nn.Module:
    return object.__new__(packed_type(own))


def is_fusable(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether `module` is plain and its parameters, all there, are ordinary tensors.

    Quantized and distributed tensors know how to be multiplied by a module, not how to be joined or
    handed to a kernel.
    """
    return is_plain(module, kind) and all(
        type(parameter) in (nn.Parameter, Tensor) for parameter in module._parameters.values()
    )


def is_exact_gelu(module: nn.Module) -> bool:
    """Whether calling `module` computes GELU by the Gaussian distribution function, only that."""
    if is_plain(module, nn.GELU):
        return getattr(module, "approximate", None) == "none"
    return is_plain(module, GELUActivation)


def window_of(config: Any) -> int | None:
    """The `attention_window` of one of our folders, which Hugging Face's configuration keeps.

    Raises:
        ValueError: It is neither None nor a number of tokens: somebody else's field of that name.
    """
    window = getattr(config, "attention_window", None)
    if window is None or (type(window) is int and window >= 1):
        return window
    raise ValueError(
        f"attention_window of a patched BERT must be None or at least 1 (tokens on each side), got "
        f"{window!r}"
    )


def dropout_of(module: nn.Module) -> float | None:
    """The probability of dropping; None if the module has to be called instead."""
    if not is_plain(module, nn.Dropout):
        return None
    return float(getattr(module, "p")) if module.training else 0.0  # noqa: B009


def called_modules(owner: nn.Module, **kinds: type[nn.Module]) -> str:
    """Which modules of `owner` are called instead of taking part in a fused operation."""
    others = [
        f"{name} ({_why_called(module, kind)})"
        for name, kind in kinds.items()
        if not is_fusable(module := owner.get_submodule(name), kind)
    ]
    return f"; called: {', '.join(others)}" if others else ""


def _why_called(module: nn.Module, kind: type[nn.Module]) -> str:
    name = f"{type(module).__module__.partition('.')[0]}.{type(module).__name__}"
    if type(module) is not kind:
        return name
    return f"{name} of other tensors" if is_plain(module, kind) else f"{name} with hooks"
