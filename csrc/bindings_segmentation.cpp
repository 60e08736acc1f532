// Python's view of segmentation; a part of bindings.cpp in a file of its own for its length.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>
#include <utility>
#include <vector>

#include "segmentation.h"
#include "span_masker.h"

namespace py = pybind11;

namespace spanbert_fast {
namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

// Boundaries, copied because another Python thread may write to them while the GIL is free.
template <typename Value>
std::vector<std::int32_t> checked_boundaries(const Array<Value>& scores,
                                             const Array<std::int32_t>& cu_seqlens,
                                             std::int64_t num_threads) {
  if (scores.ndim() != 2 || scores.shape(1) < 1) {
    throw py::value_error("scores must have shape [T, W] with W of at least 1");
  }
  if (cu_seqlens.ndim() != 1) throw py::value_error("cu_seqlens must have 1 dimension");
  if (num_threads < 1) {
    throw py::value_error("num_threads is " + std::to_string(num_threads) + ", must be at least 1");
  }
  std::vector<std::int32_t> cu(cu_seqlens.data(), cu_seqlens.data() + cu_seqlens.size());
  check_boundaries(cu, static_cast<std::size_t>(scores.shape(0)));
  return cu;
}

template <typename Value>
py::tuple best(const Array<Value>& scores, const Array<std::int32_t>& cu_seqlens,
               std::int64_t num_threads) {
  const std::vector<std::int32_t> cu = checked_boundaries(scores, cu_seqlens, num_threads);
  py::array_t<std::int32_t> lengths(scores.shape(0));
  py::array_t<double> totals(static_cast<py::ssize_t>(cu.size() - 1));
  std::int32_t* const lengths_data = lengths.mutable_data();
  double* const totals_data = totals.mutable_data();
  {
    const py::gil_scoped_release release;
    best_segmentation<Value>({scores.data(), scores.shape(1), cu}, lengths_data, totals_data,
                             static_cast<std::size_t>(num_threads));
  }
  return py::make_tuple(std::move(lengths), std::move(totals));
}

template <typename Value>
py::tuple marginals(const Array<Value>& scores, const Array<std::int32_t>& cu_seqlens,
                    std::int64_t num_threads) {
  const std::vector<std::int32_t> cu = checked_boundaries(scores, cu_seqlens, num_threads);
  py::array_t<Value> probabilities({scores.shape(0), scores.shape(1)});
  py::array_t<double> totals(static_cast<py::ssize_t>(cu.size() - 1));
  Value* const probabilities_data = probabilities.mutable_data();
  double* const totals_data = totals.mutable_data();
  {
    const py::gil_scoped_release release;
    span_marginals<Value>({scores.data(), scores.shape(1), cu}, probabilities_data, totals_data,
                          static_cast<std::size_t>(num_threads));
  }
  return py::make_tuple(std::move(probabilities), std::move(totals));
}

template <typename Value>
void bind(py::module_& module) {
  module.def("best_segmentation", &best<Value>, py::arg("scores").noconvert(),
             py::arg("cu_seqlens").noconvert(), py::arg("num_threads") = 1,
             "Returns the best segmentation's span length at each unit where one begins, else 0, "
             "int32 [T], and its score, float64 [B].");
  module.def("span_marginals", &marginals<Value>, py::arg("scores").noconvert(),
             py::arg("cu_seqlens").noconvert(), py::arg("num_threads") = 1,
             "Returns the probability of every span [T, W] and the log partition, float64 [B].");
}

}  // namespace

void bind_segmentation(py::module_& module) {
  bind<float>(module);
  bind<double>(module);
}

}  // namespace spanbert_fast
