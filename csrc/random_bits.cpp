#include "random_bits.h"

#include <algorithm>
#include <cstring>

#include "parallel.h"
#include "philox.h"

namespace spanbert_fast {
namespace {

constexpr int kCounters = 32;
constexpr int kLanes = 8;  // 16-bit lanes of one counter
constexpr int kStride = kCounters * kLanes;

// Writes num_columns <= kStride mask bits whose first counter is (first_counter, row, plane, site).
SPANBERT_FAST_INLINE void fill_stride(bool* out, std::int64_t num_columns,
                                      std::uint32_t first_counter, std::uint32_t row,
                                      std::uint32_t plane, const DropoutStream& stream) {
  std::uint16_t lanes[kStride];
  philox_batch<kCounters>(first_counter, row, plane, stream.site, stream.seed, lanes);
  std::uint8_t kept[kStride];
  // A 16-bit comparison fills twice the vector of a 32-bit one; threshold 65536 (nothing kept)
  // needs the wide one.
  if (stream.threshold > 0xFFFF) {
    std::memset(kept, 0, sizeof(kept));
  } else {
    const auto threshold = static_cast<std::uint16_t>(stream.threshold);
    for (int i = 0; i < kStride; ++i) kept[i] = lanes[i] >= threshold;
  }
  std::memcpy(out, kept, static_cast<std::size_t>(num_columns));
}

SPANBERT_FAST_INLINE void fill_row(bool* out, std::int64_t num_columns, std::uint32_t row,
                                   std::uint32_t plane, const DropoutStream& stream) {
  std::int64_t column = 0;
  for (; column + kStride <= num_columns; column += kStride) {
    fill_stride(out + column, kStride, static_cast<std::uint32_t>(column / kLanes), row, plane,
                stream);
  }
  if (column < num_columns) {
    fill_stride(out + column, num_columns - column, static_cast<std::uint32_t>(column / kLanes),
                row, plane, stream);
  }
}

SPANBERT_FAST_CLONES
void fill_hidden_rows(bool* out, std::int64_t begin, std::int64_t end, std::int64_t hidden_size,
                      const std::int64_t* positions, const std::int64_t* sequence_ids,
                      const DropoutStream& stream) noexcept {
  for (std::int64_t token = begin; token < end; ++token) {
    fill_row(out + token * hidden_size, hidden_size, static_cast<std::uint32_t>(positions[token]),
             static_cast<std::uint32_t>(sequence_ids[token]), stream);
  }
}

SPANBERT_FAST_CLONES
void fill_attention_rows(bool* out, std::int64_t begin, std::int64_t end, std::int64_t num_queries,
                         std::int64_t num_keys, std::uint32_t first_plane,
                         const DropoutStream& stream) noexcept {
  for (std::int64_t row = begin; row < end; ++row) {
    fill_row(out + row * num_keys, num_keys, static_cast<std::uint32_t>(row % num_queries),
             first_plane + static_cast<std::uint32_t>(row / num_queries), stream);
  }
}

}  // namespace

void philox4x32(const std::uint32_t* counters, std::uint32_t* out, std::int64_t num_counters,
                std::uint64_t key) {
  for (std::int64_t i = 0; i < num_counters; ++i) {
    const std::uint32_t* const counter = counters + 4 * i;
    const PhiloxWords words = philox(counter[0], counter[1], counter[2], counter[3], key);
    std::memcpy(out + 4 * i, &words, sizeof(words));
  }
}

void fill_hidden_mask(bool* out, std::int64_t num_tokens, std::int64_t hidden_size,
                      const std::int64_t* positions, const std::int64_t* sequence_ids,
                      const DropoutStream& stream, std::size_t num_threads) {
  run_parallel(num_threads, [&](std::size_t index) {
    fill_hidden_rows(out, part_begin(num_tokens, index, num_threads),
                     part_begin(num_tokens, index + 1, num_threads), hidden_size, positions,
                     sequence_ids, stream);
  });
}

void fill_attention_mask(bool* out, std::int64_t num_heads, std::int64_t num_queries,
                         std::int64_t num_keys, std::int64_t sequence_id,
                         const DropoutStream& stream, std::size_t num_threads) {
  const auto first_plane = static_cast<std::uint32_t>(static_cast<std::uint64_t>(sequence_id) *
                                                      static_cast<std::uint64_t>(num_heads));
  run_parallel(num_threads, [&](std::size_t index) {
    fill_attention_rows(out, part_begin(num_heads * num_queries, index, num_threads),
                        part_begin(num_heads * num_queries, index + 1, num_threads), num_queries,
                        num_keys, first_plane, stream);
  });
}

}  // namespace spanbert_fast
