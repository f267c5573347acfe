// The CPU part: picks the instruction set once, cuts the work into units and gives each thread a
// run of them.
#include <algorithm>
#include <stdexcept>

#include "cpu_loops.h"
#include "kernels.h"
#include "parallel.h"

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

// Into how many pieces to cut that many units of so many elements altogether.
int64_t pieces_of(int64_t units, int64_t elements, int threads) {
  return std::min<int64_t>({threads, units, elements / GRAIN});
}

// Calls run(piece) on all pieces of all samples.
template <typename Run>
void for_each_piece(int64_t samples, int64_t elements, int threads, const Run& run) {
  const auto some = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) run(piece_at(i, elements, UNIT));
  };
  const int64_t units = samples * ceil_div(elements, UNIT);
  parallel_for(units, pieces_of(units, samples * elements, threads), some);
}

template <typename T>
void dropout_elements(const T* x, T* out, const DropoutPlan& plan, const Draw& first, int threads,
                      void (*loop)(const T*, T*, int64_t, uint32_t, const Draw&, uint32_t,
                                   double)) {
  for_each_piece(plan.samples, plan.elements, threads, [&](const Piece& piece) {
    const int64_t at = element_at(piece.sample, plan.elements, piece.first);
    Draw draw = first;
    draw.sample += uint32_t(piece.sample);
    loop(x + at, out + at, piece.count, uint32_t(piece.first / 8), draw, plan.threshold,
         plan.scale);
  });
}

int64_t size_of(Dtype dtype) { return dtype == Dtype::uint8 ? 1 : 4; }

ForwardPiece forward_piece(const ForwardPlan& plan, const Piece& piece,
                           const ForwardSample& sample) {
  const int64_t elements = plan.channels * plan.height * plan.width;
  const int64_t at = element_at(piece.sample, elements, piece.first);
  const int64_t row = element_at(sample.row, elements, 0) * size_of(plan.x_0_dtype);
  return {static_cast<const char*>(plan.x_0) + row,
          piece.first,
          piece.count,
          plan.width,
          sample.mirrored,
          plan.noise == nullptr ? nullptr : plan.noise + at,
          plan.counters.draw(STREAM_NOISE, piece.sample),
          static_cast<float*>(plan.x_t) + at,
          static_cast<float*>(plan.target) + at};
}

ReversePiece reverse_piece(const ReversePlan& plan, const Piece& piece, bool noisy) {
  const int64_t elements = plan.channels * plan.positions;
  const int64_t at = element_at(piece.sample, elements, piece.first);
  const int64_t at_output =
      element_at(piece.sample, plan.output_channels * plan.positions, piece.first);
  const float* output = static_cast<const float*>(plan.output) + at_output;
  const float* unconditional = static_cast<const float*>(plan.unconditional);
  return {plan.x_t + at,
          output,
          unconditional == nullptr ? nullptr : unconditional + at_output,
          has_learned_std(plan) ? output + elements : nullptr,
          plan.noise == nullptr ? nullptr : plan.noise + at,
          plan.x_prev + at,
          plan.x_0 + at,
          piece.first,
          piece.count,
          plan.counters.draw(STREAM_SAMPLER_NOISE, piece.sample),
          noisy,
          plan.guidance,
          plan.rule.clip,
          1.0f};
}

// x_0 of a whole sample holds the unclipped estimate -> the dynamic threshold's limit. Sorted as
// bits, in the order of the magnitudes; NaN, which has none, comes last, as on the device.
float limit_of(const float* x_0, int64_t elements, double q, std::vector<uint32_t>& scratch) {
  scratch.resize(size_t(elements));
  for (int64_t i = 0; i < elements; ++i) scratch[size_t(i)] = bits_from_float(x_0[i]) & 0x7FFFFFFFu;
  const Quantile quantile = quantile_of(q, elements);
  const auto low = scratch.begin() + quantile.low;
  std::nth_element(scratch.begin(), low, scratch.end());
  const auto high = quantile.high == quantile.low ? low : std::min_element(low + 1, scratch.end());
  return dynamic_limit(float_from_bits(*low), float_from_bits(*high), quantile.weight);
}

// A sample is one piece: its threshold depends on all of it.
void posterior_step_dynamic(const ReversePlan& plan, int threads) {
  const CpuLoops& loops = *active_loops();
  const int64_t elements = plan.channels * plan.positions;
  const auto run = [&](int64_t begin, int64_t end) {
    std::vector<uint32_t> scratch;
    for (int64_t n = begin; n < end; ++n) {
      const ReverseSample sample = reverse_sample(plan, n);
      ReversePiece piece = reverse_piece(plan, {n, 0, elements}, sample.noisy);
      loops.reverse_x_0(piece, sample.step);
      piece.limit = limit_of(piece.x_0, elements, plan.quantile, scratch);
      loops.reverse(piece, sample.step);
    }
  };
  parallel_for(plan.samples, pieces_of(plan.samples, plan.samples * elements, threads), run);
}

}  // namespace

void philox_words(const int64_t* counters, const int64_t* keys, int64_t* out, int64_t n,
                  int threads) {
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) philox_words_row(counters, keys, out, i);
  };
  parallel_for(n, pieces_of(n, 4 * n, threads), run);
}

void philox_fill(bool normal, float* out, const FillPlan& plan, int threads) {
  const auto loop = normal ? active_loops()->normal : active_loops()->uniform;
  for_each_piece(plan.samples, plan.elements, threads, [&](const Piece& piece) {
    const Draw draw =
        make_draw(plan.seed, plan.stream, plan.first_index + uint32_t(piece.sample), plan.step);
    loop(out + element_at(piece.sample, plan.elements, piece.first), piece.count,
         uint32_t(piece.first / 4), draw);
  });
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

void q_sample(const ForwardPlan& plan, int threads) {
  const CpuLoops& loops = *active_loops();
  const auto loop = plan.x_0_dtype == Dtype::uint8 ? loops.forward_u8 : loops.forward_f32;
  const int64_t elements = plan.channels * plan.height * plan.width;
  for_each_piece(plan.samples, elements, threads, [&](const Piece& piece) {
    const ForwardSample sample = forward_sample(plan, piece.sample);
    if (piece.first == 0 && plan.t_out != nullptr) plan.t_out[piece.sample] = sample.t;
    loop(forward_piece(plan, piece, sample), sample.step, plan.prediction);
  });
}

void posterior_step(const ReversePlan& plan, int threads) {
  if (plan.rule.clip == Clip::dynamic) return posterior_step_dynamic(plan, threads);
  const CpuLoops& loops = *active_loops();
  for_each_piece(plan.samples, plan.channels * plan.positions, threads, [&](const Piece& piece) {
    const ReverseSample sample = reverse_sample(plan, piece.sample);
    loops.reverse(reverse_piece(plan, piece, sample.noisy), sample.step);
  });
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
