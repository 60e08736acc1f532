// Threads made per call: nothing outlives the call, so a process may fork at any other time.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <system_error>
#include <thread>
#include <vector>

namespace spanbert_fast {

inline void rethrow(const std::exception_ptr& error) {
  if (error) std::rethrow_exception(error);
}

// Runs task(0) ... task(num_tasks - 1), each on a thread of its own, and rethrows the first task's
// exception.
template <typename Task>
void run_parallel(std::size_t num_tasks, const Task& task) {
  std::vector<std::exception_ptr> errors(num_tasks);
  const auto guarded = [&](std::size_t index) noexcept {
    try {
      task(index);
    } catch (...) {
      errors[index] = std::current_exception();
    }
  };
  std::vector<std::thread> threads;
  threads.reserve(num_tasks);
  for (std::size_t index = 1; index < num_tasks; ++index) {
    try {
      threads.emplace_back(guarded, index);
    } catch (const std::system_error&) {
      guarded(index);  // The machine has no thread left: the result is the same, only later.
    }
  }
  if (num_tasks > 0) guarded(0);
  for (auto& thread : threads) thread.join();
  for (const auto& error : errors) rethrow(error);
}

// First item of part `index` when num_items items are dealt to num_parts parts.
inline std::int64_t part_begin(std::int64_t num_items, std::size_t index, std::size_t num_parts) {
  const auto parts = static_cast<std::int64_t>(num_parts);
  const auto part = static_cast<std::int64_t>(index);
  return num_items / parts * part + std::min(part, num_items % parts);
}

}  // namespace spanbert_fast
