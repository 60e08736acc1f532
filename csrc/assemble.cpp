#include "assemble.h"

#include <exception>
#include <limits>
#include <stdexcept>
#include <string>

#include "parallel.h"
#include "sequence_masker.h"

namespace spanbert_fast {
namespace {

// Assembles rows [begin, end) of the batch and returns what went wrong.
template <typename Value>
SPANBERT_FAST_INLINE std::exception_ptr assemble_rows(const SpanMasker& masker,
                                                      const RowInput<Value>& input,
                                                      std::uint32_t epoch, const PackedRows& rows,
                                                      const AssembledTokens& out, std::size_t begin,
                                                      std::size_t end,
                                                      MaskedTargets& targets) noexcept try {
  SequenceMasker engine(masker, epoch, targets);
  engine.expect(rows.cu[end] - rows.cu[begin], end - begin);
  for (std::size_t index = begin; index < end; ++index) {
    const std::int64_t first = rows.cu[index];
    const std::int64_t last = rows.cu[index + 1] - 1;
    out.input_ids[first] = out.cls_token_id;
    engine.mask(Sequence<Value, std::int64_t>{
        .tokens = input.values.data() + rows.begins[index],
        .length = last - first - 1,
        .out = out.input_ids + first + 1,
        .packed_begin = first + 1,
        .example_id = input.example_ids[index],
        .tagged = {},
    });
    out.input_ids[last] = out.sep_token_id;
    for (std::int64_t position = first; position <= last; ++position) {
      out.position_ids[position] = position - first;
    }
  }
  return nullptr;
} catch (...) {
  return std::current_exception();
}

// Clones cannot be templates.
SPANBERT_FAST_CLONES
std::exception_ptr assemble_part(const SpanMasker& masker, const RowInput<std::uint16_t>& input,
                                 std::uint32_t epoch, const PackedRows& rows,
                                 const AssembledTokens& out, std::size_t begin, std::size_t end,
                                 MaskedTargets& targets) noexcept {
  return assemble_rows(masker, input, epoch, rows, out, begin, end, targets);
}

SPANBERT_FAST_CLONES
std::exception_ptr assemble_part(const SpanMasker& masker, const RowInput<std::int32_t>& input,
                                 std::uint32_t epoch, const PackedRows& rows,
                                 const AssembledTokens& out, std::size_t begin, std::size_t end,
                                 MaskedTargets& targets) noexcept {
  return assemble_rows(masker, input, epoch, rows, out, begin, end, targets);
}

}  // namespace

template <typename Value>
PackedRows find_rows(const RowInput<Value>& input) {
  const auto num_rows = static_cast<std::int64_t>(input.offsets.size()) - 1;
  PackedRows rows;
  rows.begins.reserve(input.rows.size());
  rows.cu.reserve(input.rows.size() + 1);
  rows.cu.push_back(0);
  std::int64_t total = 0;
  for (std::size_t index = 0; index < input.rows.size(); ++index) {
    const std::int64_t row = input.rows[index];
    if (row < 0 || row >= num_rows) {
      throw std::invalid_argument("rows[" + std::to_string(index) + "] is " + std::to_string(row) +
                                  ", must be in [0, " + std::to_string(num_rows) + ")");
    }
    const std::int64_t begin = input.offsets[static_cast<std::size_t>(row)];
    const std::int64_t end = input.offsets[static_cast<std::size_t>(row) + 1];
    if (begin < 0 || end < begin || end > static_cast<std::int64_t>(input.values.size())) {
      throw std::invalid_argument("offsets[" + std::to_string(row) + ":" + std::to_string(row + 2) +
                                  "] are " + std::to_string(begin) + " and " + std::to_string(end) +
                                  ", must not decrease and be in [0, " +
                                  std::to_string(input.values.size()) + "]");
    }
    total += end - begin + 2;
    if (total > std::numeric_limits<std::int32_t>::max()) {
      throw std::invalid_argument("rows[:" + std::to_string(index + 1) + "] have " +
                                  std::to_string(total) +
                                  " tokens, a batch must have fewer than 2**31");
    }
    rows.begins.push_back(begin);
    rows.cu.push_back(static_cast<std::int32_t>(total));
  }
  return rows;
}

template <typename Value>
MaskedTargets assemble(const SpanMasker& masker, const RowInput<Value>& input, std::uint32_t epoch,
                       const PackedRows& rows, const AssembledTokens& out,
                       std::size_t num_threads) {
  const std::vector<std::size_t> parts = split_evenly(rows.cu, num_threads);
  std::vector<MaskedTargets> targets(parts.size() - 1);
  run_parallel(targets.size(), [&](std::size_t part) {
    rethrow(assemble_part(masker, input, epoch, rows, out, parts[part], parts[part + 1],
                          targets[part]));
  });
  return concatenate(targets);
}

template PackedRows find_rows(const RowInput<std::uint16_t>&);
template PackedRows find_rows(const RowInput<std::int32_t>&);
template MaskedTargets assemble(const SpanMasker&, const RowInput<std::uint16_t>&, std::uint32_t,
                                const PackedRows&, const AssembledTokens&, std::size_t);
template MaskedTargets assemble(const SpanMasker&, const RowInput<std::int32_t>&, std::uint32_t,
                                const PackedRows&, const AssembledTokens&, std::size_t);

}  // namespace spanbert_fast
