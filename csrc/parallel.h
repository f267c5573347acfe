// Cuts a range of units into pieces and gives each to a thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <system_error>
#include <thread>
#include <vector>

namespace ddpm_fast {

// Threads that are waited for whatever happens, and what they threw: a thread that throws, or is
// given up while it runs, would end the process.
class Workers {
 public:
  explicit Workers(size_t most) : errors_(most) { threads_.reserve(most); }
  Workers(const Workers&) = delete;
  ~Workers() { join(); }

  // `run` must stay until join.
  template <typename Run>
  void start(const Run& run, int64_t begin, int64_t end) {
    std::exception_ptr& error = errors_[threads_.size()];
    threads_.emplace_back([&run, &error, begin, end] {
      try {
        run(begin, end);
      } catch (...) {
        error = std::current_exception();
      }
    });
  }

  void join() {
    for (std::thread& thread : threads_) {
      if (thread.joinable()) thread.join();
    }
  }

  void rethrow() const {
    for (const std::exception_ptr& error : errors_) {
      if (error) std::rethrow_exception(error);
    }
  }

 private:
  std::vector<std::exception_ptr> errors_;
  std::vector<std::thread> threads_;
};

// Calls run(begin, end) on consecutive pieces of [0, units), one of them on the calling thread.
// What a piece throws is thrown when all of them are done.
template <typename Run>
void parallel_for(int64_t units, int64_t pieces, const Run& run) {
  if (pieces <= 1) return run(0, units);
  Workers workers(size_t(pieces - 1));
  int64_t piece = 0;
  try {
    for (; piece + 1 < pieces; ++piece) {
      workers.start(run, units * piece / pieces, units * (piece + 1) / pieces);
    }
  } catch (const std::system_error&) {
    // No more threads to be had: this one does the rest.
  }
  run(units * piece / pieces, units);
  workers.join();
  workers.rethrow();
}

}  // namespace ddpm_fast
