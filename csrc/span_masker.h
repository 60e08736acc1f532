// Span masking of token sequences (Joshi et al. 2020, section 3.1) on a counter-based random
// stream.
//
// A sequence is cut at its special tokens into blocks, each with a budget of ceil(mask_ratio * L)
// of its L tokens. A special token is never masked. A word starts at a token whose vocabulary entry
// says so, and at the first token of a block.
//
// The random stream of a sequence is u_0, u_1, ...: u_i = word i mod 4 of Philox4x32-10 with key =
// seed (low half, high half) and counter = (i div 4, epoch, low half of the example id, high half
// of it). Its blocks use it one after the other from left to right:
//   until the budget is spent, one turn =
//     1 word   number of words of the span = min_span_words + the number of length thresholds <= u;
//     1 word   only in scheme "tagged": u < tag threshold means that this turn masks a tagged span;
//     1 word   the place. Tagged span (u * number of the block's tagged spans) >> 32, or anchor
//     token (u * L) >> 32.
//              An anchor that is masked already rejects the turn, and so does a tagged span that is
//              masked wholly or does not exist. After rejections_per_token * L rejections in the
//              block, a turn draws no tagged span any more and its anchor is the unmasked token
//              number (u * number of unmasked tokens) >> 32.
//   then, for each maximal run of masked tokens from left to right (each masked token, if
//   replacement goes by token or in scheme "tokens"):
//     1 word   below round(0.8 * 2^32): [MASK]; else below round(0.9 * 2^32): random tokens; else
//     unchanged; 1 word   per token that becomes random: replacement_ids[(u * number of
//     replacement_ids) >> 32].
// A span begins at the start of the anchor's word, takes its words until the block ends, passes
// over masked tokens and stops in the middle of a word when the budget is spent. Scheme "tagged"
// with a tag threshold of 2^32 masks tagged spans only: its block ends when they are masked wholly
// or the rejections are used up.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <utility>
#include <vector>

namespace spanbert_fast {

enum class Scheme { kWords, kTokens, kTagged };

struct MaskerOptions {
  std::int32_t mask_token_id;
  double mask_ratio;
  std::int64_t min_span_words;
  std::vector<std::uint64_t>
      length_thresholds;  // P(words > min_span_words + i) = 1 - threshold / 2^32
  std::int64_t max_span_targets;
  Scheme scheme;
  bool replace_by_token;
  std::uint64_t tag_threshold;
  std::uint64_t seed;
  std::int64_t rejections_per_token;
};

// A growing array that leaves new items uninitialised.
template <typename T>
class Buffer {
 public:
  T* extend(std::int64_t count) {
    if (size_ + count > capacity_) grow(size_ + count);
    T* const added = data_.get() + size_;
    size_ += count;
    return added;
  }
  void push(T value) { *extend(1) = value; }
  // Room for count more items; memory that is never written costs nothing.
  void reserve(std::int64_t count) {
    if (size_ + count > capacity_) grow(size_ + count);
  }
  [[nodiscard]] const T* data() const { return data_.get(); }
  [[nodiscard]] std::int64_t size() const { return size_; }
  T* release() { return data_.release(); }

 private:
  void grow(std::int64_t needed) {
    const std::int64_t capacity = std::max(needed, std::max<std::int64_t>(64, 2 * capacity_));
    auto data = std::make_unique_for_overwrite<T[]>(static_cast<std::size_t>(capacity));
    std::copy_n(data_.get(), size_, data.get());
    data_ = std::move(data);
    capacity_ = capacity;
  }

  std::unique_ptr<T[]> data_;
  std::int64_t size_ = 0;
  std::int64_t capacity_ = 0;
};

// What the masked positions ask of a model; positions count in the packed batch.
struct MaskedTargets {
  Buffer<std::int64_t> mlm_positions;
  Buffer<std::int64_t> mlm_labels;
  Buffer<std::int64_t> sbo_left;
  Buffer<std::int64_t> sbo_right;
  Buffer<std::int32_t> sbo_ends;  // end of each span's rows in sbo_targets
  Buffer<std::int64_t> sbo_targets;

  // Room for what so many masked tokens bring: growing step by step would move everything twice.
  void reserve(std::int64_t num_masked) {
    mlm_positions.reserve(num_masked);
    mlm_labels.reserve(num_masked);
    sbo_targets.reserve(num_masked);
  }
};

// Half-open [begin, end) of packed positions.
struct TaggedSpan {
  std::int32_t begin;
  std::int32_t end;
};

// One packed batch. The tokens of sequence b are tokens[cu[b]:cu[b + 1]].
struct PackedInput {
  const std::int32_t* tokens;
  std::span<const std::int32_t> cu;
  const std::int64_t* example_ids;
  std::span<const TaggedSpan> tagged;  // sorted by begin
};

// Throw std::invalid_argument unless cu rises from 0 to num_tokens, and spans lie within and are
// sorted.
void check_boundaries(std::span<const std::int32_t> cu, std::size_t num_tokens);
void check_spans(std::span<const TaggedSpan> spans, std::size_t num_tokens);

// Bounds of num_parts runs of sequences (fewer if there are fewer sequences) with about equally
// many tokens.
std::vector<std::size_t> split_evenly(std::span<const std::int32_t> cu, std::size_t num_parts);

// All parts in one, each copied by a thread of its own; there must be a first.
MaskedTargets concatenate(std::vector<MaskedTargets>& parts);

// Immutable after construction, so any number of threads may mask with one.
class SpanMasker {
 public:
  // token_flags: one byte per vocabulary entry, see kWordStart and kSpecial.
  SpanMasker(std::vector<std::uint8_t> token_flags, std::vector<std::int32_t> replacement_ids,
             MaskerOptions options);

  static constexpr std::uint8_t kWordStart = 1;
  static constexpr std::uint8_t kSpecial = 2;
  static constexpr std::uint8_t kUnknown = 4;

  // Writes the masked tokens to out (as many as there are tokens).
  [[nodiscard]] MaskedTargets mask(const PackedInput& input, std::uint32_t epoch, std::int32_t* out,
                                   std::size_t num_threads) const;

  [[nodiscard]] const MaskerOptions& options() const { return options_; }
  [[nodiscard]] const std::uint8_t* token_flags() const { return token_flags_.data(); }
  [[nodiscard]] std::int64_t vocabulary_size() const {
    return static_cast<std::int64_t>(token_flags_.size()) - 1;
  }
  [[nodiscard]] std::span<const std::int32_t> replacement_ids() const { return replacement_ids_; }

  [[nodiscard]] bool is_special(std::int64_t id) const {
    return id >= 0 && id < vocabulary_size() &&
           (token_flags_[static_cast<std::size_t>(id)] & kSpecial) != 0;
  }

  // Number of words of a span.
  [[nodiscard]] std::int64_t span_words(std::uint32_t random) const {
    std::size_t index = first_length_[random >> 24];
    while (random >= options_.length_thresholds[index]) ++index;
    return options_.min_span_words + static_cast<std::int64_t>(index);
  }

 private:
  void check() const;

  std::vector<std::uint8_t>
      token_flags_;  // one more entry, kUnknown, stands for ids outside the vocabulary
  std::vector<std::int32_t> replacement_ids_;
  MaskerOptions options_;  // length_thresholds end with one that no word reaches
  std::vector<std::uint32_t>
      first_length_;  // by the highest byte of a random word: where to begin looking
};

}  // namespace spanbert_fast
