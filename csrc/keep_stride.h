// Keep bits of 128 neighbouring elements from one stretch of counters: the inner loop of dropout.
#pragma once

#include <cstdint>
#include <cstring>

#include "philox.h"
#include "random_bits.h"

// AVX2 is written out: compilers make three products of each widening one, and a third of the
// speed. Sanitizers watch the portable body, which every other machine runs.
#if defined(__GNUC__) && defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__) && \
    !defined(__SANITIZE_THREAD__)
#define SPANBERT_FAST_AVX2 1
#include <immintrin.h>
#endif

namespace spanbert_fast {

constexpr int kLanes = 8;  // 16-bit lanes of one counter
constexpr int kStride = 128;

// Where the lanes come from: counters (first, row, plane, stream.site), (first + 1, row, ...), ...
struct StrideCounters {
  std::uint32_t first;
  std::uint32_t row;
  std::uint32_t plane;
};

// Sets out[i] for i < kStride to lane[i] >= stream.threshold, which is below 65536.
SPANBERT_FAST_CLONES inline void keep_stride(bool* out, const StrideCounters& counters,
                                             const DropoutStream& stream) noexcept {
  std::uint16_t lanes[kStride];
  philox_batch<kStride / kLanes>(counters.first, counters.row, counters.plane, stream.site,
                                 stream.seed, lanes);
  std::uint8_t kept[kStride];
  const auto threshold = static_cast<std::uint16_t>(stream.threshold);
  for (int i = 0; i < kStride; ++i) kept[i] = lanes[i] >= threshold;
  std::memcpy(out, kept, sizeof(kept));
}

#ifdef SPANBERT_FAST_AVX2

// The same. Four counters share a vector of 64-bit words, whose high halves may hold garbage, and
// four vectors hide the latency of a product.
__attribute__((target("avx2"))) inline void keep_stride_avx2(bool* out,
                                                             const StrideCounters& counters,
                                                             const DropoutStream& stream) noexcept {
  constexpr int kVectors = 4;
  __m256i word0[kVectors], word1[kVectors], word2[kVectors], word3[kVectors];
  for (int i = 0; i < kVectors; ++i) {
    const std::uint32_t first = counters.first + 4 * static_cast<std::uint32_t>(i);
    word0[i] = _mm256_setr_epi64x(first, first + 1, first + 2, first + 3);
    word1[i] = _mm256_set1_epi64x(counters.row);
    word2[i] = _mm256_set1_epi64x(counters.plane);
    word3[i] = _mm256_set1_epi64x(stream.site);
  }
  auto key0 = static_cast<std::uint32_t>(stream.seed);
  auto key1 = static_cast<std::uint32_t>(stream.seed >> 32);
  const __m256i multiplier0 = _mm256_set1_epi64x(0xD2511F53);
  const __m256i multiplier1 = _mm256_set1_epi64x(0xCD9E8D57);
  SPANBERT_FAST_UNROLL
  for (int round = 0; round < 10; ++round) {
    const __m256i wide_key0 = _mm256_set1_epi64x(key0);
    const __m256i wide_key1 = _mm256_set1_epi64x(key1);
    for (int i = 0; i < kVectors; ++i) {
      const __m256i product0 = _mm256_mul_epu32(multiplier0, word0[i]);
      const __m256i product1 = _mm256_mul_epu32(multiplier1, word2[i]);
      const __m256i high0 = _mm256_srli_epi64(product0, 32);
      const __m256i high1 = _mm256_srli_epi64(product1, 32);
      word0[i] = _mm256_xor_si256(_mm256_xor_si256(high1, word1[i]), wide_key0);
      word1[i] = product1;
      word2[i] = _mm256_xor_si256(_mm256_xor_si256(high0, word3[i]), wide_key1);
      word3[i] = product0;
    }
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
  const __m256i threshold = _mm256_set1_epi16(static_cast<std::int16_t>(stream.threshold));
  const __m256i ones = _mm256_set1_epi8(1);
  for (int i = 0; i < kVectors; ++i) {
    // Odd 32-bit halves come from the later word of a pair.
    const __m256i low = _mm256_blend_epi32(word0[i], _mm256_slli_epi64(word1[i], 32), 0xAA);
    const __m256i high = _mm256_blend_epi32(word2[i], _mm256_slli_epi64(word3[i], 32), 0xAA);
    // An unsigned lane >= threshold iff it is the larger of the two.
    const __m256i kept_low = _mm256_cmpeq_epi16(_mm256_max_epu16(low, threshold), low);
    const __m256i kept_high = _mm256_cmpeq_epi16(_mm256_max_epu16(high, threshold), high);
    // Counters 0 and 2, then 1 and 3; narrowed to bytes they stand in order.
    const __m256i even = _mm256_unpacklo_epi64(kept_low, kept_high);
    const __m256i odd = _mm256_unpackhi_epi64(kept_low, kept_high);
    const __m256i kept = _mm256_and_si256(_mm256_packs_epi16(even, odd), ones);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 4 * kLanes * i), kept);
  }
}

#endif

}  // namespace spanbert_fast
