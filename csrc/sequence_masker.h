// The engine of span_masker.h for one sequence at a time; one per thread, its memory is used again.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "bits.h"
#include "span_masker.h"
#include "word_stream.h"

namespace spanbert_fast {

// One sequence: where it comes from, where it goes, and its tagged spans.
template <typename Token, typename Out>
struct Sequence {
  const Token* tokens;
  std::int64_t length;
  Out* out;
  std::int64_t packed_begin;  // packed position of tokens[0]
  std::int64_t example_id;
  std::span<const TaggedSpan> tagged;  // in packed positions
};

class SequenceMasker {
 public:
  SequenceMasker(const SpanMasker& masker, std::uint32_t epoch, MaskedTargets& targets)
      : masker_(masker), options_(masker.options()), epoch_(epoch), targets_(targets) {}

  // Makes room for the targets of num_sequences sequences of one block each; more may come.
  void expect(std::int64_t num_tokens, std::size_t num_sequences) {
    const double masked = options_.mask_ratio * static_cast<double>(num_tokens);
    targets_.reserve(static_cast<std::int64_t>(masked) + static_cast<std::int64_t>(num_sequences));
  }

  // Copies the sequence to its place, masked, and appends its targets.
  template <typename Token, typename Out>
  SPANBERT_FAST_INLINE void mask(const Sequence<Token, Out>& sequence) {
    classify(sequence);
    for (std::int64_t i = 0; i < sequence.length; ++i) {
      sequence.out[i] = static_cast<Out>(sequence.tokens[i]);
    }
    WordStream stream(options_.seed, epoch_, sequence.example_id);
    std::size_t tagged = 0;
    std::int64_t begin = next_clear_bit(special_.data(), 0, sequence.length);
    while (begin < sequence.length) {
      const std::int64_t end = next_bit(special_.data(), begin, sequence.length);
      block_ = {begin, end, sequence.packed_begin, {}};
      take_tagged(sequence.tagged, tagged);
      choose_spans(stream);
      replace_runs(sequence, stream);
      begin = next_clear_bit(special_.data(), end, sequence.length);
    }
    if (tagged < sequence.tagged.size()) refuse_span(sequence.tagged[tagged]);
  }

 private:
  // A maximal run of tokens that are not special: [begin, end) of the sequence.
  struct Block {
    std::int64_t begin;
    std::int64_t end;
    std::int64_t packed_begin;  // of the sequence
    std::span<const TaggedSpan> tagged;
  };

  // Gives the block the tagged spans from `next` on that begin before its end.
  void take_tagged(std::span<const TaggedSpan> tagged, std::size_t& next) {
    const std::size_t first = next;
    for (; next < tagged.size(); ++next) {
      const TaggedSpan& span = tagged[next];
      if (span.begin >= block_.packed_begin + block_.end) break;
      if (span.begin < block_.packed_begin + block_.begin ||
          span.end > block_.packed_begin + block_.end) {
        refuse_span(span);
      }
    }
    block_.tagged = tagged.subspan(first, next - first);
  }

  [[noreturn]] static void refuse_span(const TaggedSpan& span) {
    throw std::invalid_argument("spans has [" + std::to_string(span.begin) + ", " +
                                std::to_string(span.end) +
                                "), must stay in one sequence and hold no special token");
  }

  // Finds special tokens and word starts.
  template <typename Token, typename Out>
  SPANBERT_FAST_INLINE void classify(const Sequence<Token, Out>& sequence) {
    const std::size_t num_words = static_cast<std::size_t>(sequence.length) / 64 + 1;
    special_.resize(num_words);
    starts_.resize(num_words);
    masked_.assign(num_words, 0);
    const std::uint8_t* const flags = masker_.token_flags();
    const auto vocabulary_size = static_cast<std::uint32_t>(masker_.vocabulary_size());
    Word after_special = 1;  // Nothing stands before the first token, so it begins a block.
    Word unknown = 0;
    for (std::size_t word = 0; word < num_words; ++word) {
      const Token* const tokens = sequence.tokens + 64 * word;
      const std::int64_t count = sequence.length - 64 * static_cast<std::int64_t>(word);
      const auto flag_of = [=](Token token) {
        return flags[std::min(static_cast<std::uint32_t>(token), vocabulary_size)];
      };
      std::uint8_t bytes[64];
      if (count >= 64) {
        for (int i = 0; i < 64; ++i) bytes[i] = flag_of(tokens[i]);
      } else {
        std::memset(bytes, SpanMasker::kWordStart, sizeof(bytes));
        for (int i = 0; i < count; ++i) bytes[i] = flag_of(tokens[i]);
      }
      special_[word] = pack_flag(bytes, SpanMasker::kSpecial);
      starts_[word] =
          pack_flag(bytes, SpanMasker::kWordStart) | special_[word] << 1 | after_special;
      after_special = special_[word] >> 63;
      unknown |= pack_flag(bytes, SpanMasker::kUnknown);
    }
    if (unknown != 0) refuse_token(sequence);
  }

  // Bit j = whether bytes[j] holds the flag.
  SPANBERT_FAST_INLINE static Word pack_flag(const std::uint8_t* bytes, std::uint8_t flag) {
    constexpr Word kLowBits = 0x0101010101010101;
    constexpr Word kGather = 0x0102040810204080;  // moves bit 8 j to bit 56 + j
    Word packed = 0;
    for (int i = 0; i < 8; ++i) {
      Word eight;
      std::memcpy(&eight, bytes + 8 * i, sizeof(eight));
      packed |= (((eight >> std::countr_zero(flag) & kLowBits) * kGather) >> 56) << (8 * i);
    }
    return packed;
  }

  template <typename Token, typename Out>
  [[noreturn]] void refuse_token(const Sequence<Token, Out>& sequence) const {
    const std::int64_t size = masker_.vocabulary_size();
    std::int64_t index = 0;
    while (sequence.tokens[index] >= 0 && sequence.tokens[index] < size) ++index;
    throw std::invalid_argument("input_ids[" + std::to_string(sequence.packed_begin + index) +
                                "] is " + std::to_string(sequence.tokens[index]) +
                                ", must be in [0, " + std::to_string(size) + ")");
  }

  // Marks what is masked in the block.
  SPANBERT_FAST_INLINE void choose_spans(WordStream& stream) {
    const std::int64_t length = block_.end - block_.begin;
    std::int64_t budget =
        static_cast<std::int64_t>(std::ceil(options_.mask_ratio * static_cast<double>(length)));
    std::int64_t unmasked = length;
    std::int64_t rejections = options_.rejections_per_token * length;
    const bool is_tagged = options_.scheme == Scheme::kTagged;
    const bool tags_only = is_tagged && options_.tag_threshold >> 32 != 0;
    std::int64_t unmasked_tags = tags_only ? count_tagged() : 0;
    while (budget > 0) {
      if (tags_only && (unmasked_tags == 0 || rejections == 0)) return;
      const std::int64_t words = masker_.span_words(stream.next());
      std::int64_t begin = 0;
      std::int64_t end = 0;
      if (is_tagged && stream.next() < options_.tag_threshold && rejections > 0) {
        pick_tagged(stream, begin, end);
      } else {
        pick_words(stream, words, rejections == 0 ? unmasked : 0, begin, end);
      }
      const std::int64_t added = set_bits(masked_.data(), begin, end, budget);
      rejections -= added == 0;
      budget -= added;
      unmasked -= added;
      if (tags_only) unmasked_tags -= added;
    }
  }

  // Words from an anchor on: of `unmasked` unmasked tokens, or, with 0, of all. An empty span is a
  // rejection.
  SPANBERT_FAST_INLINE void pick_words(WordStream& stream, std::int64_t words,
                                       std::int64_t unmasked, std::int64_t& begin,
                                       std::int64_t& end) {
    std::int64_t anchor;
    if (unmasked > 0) {
      anchor = nth_clear_bit(masked_.data(), block_.begin, stream.below(unmasked));
    } else {
      anchor = block_.begin + stream.below(block_.end - block_.begin);
      if (test_bit(masked_.data(), anchor)) return;
    }
    begin = last_bit_at_or_before(starts_.data(), anchor);
    end = nth_bit_after(starts_.data(), anchor, words, block_.end);
  }

  SPANBERT_FAST_INLINE void pick_tagged(WordStream& stream, std::int64_t& begin,
                                        std::int64_t& end) {
    const auto index =
        static_cast<std::size_t>(stream.below(static_cast<std::int64_t>(block_.tagged.size())));
    if (block_.tagged.empty()) return;
    begin = block_.tagged[index].begin - block_.packed_begin;
    end = block_.tagged[index].end - block_.packed_begin;
  }

  // Number of tokens that stand in tagged spans, which are sorted by begin and may overlap.
  [[nodiscard]] std::int64_t count_tagged() const {
    std::int64_t count = 0;
    std::int64_t covered = 0;
    for (const TaggedSpan& span : block_.tagged) {
      const std::int64_t begin = std::max<std::int64_t>(span.begin, covered);
      if (span.end > begin) count += span.end - begin;
      covered = std::max<std::int64_t>(span.end, covered);
    }
    return count;
  }

  // Replaces the masked tokens of the block and appends their targets.
  template <typename Token, typename Out>
  SPANBERT_FAST_INLINE void replace_runs(const Sequence<Token, Out>& sequence, WordStream& stream) {
    const bool by_token = options_.replace_by_token || options_.scheme == Scheme::kTokens;
    std::int64_t begin = next_bit(masked_.data(), block_.begin, block_.end);
    while (begin < block_.end) {
      const std::int64_t end = next_clear_bit(masked_.data(), begin, block_.end);
      append_labels(sequence, begin, end);
      if (options_.scheme != Scheme::kTokens && begin > block_.begin && end < block_.end) {
        append_span(sequence, begin, end);
      }
      const std::int64_t step = by_token ? 1 : end - begin;
      for (std::int64_t first = begin; first < end; first += step) {
        replace(sequence.out, first, first + step, stream);
      }
      begin = next_bit(masked_.data(), end, block_.end);
    }
  }

  template <typename Token, typename Out>
  SPANBERT_FAST_INLINE void append_labels(const Sequence<Token, Out>& sequence, std::int64_t begin,
                                          std::int64_t end) {
    std::int64_t* const positions = targets_.mlm_positions.extend(end - begin);
    std::int64_t* const labels = targets_.mlm_labels.extend(end - begin);
    for (std::int64_t i = begin; i < end; ++i) {
      positions[i - begin] = sequence.packed_begin + i;
      labels[i - begin] = static_cast<std::int64_t>(sequence.tokens[i]);
    }
  }

  template <typename Token, typename Out>
  SPANBERT_FAST_INLINE void append_span(const Sequence<Token, Out>& sequence, std::int64_t begin,
                                        std::int64_t end) {
    const std::int64_t count = std::min(end - begin, options_.max_span_targets);
    targets_.sbo_left.push(sequence.packed_begin + begin - 1);
    targets_.sbo_right.push(sequence.packed_begin + end);
    std::int64_t* const rows = targets_.sbo_targets.extend(count);
    for (std::int64_t i = 0; i < count; ++i) {
      rows[i] = static_cast<std::int64_t>(sequence.tokens[begin + i]);
    }
    targets_.sbo_ends.push(static_cast<std::int32_t>(targets_.sbo_targets.size()));
  }

  // One decision for [begin, end): [MASK], random tokens, or nothing.
  template <typename Out>
  SPANBERT_FAST_INLINE void replace(Out* out, std::int64_t begin, std::int64_t end,
                                    WordStream& stream) {
    constexpr std::uint32_t kBelowMask = 3435973837;    // round(0.8 * 2^32)
    constexpr std::uint32_t kBelowRandom = 3865470566;  // round(0.9 * 2^32)
    const std::uint32_t choice = stream.next();
    if (choice < kBelowMask) {
      for (std::int64_t i = begin; i < end; ++i) out[i] = static_cast<Out>(options_.mask_token_id);
    } else if (choice < kBelowRandom) {
      const auto ids = masker_.replacement_ids();
      for (std::int64_t i = begin; i < end; ++i) {
        const auto index = stream.below(static_cast<std::int64_t>(ids.size()));
        out[i] = static_cast<Out>(ids[static_cast<std::size_t>(index)]);
      }
    }
  }

  const SpanMasker& masker_;
  const MaskerOptions& options_;
  std::uint32_t epoch_;
  MaskedTargets& targets_;
  Block block_{};
  std::vector<Word> special_;
  std::vector<Word> starts_;
  std::vector<Word> masked_;
};

}  // namespace spanbert_fast
