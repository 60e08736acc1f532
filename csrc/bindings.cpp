// Python's view of the core: checks shapes and ranges, makes result arrays, releases the GIL.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include "assemble.h"
#include "random_bits.h"
#include "span_masker.h"

namespace py = pybind11;

namespace spanbert_fast {
namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

template <typename T>
std::span<const T> view(const Array<T>& array, const char* name) {
  if (array.ndim() != 1) {
    throw py::value_error(std::string(name) + " has " + std::to_string(array.ndim()) +
                          " dimensions, must have 1");
  }
  return {array.data(), static_cast<std::size_t>(array.size())};
}

void check_length(const char* name, std::size_t length, std::size_t expected, const char* why) {
  if (length == expected) return;
  throw py::value_error(std::string(name) + " has " + std::to_string(length) +
                        " items, must have " + std::to_string(expected) + " (" + why + ")");
}

std::size_t check_threads(std::int64_t num_threads) {
  if (num_threads >= 1) return static_cast<std::size_t>(num_threads);
  throw py::value_error("num_threads is " + std::to_string(num_threads) + ", must be at least 1");
}

// A 64-bit key; negative numbers stand for their two's complement, as a torch seed may be negative.
std::uint64_t to_key(const py::int_& value, const char* name) {
  const py::int_ wrapped = value & py::int_(std::numeric_limits<std::uint64_t>::max());
  const auto key = wrapped.cast<std::uint64_t>();
  if (!value.equal(wrapped) && !value.equal(py::int_(static_cast<std::int64_t>(key)))) {
    throw py::value_error(std::string(name) + " is " + py::str(value).cast<std::string>() +
                          ", must be in [-2**63, 2**64)");
  }
  return key;
}

// A numpy array that owns what the buffer held.
template <typename T>
py::array_t<T> to_array(Buffer<T>& buffer) {
  const auto size = static_cast<py::ssize_t>(buffer.size());
  if (size == 0) return py::array_t<T>(0);
  T* const data = buffer.release();
  const py::capsule owner(data, [](void* memory) { delete[] static_cast<T*>(memory); });
  return py::array_t<T>(size, data, owner);
}

using Targets =
    std::tuple<py::array_t<std::int64_t>, py::array_t<std::int64_t>, py::array_t<std::int64_t>,
               py::array_t<std::int64_t>, py::array_t<std::int32_t>, py::array_t<std::int64_t>>;

Targets to_arrays(MaskedTargets& targets) {
  py::array_t<std::int32_t> sbo_cu(static_cast<py::ssize_t>(targets.sbo_ends.size() + 1));
  sbo_cu.mutable_data()[0] = 0;
  std::copy_n(targets.sbo_ends.data(), targets.sbo_ends.size(), sbo_cu.mutable_data() + 1);
  return {to_array(targets.mlm_positions),
          to_array(targets.mlm_labels),
          to_array(targets.sbo_left),
          to_array(targets.sbo_right),
          std::move(sbo_cu),
          to_array(targets.sbo_targets)};
}

py::array_t<std::uint32_t> philox(const Array<std::uint32_t>& counters, const py::int_& key) {
  if (counters.ndim() != 2 || counters.shape(1) != 4) {
    throw py::value_error("counters must have shape [N, 4]");
  }
  const std::uint64_t bits = to_key(key, "key");
  py::array_t<std::uint32_t> out({counters.shape(0), py::ssize_t{4}});
  std::uint32_t* const data = out.mutable_data();
  const py::gil_scoped_release release;
  philox4x32(counters.data(), data, counters.shape(0), bits);
  return out;
}

DropoutStream dropout_stream(std::int64_t site, const py::int_& seed, std::int64_t threshold) {
  if (site < 0 || site > std::numeric_limits<std::uint32_t>::max()) {
    throw py::value_error("site is " + std::to_string(site) + ", must be in [0, 2**32)");
  }
  if (threshold < 0 || threshold > 65536) {
    throw py::value_error("threshold is " + std::to_string(threshold) + ", must be in [0, 65536]");
  }
  return {static_cast<std::uint32_t>(site), to_key(seed, "seed"),
          static_cast<std::uint32_t>(threshold)};
}

void fill_hidden(Array<bool>& out, const Array<std::int64_t>& positions,
                 const Array<std::int64_t>& sequence_ids, std::int64_t site, const py::int_& seed,
                 std::int64_t threshold, std::int64_t num_threads) {
  if (out.ndim() != 2) throw py::value_error("out must have shape [T, D]");
  const auto num_tokens = static_cast<std::size_t>(out.shape(0));
  check_length("positions", view(positions, "positions").size(), num_tokens, "rows of out");
  check_length("sequence_ids", view(sequence_ids, "sequence_ids").size(), num_tokens,
               "rows of out");
  const DropoutStream stream = dropout_stream(site, seed, threshold);
  const std::size_t threads = check_threads(num_threads);
  bool* const data = out.mutable_data();
  const py::gil_scoped_release release;
  fill_hidden_mask(data, out.shape(0), out.shape(1), positions.data(), sequence_ids.data(), stream,
                   threads);
}

void fill_attention(Array<bool>& out, std::int64_t sequence_id, std::int64_t site,
                    const py::int_& seed, std::int64_t threshold, std::int64_t num_threads,
                    std::int64_t first_query, std::int64_t first_key) {
  if (out.ndim() != 3) throw py::value_error("out must have shape [H, Q, K]");
  if (first_query < 0 || first_key < 0 || first_key % 8 != 0) {
    throw py::value_error("first_query is " + std::to_string(first_query) + ", first_key is " +
                          std::to_string(first_key) + ", must be >= 0, the key a multiple of 8");
  }
  const DropoutStream stream = dropout_stream(site, seed, threshold);
  const std::size_t threads = check_threads(num_threads);
  bool* const data = out.mutable_data();
  const py::gil_scoped_release release;
  fill_attention_mask(data, out.shape(0), {first_query, out.shape(1), first_key, out.shape(2)},
                      sequence_id, stream, threads);
}

Scheme to_scheme(const std::string& name) {
  if (name == "words") return Scheme::kWords;
  if (name == "tokens") return Scheme::kTokens;
  if (name == "tagged") return Scheme::kTagged;
  throw py::value_error("scheme is '" + name + "', must be 'words', 'tokens' or 'tagged'");
}

SpanMasker make_masker(const Array<bool>& word_starts, const Array<std::int32_t>& special_token_ids,
                       const Array<std::int32_t>& replacement_ids, std::int32_t mask_token_id,
                       double mask_ratio, std::int64_t min_span_words,
                       const Array<std::uint64_t>& length_thresholds, std::int64_t max_span_targets,
                       const std::string& scheme, bool replace_by_token,
                       std::uint64_t tag_threshold, std::uint64_t seed,
                       std::int64_t rejections_per_token) {
  std::vector<std::uint8_t> flags;
  for (const bool starts : view(word_starts, "word_starts")) {
    flags.push_back(starts ? SpanMasker::kWordStart : 0);
  }
  const auto special_ids = view(special_token_ids, "special_token_ids");
  for (std::size_t index = 0; index < special_ids.size(); ++index) {
    const auto id = static_cast<std::uint32_t>(special_ids[index]);
    if (id >= flags.size()) {
      throw py::value_error("special_token_ids[" + std::to_string(index) + "] is " +
                            std::to_string(special_ids[index]) + ", must be in [0, " +
                            std::to_string(flags.size()) + ")");
    }
    flags[id] = SpanMasker::kWordStart | SpanMasker::kSpecial;
  }
  const auto ids = view(replacement_ids, "replacement_ids");
  const auto thresholds = view(length_thresholds, "length_thresholds");
  return SpanMasker(std::move(flags), {ids.begin(), ids.end()},
                    {.mask_token_id = mask_token_id,
                     .mask_ratio = mask_ratio,
                     .min_span_words = min_span_words,
                     .length_thresholds = {thresholds.begin(), thresholds.end()},
                     .max_span_targets = max_span_targets,
                     .scheme = to_scheme(scheme),
                     .replace_by_token = replace_by_token,
                     .tag_threshold = tag_threshold,
                     .seed = seed,
                     .rejections_per_token = rejections_per_token});
}

std::vector<TaggedSpan> to_spans(const Array<std::int32_t>& spans) {
  if (spans.ndim() != 2 || spans.shape(1) != 2) {
    throw py::value_error("spans must have shape [P, 2]");
  }
  std::vector<TaggedSpan> tagged;
  for (py::ssize_t index = 0; index < spans.shape(0); ++index) {
    tagged.push_back({spans.at(index, 0), spans.at(index, 1)});
  }
  return tagged;
}

py::tuple mask(const SpanMasker& masker, const Array<std::int32_t>& input_ids,
               const Array<std::int32_t>& cu_seqlens, const Array<std::int64_t>& example_ids,
               const Array<std::int32_t>& spans, std::uint32_t epoch, std::int64_t num_threads) {
  const auto tokens = view(input_ids, "input_ids");
  // Copied, because another Python thread may write to the arrays while the GIL is free.
  const auto bounds = view(cu_seqlens, "cu_seqlens");
  const std::vector<std::int32_t> cu(bounds.begin(), bounds.end());
  const std::vector<TaggedSpan> tagged = to_spans(spans);
  const auto ids = view(example_ids, "example_ids");
  check_boundaries(cu, tokens.size());
  check_length("example_ids", ids.size(), cu.size() - 1, "items of cu_seqlens less one");
  check_spans(tagged, tokens.size());
  const std::size_t threads = check_threads(num_threads);
  py::array_t<std::int32_t> out(static_cast<py::ssize_t>(tokens.size()));
  std::int32_t* const data = out.mutable_data();
  MaskedTargets targets;
  {
    const py::gil_scoped_release release;
    targets = masker.mask({tokens.data(), cu, ids.data(), tagged}, epoch, data, threads);
  }
  return py::make_tuple(std::move(out)) + py::tuple(py::cast(to_arrays(targets)));
}

template <typename Value>
py::tuple assemble_batch(const SpanMasker& masker, const Array<Value>& values,
                         const Array<std::int64_t>& offsets, const Array<std::int64_t>& rows,
                         const Array<std::int64_t>& example_ids, std::uint32_t epoch,
                         std::int32_t cls_token_id, std::int32_t sep_token_id,
                         std::int64_t num_threads) {
  const auto ids = view(example_ids, "example_ids");
  const RowInput<Value> input{view(values, "values"), view(offsets, "offsets"), view(rows, "rows"),
                              ids.data()};
  if (input.offsets.empty()) throw py::value_error("offsets has no items, must have at least 1");
  check_length("example_ids", ids.size(), input.rows.size(), "items of rows");
  for (const std::int32_t id : {cls_token_id, sep_token_id}) {
    if (!masker.is_special(id)) {
      throw py::value_error("cls_token_id and sep_token_id are " + std::to_string(cls_token_id) +
                            " and " + std::to_string(sep_token_id) +
                            ", must be special_token_ids of the masker");
    }
  }
  const std::size_t threads = check_threads(num_threads);
  const PackedRows packed = find_rows(input);
  py::array_t<std::int64_t> input_ids(packed.cu.back());
  py::array_t<std::int64_t> position_ids(packed.cu.back());
  const AssembledTokens out{cls_token_id, sep_token_id, input_ids.mutable_data(),
                            position_ids.mutable_data()};
  MaskedTargets targets;
  {
    const py::gil_scoped_release release;
    targets = assemble(masker, input, epoch, packed, out, threads);
  }
  py::array_t<std::int32_t> cu_seqlens(static_cast<py::ssize_t>(packed.cu.size()),
                                       packed.cu.data());
  return py::make_tuple(std::move(input_ids), std::move(position_ids), std::move(cu_seqlens)) +
         py::tuple(py::cast(to_arrays(targets)));
}

void bind_random_bits(py::module_& module) {
  module.def("philox4x32", &philox, py::arg("counters").noconvert(), py::arg("key"),
             "Returns the Philox4x32-10 words of each counter, uint32 [N, 4].");
  module.def("fill_hidden_mask", &fill_hidden, py::arg("out").noconvert(),
             py::arg("positions").noconvert(), py::arg("sequence_ids").noconvert(), py::arg("site"),
             py::arg("seed"), py::arg("threshold"), py::arg("num_threads") = 1,
             "Sets out [T, D] to True where a hidden unit is kept.");
  module.def("fill_attention_mask", &fill_attention, py::arg("out").noconvert(),
             py::arg("sequence_id"), py::arg("site"), py::arg("seed"), py::arg("threshold"),
             py::arg("num_threads") = 1, py::arg("first_query") = 0, py::arg("first_key") = 0,
             "Sets out [H, Q, K] to True where an attention probability is kept.");
}

void bind_masker(py::module_& module) {
  py::class_<SpanMasker>(module, "SpanMasker",
                         "Tables and settings of span masking; immutable. See data/masking.py.")
      .def(py::init(&make_masker), py::arg("word_starts").noconvert(),
           py::arg("special_token_ids").noconvert(), py::arg("replacement_ids").noconvert(),
           py::kw_only(), py::arg("mask_token_id"), py::arg("mask_ratio"),
           py::arg("min_span_words"), py::arg("length_thresholds").noconvert(),
           py::arg("max_span_targets"), py::arg("scheme"), py::arg("replace_by_token"),
           py::arg("tag_threshold"), py::arg("seed"), py::arg("rejections_per_token") = 64)
      .def("mask", &mask, py::arg("input_ids").noconvert(), py::arg("cu_seqlens").noconvert(),
           py::arg("example_ids").noconvert(), py::arg("spans").noconvert(), py::arg("epoch"),
           py::arg("num_threads") = 1,
           "Returns masked input_ids, mlm_positions, mlm_labels, sbo_left, sbo_right, sbo_cu, "
           "sbo_targets.");
  const char* const assemble_doc =
      "Returns masked input_ids, position_ids, cu_seqlens, mlm_positions, mlm_labels, sbo_left, "
      "sbo_right, sbo_cu, sbo_targets of a batch of rows of a token store.";
  const auto bind_assemble = [&](auto function) {
    module.def("assemble", function, py::arg("masker"), py::arg("values").noconvert(),
               py::arg("offsets").noconvert(), py::arg("rows").noconvert(),
               py::arg("example_ids").noconvert(), py::arg("epoch"), py::arg("cls_token_id"),
               py::arg("sep_token_id"), py::arg("num_threads") = 1, assemble_doc);
  };
  bind_assemble(&assemble_batch<std::uint16_t>);
  bind_assemble(&assemble_batch<std::int32_t>);
}

}  // namespace

void bind_segmentation(py::module_& module);  // bindings_segmentation.cpp

}  // namespace spanbert_fast

PYBIND11_MODULE(_core, module, pybind11::mod_gil_not_used()) {
  module.doc() = "C++ core of spanbert_fast: random bits, span masking, batches, segmentation.";
  spanbert_fast::bind_random_bits(module);
  spanbert_fast::bind_masker(module);
  spanbert_fast::bind_segmentation(module);
}
