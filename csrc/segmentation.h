// Segmentations of sequences into spans of bounded width: the best one, and the probability of
// every span when a segmentation has probability proportional to exp(sum of its spans' scores).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace spanbert_fast {

// Scores of all spans of a packed batch: item [t * width + w] is that of the w + 1 units from t on.
// Minus infinity forbids a span; spans that would leave their sequence are never read.
template <typename Value>
struct SpanScores {
  const Value* scores;
  std::int64_t width;
  std::span<const std::int32_t> cu;  // Checked boundaries of the sequences, B + 1 items.
};

// Writes the length of the best segmentation's span at each unit where one begins, 0 elsewhere, to
// `lengths` [T], and its score to `best` [B]. Of equally good ones the span that ends a prefix is
// the longest. Time O(T width). Throws std::invalid_argument for a score that is NaN or plus
// infinity, and for a sequence whose every segmentation is forbidden.
template <typename Value>
void best_segmentation(const SpanScores<Value>& input, std::int32_t* lengths, double* best,
                       std::size_t num_threads);

// Writes the probability of every span to `marginals` [T, width], 0 where it would leave its
// sequence, and the logarithm of the sum over segmentations to `log_partition` [B]. Computed in
// double precision, with logarithms; time and throws as above.
template <typename Value>
void span_marginals(const SpanScores<Value>& input, Value* marginals, double* log_partition,
                    std::size_t num_threads);

}  // namespace spanbert_fast
