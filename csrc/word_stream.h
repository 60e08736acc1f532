// The random stream of one example.
#pragma once

#include <cstdint>

#include "philox.h"

namespace spanbert_fast {

// u_0, u_1, ... of one example, drawn in batches.
class WordStream {
 public:
  SPANBERT_FAST_INLINE WordStream(std::uint64_t seed, std::uint32_t epoch, std::int64_t example_id)
      : seed_(seed), epoch_(epoch), example_id_(static_cast<std::uint64_t>(example_id)) {}

  SPANBERT_FAST_INLINE std::uint32_t next() {
    if (position_ == kWords) refill();
    return words_[position_++];
  }

  // An integer below limit <= 2^32.
  SPANBERT_FAST_INLINE std::int64_t below(std::int64_t limit) {
    return static_cast<std::int64_t>((next() * static_cast<std::uint64_t>(limit)) >> 32);
  }

 private:
  static constexpr int kCounters = 16;
  static constexpr int kWords = 4 * kCounters;

  SPANBERT_FAST_INLINE void refill() {
    philox_batch<kCounters>(counter_, epoch_, static_cast<std::uint32_t>(example_id_),
                            static_cast<std::uint32_t>(example_id_ >> 32), seed_, words_);
    counter_ += kCounters;
    position_ = 0;
  }

  std::uint64_t seed_;
  std::uint32_t epoch_;
  std::uint64_t example_id_;
  std::uint32_t counter_ = 0;
  int position_ = kWords;
  std::uint32_t words_[kWords];
};

}  // namespace spanbert_fast
