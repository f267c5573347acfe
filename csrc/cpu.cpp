// The CPU part: picks the instruction set once, cuts the work into units and gives each thread a
// run of them.
#include <algorithm>
#include <stdexcept>
#include <system_error>
#include <thread>

#include "cpu_loops.h"
#include "kernels.h"

namespace ddpm_fast {
namespace cpu {
namespace {

// Elements a thread must have to be worth its start: 77 us of normals on one Xeon core (AVX-512).
// Other values are not yet measured.
constexpr int64_t GRAIN = 1 << 16;
// Elements of a unit: large enough to amortise the call, small enough to share out evenly.
constexpr int64_t UNIT = 1 << 12;

std::vector<const CpuLoops*> runnable_loops() {
  std::vector<const CpuLoops*> loops{&loops_baseline};
#if defined(DDPM_FAST_X86_LEVELS)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2")) loops.push_back(&loops_avx2);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
    loops.push_back(&loops_avx512);
  }
#endif
  return loops;
}

const CpuLoops*& active_loops() {
  static const CpuLoops* loops = runnable_loops().back();
  return loops;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls run(begin, end) on consecutive pieces of [0, units), one of them on the calling thread.
template <typename Run>
void parallel_for(int64_t units, int64_t elements, int threads, const Run& run) {
  const int64_t useful = std::min<int64_t>({threads, units, elements / GRAIN});
  const int64_t pieces = std::max<int64_t>(useful, 1);
  std::vector<std::thread> workers;
  int64_t piece = 0;
  try {
    for (; piece + 1 < pieces; ++piece) {
      workers.emplace_back(run, units * piece / pieces, units * (piece + 1) / pieces);
    }
  } catch (const std::system_error&) {
    // No more threads to be had: this one does the rest.
  }
  run(units * piece / pieces, units);
  for (std::thread& worker : workers) worker.join();
}

template <typename T>
void dropout_elements(const T* x, T* out, const DropoutPlan& plan, const Draw& first, int threads,
                    void (*loop)(const T*, T*, int64_t, uint32_t, const Draw&, uint32_t, double)) {
  const int64_t elements = plan.elements;
  const int64_t units_per_sample = ceil_div(elements, UNIT);
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t sample = unit / units_per_sample;
      const int64_t element = unit % units_per_sample * UNIT;
      const int64_t at = sample * elements + element;
      Draw draw = first;
      draw.sample += uint32_t(sample);
      loop(x + at, out + at, std::min(UNIT, elements - element), uint32_t(element / 8), draw,
           plan.threshold, plan.scale);
    }
  };
  parallel_for(plan.samples * units_per_sample, plan.samples * elements, threads, run);
}

}  // namespace

void philox_words(const int64_t* counters, const int64_t* keys, int64_t* out, int64_t n,
                  int threads) {
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) philox_words_row(counters, keys, out, i);
  };
  parallel_for(n, 4 * n, threads, run);
}

void philox_fill(bool normal, float* out, const FillPlan& plan, int threads) {
  const auto loop = normal ? active_loops()->normal : active_loops()->uniform;
  const int64_t units_per_sample = ceil_div(plan.elements, UNIT);
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t sample = unit / units_per_sample;
      const int64_t element = unit % units_per_sample * UNIT;
      const Draw draw =
          make_draw(plan.seed, plan.stream, plan.first_index + uint32_t(sample), plan.step);
      loop(out + sample * plan.elements + element, std::min(UNIT, plan.elements - element),
           uint32_t(element / 4), draw);
    }
  };
  parallel_for(plan.samples * units_per_sample, plan.samples * plan.elements, threads, run);
}

void box_muller(const uint32_t* words, float* out, int64_t n) {
  active_loops()->box_muller(words, out, n);
}

void dropout(const void* x, void* out, Dtype dtype, const DropoutPlan& plan, uint64_t seed,
             uint32_t step, uint32_t first_index, int threads) {
  const Draw draw = make_draw(seed, plan.stream, first_index, step);
  const CpuLoops& loops = *active_loops();
  if (dtype == Dtype::float32) {
    dropout_elements(static_cast<const float*>(x), static_cast<float*>(out), plan, draw, threads,
                     loops.dropout_f32);
  } else if (dtype == Dtype::float64) {
    dropout_elements(static_cast<const double*>(x), static_cast<double*>(out), plan, draw, threads,
                     loops.dropout_f64);
  } else {
    throw std::invalid_argument("cpu dropout takes float32 or float64, got dtype code " +
                                std::to_string(int(dtype)));
  }
}

std::vector<std::string> simd_levels() {
  std::vector<std::string> names;
  for (const CpuLoops* loops : runnable_loops()) names.push_back(loops->level);
  return names;
}

std::string simd_level() { return active_loops()->level; }

void use_simd(const std::string& level) {
  for (const CpuLoops* loops : runnable_loops()) {
    if (level == loops->level) {
      active_loops() = loops;
      return;
    }
  }
  throw std::invalid_argument("simd level '" + level + "' is not one this processor runs");
}

}  // namespace cpu
}  // namespace ddpm_fast
