// q_sample and posterior_step: what a thread does with its tile of a sample.
#pragma once

#include "cuda_tiles.cuh"
#include "diffusion_math.h"
#include "philox.h"

namespace ddpm_fast {
namespace {

// 128 threads of 8 elements, so that 3x32x32 is three full blocks; not yet measured
constexpr int TILE_BLOCK = 128;
constexpr int TILE_BLOCKS_PER_SM = 6;  // at least: up to 80 registers a thread
constexpr int DYNAMIC_BLOCK = 512;     // a block sees its sample seven times; not yet measured

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

}  // namespace
}  // namespace ddpm_fast
