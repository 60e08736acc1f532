"""Triton kernels of the product with the vocabulary; `kernels.cross_entropy` launches them."""

from __future__ import annotations

import triton
import triton.language as tl

from spanbert_fast.kernels.common import COUNTS

_COUNTS = (
    *COUNTS,
    "num_mlm",
    "num_row_blocks",
    "blocks_per_part",
    "num_parts",
    "first_class",
    "ignore_index",
)


@triton.jit
def _row_block(block, num_mlm, num_rows, ROWS: tl.constexpr):
    """Rows of a block, which of them exist, and 1 for SBO rows: no block has both kinds."""
    num_mlm_blocks = tl.cdiv(num_mlm, ROWS)
    is_sbo = (block >= num_mlm_blocks).to(tl.int32)
    start = (block - is_sbo * num_mlm_blocks) * ROWS + is_sbo * num_mlm
    end = tl.where(is_sbo != 0, num_rows, num_mlm)
    rows = start + tl.arange(0, ROWS)
    return rows.to(tl.int64), rows < end, is_sbo


@triton.jit
def _logits(
    rows_ptr,
    weight_ptr,
    biases_ptr,
    rows,
    is_row,
    classes,
    is_class,
    is_sbo,
    num_classes,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Logits of some rows for some classes, float32; -inf past the vocabulary."""
    logits = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, SIZE, INNER):
        inner = start + tl.arange(0, INNER)
        left_mask, right_mask = is_row[:, None], is_class[None, :]
        if SIZE % INNER:
            left_mask &= (inner < SIZE)[None, :]
            right_mask &= (inner < SIZE)[:, None]
        left = tl.load(rows_ptr + rows[:, None] * SIZE + inner[None, :], mask=left_mask, other=0.0)
        right = tl.load(
            weight_ptr + classes[None, :] * SIZE + inner[:, None], mask=right_mask, other=0.0
        )
        logits = tl.dot(left, right, logits, input_precision=PRECISION)
    bias = tl.load(biases_ptr + is_sbo * num_classes + classes, mask=is_class, other=float("-inf"))
    return logits + bias[None, :]


@triton.jit(do_not_specialize=_COUNTS)
def score_vocabulary(
    rows_ptr,
    weight_ptr,
    biases_ptr,
    targets_ptr,
    class_weight_ptr,
    parts_ptr,
    best_ptr,
    num_mlm,
    num_rows,
    num_classes,
    num_row_blocks,
    blocks_per_part,
    SMOOTH: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One part of the vocabulary: maximum, sum of exponentials, target's logit, sum, best class."""
    # Programs that run at the same time share a part of the matrix, not a block of rows.
    block = tl.program_id(0) % num_row_blocks
    part = tl.program_id(0) // num_row_blocks
    rows, is_row, is_sbo = _row_block(block, num_mlm, num_rows, ROWS)
    targets = tl.load(targets_ptr + rows, mask=is_row, other=-1)
    maximum = tl.full((ROWS,), float("-inf"), tl.float32)
    exponentials = tl.zeros((ROWS,), tl.float32)
    at_target = tl.zeros((ROWS,), tl.float32)
    weighted = tl.zeros((ROWS,), tl.float32)
    best = tl.zeros((ROWS,), tl.int32)
    for index in range(blocks_per_part):
        first = (part * blocks_per_part + index) * COLUMNS
        classes = first + tl.arange(0, COLUMNS)
        is_class = classes < num_classes
        logits = _logits(
            rows_ptr,
            weight_ptr,
            biases_ptr,
            rows,
            is_row,
            classes.to(tl.int64),
            is_class,
            is_sbo,
            num_classes,
            SIZE,
            ROWS,
            COLUMNS,
            INNER,
            PRECISION,
        )
        highest = tl.max(logits, axis=1)
        place = tl.where(logits == highest[:, None], classes[None, :], 2147483647)
        best = tl.where(highest > maximum, tl.min(place, axis=1), best)
        higher = tl.maximum(maximum, highest)
        exponentials *= tl.exp(maximum - higher)
        exponentials += tl.sum(tl.exp(logits - higher[:, None]), axis=1)
        maximum = higher
        is_target = classes[None, :] == targets[:, None]
        at_target += tl.sum(tl.where(is_target, logits, 0.0), axis=1)
        if SMOOTH:
            terms = tl.where(is_class[None, :], logits, 0.0)
            if class_weight_ptr is not None:
                factors = tl.load(class_weight_ptr + classes, mask=is_class, other=0.0)
                terms *= factors[None, :]
            weighted += tl.sum(terms, axis=1)
    out = parts_ptr + part.to(tl.int64) * (4 * num_rows) + rows
    tl.store(out, maximum, mask=is_row)
    tl.store(out + num_rows, exponentials, mask=is_row)
    tl.store(out + 2 * num_rows, at_target, mask=is_row)
    if SMOOTH:
        tl.store(out + 3 * num_rows, weighted, mask=is_row)
    tl.store(best_ptr + part.to(tl.int64) * num_rows + rows, best, mask=is_row)


@triton.jit
def _target_weight(targets, is_row, class_weight_ptr, num_classes, smoothing, ignore_index):
    """Factor of -log p(target), and label smoothing per class; 0 for rows that count nothing."""
    is_valid = is_row & (targets != ignore_index)
    is_class = (targets >= 0) & (targets < num_classes)
    weight = tl.where(is_class, 1.0, float("nan"))
    if class_weight_ptr is not None:
        weight *= tl.load(class_weight_ptr + targets, mask=is_valid & is_class, other=0.0)
    certain = tl.where(is_valid, weight * (1.0 - smoothing), 0.0)
    return certain, tl.where(is_valid, smoothing / num_classes, 0.0)


@triton.jit(do_not_specialize=_COUNTS)
def merge_parts(
    parts_ptr,
    best_ptr,
    targets_ptr,
    class_weight_ptr,
    class_total_ptr,
    loss_ptr,
    correct_ptr,
    lse_ptr,
    num_rows,
    num_classes,
    num_parts,
    ignore_index,
    smoothing,
    SMOOTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Loss, correctness and log-sum-exp of each row from the parts of the vocabulary."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row = rows < num_rows
    maximum = tl.full((ROWS,), float("-inf"), tl.float32)
    exponentials = tl.zeros((ROWS,), tl.float32)
    at_target = tl.zeros((ROWS,), tl.float32)
    weighted = tl.zeros((ROWS,), tl.float32)
    best = tl.zeros((ROWS,), tl.int32)
    source = parts_ptr + rows
    best_source = best_ptr + rows
    for _ in range(num_parts):
        highest = tl.load(source, mask=is_row, other=0.0)
        place = tl.load(best_source, mask=is_row, other=0)
        best = tl.where(highest > maximum, place, best)
        higher = tl.maximum(maximum, highest)
        sums = tl.load(source + num_rows, mask=is_row, other=1.0)
        exponentials = exponentials * tl.exp(maximum - higher) + sums * tl.exp(highest - higher)
        maximum = higher
        at_target += tl.load(source + 2 * num_rows, mask=is_row, other=0.0)
        if SMOOTH:
            weighted += tl.load(source + 3 * num_rows, mask=is_row, other=0.0)
        source += 4 * num_rows
        best_source += num_rows
    lse = maximum + tl.log(exponentials)
    targets = tl.load(targets_ptr + rows, mask=is_row, other=-1)
    certain, spread = _target_weight(
        targets, is_row, class_weight_ptr, num_classes, smoothing, ignore_index
    )
    loss = certain * (lse - at_target)
    if SMOOTH:
        loss += spread * (lse * tl.load(class_total_ptr) - weighted)
    # Ignored rows count nothing, even where their logits are not finite.
    loss = tl.where(targets == ignore_index, 0.0, loss)
    tl.store(loss_ptr + rows, loss, mask=is_row)
    tl.store(lse_ptr + rows, lse, mask=is_row)
    is_correct = (best == targets) & (targets != ignore_index)
    tl.store(correct_ptr + rows, is_correct, mask=is_row)


@triton.jit(do_not_specialize=_COUNTS)
def slope_of_logits(
    rows_ptr,
    weight_ptr,
    biases_ptr,
    targets_ptr,
    class_weight_ptr,
    class_total_ptr,
    lse_ptr,
    dloss_ptr,
    slope_ptr,
    dbias_ptr,
    num_mlm,
    num_rows,
    num_classes,
    num_row_blocks,
    first_class,
    slope_stride,
    ignore_index,
    smoothing,
    SMOOTH: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Slope of the loss in each logit of a chunk of the vocabulary: [rows, slope_stride].

    Also the sums over each block of rows, for the biases: [blocks, classes], float32.
    """
    block = tl.program_id(0) % num_row_blocks
    place = tl.program_id(0) // num_row_blocks * COLUMNS + tl.arange(0, COLUMNS)
    rows, is_row, is_sbo = _row_block(block, num_mlm, num_rows, ROWS)
    classes = (first_class + place).to(tl.int64)
    is_class = classes < num_classes
    logits = _logits(
        rows_ptr,
        weight_ptr,
        biases_ptr,
        rows,
        is_row,
        classes,
        is_class,
        is_sbo,
        num_classes,
        SIZE,
        ROWS,
        COLUMNS,
        INNER,
        PRECISION,
    )
    targets = tl.load(targets_ptr + rows, mask=is_row, other=-1)
    lse = tl.load(lse_ptr + rows, mask=is_row, other=0.0)
    dloss = tl.load(dloss_ptr + rows, mask=is_row, other=0.0).to(tl.float32)
    certain, spread = _target_weight(
        targets, is_row, class_weight_ptr, num_classes, smoothing, ignore_index
    )
    certain *= dloss
    factor = certain
    if SMOOTH:
        spread *= dloss
        factor += spread * tl.load(class_total_ptr)
    # The difference is taken before it is rounded: rounding the probability first would lose it.
    is_target = classes[None, :] == targets[:, None]
    slope = tl.exp(logits - lse[:, None]) * factor[:, None]
    slope -= tl.where(is_target, certain[:, None], 0.0)
    if SMOOTH:
        if class_weight_ptr is not None:
            factors = tl.load(class_weight_ptr + classes, mask=is_class, other=0.0)
            slope -= spread[:, None] * factors[None, :]
        else:
            slope -= spread[:, None]
    is_counted = is_row & (targets != ignore_index)
    slope = tl.where(is_counted[:, None] & is_class[None, :], slope, 0.0)
    # Past the vocabulary the chunk is filled with zeros, so that products need not look.
    out = slope_ptr + rows[:, None] * slope_stride + place[None, :]
    tl.store(
        out,
        slope.to(slope_ptr.dtype.element_ty),
        mask=is_row[:, None] & (place < slope_stride)[None, :],
    )
    sums = dbias_ptr + block.to(tl.int64) * num_classes + classes
    tl.store(sums, tl.sum(slope, axis=0), mask=is_class)


@triton.jit(do_not_specialize=_COUNTS)
def gradient_of_rows(
    slope_ptr,
    weight_ptr,
    drows_ptr,
    num_rows,
    num_classes,
    first_class,
    slope_stride,
    ADD: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What a chunk of the vocabulary gives to the gradient of the rows, float32: slope weight."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_row, is_column = rows < num_rows, columns < SIZE
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, slope_stride, INNER):
        place = start + tl.arange(0, INNER)
        classes = (first_class + place).to(tl.int64)
        left = tl.load(
            slope_ptr + rows[:, None] * slope_stride + place[None, :],
            mask=is_row[:, None] & (place < slope_stride)[None, :],
            other=0.0,
        )
        right = tl.load(
            weight_ptr + classes[:, None] * SIZE + columns[None, :],
            mask=(classes < num_classes)[:, None] & is_column[None, :],
            other=0.0,
        )
        total = tl.dot(left, right, total, input_precision=PRECISION)
    out = drows_ptr + rows[:, None] * SIZE + columns[None, :]
    mask = is_row[:, None] & is_column[None, :]
    if ADD:
        total += tl.load(out, mask=mask, other=0.0)
    tl.store(out, total, mask=mask)


@triton.jit(do_not_specialize=_COUNTS)
def gradient_of_weight(
    slope_ptr,
    rows_ptr,
    dweight_ptr,
    num_rows,
    num_classes,
    first_class,
    slope_stride,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of a chunk of the vocabulary matrix: slope^T rows, summed in float32."""
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = columns < SIZE
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, num_rows, INNER):
        rows = (start + tl.arange(0, INNER)).to(tl.int64)
        is_row = rows < num_rows
        left = tl.load(
            slope_ptr + rows[None, :] * slope_stride + place[:, None],
            mask=(place < slope_stride)[:, None] & is_row[None, :],
            other=0.0,
        )
        right = tl.load(
            rows_ptr + rows[:, None] * SIZE + columns[None, :],
            mask=is_row[:, None] & is_column[None, :],
            other=0.0,
        )
        total = tl.dot(left, right, total, input_precision=PRECISION)
    classes = (first_class + place).to(tl.int64)
    out = dweight_ptr + classes[:, None] * SIZE + columns[None, :]
    mask = ((place < slope_stride) & (classes < num_classes))[:, None] & is_column[None, :]
    tl.store(out, total.to(dweight_ptr.dtype.element_ty), mask=mask)
