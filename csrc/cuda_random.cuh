// Philox words, uniforms and normals, and dropout: a thread takes one counter.
#pragma once

#include "cuda_memory.cuh"
#include "indexing.h"
#include "philox.h"

namespace ddpm_fast {
namespace {

constexpr int BLOCK = 256;  // threads; not yet measured

__device__ __forceinline__ int64_t global_thread() {
  return int64_t(blockIdx.x) * BLOCK + threadIdx.x;
}

__device__ __forceinline__ int64_t thread_count() { return int64_t(gridDim.x) * BLOCK; }

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
    float* to = out + element_at(sample, plan.elements, 4 * counter);
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
    const int64_t at = element_at(sample, elements, 8 * counter);
    if (ALIGNED) {
      Pack<T, 8> pack = load_words<T, 8>(x + at);
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

}  // namespace
}  // namespace ddpm_fast
