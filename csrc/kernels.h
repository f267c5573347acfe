// What the extension exports: raw pointers, sizes, dtype codes, a stream handle; nothing of torch.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "diffusion_math.h"
#include "indexing.h"

namespace ddpm_fast {

// Codes shared with ddpm_fast/kernels/calling/extension.py.
enum class Dtype : int { float32 = 0, float64 = 1, float16 = 2, bfloat16 = 3, uint8 = 4 };

// Second words of the counters: kernels/philox/counters.py, class Stream.
enum Stream : uint32_t {
  STREAM_T = 2,
  STREAM_NOISE = 3,
  STREAM_FLIP = 4,
  STREAM_SAMPLER_NOISE = 6
};

// Where a philox fill goes: out[n * elements + e], n < samples, is element e of sample first_index
// + n.
struct FillPlan {
  uint64_t seed;
  uint32_t stream, step, first_index;
  int64_t samples, elements;
};

// Dropout over (samples, elements), in the order in which elements are counted: channels fastest.
struct DropoutPlan {
  int64_t samples, elements;
  uint32_t stream;
  uint32_t threshold;  // keep iff lane >= threshold; 0..65536
  double scale;        // of the kept elements
};

// An integer for each sample: a value, or where it lies in the memory that the kernel sees.
struct PerSample {
  int64_t value;
  const int64_t* at;  // null: the value
  int64_t stride;     // 0: one for all samples

  DDPM_FAST_INLINE_MEMBER int64_t of(int64_t sample) const {
    return at == nullptr ? value : at[sample * stride];
  }
};

struct Counters {
  PerSample seed, step, first_index;  // stride 0

  DDPM_FAST_INLINE_MEMBER Draw draw(uint32_t stream, int64_t sample) const {
    return make_draw(uint64_t(seed.of(0)), stream, uint32_t(first_index.of(0)) + uint32_t(sample),
                     uint32_t(step.of(0)));
  }
};

// q_sample: x_0 (row of each sample in a contiguous set) -> x_t and the target.
struct ForwardPlan {
  int64_t samples, channels, height, width;
  const void* x_0;
  Dtype x_0_dtype;
  const int64_t* rows;           // null: sample n is row n
  const double* alphas_cumprod;  // (num_timesteps,)
  int64_t num_timesteps;
  const int64_t* t;  // (samples,); null: drawn, and written to t_out
  int64_t* t_out;
  const float* noise;  // as x_t in NCHW; null: drawn
  Counters counters;
  bool flip;              // mirror about half of the samples
  Prediction prediction;  // what the target is
  void* x_t;
  Dtype x_t_dtype;
  void* target;
  Dtype target_dtype;
  bool channels_last;  // both outputs
};

// One sample's part of it, the same for all its elements.
struct ForwardSample {
  ForwardStep step;
  int64_t row, t;
  bool mirrored;
};

DDPM_FAST_INLINE ForwardSample forward_sample(const ForwardPlan& plan, int64_t n) {
  ForwardSample sample{};
  sample.row = plan.rows == nullptr ? n : plan.rows[n];
  sample.t = plan.t != nullptr
                 ? plan.t[n]
                 : timestep_from_word(philox_words(0, plan.counters.draw(STREAM_T, n)).w0,
                                      plan.num_timesteps);
  sample.step = forward_step(plan.alphas_cumprod[sample.t]);
  sample.mirrored =
      plan.flip && mirrored_by_word(philox_words(0, plan.counters.draw(STREAM_FLIP, n)).w0);
  return sample;
}

// posterior_step: x_t and the net's output -> x_0, x_prev and its low-precision copy.
struct ReversePlan {
  int64_t samples, channels, positions;
  const float* x_t;
  const void* output;  // (samples, output_channels, positions)
  Dtype output_dtype;
  int64_t output_channels;    // 2 * channels if the second half is the variance's values
  const void* unconditional;  // like output; null: no guidance
  float guidance;
  const double* alphas_cumprod;
  int64_t num_timesteps;
  PerSample t, t_prev;  // t_prev < 0: to the image itself
  ReverseRule rule;
  double quantile;     // of |x_0|, for Clip::dynamic
  const float* noise;  // null: drawn
  Counters counters;
  float* x_prev;  // may be x_t
  float* x_0;     // no input's memory: the dynamic threshold keeps its estimates there
  void* copy;     // of x_prev; may be null
  Dtype copy_dtype;
  bool channels_last;  // all tensors
};

struct ReverseSample {
  ReverseStep step;
  bool noisy;
};

DDPM_FAST_INLINE ReverseSample reverse_sample(const ReversePlan& plan, int64_t n) {
  const int64_t t_prev = plan.t_prev.of(n);
  const double abar = plan.alphas_cumprod[plan.t.of(n)];
  const double abar_prev = t_prev < 0 ? 1.0 : plan.alphas_cumprod[t_prev];
  ReverseSample sample{reverse_step(abar, abar_prev, plan.rule), false};
  sample.noisy = t_prev >= 0 && (plan.rule.eta < 0.0 || plan.rule.eta > 0.0);
  return sample;
}

DDPM_FAST_INLINE bool has_learned_std(const ReversePlan& plan) {
  return plan.rule.eta < 0.0 && learns_variance(plan.rule);
}

namespace cpu {
// counters (n, 4), keys (n, 2), out (n, 4): int64 holding uint32.
void philox_words(const int64_t* counters, const int64_t* keys, int64_t* out, int64_t n,
                  int threads);
// out: float32; normals or uniforms.
void philox_fill(bool normal, float* out, const FillPlan& plan, int threads);
// words (2 n): pairs of uint32 -> out (2 n) normals.
void box_muller(const uint32_t* words, float* out, int64_t n);
// x, out: float32 or float64.
void dropout(const void* x, void* out, Dtype dtype, const DropoutPlan& plan, uint64_t seed,
             uint32_t step, uint32_t first_index, int threads);
// x_0: uint8 or float32; all else float32 in NCHW.
void q_sample(const ForwardPlan& plan, int threads);
// All float32 in NCHW, no copy.
void posterior_step(const ReversePlan& plan, int threads);

std::vector<std::string> simd_levels();  // those this processor runs, worst first
std::string simd_level();                // the one in use
void use_simd(const std::string& level);
}  // namespace cpu

namespace cuda {
// The caller has made `device` current (ops.py holds torch's device guard). Errors are
// std::runtime_error.
void philox_words(const int64_t* counters, const int64_t* keys, int64_t* out, int64_t n, int device,
                  void* stream);
void philox_fill(bool normal, float* out, const FillPlan& plan, int device, void* stream);
// rng: three int64 on the device, [seed, step, first_index].
void dropout(const void* x, void* out, Dtype dtype, const DropoutPlan& plan, const int64_t* rng,
             int device, void* stream);
void q_sample(const ForwardPlan& plan, int device, void* stream);
void posterior_step(const ReversePlan& plan, int device, void* stream);
std::string why_unusable();  // empty when a device and a new enough driver are there
}  // namespace cuda

}  // namespace ddpm_fast
