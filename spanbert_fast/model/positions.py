"""The position table: what a model says to a text beyond it, and how it is made longer.

Shapes: P positions of a table, Q of a longer one, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spanbert_fast.config import Config

POSITION_EXTENSIONS = ("interpolate", "tile")

LONGER_TEXTS = (
    "Three ways lead to longer texts: overlapping windows (windows=True of fill_span, segment and "
    "span_embeddings, --windows on the command line); a longer position table with a local "
    "attention window, for time and memory linear in the length (Model.from_pretrained(..., "
    "max_position_embeddings=4096, position_extension='tile', attention_window=256)); and a longer "
    "table without a window, which needs to be trained on"
)
"""The end of a message that refuses a text for its length."""


def check_extension(extension: object, num_positions: object) -> tuple[str, int]:
    """Both arguments, found valid.

    Raises:
        ValueError: The extension is unknown, or the number is missing or out of range.
        TypeError: The number is no int.
    """
    if extension not in POSITION_EXTENSIONS:
        allowed = " or ".join(map(repr, POSITION_EXTENSIONS))
        raise ValueError(f"position_extension must be {allowed}, got {extension!r}")
    if num_positions is None:
        raise ValueError(
            f"position_extension={extension!r} needs max_position_embeddings, the number of "
            "positions that there are to be"
        )
    if type(num_positions) is not int:
        raise TypeError(f"max_position_embeddings must be an int, got {num_positions!r}")
    Config(max_position_embeddings=num_positions)  # refuses what is out of range
    return str(extension), num_positions


@torch.no_grad()
def extended_table(table: Tensor, num_positions: int, extension: str) -> Tensor:
    """The longer table [Q, D], in the dtype of the given one [P, D].

    - "interpolate": row j is the table at j (P - 1) / (Q - 1), linear between its rows. First and
      last row keep their vectors, and so does every row that falls on one of the table.
    - "tile": row j is row j mod P (Beltagy et al. 2020, section 5): the table again and again, the
      last copy cut.

    Raises:
        ValueError: The new table would be shorter.
    """
    size = table.shape[0]
    if num_positions < size:
        raise ValueError(
            f"max_position_embeddings is {num_positions}, a table of {size} positions can only be "
            "made longer"
        )
    rows = torch.arange(num_positions, device=table.device)
    if extension == "tile" or num_positions == size:
        return table.index_select(0, rows % size)
    # In whole numbers, so that what falls on a row is that row to the bit.
    scaled = rows * (size - 1)
    low = scaled // (num_positions - 1)
    share = (scaled % (num_positions - 1)).double() / (num_positions - 1)
    wide = table.double()
    below = wide.index_select(0, low)
    above = wide.index_select(0, (low + 1).clamp(max=size - 1))
    return torch.lerp(below, above, share[:, None]).to(table.dtype)


def extend_positions(model: nn.Module, config: Config, num_positions: int, extension: str) -> None:
    """Makes the position table of a model longer, and its configuration say so.

    Args:
        model: With an `embeddings.position_embeddings`.
        config: Its configuration; a folder that is saved with it loads anywhere.
        num_positions: Q.
        extension: One of `POSITION_EXTENSIONS`.

    Raises:
        ValueError: The new table would be shorter.
    """
    table = model.get_submodule("embeddings.position_embeddings")
    assert isinstance(table, nn.Embedding)
    longer = extended_table(table.weight, num_positions, extension)
    table.weight = nn.Parameter(longer, requires_grad=table.weight.requires_grad)
    table.num_embeddings = config.max_position_embeddings = num_positions
