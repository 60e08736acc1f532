// Philox4x32-10 (Salmon et al. 2011): random words that are a pure function of a counter and a key.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

// One body compiled for several instruction sets, chosen when the library is loaded. Sanitizers
// instrument the resolver, which runs before they are ready, so there the plain body is used.
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__GLIBC__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define SPANBERT_FAST_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define SPANBERT_FAST_CLONES
#endif

// What a clone calls has to be inlined into it, otherwise it is compiled for the oldest processor.
#if defined(_MSC_VER)
#define SPANBERT_FAST_INLINE __forceinline
#else
#define SPANBERT_FAST_INLINE [[gnu::always_inline]] inline
#endif

// Without it the loop over rounds hides the loop over counters from the vectoriser.
#if defined(__GNUC__) && !defined(__clang__)
#define SPANBERT_FAST_UNROLL _Pragma("GCC unroll 10")
#else
#define SPANBERT_FAST_UNROLL
#endif

namespace spanbert_fast {

static_assert(std::endian::native == std::endian::little, "bit packing assumes little-endian");

// Words 0 and 1 of a counter, or words 2 and 3; the earlier one in the low half.
struct PhiloxWords {
  std::uint64_t low;
  std::uint64_t high;
};

// The four random words of one counter. Each word lives in 64 bits, whose high half may hold
// garbage until the end: so a round is two widening products and no packing, which compilers turn
// into vectors of counters.
SPANBERT_FAST_INLINE PhiloxWords philox(std::uint64_t c0, std::uint64_t c1, std::uint64_t c2,
                                        std::uint64_t c3, std::uint64_t key) {
  constexpr std::uint64_t kLowHalf = 0xFFFFFFFF;
  auto key0 = static_cast<std::uint32_t>(key);
  auto key1 = static_cast<std::uint32_t>(key >> 32);
  SPANBERT_FAST_UNROLL
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t product0 = 0xD2511F53 * (c0 & kLowHalf);
    const std::uint64_t product1 = 0xCD9E8D57 * (c2 & kLowHalf);
    c0 = (product1 >> 32) ^ c1 ^ key0;
    c1 = product1;
    c2 = (product0 >> 32) ^ c3 ^ key1;
    c3 = product0;
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
  return {(c0 & kLowHalf) | c1 << 32, (c2 & kLowHalf) | c3 << 32};
}

// The words of counters (first, c1, c2, c3), (first + 1, c1, c2, c3), ...: 4 * kCounters words in a
// row.
template <int kCounters>
SPANBERT_FAST_INLINE void philox_batch(std::uint32_t first, std::uint32_t c1, std::uint32_t c2,
                                       std::uint32_t c3, std::uint64_t key, void* words) {
  std::uint64_t low[kCounters];
  std::uint64_t high[kCounters];
  for (int i = 0; i < kCounters; ++i) {
    const PhiloxWords drawn = philox(first + static_cast<std::uint32_t>(i), c1, c2, c3, key);
    low[i] = drawn.low;
    high[i] = drawn.high;
  }
  std::uint64_t pairs[2 * kCounters];
  for (int i = 0; i < kCounters; ++i) {
    pairs[2 * i] = low[i];
    pairs[2 * i + 1] = high[i];
  }
  std::memcpy(words, pairs, sizeof(pairs));
}

}  // namespace spanbert_fast
