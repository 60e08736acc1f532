// Rows of a token store, read once, to a masked packed batch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "span_masker.h"

namespace spanbert_fast {

// Row r of a store is values[offsets[r]:offsets[r + 1]], tokens without [CLS] and [SEP].
template <typename Value>
struct RowInput {
  std::span<const Value> values;
  std::span<const std::int64_t> offsets;
  std::span<const std::int64_t> rows;
  const std::int64_t* example_ids;
};

// What assemble writes: cu[B] input ids and positions.
struct AssembledTokens {
  std::int32_t cls_token_id;
  std::int32_t sep_token_id;
  std::int64_t* input_ids;
  std::int64_t* position_ids;
};

// Where the rows of a batch stand.
struct PackedRows {
  std::vector<std::int64_t> begins;  // [B] in the values
  std::vector<std::int32_t> cu;      // [B + 1] in the batch, with [CLS] and [SEP]
};

// Finds the rows and refuses those that the store does not have.
template <typename Value>
PackedRows find_rows(const RowInput<Value>& input);

// Writes each row between [CLS] and [SEP], masked, and positions that begin at 0 in every row.
template <typename Value>
MaskedTargets assemble(const SpanMasker& masker, const RowInput<Value>& input, std::uint32_t epoch,
                       const PackedRows& rows, const AssembledTokens& out, std::size_t num_threads);

}  // namespace spanbert_fast
