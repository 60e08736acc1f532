// Random words and dropout masks on Philox4x32-10.
#pragma once

#include <cstddef>
#include <cstdint>

namespace spanbert_fast {

// Writes the four random words of each of num_counters counters of four words.
void philox4x32(const std::uint32_t* counters, std::uint32_t* out, std::int64_t num_counters,
                std::uint64_t key);

// What a dropout mask needs besides its shape: lane < threshold means dropped.
struct DropoutStream {
  std::uint32_t site;
  std::uint64_t seed;
  std::uint32_t threshold;  // 0 ... 65536
};

// out[t, d] = kept, from counter (d div 8, positions[t], sequence_ids[t], site), 16-bit lane d
// mod 8.
void fill_hidden_mask(bool* out, std::int64_t num_tokens, std::int64_t hidden_size,
                      const std::int64_t* positions, const std::int64_t* sequence_ids,
                      const DropoutStream& stream, std::size_t num_threads);

// The part of an attention matrix that a mask is for.
struct AttentionTile {
  std::int64_t first_query;
  std::int64_t num_queries;
  std::int64_t first_key;  // a multiple of 8
  std::int64_t num_keys;
};

// out[h, q - first_query, k - first_key] = kept, from counter (k div 8, q, sequence_id * num_heads
// + h, site), lane k mod 8.
void fill_attention_mask(bool* out, std::int64_t num_heads, const AttentionTile& tile,
                         std::int64_t sequence_id, const DropoutStream& stream,
                         std::size_t num_threads);

}  // namespace spanbert_fast
