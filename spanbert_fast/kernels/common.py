"""What all kernels share: random words, launch conventions, the dtypes they take.

Conventions of this room. An operator is a `torch.library.custom_op` that allocates its results and
launches inside `launch_on`; it reads nothing on the host but shapes and Python numbers. Every
launch names `num_warps`, `num_stages` and `enable_fp_fusion` (Triton's default for the last is
about to change, and with it the numbers). Arguments that differ from batch to batch stand in
`COUNTS`, so that no value of theirs compiles another variant; strides do not, because their
divisibility by 16 is what allows 16-byte loads. Offsets of rows are int64.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

COUNTS = (
    "num_tokens",
    "num_rows",
    "num_sequences",
    "num_heads",
    "num_blocks",
    "rows_per_program",
    "search_steps",
    "site",
    "threshold",
    "window",
)
"""Names of kernel arguments that Triton must not specialise on."""

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""What the kernels compute in; sums are always float32."""

# What settings are chosen for where there is no GPU: the interpreter and the simulator.
_ARCHITECTURE_WITHOUT_GPU = 80
# What they are chosen for inside `settings_for`.
_ahead: int | None = None


@triton.jit
def philox4x32(seed, counter0, counter1, counter2, counter3):
    """Four uint32 words of Philox4x32-10; counters broadcast and are taken mod 2^32.

    Args:
        seed: int64 scalar, the key (low word, high word).
        counter0: int32 or uint32, as the other three.
        counter1: See `counter0`.
        counter2: See `counter0`.
        counter3: See `counter0`.
    """
    key0 = seed.to(tl.uint32)
    key1 = (seed >> 32).to(tl.uint32)
    word0 = counter0.to(tl.uint32)
    word1 = counter1.to(tl.uint32)
    word2 = counter2.to(tl.uint32)
    word3 = counter3.to(tl.uint32)
    for _ in tl.static_range(10):
        # Both halves of a product come from one instruction if it is written as one product.
        product0 = word0.to(tl.uint64) * 0xD2511F53
        product1 = word2.to(tl.uint64) * 0xCD9E8D57
        word0 = (product1 >> 32).to(tl.uint32) ^ word1 ^ key0
        word1 = product1.to(tl.uint32)
        word2 = (product0 >> 32).to(tl.uint32) ^ word3 ^ key1
        word3 = product0.to(tl.uint32)
        key0 += 0x9E3779B9
        key1 += 0xBB67AE85
    return word0, word1, word2, word3


@triton.jit
def philox_lanes(seed, counter0, counter1, counter2, counter3):
    """Eight 16-bit lanes of each counter, each in the high half of a uint32: [..., 2, 2, 2].

    The last three axes are the bits of the lane's number, high to low. Compare with
    `threshold << 16`: a lane is below the threshold iff the word is, whatever its low half.
    """
    word0, word1, word2, word3 = philox4x32(seed, counter0, counter1, counter2, counter3)
    words = tl.join(tl.join(word0, word2), tl.join(word1, word3))
    return tl.join(words << 16, words)


@triton.jit
def keep_probability(threshold):
    """The true probability of keeping, exact."""
    return (65536 - threshold).to(tl.float32) * (1.0 / 65536.0)


@triton.jit
def keep_scale(threshold):
    """Factor of what dropout keeps: 1 / (the true probability of keeping)."""
    return 65536.0 / (65536 - threshold).to(tl.float32)


def launch_on(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's GPU the current one, which is where Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def architecture(device: torch.device) -> int:
    """Compute capability as a number, such as 80, 90 or 100."""
    if device.type != "cuda":
        return _ARCHITECTURE_WITHOUT_GPU if _ahead is None else _ahead
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@contextmanager
def settings_for(arch: int) -> Iterator[None]:
    """Launches on CPU tensors have the settings of a GPU of this compute capability inside."""
    global _ahead
    before, _ahead = _ahead, arch
    try:
        yield
    finally:
        _ahead = before


def product_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that `tensor` has as an operand of a matrix product: under autocast, autocast's."""
    if torch.is_autocast_enabled(tensor.device.type):
        return torch.get_autocast_dtype(tensor.device.type)
    return tensor.dtype


def check_dtype(name: str, tensor: Tensor) -> None:
    """Raises where a kernel cannot compute in the dtype of `tensor`.

    Raises:
        TypeError: The dtype is none of `DTYPES`.
    """
    if tensor.dtype not in DTYPES:
        allowed = ", ".join(str(dtype) for dtype in DTYPES)
        raise TypeError(
            f"{name} has dtype {tensor.dtype}, allowed in a Triton kernel are {allowed}; "
            "use_backend('torch') takes others"
        )


def dropout_threshold(p: float) -> int:
    """The number of 16-bit lanes, of 65,536, that mean "dropped".

    Raises:
        ValueError: `p` is outside [0, 1), or so close to 1 that nothing would be kept.
    """
    threshold = round(p * 65536) if 0.0 <= p < 1.0 else 65536
    if threshold == 65536:
        raise ValueError(f"dropout_p is {p}, allowed is 0 <= dropout_p <= 65535/65536")
    return threshold
