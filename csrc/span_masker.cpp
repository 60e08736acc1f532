#include "span_masker.h"

#include <algorithm>
#include <exception>
#include <stdexcept>
#include <string>

#include "parallel.h"
#include "sequence_masker.h"

namespace spanbert_fast {
namespace {

// Masks sequences [begin, end) of the batch and returns what went wrong.
SPANBERT_FAST_CLONES
std::exception_ptr mask_sequences(const SpanMasker& masker, const PackedInput& input,
                                  std::uint32_t epoch, std::size_t begin, std::size_t end,
                                  std::int32_t* out, MaskedTargets& targets) noexcept try {
  SequenceMasker engine(masker, epoch, targets);
  engine.expect(input.cu[end] - input.cu[begin], end - begin);
  auto tagged = std::lower_bound(
      input.tagged.begin(), input.tagged.end(), begin < end ? input.cu[begin] : 0,
      [](const TaggedSpan& span, std::int32_t position) { return span.begin < position; });
  for (std::size_t index = begin; index < end; ++index) {
    const auto first_tagged = tagged;
    while (tagged != input.tagged.end() && tagged->begin < input.cu[index + 1]) ++tagged;
    engine.mask(Sequence<std::int32_t, std::int32_t>{
        .tokens = input.tokens + input.cu[index],
        .length = input.cu[index + 1] - input.cu[index],
        .out = out + input.cu[index],
        .packed_begin = input.cu[index],
        .example_id = input.example_ids[index],
        .tagged = {first_tagged, tagged},
    });
  }
  return nullptr;
} catch (...) {
  return std::current_exception();
}

template <typename T>
void copy_all(const Buffer<T>& source, T* target) {
  std::copy_n(source.data(), source.size(), target);
}

}  // namespace

SpanMasker::SpanMasker(std::vector<std::uint8_t> token_flags,
                       std::vector<std::int32_t> replacement_ids, MaskerOptions options)
    : token_flags_(std::move(token_flags)),
      replacement_ids_(std::move(replacement_ids)),
      options_(std::move(options)),
      first_length_(256) {
  check();
  token_flags_.push_back(kUnknown);
  if (options_.scheme == Scheme::kTokens) {
    for (auto& flags : token_flags_) flags |= kWordStart;
  }
  auto& thresholds = options_.length_thresholds;
  for (std::uint64_t byte = 0; byte < 256; ++byte) {
    const auto above = std::upper_bound(thresholds.begin(), thresholds.end(), byte << 24);
    first_length_[byte] = static_cast<std::uint32_t>(above - thresholds.begin());
  }
  thresholds.push_back(std::uint64_t{1} << 32);
}

void SpanMasker::check() const {
  const std::int64_t size = static_cast<std::int64_t>(token_flags_.size());
  const auto& thresholds = options_.length_thresholds;
  if (!(options_.mask_ratio > 0 && options_.mask_ratio < 1) || options_.min_span_words < 1 ||
      options_.max_span_targets < 1 || options_.rejections_per_token < 0 ||
      options_.tag_threshold >> 32 > 1 || options_.mask_token_id < 0 ||
      options_.mask_token_id >= size || replacement_ids_.empty() ||
      !std::is_sorted(thresholds.begin(), thresholds.end())) {
    throw std::invalid_argument("SpanMasker has an option out of range");
  }
  for (std::size_t index = 0; index < replacement_ids_.size(); ++index) {
    const std::int64_t id = replacement_ids_[index];
    const bool is_known = id >= 0 && id < size;
    if (!is_known || id == options_.mask_token_id ||
        (token_flags_[static_cast<std::size_t>(id)] & kSpecial) != 0) {
      throw std::invalid_argument("replacement_ids[" + std::to_string(index) + "] is " +
                                  std::to_string(id) +
                                  (is_known ? ", must be neither special nor mask_token_id"
                                            : ", must be in [0, " + std::to_string(size) + ")"));
    }
  }
}

MaskedTargets SpanMasker::mask(const PackedInput& input, std::uint32_t epoch, std::int32_t* out,
                               std::size_t num_threads) const {
  const std::vector<std::size_t> parts = split_evenly(input.cu, num_threads);
  std::vector<MaskedTargets> targets(parts.size() - 1);
  run_parallel(targets.size(), [&](std::size_t part) {
    rethrow(mask_sequences(*this, input, epoch, parts[part], parts[part + 1], out, targets[part]));
  });
  return concatenate(targets);
}

void check_boundaries(std::span<const std::int32_t> cu, std::size_t num_tokens) {
  if (cu.empty() || cu.front() != 0) {
    throw std::invalid_argument("cu_seqlens must begin with 0, has " +
                                (cu.empty() ? "no items" : std::to_string(cu.front())));
  }
  for (std::size_t index = 1; index < cu.size(); ++index) {
    if (cu[index] < cu[index - 1]) {
      throw std::invalid_argument("cu_seqlens[" + std::to_string(index) + "] is " +
                                  std::to_string(cu[index]) + ", must be at least " +
                                  std::to_string(cu[index - 1]));
    }
  }
  if (static_cast<std::size_t>(cu.back()) != num_tokens) {
    throw std::invalid_argument("cu_seqlens ends with " + std::to_string(cu.back()) +
                                ", must end with " + std::to_string(num_tokens) +
                                " (number of tokens)");
  }
}

void check_spans(std::span<const TaggedSpan> spans, std::size_t num_tokens) {
  for (std::size_t index = 0; index < spans.size(); ++index) {
    const TaggedSpan& span = spans[index];
    const bool is_within = span.begin >= 0 && span.begin < span.end &&
                           static_cast<std::size_t>(span.end) <= num_tokens;
    const bool is_sorted = index == 0 || spans[index - 1].begin <= span.begin;
    if (is_within && is_sorted) continue;
    throw std::invalid_argument(
        "spans[" + std::to_string(index) + "] is [" + std::to_string(span.begin) + ", " +
        std::to_string(span.end) + "), must " +
        (is_within ? "not begin before the span ahead of it"
                   : "hold a token and lie in [0, " + std::to_string(num_tokens) + ")"));
  }
}

std::vector<std::size_t> split_evenly(std::span<const std::int32_t> cu, std::size_t num_parts) {
  const std::size_t num_sequences = cu.size() - 1;
  num_parts = std::clamp<std::size_t>(num_sequences, 1, num_parts);
  std::vector<std::size_t> bounds(num_parts + 1, 0);
  for (std::size_t part = 1; part < num_parts; ++part) {
    const auto target =
        static_cast<std::int32_t>(static_cast<std::uint64_t>(cu.back()) * part / num_parts);
    const auto bound = std::lower_bound(cu.begin(), cu.end() - 1, target);
    bounds[part] = static_cast<std::size_t>(bound - cu.begin());
  }
  bounds[num_parts] = num_sequences;
  return bounds;
}

MaskedTargets concatenate(std::vector<MaskedTargets>& parts) {
  if (parts.size() == 1) return std::move(parts[0]);
  // Number of items, and where those of each part begin.
  struct Sizes {
    std::int64_t labels = 0, spans = 0, rows = 0;
  } total;
  std::vector<Sizes> begins;
  for (const MaskedTargets& part : parts) {
    begins.push_back(total);
    total.labels += part.mlm_labels.size();
    total.spans += part.sbo_ends.size();
    total.rows += part.sbo_targets.size();
  }
  MaskedTargets whole;
  std::int64_t* const positions = whole.mlm_positions.extend(total.labels);
  std::int64_t* const labels = whole.mlm_labels.extend(total.labels);
  std::int64_t* const left = whole.sbo_left.extend(total.spans);
  std::int64_t* const right = whole.sbo_right.extend(total.spans);
  std::int32_t* const ends = whole.sbo_ends.extend(total.spans);
  std::int64_t* const rows = whole.sbo_targets.extend(total.rows);
  run_parallel(parts.size(), [&](std::size_t index) {
    const MaskedTargets part = std::move(parts[index]);
    const Sizes begin = begins[index];
    copy_all(part.mlm_positions, positions + begin.labels);
    copy_all(part.mlm_labels, labels + begin.labels);
    copy_all(part.sbo_left, left + begin.spans);
    copy_all(part.sbo_right, right + begin.spans);
    copy_all(part.sbo_targets, rows + begin.rows);
    std::transform(part.sbo_ends.data(), part.sbo_ends.data() + part.sbo_ends.size(),
                   ends + begin.spans,
                   [&](std::int32_t end) { return static_cast<std::int32_t>(begin.rows) + end; });
  });
  return whole;
}

}  // namespace spanbert_fast
