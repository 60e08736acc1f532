"""What a user may choose of pre-training and evaluation, and how choices override one another."""

from __future__ import annotations

import dataclasses
import math
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from spanbert_fast.data.loss_weighting import LossWeighting
from spanbert_fast.train.presets import RECIPES
from spanbert_fast.train.scheme import Scheme, check_scheme, masking_table

Preset = Literal["tiny", "small", "base", "large"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
Device = Literal["auto", "cpu", "cuda"]
Value = bool | int | float | str

MASKING_KEYS = (
    "mask_ratio",
    "geometric_p",
    "min_span_words",
    "max_span_words",
    "scheme",
    "replacement",
)
MICRO_BATCH_TOKENS = 16_384
"""Rows of a micro-batch that fit the activations of a base model into a few gigabytes."""


@dataclass(frozen=True, kw_only=True)
class PretrainOptions:
    """Pre-train a model. What is left out comes from the file of `config`, then from the preset."""

    data: Path | None = None
    """Folder of token shards that `prepare` wrote. Needed."""
    output: Path | None = None
    """Folder of the run; an interrupted run there is continued. Needed."""
    preset: Preset | None = None
    """Size and recipe; tiny unless given."""
    config: Path | None = None
    """TOML file with any of these options, and tables [model], [masking] and [weighting]."""
    init: str | None = None
    """Continue from this BERT or SpanBERT folder, or hub name, instead of random weights."""
    seed: int | None = None
    """Seed of weights, order, masks and dropout; 0 unless given."""
    seq_length: int | None = None
    """Refuse shards whose longest sequence is another; their length counts in any case."""
    attention_window: int | None = None
    """A token sees others at a distance of at most this; all of its sequence unless given."""
    steps: int | None = None
    """Optimizer steps."""
    global_batch_tokens: int | None = None
    """Real tokens per optimizer step."""
    micro_batches: int | None = None
    """Parts into which a step is split (accumulation); chosen by size unless given."""
    learning_rate: float | None = None
    """Peak of the schedule."""
    warmup_steps: int | None = None
    """Steps of linear warm-up; linear decay to 0 follows."""
    weight_decay: float | None = None
    """Decoupled decay, on matrices only."""
    clip_norm: float | None = None
    """Largest global norm of the gradient."""
    reference_optimizer: bool | None = None
    """Decay every parameter and use epsilon 1e-8, as the released command does."""
    unigram_bias: bool | None = None
    """Begin with output biases at the logarithm of the token counts instead of at 0."""
    scheme: Scheme | None = None
    """What is masked: random spans (spanbert), words, tokens, or predicted spans (segments)."""
    segment_every: int | None = None
    """Steps between two predictions of spans by the model; for segments alone, which need it."""
    log_every: int | None = None
    """Steps between two lines of metrics."""
    eval_every: int | None = None
    """Steps between two evaluations; 0: none at all."""
    eval_blocks: int | None = None
    """Held-out blocks of an evaluation, rounded up to whole batches; 2048 unless given, 0: all."""
    save_every: int | None = None
    """Steps between two checkpoints."""
    keep_checkpoints: int | None = None
    """Checkpoints kept; 2 unless given."""
    threads: int | None = None
    """CPU threads; as many as torch takes by itself, but 1 for tiny, unless given."""
    device: Device | None = None
    """Where the model runs; auto: CUDA if there is one."""
    precision: Precision | None = None
    """auto: bf16 where the hardware has the instruction, else fp32 (fp16 on older GPUs)."""
    activation_checkpointing: bool | None = None
    """Recompute activations in the backward pass: less memory, a third more work."""
    compile: bool | None = None
    """Compile the model with torch.compile."""
    language: str | None = None
    """Language code for the model card, for example en."""
    allow_inexact_resume: bool = False
    """Continue a run even if versions, threads or settings changed, so that results may differ."""
    model: dict[str, Value] = field(default_factory=dict)
    """Fields of the model that differ from the preset, for example num_hidden_layers 4."""
    masking: dict[str, Value] = field(default_factory=dict)
    """Settings of the span masker that differ from its defaults, for example mask_ratio 0.2."""
    weighting: dict[str, Value] = field(default_factory=dict)
    """Weights of the targets in the loss, for example sequence_length 0.5; all 1 unless given."""

    def __post_init__(self) -> None:
        LossWeighting.of(self.weighting)
        if unknown := sorted(set(self.masking) - set(MASKING_KEYS)):
            raise ValueError(f"masking knows {', '.join(MASKING_KEYS)}; got {', '.join(unknown)}")


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Evaluate a model on held-out blocks; every model meets the same masks."""

    model: str
    """Folder or hub name of a SpanBERT or BERT model."""
    data: Path
    """Folder of token shards that `prepare` wrote."""
    split: Literal["validation", "train"] = "validation"
    """Blocks to evaluate on."""
    max_blocks: int = 0
    """Evaluate on this many of the first blocks, rounded up to whole batches; 0: on all."""
    threads: int | None = None
    """CPU threads; as many as torch takes by itself unless given."""
    device: Device = "auto"
    """Where the model runs; auto: CUDA if there is one."""

    def __post_init__(self) -> None:
        if self.max_blocks < 0:
            raise ValueError(f"max_blocks must not be negative, got {self.max_blocks}")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads must be at least 1, got {self.threads}")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The options of one run with nothing left open; field for field as `PretrainOptions`.

    Only `fit_heads` makes those with the preset "heads" and a frozen encoder.
    """

    data: Path
    output: Path
    preset: str
    init: str | None
    seed: int
    steps: int
    global_batch_tokens: int
    micro_batches: int
    learning_rate: float
    warmup_steps: int
    weight_decay: float
    clip_norm: float
    reference_optimizer: bool
    unigram_bias: bool
    log_every: int
    eval_every: int
    eval_blocks: int
    save_every: int
    keep_checkpoints: int
    threads: int
    device: str
    precision: str
    activation_checkpointing: bool
    compile: bool
    language: str | None
    model: dict[str, Value]
    masking: dict[str, Value]
    freeze_encoder: bool = False
    weighting: LossWeighting = field(default_factory=LossWeighting)
    seq_length: int | None = None
    segment_every: int | None = None

    def __post_init__(self) -> None:
        for name in ("data", "output"):
            if not isinstance(getattr(self, name), Path):
                raise ValueError(f"{name} must be a folder, got {getattr(self, name)!r}")
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        for name in ("learning_rate", "clip_norm", "weight_decay"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"{name} must be a number, got {value!r}")
            if not (0 <= value < math.inf) or (value == 0 and name != "weight_decay"):
                raise ValueError(f"{name} must be finite and positive, got {value}")
        for name in ("reference_optimizer", "unigram_bias", "activation_checkpointing", "compile"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")
        check_scheme(self.masking, self.segment_every, freeze_encoder=self.freeze_encoder)
        if self.warmup_steps >= self.steps:
            raise ValueError(
                f"warmup_steps must be below steps ({self.steps}), got {self.warmup_steps}"
            )

    def as_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        values = dataclasses.asdict(self)
        return {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}


_CHOICES: dict[str, tuple[str, ...]] = {
    "preset": (*get_args(Preset), "heads"),
    "precision": get_args(Precision),
    "device": get_args(Device),
}
_LEAST = {
    "seed": 0,
    "steps": 1,
    "global_batch_tokens": 1,
    "micro_batches": 1,
    "warmup_steps": 0,
    "log_every": 1,
    "eval_every": 0,
    "eval_blocks": 0,
    "save_every": 1,
    "keep_checkpoints": 1,
    "threads": 1,
}
_DEFAULTS: dict[str, Any] = {
    "preset": "tiny",
    "init": None,
    "seed": 0,
    "reference_optimizer": False,
    "eval_blocks": 2_048,
    "keep_checkpoints": 2,
    "language": None,
    "device": "auto",
    "activation_checkpointing": False,
    "compile": False,
}
_TABLES = ("model", "masking", "weighting")


def read_config(path: Path) -> dict[str, Any]:
    """The options in a TOML file.

    Raises:
        ValueError: The file is no TOML, or has a key that is no option; all options are listed.
    """
    known = {f.name for f in dataclasses.fields(PretrainOptions)} - {"config"}
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is no TOML file: {error}") from error
    if unknown := sorted(set(values) - known):
        raise ValueError(
            f"{path} has the unknown option {unknown[0]!r}; known are {', '.join(sorted(known))}"
        )
    for table in _TABLES:
        if not isinstance(values.get(table, {}), dict):
            raise ValueError(f"{path}: [{table}] must be a table, got {values[table]!r}")
    for name in ("data", "output"):
        if isinstance(values.get(name), str):
            values[name] = Path(values[name])
    return values


def resolve(options: PretrainOptions) -> tuple[Settings, bool]:
    """The settings of a run, and whether it may be resumed inexactly.

    What was given in `options` wins over the file, the file over the preset, the preset over the
    defaults. The tables `model`, `masking` and `weighting` are merged key by key.

    Raises:
        ValueError: An option is missing, unknown or out of range.
    """
    file = read_config(options.config) if options.config else {}
    PretrainOptions(masking=file.get("masking", {}))
    given = {f.name: getattr(options, f.name) for f in dataclasses.fields(PretrainOptions)}
    chosen = file | {name: value for name, value in given.items() if value is not None}
    for table in _TABLES:
        chosen[table] = file.get(table, {}) | given[table]
    chosen["weighting"] = LossWeighting.of(chosen["weighting"])
    if (window := chosen.get("attention_window")) is not None:
        chosen["model"]["attention_window"] = window
    chosen["masking"] = masking_table(file) | masking_table(given)
    inexact = options.allow_inexact_resume or file.get("allow_inexact_resume", False)
    preset = chosen.get("preset", _DEFAULTS["preset"])
    if preset not in RECIPES:
        raise ValueError(f"preset must be one of {tuple(RECIPES)}, got {preset!r}")
    recipe = dataclasses.asdict(RECIPES[preset])
    if not chosen.get("init"):  # foreign weights bring their own configuration
        chosen["model"] = recipe["model"] | chosen["model"]
    values = _DEFAULTS | recipe | chosen
    if values["threads"] is None:
        import torch  # heavy, and the command line reads this file for its help

        values["threads"] = torch.get_num_threads()
    if isinstance(tokens := values["global_batch_tokens"], int):
        values.setdefault("micro_batches", max(1, math.ceil(tokens / MICRO_BATCH_TOKENS)))
    if missing := [name for name in ("data", "output") if name not in values]:
        raise ValueError(f"{missing[0]} must be given, on the command line or in the file")
    names = {f.name for f in dataclasses.fields(Settings)}
    return Settings(**{name: value for name, value in values.items() if name in names}), inexact
