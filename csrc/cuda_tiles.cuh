// Which elements of a sample a thread takes, by the layout in memory.
#pragma once

#include "cuda_memory.cuh"
#include "indexing.h"

namespace ddpm_fast {
namespace {

// A tensor (samples, channels, positions) of floats as the kernels below see it.
struct View {
  void* base;
  Dtype dtype;
  int64_t channels, positions;
  bool channels_last;
};

__device__ __forceinline__ View nchw(const float* base, int64_t channels, int64_t positions) {
  return {const_cast<float*>(base), Dtype::float32, channels, positions, false};
}

// What a thread takes: QUADS counters of one sample, so 4 * QUADS elements, where they lie in
// memory and how they get there. values[4 * q + j] is element(q) + j.
// Flat: neighbours in C,H,W order, in memory of that order.
template <int QUAD_COUNT>
struct Flat {
  static constexpr int QUADS = QUAD_COUNT;
  static constexpr bool VECTOR = true;
  int64_t first;

  static __device__ int64_t count(int64_t channels, int64_t positions) {
    return channels * positions / (4 * QUADS);
  }
  __device__ Flat(int64_t index, int64_t, int64_t) : first(4 * QUADS * index) {}
  __device__ __forceinline__ int64_t element(int q) const { return first + 4 * q; }
  __device__ __forceinline__ bool inside(int, int) const { return true; }
  __device__ __forceinline__ int64_t offset(const View& view, int64_t sample) const {
    return element_at(sample, view.channels * view.positions, first);
  }
  __device__ __forceinline__ void load(const View& view, int64_t sample, int64_t channel,
                                       float (&values)[4 * QUADS]) const {
    load_run(view.base, view.dtype, offset(view, sample) + channel * view.positions, values);
  }
  __device__ __forceinline__ void store(const View& view, int64_t sample,
                                        const float (&values)[4 * QUADS]) const {
    store_run(view.base, view.dtype, offset(view, sample), values);
  }
};

// Interleaved: four positions of all CHANNELS channels, in channels-last memory of just these.
template <int CHANNELS>
struct Interleaved {
  static constexpr int QUADS = CHANNELS;
  static constexpr bool VECTOR = true;
  int64_t position, positions;

  static __device__ int64_t count(int64_t, int64_t positions) { return positions / 4; }
  __device__ Interleaved(int64_t index, int64_t, int64_t positions)
      : position(4 * index), positions(positions) {}
  __device__ __forceinline__ int64_t element(int q) const { return q * positions + position; }
  __device__ __forceinline__ bool inside(int, int) const { return true; }
  __device__ __forceinline__ void load(const View& view, int64_t sample, int64_t,
                                       float (&values)[4 * QUADS]) const {
    if (!view.channels_last) {
#pragma unroll
      for (int q = 0; q < QUADS; ++q) {
        float quad[4];
        load_run(view.base, view.dtype, element_at(sample, QUADS * positions, element(q)), quad);
#pragma unroll
        for (int j = 0; j < 4; ++j) values[4 * q + j] = quad[j];
      }
      return;
    }
    float memory[4 * QUADS];
    load_run(view.base, view.dtype, element_at(sample, positions, position) * QUADS, memory);
#pragma unroll
    for (int i = 0; i < 4 * QUADS; ++i) values[i % QUADS * 4 + i / QUADS] = memory[i];
  }
  __device__ __forceinline__ void store(const View& view, int64_t sample,
                                        const float (&values)[4 * QUADS]) const {
    float memory[4 * QUADS];
#pragma unroll
    for (int i = 0; i < 4 * QUADS; ++i) memory[i] = values[i % QUADS * 4 + i / QUADS];
    store_run(view.base, view.dtype, element_at(sample, positions, position) * QUADS, memory);
  }
};

// Scattered: one counter, each element by itself: any size, layout and alignment.
struct Scattered {
  static constexpr int QUADS = 1;
  static constexpr bool VECTOR = false;
  int64_t first, elements;

  static __device__ int64_t count(int64_t channels, int64_t positions) {
    return ceil_div(channels * positions, 4);
  }
  __device__ Scattered(int64_t index, int64_t channels, int64_t positions)
      : first(4 * index), elements(channels * positions) {}
  __device__ __forceinline__ int64_t element(int) const { return first; }
  __device__ __forceinline__ bool inside(int, int j) const { return first + j < elements; }
  __device__ __forceinline__ void load(const View& view, int64_t sample, int64_t channel,
                                       float (&values)[4]) const {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float one[1] = {0.0f};
      if (inside(0, j)) {
        const int64_t e = first + j + channel * view.positions;
        load_run(view.base, view.dtype,
                 offset_of(sample, e, view.channels, view.positions, view.channels_last), one);
      }
      values[j] = one[0];
    }
  }
  __device__ __forceinline__ void store(const View& view, int64_t sample,
                                        const float (&values)[4]) const {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (!inside(0, j)) continue;
      const float one[1] = {values[j]};
      store_run(view.base, view.dtype,
                offset_of(sample, first + j, view.channels, view.positions, view.channels_last),
                one);
    }
  }
};

}  // namespace
}  // namespace ddpm_fast
