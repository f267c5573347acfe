// The CUDA part: a thread takes one counter, so four normals or eight dropout decisions, and moves
// 16 bytes at a time where alignment allows. Launches only: no allocation, no synchronisation, so
// every kernel can be captured in a graph.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <stdexcept>
#include <type_traits>

#include "indexing.h"
#include "kernels.h"
#include "philox.h"

namespace ddpm_fast {
namespace {

constexpr int BLOCK = 256;                 // threads; not yet measured
constexpr int64_t MAX_BLOCKS = INT32_MAX;  // of a grid
// q_sample, posterior_step: 128 threads of 8 elements, so that 3x32x32 is three full blocks; not
// yet measured
constexpr int TILE_BLOCK = 128;
constexpr int TILE_BLOCKS_PER_SM = 6;  // at least: up to 80 registers a thread
constexpr int DYNAMIC_BLOCK = 512;     // a block sees its sample seven times; not yet measured

__device__ __forceinline__ int64_t global_thread() {
  return int64_t(blockIdx.x) * BLOCK + threadIdx.x;
}

__device__ __forceinline__ int64_t thread_count() { return int64_t(gridDim.x) * BLOCK; }

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

// The tile's normals, drawn or loaded.
template <typename Tile>
__device__ __forceinline__ void noise_of(const Tile& tile, const float* noise, int64_t channels,
                                         int64_t positions, bool channels_last, int64_t sample,
                                         const Draw& draw, float (&z)[4 * Tile::QUADS]) {
  if (noise != nullptr) {
    View view = nchw(noise, channels, positions);
    view.channels_last = channels_last;
    tile.load(view, sample, 0, z);
    return;
  }
#pragma unroll
  for (int q = 0; q < Tile::QUADS; ++q) {
    const Words<uint32_t> words = philox_words(uint32_t(tile.element(q) / 4), draw);
    box_muller(words.w0, words.w1, z[4 * q + 0], z[4 * q + 1]);
    box_muller(words.w2, words.w3, z[4 * q + 2], z[4 * q + 3]);
  }
}

// The tile's elements of x_0, which lies in NCHW; mirrored quads stay quads, since they lie in rows
// of a multiple of four.
template <typename Tile>
__device__ __forceinline__ void load_image(const Tile& tile, const ForwardPlan& plan,
                                           const ForwardSample& sample,
                                           float (&x_0)[4 * Tile::QUADS]) {
  const int64_t positions = plan.height * plan.width;
  const int64_t start = element_at(sample.row, plan.channels * positions, 0);
  if (Tile::VECTOR && !sample.mirrored) {
    const View view{const_cast<void*>(plan.x_0), plan.x_0_dtype, plan.channels, positions, false};
    tile.load(view, sample.row, 0, x_0);
    return;
  }
#pragma unroll
  for (int q = 0; q < Tile::QUADS; ++q) {
    if (Tile::VECTOR) {
      float quad[4];
      // 32 bits, which hold a tiled sample (tiling_of): a 64-bit remainder is some 70 instructions.
      const int64_t last = mirrored_element(uint32_t(tile.element(q)), uint32_t(plan.width));
      load_run(plan.x_0, plan.x_0_dtype, start + last - 3, quad);
#pragma unroll
      for (int j = 0; j < 4; ++j) x_0[4 * q + j] = quad[3 - j];
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float one[1] = {0.0f};
        if (tile.inside(q, j)) {
          const int64_t e = tile.element(q) + j;
          const int64_t from = sample.mirrored ? mirrored_element(e, plan.width) : e;
          load_run(plan.x_0, plan.x_0_dtype, start + from, one);
        }
        x_0[4 * q + j] = one[0];
      }
    }
  }
}

template <typename Tile>
__device__ __forceinline__ void forward_tile(const ForwardPlan& plan, const ForwardSample& sample,
                                             const Draw& draw, int64_t n, int64_t index) {
  constexpr int SIZE = 4 * Tile::QUADS;
  const int64_t positions = plan.height * plan.width;
  const Tile tile(index, plan.channels, positions);
  float x_0[SIZE], eps[SIZE], x_t[SIZE];
  load_image(tile, plan, sample, x_0);
  noise_of(tile, plan.noise, plan.channels, positions, false, n, draw, eps);
#pragma unroll
  for (int i = 0; i < SIZE; ++i) {
    x_t[i] = noised(x_0[i], eps[i], sample.step);
    eps[i] = target_of(x_0[i], eps[i], sample.step, plan.prediction);
  }
  tile.store({plan.x_t, plan.x_t_dtype, plan.channels, positions, plan.channels_last}, n, x_t);
  tile.store({plan.target, plan.target_dtype, plan.channels, positions, plan.channels_last}, n,
             eps);
}

// A block takes TILE_BLOCK tiles of one sample, whose coefficients its first thread finds.
template <typename Tile>
__global__ void __launch_bounds__(TILE_BLOCK, TILE_BLOCKS_PER_SM)
    q_sample_kernel(ForwardPlan plan) {
  __shared__ Piece piece;
  __shared__ ForwardSample sample;
  __shared__ Draw draw;
  const int64_t tiles = Tile::count(plan.channels, plan.height * plan.width);
  const int64_t blocks = plan.samples * ceil_div(tiles, TILE_BLOCK);
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    if (threadIdx.x == 0) {
      piece = piece_at(block, tiles, TILE_BLOCK);
      sample = forward_sample(plan, piece.sample);
      draw = plan.counters.draw(STREAM_NOISE, piece.sample);
      if (piece.first == 0 && plan.t_out != nullptr) plan.t_out[piece.sample] = sample.t;
    }
    __syncthreads();
    if (threadIdx.x < piece.count) {
      forward_tile<Tile>(plan, sample, draw, piece.sample, piece.first + threadIdx.x);
    }
    __syncthreads();
  }
}

__device__ __forceinline__ View state_view(const ReversePlan& plan, const float* base) {
  return {const_cast<float*>(base), Dtype::float32, plan.channels, plan.positions,
          plan.channels_last};
}

__device__ __forceinline__ View output_view(const ReversePlan& plan, const void* base) {
  return {const_cast<void*>(base), plan.output_dtype, plan.output_channels, plan.positions,
          plan.channels_last};
}

template <typename Tile>
__device__ __forceinline__ void load_reverse(const Tile& tile, const ReversePlan& plan, int64_t n,
                                             float (&x_t)[4 * Tile::QUADS],
                                             float (&out)[4 * Tile::QUADS]) {
  tile.load(state_view(plan, plan.x_t), n, 0, x_t);
  tile.load(output_view(plan, plan.output), n, 0, out);
  if (plan.unconditional == nullptr) return;
  float other[4 * Tile::QUADS];
  tile.load(output_view(plan, plan.unconditional), n, 0, other);
#pragma unroll
  for (int i = 0; i < 4 * Tile::QUADS; ++i) out[i] = guided(out[i], other[i], plan.guidance);
}

template <typename Tile>
__device__ __forceinline__ void reverse_tile(const ReversePlan& plan, const ReverseSample& sample,
                                             const Draw& draw, int64_t n, int64_t index,
                                             float limit) {
  constexpr int SIZE = 4 * Tile::QUADS;
  const Tile tile(index, plan.channels, plan.positions);
  float x_t[SIZE], out[SIZE], x_0[SIZE];
  load_reverse(tile, plan, n, x_t, out);
#pragma unroll
  for (int i = 0; i < SIZE; ++i) {
    x_0[i] = clipped(raw_x_0(x_t[i], out[i], sample.step), plan.rule.clip, limit);
    x_t[i] = previous(x_0[i], x_t[i], out[i], sample.step);
  }
  tile.store(state_view(plan, plan.x_0), n, x_0);
  if (sample.noisy) {
    float z[SIZE];
    noise_of(tile, plan.noise, plan.channels, plan.positions, plan.channels_last, n, draw, z);
    if (has_learned_std(plan)) {
      tile.load(output_view(plan, plan.output), n, plan.channels, out);
#pragma unroll
      for (int i = 0; i < SIZE; ++i) x_t[i] += learned_std(out[i], sample.step) * z[i];
    } else {
#pragma unroll
      for (int i = 0; i < SIZE; ++i) x_t[i] += sample.step.std * z[i];
    }
  }
  tile.store(state_view(plan, plan.x_prev), n, x_t);
  if (plan.copy != nullptr) {
    tile.store({plan.copy, plan.copy_dtype, plan.channels, plan.positions, plan.channels_last}, n,
               x_t);
  }
}

template <typename Tile>
__global__ void __launch_bounds__(TILE_BLOCK, TILE_BLOCKS_PER_SM)
    posterior_step_kernel(ReversePlan plan) {
  __shared__ Piece piece;
  __shared__ ReverseSample sample;
  __shared__ Draw draw;
  const int64_t tiles = Tile::count(plan.channels, plan.positions);
  const int64_t blocks = plan.samples * ceil_div(tiles, TILE_BLOCK);
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    if (threadIdx.x == 0) {
      piece = piece_at(block, tiles, TILE_BLOCK);
      sample = reverse_sample(plan, piece.sample);
      draw = plan.counters.draw(STREAM_SAMPLER_NOISE, piece.sample);
    }
    __syncthreads();
    if (threadIdx.x < piece.count) {
      reverse_tile<Tile>(plan, sample, draw, piece.sample, piece.first + threadIdx.x, 1.0f);
    }
    __syncthreads();
  }
}

// The unclipped estimates of a sample to x_0, where each thread reads its own share back.
template <typename Tile>
__device__ __forceinline__ void store_raw_x_0(const ReversePlan& plan, const ReverseStep& step,
                                              int64_t n) {
  const int64_t tiles = Tile::count(plan.channels, plan.positions);
  for (int64_t index = threadIdx.x; index < tiles; index += DYNAMIC_BLOCK) {
    const Tile tile(index, plan.channels, plan.positions);
    float x_t[4 * Tile::QUADS], out[4 * Tile::QUADS];
    load_reverse(tile, plan, n, x_t, out);
#pragma unroll
    for (int i = 0; i < 4 * Tile::QUADS; ++i) x_t[i] = raw_x_0(x_t[i], out[i], step);
    tile.store(state_view(plan, plan.x_0), n, x_t);
  }
}

// Calls use(bits of |x_0|) for the thread's share of them; their order is that of the values.
template <typename Tile, typename Use>
__device__ __forceinline__ void for_each_magnitude(const ReversePlan& plan, int64_t n,
                                                   const Use& use) {
  const int64_t tiles = Tile::count(plan.channels, plan.positions);
  for (int64_t index = threadIdx.x; index < tiles; index += DYNAMIC_BLOCK) {
    const Tile tile(index, plan.channels, plan.positions);
    float x_0[4 * Tile::QUADS];
    tile.load(state_view(plan, plan.x_0), n, 0, x_0);
#pragma unroll
    for (int i = 0; i < 4 * Tile::QUADS; ++i) {
      if (tile.inside(i / 4, i % 4)) use(bits_from_float(x_0[i]) & 0x7FFFFFFFu);
    }
  }
}

// The dynamic threshold's limit, by a radix select over the magnitudes' bits: four passes find the
// lower order statistic exactly, a fifth the next one.
template <typename Tile>
__device__ __forceinline__ float limit_of(const ReversePlan& plan, int64_t n) {
  __shared__ unsigned int counts[256];
  __shared__ uint32_t prefix, next;
  __shared__ int64_t rank, not_above;
  const Quantile quantile = quantile_of(plan.quantile, plan.channels * plan.positions);
  if (threadIdx.x == 0) {
    prefix = 0;
    next = 0xFFFFFFFFu;
    rank = quantile.low;
    not_above = 0;
  }
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int i = threadIdx.x; i < 256; i += DYNAMIC_BLOCK) counts[i] = 0;
    __syncthreads();
    const uint32_t found = prefix;
    for_each_magnitude<Tile>(plan, n, [&](uint32_t bits) {
      if (shift == 24 || bits >> (shift + 8) == found) atomicAdd(&counts[bits >> shift & 255u], 1u);
    });
    __syncthreads();
    if (threadIdx.x == 0) {
      uint32_t digit = 0;
      while (rank >= int64_t(counts[digit])) {
        rank -= counts[digit];
        not_above += counts[digit++];
      }
      if (shift == 0) not_above += counts[digit];
      prefix = prefix << 8 | digit;
    }
    __syncthreads();
  }
  if (quantile.high >= not_above) {
    const uint32_t low = prefix;
    for_each_magnitude<Tile>(plan, n, [&](uint32_t bits) {
      if (bits > low) atomicMin(&next, bits);
    });
  } else if (threadIdx.x == 0) {
    next = prefix;
  }
  __syncthreads();
  return dynamic_limit(float_from_bits(prefix), float_from_bits(next), quantile.weight);
}

// A block takes sample first + blockIdx.x. No loop over samples: nvcc would keep addresses across it
// and spill them.
template <typename Tile>
__global__ void __launch_bounds__(DYNAMIC_BLOCK, 1)
    posterior_step_dynamic_kernel(ReversePlan plan, int64_t first) {
  __shared__ ReverseSample sample;
  __shared__ Draw draw;
  const int64_t n = first + blockIdx.x;
  const int64_t tiles = Tile::count(plan.channels, plan.positions);
  if (threadIdx.x == 0) {
    sample = reverse_sample(plan, n);
    draw = plan.counters.draw(STREAM_SAMPLER_NOISE, n);
  }
  __syncthreads();
  store_raw_x_0<Tile>(plan, sample.step, n);
  const float limit = limit_of<Tile>(plan, n);
  for (int64_t index = threadIdx.x; index < tiles; index += DYNAMIC_BLOCK) {
    reverse_tile<Tile>(plan, sample, draw, n, index, limit);
  }
}

void check(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(call) + " failed: " + cudaGetErrorName(error) + ": " +
                           cudaGetErrorString(error));
}

// Selecting the device the caller made current tells our own copy of the CUDA runtime about it.
template <typename... Arguments>
void launch_blocks(const char* name, int64_t blocks, int threads, int device, void* stream,
                   void (*kernel)(Arguments...), Arguments... arguments) {
  check(cudaSetDevice(device), "cudaSetDevice");
  if (blocks == 0) return;
  const unsigned grid = unsigned(std::min<int64_t>(blocks, MAX_BLOCKS));
  kernel<<<grid, threads, 0, static_cast<cudaStream_t>(stream)>>>(arguments...);
  check(cudaGetLastError(), name);
}

template <typename... Arguments>
void launch(const char* name, int64_t work, int device, void* stream, void (*kernel)(Arguments...),
            Arguments... arguments) {
  launch_blocks(name, ceil_div(work, BLOCK), BLOCK, device, stream, kernel, arguments...);
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

// Calls use(null pointer of the tile's type, tiles of a sample).
template <typename Use>
void with_tiles(Tiling tiling, int64_t channels, int64_t positions, const Use& use) {
  if (tiling == Tiling::flat) {
    use(static_cast<Flat<2>*>(nullptr), channels * positions / 8);
  } else if (tiling == Tiling::interleaved3) {
    use(static_cast<Interleaved<3>*>(nullptr), positions / 4);
  } else if (tiling == Tiling::interleaved4) {
    use(static_cast<Interleaved<4>*>(nullptr), positions / 4);
  } else {
    use(static_cast<Scattered*>(nullptr), ceil_div(channels * positions, 4));
  }
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

void q_sample(const ForwardPlan& plan, int device, void* stream) {
  const int64_t positions = plan.height * plan.width;
  // Vectors of an image of the set, or of a mirrored row, must start at their own boundaries.
  const bool aligned = aligned16(plan.x_0) && aligned16(plan.noise) && aligned16(plan.x_t) &&
                       aligned16(plan.target) && plan.channels * positions % 8 == 0 &&
                       (!plan.flip || plan.width % 4 == 0);
  const Tiling tiling = tiling_of(plan.channels, positions, plan.channels_last, aligned);
  with_tiles(tiling, plan.channels, positions, [&](auto* tile, int64_t tiles) {
    using Tile = std::remove_pointer_t<decltype(tile)>;
    launch_blocks("q_sample_kernel", plan.samples * ceil_div(tiles, TILE_BLOCK), TILE_BLOCK, device,
                  stream, q_sample_kernel<Tile>, plan);
  });
}

void posterior_step(const ReversePlan& plan, int device, void* stream) {
  const bool aligned = aligned16(plan.x_t) && aligned16(plan.output) &&
                       aligned16(plan.unconditional) && aligned16(plan.noise) &&
                       aligned16(plan.x_prev) && aligned16(plan.x_0) && aligned16(plan.copy);
  // The variance's values are interleaved with the output's: no vectors of either alone.
  const bool interleaved_pair = plan.channels_last && plan.output_channels != plan.channels;
  const Tiling tiling =
      tiling_of(plan.channels, plan.positions, plan.channels_last, aligned && !interleaved_pair);
  const bool dynamic = plan.rule.clip == Clip::dynamic;
  with_tiles(tiling, plan.channels, plan.positions, [&](auto* tile, int64_t tiles) {
    using Tile = std::remove_pointer_t<decltype(tile)>;
    if (dynamic) {
      for (int64_t first = 0; first < plan.samples; first += MAX_BLOCKS) {
        launch_blocks("posterior_step_dynamic_kernel", plan.samples - first, DYNAMIC_BLOCK, device,
                      stream, posterior_step_dynamic_kernel<Tile>, plan, first);
      }
    } else {
      launch_blocks("posterior_step_kernel", plan.samples * ceil_div(tiles, TILE_BLOCK), TILE_BLOCK,
                    device, stream, posterior_step_kernel<Tile>, plan);
    }
  });
}

std::string why_unusable() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess && count > 0) return "";
  return std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
}

}  // namespace cuda
}  // namespace ddpm_fast
