// Philox4x32-10 (Salmon et al. 2011): random words that are a pure function of a counter and a key.
#pragma once

#include <bit>
#include <cstdint>

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

namespace spanbert_fast {

static_assert(std::endian::native == std::endian::little, "bit packing assumes little-endian");

inline constexpr int kPhiloxRounds = 10;
inline constexpr std::uint32_t kPhiloxMultiplier0 = 0xD2511F53;
inline constexpr std::uint32_t kPhiloxMultiplier1 = 0xCD9E8D57;
inline constexpr std::uint32_t kPhiloxWeyl0 = 0x9E3779B9;
inline constexpr std::uint32_t kPhiloxWeyl1 = 0xBB67AE85;

// Counters side by side, one array per counter word, so that a compiler turns the loops into
// vectors.
template <int kCounters>
struct PhiloxBatch {
  std::uint32_t words[4][kCounters];

  // Replaces every counter by its four random words.
  SPANBERT_FAST_INLINE void encrypt(std::uint64_t key) {
    auto key0 = static_cast<std::uint32_t>(key);
    auto key1 = static_cast<std::uint32_t>(key >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round) {
      for (int i = 0; i < kCounters; ++i) {
        const std::uint64_t product0 = std::uint64_t{kPhiloxMultiplier0} * words[0][i];
        const std::uint64_t product1 = std::uint64_t{kPhiloxMultiplier1} * words[2][i];
        words[0][i] = static_cast<std::uint32_t>(product1 >> 32) ^ words[1][i] ^ key0;
        words[1][i] = static_cast<std::uint32_t>(product1);
        words[2][i] = static_cast<std::uint32_t>(product0 >> 32) ^ words[3][i] ^ key1;
        words[3][i] = static_cast<std::uint32_t>(product0);
      }
      key0 += kPhiloxWeyl0;
      key1 += kPhiloxWeyl1;
    }
  }
};

}  // namespace spanbert_fast
