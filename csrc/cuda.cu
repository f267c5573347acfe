// The CUDA part: a thread takes one counter, so four normals or eight dropout decisions, and moves
// 16 bytes at a time where alignment allows. Launches only: no allocation, no synchronisation, so
// every kernel can be captured in a graph.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <stdexcept>

#include "kernels.h"
#include "philox.h"

namespace ddpm_fast {
namespace {

constexpr int BLOCK = 256;  // threads; not yet measured

__device__ __forceinline__ int64_t global_thread() {
  return int64_t(blockIdx.x) * BLOCK + threadIdx.x;
}

__device__ __forceinline__ int64_t thread_count() { return int64_t(gridDim.x) * BLOCK; }

// A vector of N values that loads and stores in 16-byte accesses (8-byte for four 2-byte values).
template <typename T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Pack {
  T values[N];
};

__device__ __forceinline__ float to_math(float x) { return x; }
__device__ __forceinline__ float to_math(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_math(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T from_math(float x) {
  return T(x);
}
template <>
__device__ __forceinline__ __half from_math<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_math<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
__device__ __forceinline__ double scaled(double x, double scale) { return x * scale; }
template <typename T>
__device__ __forceinline__ T scaled(T x, double scale) {
  return from_math<T>(to_math(x) * float(scale));
}

struct DeviceRng {  // [seed, step, first_index] as the kernel finds them in memory
  const int64_t* values;

  __device__ __forceinline__ Draw draw(uint32_t stream, int64_t sample) const {
    return make_draw(uint64_t(values[0]), stream, uint32_t(values[2]) + uint32_t(sample),
                     uint32_t(values[1]));
  }
};

__global__ void words_kernel(const int64_t* counters, const int64_t* keys, int64_t* out,
                             int64_t n) {
  for (int64_t i = global_thread(); i < n; i += thread_count()) {
    philox_words_row(counters, keys, out, i);
  }
}

template <bool NORMAL, bool ALIGNED>
__global__ void fill_kernel(float* out, FillPlan plan) {
  const int64_t counters_per_sample = (plan.elements + 3) / 4;
  const int64_t counters = plan.samples * counters_per_sample;
  for (int64_t i = global_thread(); i < counters; i += thread_count()) {
    const int64_t sample = i / counters_per_sample;
    const int64_t counter = i % counters_per_sample;
    const Draw draw =
        make_draw(plan.seed, plan.stream, plan.first_index + uint32_t(sample), plan.step);
    const Words<uint32_t> words = philox_words(uint32_t(counter), draw);
    Pack<float, 4> pack;
    if (NORMAL) {
      box_muller(words.w0, words.w1, pack.values[0], pack.values[1]);
      box_muller(words.w2, words.w3, pack.values[2], pack.values[3]);
    } else {
      pack.values[0] = uniform_from_word(words.w0);
      pack.values[1] = uniform_from_word(words.w1);
      pack.values[2] = uniform_from_word(words.w2);
      pack.values[3] = uniform_from_word(words.w3);
    }
    float* to = out + sample * plan.elements + 4 * counter;
    if (ALIGNED) {
      *reinterpret_cast<Pack<float, 4>*>(to) = pack;
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (4 * counter + j < plan.elements) to[j] = pack.values[j];
      }
    }
  }
}

// Memory order n,c,p: the eight lanes of a counter are eight neighbours in memory.
template <typename T, bool ALIGNED>
__global__ void dropout_kernel(const T* x, T* out, DropoutPlan plan, DeviceRng rng) {
  const int64_t elements = plan.elements;
  const int64_t counters_per_sample = (elements + 7) / 8;
  const int64_t counters = plan.samples * counters_per_sample;
  for (int64_t i = global_thread(); i < counters; i += thread_count()) {
    const int64_t sample = i / counters_per_sample;
    const int64_t counter = i % counters_per_sample;
    const Words<uint32_t> words = philox_words(uint32_t(counter), rng.draw(plan.stream, sample));
    const int64_t at = sample * elements + 8 * counter;
    if (ALIGNED) {
      Pack<T, 8> pack = *reinterpret_cast<const Pack<T, 8>*>(x + at);
#pragma unroll
      for (int lane = 0; lane < 8; ++lane) {
        const bool keep = lane_of(words, lane) >= plan.threshold;
        pack.values[lane] = keep ? scaled(pack.values[lane], plan.scale) : T(0.0f);
      }
      *reinterpret_cast<Pack<T, 8>*>(out + at) = pack;
    } else {
#pragma unroll
      for (int lane = 0; lane < 8; ++lane) {
        if (8 * counter + lane >= elements) continue;
        const bool keep = lane_of(words, lane) >= plan.threshold;
        out[at + lane] = keep ? scaled(x[at + lane], plan.scale) : T(0.0f);
      }
    }
  }
}

void check(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(call) + " failed: " + cudaGetErrorName(error) + ": " +
                           cudaGetErrorString(error));
}

// Selecting the device the caller made current tells our own copy of the CUDA runtime about it.
template <typename... Arguments>
void launch(const char* name, int64_t work, int device, void* stream, void (*kernel)(Arguments...),
            Arguments... arguments) {
  check(cudaSetDevice(device), "cudaSetDevice");
  if (work == 0) return;
  const int64_t blocks = std::min<int64_t>((work + BLOCK - 1) / BLOCK, INT32_MAX);
  kernel<<<unsigned(blocks), BLOCK, 0, static_cast<cudaStream_t>(stream)>>>(arguments...);
  check(cudaGetLastError(), name);
}

bool aligned16(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <typename T>
void launch_dropout(const void* x_ptr, void* out_ptr, const DropoutPlan& plan, DeviceRng rng,
                    int device, void* stream) {
  const T* x = static_cast<const T*>(x_ptr);
  T* out = static_cast<T*>(out_ptr);
  const bool aligned = plan.elements % 8 == 0 && aligned16(x) && aligned16(out);
  launch("dropout_kernel", plan.samples * ((plan.elements + 7) / 8), device, stream,
         aligned ? dropout_kernel<T, true> : dropout_kernel<T, false>, x, out, plan, rng);
}

}  // namespace

namespace cuda {

void philox_words(const int64_t* counters, const int64_t* keys, int64_t* out, int64_t n, int device,
                  void* stream) {
  launch("words_kernel", n, device, stream, words_kernel, counters, keys, out, n);
}

void philox_fill(bool normal, float* out, const FillPlan& plan, int device, void* stream) {
  const bool aligned = plan.elements % 4 == 0 && aligned16(out);
  void (*kernel)(float*, FillPlan) =
      normal ? (aligned ? fill_kernel<true, true> : fill_kernel<true, false>)
             : (aligned ? fill_kernel<false, true> : fill_kernel<false, false>);
  launch("fill_kernel", plan.samples * ((plan.elements + 3) / 4), device, stream, kernel, out,
         plan);
}

void dropout(const void* x, void* out, Dtype dtype, const DropoutPlan& plan, const int64_t* rng,
             int device, void* stream) {
  const auto run = dtype == Dtype::float32   ? launch_dropout<float>
                   : dtype == Dtype::float64 ? launch_dropout<double>
                   : dtype == Dtype::float16 ? launch_dropout<__half>
                                             : launch_dropout<__nv_bfloat16>;
  run(x, out, plan, DeviceRng{rng}, device, stream);
}

std::string why_unusable() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess && count > 0) return "";
  return std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
}

}  // namespace cuda
}  // namespace ddpm_fast
