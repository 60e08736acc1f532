#include "random_bits.h"

#include <cstring>

#include "keep_stride.h"
#include "parallel.h"
#include "philox.h"

namespace spanbert_fast {
namespace {

using KeepStride = decltype(&keep_stride);

KeepStride fastest_stride() noexcept {
#ifdef SPANBERT_FAST_AVX2
  if (__builtin_cpu_supports("avx2")) return &keep_stride_avx2;
#endif
  return &keep_stride;
}

// Writes one row of keep bits; the counters are those of the first of them.
void fill_row(bool* out, std::int64_t num_columns, StrideCounters counters,
              const DropoutStream& stream, KeepStride keep) noexcept {
  if (stream.threshold > 0xFFFF) {  // Nothing is kept; a lane of 16 bits could not say so.
    std::memset(out, 0, static_cast<std::size_t>(num_columns));
    return;
  }
  std::int64_t column = 0;
  for (; column + kStride <= num_columns; column += kStride) {
    keep(out + column, counters, stream);
    counters.first += kStride / kLanes;
  }
  if (column < num_columns) {
    bool rest[kStride];
    keep(rest, counters, stream);
    std::memcpy(out + column, rest, static_cast<std::size_t>(num_columns - column));
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
  const KeepStride keep = fastest_stride();
  run_parallel(num_threads, [&](std::size_t index) {
    const std::int64_t end = part_begin(num_tokens, index + 1, num_threads);
    for (std::int64_t token = part_begin(num_tokens, index, num_threads); token < end; ++token) {
      const StrideCounters counters{0, static_cast<std::uint32_t>(positions[token]),
                                    static_cast<std::uint32_t>(sequence_ids[token])};
      fill_row(out + token * hidden_size, hidden_size, counters, stream, keep);
    }
  });
}

void fill_attention_mask(bool* out, std::int64_t num_heads, const AttentionTile& tile,
                         std::int64_t sequence_id, const DropoutStream& stream,
                         std::size_t num_threads) {
  const auto first_plane = static_cast<std::uint32_t>(static_cast<std::uint64_t>(sequence_id) *
                                                      static_cast<std::uint64_t>(num_heads));
  const KeepStride keep = fastest_stride();
  const std::int64_t num_rows = num_heads * tile.num_queries;
  const auto first_counter = static_cast<std::uint32_t>(tile.first_key / kLanes);
  run_parallel(num_threads, [&](std::size_t index) {
    const std::int64_t end = part_begin(num_rows, index + 1, num_threads);
    for (std::int64_t row = part_begin(num_rows, index, num_threads); row < end; ++row) {
      const StrideCounters counters{
          first_counter, static_cast<std::uint32_t>(tile.first_query + row % tile.num_queries),
          first_plane + static_cast<std::uint32_t>(row / tile.num_queries)};
      fill_row(out + row * tile.num_keys, tile.num_keys, counters, stream, keep);
    }
  });
}

}  // namespace spanbert_fast
