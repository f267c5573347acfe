// What the extension exports: raw pointers, sizes, dtype codes, a stream handle; nothing of torch.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace ddpm_fast {

// Codes shared with ddpm_fast/kernels/extension.py.
enum class Dtype : int { float32 = 0, float64 = 1, float16 = 2, bfloat16 = 3 };

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
std::string why_unusable();  // empty when a device and a new enough driver are there
}  // namespace cuda

}  // namespace ddpm_fast
