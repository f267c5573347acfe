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
void dropout_planes(const T* x, T* out, const DropoutPlan& plan, const Draw& first, int threads,
                    void (*loop)(const T*, T*, int64_t, uint32_t, const Draw&, uint32_t, double)) {
  const int64_t elements = plan.channels * plan.positions;
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

template <typename T>
void dropout_rows(const T* x, T* out, const DropoutPlan& plan, const Draw& first, int threads,
                  void (*loop)(const T*, T*, int64_t, int64_t, int64_t, int64_t, const Draw&,
                               uint32_t, double)) {
  const int64_t elements = plan.channels * plan.positions;
  const int64_t octets = ceil_div(plan.positions, 8);
  const auto run = [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t sample = begin / octets;
      const int64_t octet = begin % octets;
      const int64_t octet_end = std::min(octets, octet + end - begin);
      Draw draw = first;
      draw.sample += uint32_t(sample);
      loop(x + sample * elements, out + sample * elements, octet * 8,
           std::min(plan.positions, octet_end * 8), plan.positions, plan.channels, draw,
           plan.threshold, plan.scale);
      begin += octet_end - octet;
    }
  };
  parallel_for(plan.samples * octets, plan.samples * elements, threads, run);
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
    const float* from = static_cast<const float*>(x);
    float* to = static_cast<float*>(out);
    if (plan.channels_last) {
      dropout_rows(from, to, plan, draw, threads, loops.dropout_rows_f32);
    } else {
      dropout_planes(from, to, plan, draw, threads, loops.dropout_f32);
    }
  } else if (dtype == Dtype::float64) {
    const double* from = static_cast<const double*>(x);
    double* to = static_cast<double*>(out);
    if (plan.channels_last) {
      dropout_rows(from, to, plan, draw, threads, loops.dropout_rows_f64);
    } else {
      dropout_planes(from, to, plan, draw, threads, loops.dropout_f64);
    }
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
