#include "segmentation.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "parallel.h"

namespace spanbert_fast {
namespace {

constexpr double kForbidden = -std::numeric_limits<double>::infinity();

[[noreturn]] void refuse_score(double score, std::int64_t unit, std::int64_t w) {
  throw std::invalid_argument("scores[" + std::to_string(unit) + ", " + std::to_string(w) +
                              "] is " + std::to_string(score) +
                              ", must be a finite number or -inf");
}

[[noreturn]] void refuse_sequence(std::size_t sequence) {
  throw std::invalid_argument("sequence " + std::to_string(sequence) +
                              " has no allowed segmentation: scores of -inf forbid them all");
}

// Runs task(sequence) for all sequences; threads get runs of sequences with about equal units.
template <typename Task>
void for_each_sequence(std::span<const std::int32_t> cu, std::size_t num_threads,
                       const Task& task) {
  const std::size_t num_sequences = cu.size() - 1;
  const std::size_t parts = std::clamp<std::size_t>(num_sequences, 1, num_threads);
  const auto first_of = [&](std::size_t part) {
    if (part == parts) return num_sequences;
    const std::int64_t unit = part_begin(cu.back(), part, parts);
    const auto found = std::lower_bound(cu.begin(), cu.end() - 1, unit);
    return part == 0 ? std::size_t{0} : static_cast<std::size_t>(found - cu.begin());
  };
  run_parallel(parts, [&](std::size_t part) {
    const std::size_t end = first_of(part + 1);
    for (std::size_t sequence = first_of(part); sequence < end; ++sequence) task(sequence);
  });
}

template <typename Value>
double best_of_sequence(const SpanScores<Value>& input, std::int64_t start, std::int64_t length,
                        std::int32_t* lengths) {
  // best[e]: score of the best segmentation of the first e units; last[e]: its last span's length.
  std::vector<double> best(static_cast<std::size_t>(length + 1), kForbidden);
  std::vector<std::int32_t> last(best.size(), 0);
  best[0] = 0.0;
  for (std::int64_t unit = 0; unit < length; ++unit) {
    const Value* const row = input.scores + (start + unit) * input.width;
    const std::int64_t widest = std::min(input.width, length - unit);
    const double before = best[unit];
    for (std::int64_t w = 0; w < widest; ++w) {
      const double score = row[w];
      // Also false for NaN.
      if (!(score < std::numeric_limits<double>::infinity())) refuse_score(score, start + unit, w);
      const double total = before + score;
      if (total > best[unit + w + 1]) {
        best[unit + w + 1] = total;
        last[unit + w + 1] = static_cast<std::int32_t>(w + 1);
      }
    }
  }
  std::fill_n(lengths + start, length, 0);
  if (best[length] == kForbidden) return kForbidden;
  for (std::int64_t end = length; end > 0; end -= last[end]) {
    lengths[start + end - last[end]] = last[end];
  }
  return best[length];
}

// Backwards, log_rest[t] = log of the sum over segmentations of the units from t on. The terms of
// that sum, normalised, are the probabilities of the spans that begin at t given that one does;
// forwards, they only have to be multiplied by the probability that one does. So there is one
// exponential for a span, and no product of many small numbers is ever divided by another.
template <typename Value>
double marginals_of_sequence(const SpanScores<Value>& input, std::int64_t start,
                             std::int64_t length, Value* marginals) {
  const std::int64_t width = input.width;
  std::vector<double> log_rest(static_cast<std::size_t>(length + 1), kForbidden);
  std::vector<double> begins(log_rest.size(), 0.0);
  std::vector<double> terms(static_cast<std::size_t>(width));
  log_rest[length] = 0.0;
  for (std::int64_t unit = length - 1; unit >= 0; --unit) {
    const Value* const row = input.scores + (start + unit) * width;
    Value* const out = marginals + (start + unit) * width;
    const std::int64_t widest = std::min(width, length - unit);
    double maximum = kForbidden;
    for (std::int64_t w = 0; w < widest; ++w) {
      const double score = row[w];
      if (!(score < std::numeric_limits<double>::infinity())) refuse_score(score, start + unit, w);
      terms[w] = score + log_rest[unit + w + 1];
      maximum = std::max(maximum, terms[w]);
    }
    std::fill_n(out, width, Value{0});
    if (maximum == kForbidden) continue;
    double total = 0.0;
    for (std::int64_t w = 0; w < widest; ++w) {
      terms[w] = std::exp(terms[w] - maximum);
      total += terms[w];
    }
    for (std::int64_t w = 0; w < widest; ++w) out[w] = static_cast<Value>(terms[w] / total);
    log_rest[unit] = maximum + std::log(total);
  }
  begins[0] = 1.0;
  for (std::int64_t unit = 0; unit < length; ++unit) {
    Value* const out = marginals + (start + unit) * width;
    const std::int64_t widest = std::min(width, length - unit);
    // The sum again, of what a float kept: rounding then moves no probability in or out.
    double total = 0.0;
    for (std::int64_t w = 0; w < widest; ++w) total += out[w];
    if (total == 0.0) continue;
    const double factor = begins[unit] / total;
    for (std::int64_t w = 0; w < widest; ++w) {
      const double probability = factor * out[w];
      out[w] = static_cast<Value>(probability);
      begins[unit + w + 1] += probability;
    }
  }
  return log_rest[0];
}

}  // namespace

template <typename Value>
void best_segmentation(const SpanScores<Value>& input, std::int32_t* lengths, double* best,
                       std::size_t num_threads) {
  for_each_sequence(input.cu, num_threads, [&](std::size_t sequence) {
    const std::int64_t start = input.cu[sequence];
    const std::int64_t length = input.cu[sequence + 1] - start;
    best[sequence] = best_of_sequence(input, start, length, lengths);
    if (best[sequence] == kForbidden) refuse_sequence(sequence);
  });
}

template <typename Value>
void span_marginals(const SpanScores<Value>& input, Value* marginals, double* log_partition,
                    std::size_t num_threads) {
  for_each_sequence(input.cu, num_threads, [&](std::size_t sequence) {
    const std::int64_t start = input.cu[sequence];
    const std::int64_t length = input.cu[sequence + 1] - start;
    log_partition[sequence] = marginals_of_sequence(input, start, length, marginals);
    if (log_partition[sequence] == kForbidden) refuse_sequence(sequence);
  });
}

template void best_segmentation(const SpanScores<float>&, std::int32_t*, double*, std::size_t);
template void best_segmentation(const SpanScores<double>&, std::int32_t*, double*, std::size_t);
template void span_marginals(const SpanScores<float>&, float*, double*, std::size_t);
template void span_marginals(const SpanScores<double>&, double*, double*, std::size_t);

}  // namespace spanbert_fast
