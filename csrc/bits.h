// Questions about runs of bits; bit i stands in word i / 64.
#pragma once

#include <bit>
#include <cstdint>

#include "philox.h"

namespace spanbert_fast {

using Word = std::uint64_t;

inline constexpr Word kAllBits = ~Word{0};

SPANBERT_FAST_INLINE bool test_bit(const Word* bits, std::int64_t index) {
  return (bits[index >> 6] >> (index & 63)) & 1;
}

// The last set bit at or before index; there must be one.
SPANBERT_FAST_INLINE std::int64_t last_bit_at_or_before(const Word* bits, std::int64_t index) {
  std::int64_t position = index >> 6;
  Word word = bits[position] << (63 - (index & 63));
  if (word != 0) return index - std::countl_zero(word);
  do word = bits[--position];
  while (word == 0);
  return 64 * position + 63 - std::countl_zero(word);
}

// The first set bit at or after index, at most limit.
SPANBERT_FAST_INLINE std::int64_t next_bit(const Word* bits, std::int64_t index, std::int64_t limit,
                                           Word flip = 0) {
  if (index >= limit) return limit;
  std::int64_t position = index >> 6;
  Word word = (bits[position] ^ flip) & (kAllBits << (index & 63));
  while (word == 0) {
    if (64 * ++position >= limit) return limit;
    word = bits[position] ^ flip;
  }
  const std::int64_t found = 64 * position + std::countr_zero(word);
  return found < limit ? found : limit;
}

// The first clear bit at or after index, at most limit.
SPANBERT_FAST_INLINE std::int64_t next_clear_bit(const Word* bits, std::int64_t index,
                                                 std::int64_t limit) {
  return next_bit(bits, index, limit, kAllBits);
}

// The rank-th (from 0) set bit of a word that has more than rank.
SPANBERT_FAST_INLINE int select_bit(Word word, std::int64_t rank) {
  for (; rank > 0; --rank) word &= word - 1;
  return std::countr_zero(word);
}

// The count-th (from 1) set bit after index, at most limit.
SPANBERT_FAST_INLINE std::int64_t nth_bit_after(const Word* bits, std::int64_t index,
                                                std::int64_t count, std::int64_t limit) {
  ++index;
  if (index >= limit) return limit;
  std::int64_t position = index >> 6;
  Word word = bits[position] & (kAllBits << (index & 63));
  for (std::int64_t here = std::popcount(word); here < count; here = std::popcount(word)) {
    count -= here;
    if (64 * ++position >= limit) return limit;
    word = bits[position];
  }
  const std::int64_t found = 64 * position + select_bit(word, count - 1);
  return found < limit ? found : limit;
}

// The rank-th (from 0) clear bit at or after begin; there must be more than rank.
SPANBERT_FAST_INLINE std::int64_t nth_clear_bit(const Word* bits, std::int64_t begin,
                                                std::int64_t rank) {
  std::int64_t position = begin >> 6;
  Word word = ~bits[position] & (kAllBits << (begin & 63));
  for (std::int64_t here = std::popcount(word); here <= rank; here = std::popcount(word)) {
    rank -= here;
    word = ~bits[++position];
  }
  return 64 * position + select_bit(word, rank);
}

// Sets clear bits of [begin, end) from the left, at most limit of them, and returns how many.
SPANBERT_FAST_INLINE std::int64_t set_bits(Word* bits, std::int64_t begin, std::int64_t end,
                                           std::int64_t limit) {
  std::int64_t added = 0;
  for (std::int64_t position = begin >> 6; 64 * position < end; ++position) {
    Word range = kAllBits;
    if (64 * position < begin) range &= kAllBits << (begin & 63);
    if (64 * position + 64 > end) range &= kAllBits >> (63 - ((end - 1) & 63));
    Word fresh = range & ~bits[position];
    std::int64_t here = std::popcount(fresh);
    if (added + here >= limit) {
      for (; added + here > limit; --here) fresh &= ~(Word{1} << (63 - std::countl_zero(fresh)));
      bits[position] |= fresh;
      return limit;
    }
    bits[position] |= fresh;
    added += here;
  }
  return added;
}

}  // namespace spanbert_fast
