// Values of any dtype from memory and back, in accesses of 16 bytes where alignment allows.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>

#include "diffusion_math.h"
#include "kernels.h"

namespace ddpm_fast {
namespace {

// A vector of N values that loads and stores in 16-byte accesses (8-byte for four 2-byte values).
template <typename T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Pack {
  T values[N];
};

// As whole 16-byte words: of members that are used apart nvcc 13.0 makes loads of 2 to 8 bytes.
template <typename T, int N>
__device__ __forceinline__ Pack<T, N> load_words(const T* from) {
  static_assert(sizeof(Pack<T, N>) % sizeof(uint4) == 0, "a pack of whole words");
  constexpr int COUNT = int(sizeof(Pack<T, N>) / sizeof(uint4));
  uint4 words[COUNT];
#pragma unroll
  for (int i = 0; i < COUNT; ++i) words[i] = reinterpret_cast<const uint4*>(from)[i];
  Pack<T, N> pack;
  memcpy(&pack, words, sizeof pack);
  return pack;
}

__device__ __forceinline__ float to_math(float x) { return x; }
__device__ __forceinline__ float to_math(uint8_t x) { return float(x); }
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

// The largest access, at most 16 bytes, that N values of T divide into.
template <typename T, int N>
struct Access {
  static constexpr int BYTES = N * int(sizeof(T));
  static constexpr int WIDTH = BYTES % 16 ? BYTES & -BYTES : 16;  // or its largest power of two
  static constexpr int COUNT = WIDTH / int(sizeof(T));
  static_assert(COUNT > 0 && N % COUNT == 0, "whole accesses");
  using Piece = Pack<T, COUNT>;
};

template <typename T, int N>
__device__ __forceinline__ void load_as(const void* base, int64_t offset, float (&values)[N]) {
  using Piece = typename Access<T, N>::Piece;
  constexpr int COUNT = Access<T, N>::COUNT;
  const Piece* from = reinterpret_cast<const Piece*>(static_cast<const T*>(base) + offset);
#pragma unroll
  for (int i = 0; i < N / COUNT; ++i) {
    const Piece piece = from[i];
#pragma unroll
    for (int j = 0; j < COUNT; ++j) values[i * COUNT + j] = to_math(piece.values[j]);
  }
}

template <typename T, int N>
__device__ __forceinline__ void store_as(void* base, int64_t offset, const float (&values)[N]) {
  using Piece = typename Access<T, N>::Piece;
  constexpr int COUNT = Access<T, N>::COUNT;
  Piece* to = reinterpret_cast<Piece*>(static_cast<T*>(base) + offset);
#pragma unroll
  for (int i = 0; i < N / COUNT; ++i) {
    Piece piece;
#pragma unroll
    for (int j = 0; j < COUNT; ++j) piece.values[j] = from_math<T>(values[i * COUNT + j]);
    to[i] = piece;
  }
}

// N neighbours in memory. The dtype is the same for the whole grid, so the branch costs little and
// one kernel serves every combination of them.
template <int N>
__device__ __forceinline__ void load_run(const void* base, Dtype dtype, int64_t offset,
                                         float (&values)[N]) {
  if (dtype == Dtype::float32) {
    load_as<float>(base, offset, values);
  } else if (dtype == Dtype::bfloat16) {
    load_as<__nv_bfloat16>(base, offset, values);
  } else if (dtype == Dtype::float16) {
    load_as<__half>(base, offset, values);
  } else {
    load_as<uint8_t>(base, offset, values);
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] = unit_from_pixel(values[i]);
  }
}

template <int N>
__device__ __forceinline__ void store_run(void* base, Dtype dtype, int64_t offset,
                                          const float (&values)[N]) {
  if (dtype == Dtype::float32) {
    store_as<float>(base, offset, values);
  } else if (dtype == Dtype::bfloat16) {
    store_as<__nv_bfloat16>(base, offset, values);
  } else {
    store_as<__half>(base, offset, values);
  }
}

}  // namespace
}  // namespace ddpm_fast
