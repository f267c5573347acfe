// One thread's share of each CPU kernel, as loops over structure-of-arrays blocks that the compiler
// vectorises. setup.py compiles this file once per instruction set; DDPM_FAST_LEVEL names the table
// it defines. Only internal-linkage code here: a shared inline function could be kept from the
// AVX-512 object and run elsewhere.
#include "cpu_loops.h"

#include <cstring>

#include "indexing.h"
#include "simd.h"

#if !defined(DDPM_FAST_LEVEL)
#define DDPM_FAST_LEVEL baseline
#endif
#define DDPM_FAST_NAME_OF(level) #level
#define DDPM_FAST_NAME(level) DDPM_FAST_NAME_OF(level)
#define DDPM_FAST_TABLE_OF(level) loops_##level
#define DDPM_FAST_TABLE(level) DDPM_FAST_TABLE_OF(level)

namespace ddpm_fast {
namespace {

constexpr int64_t BLOCK = 128;  // counters; the words of a block (2 KiB) stay in L1

struct WordBlock {  // structure of arrays: one array per output word
  alignas(64) uint32_t w0[BLOCK];
  alignas(64) uint32_t w1[BLOCK];
  alignas(64) uint32_t w2[BLOCK];
  alignas(64) uint32_t w3[BLOCK];
};

DDPM_FAST_INLINE void fill_words(WordBlock& block, uint32_t first_counter, uint32_t stride,
                                 const Draw& draw) {
  alignas(64) uint32_t counters[BLOCK];
  for (int64_t i = 0; i < BLOCK; ++i) counters[i] = first_counter + uint32_t(i) * stride;
  for (int64_t i = 0; i < BLOCK; i += LANES) {
    const auto words =
        philox4x32_10(load(counters + i), broadcast(draw.stream), broadcast(draw.sample),
                      broadcast(draw.step), draw.key_low, draw.key_high);
    store(block.w0 + i, words.w0);
    store(block.w1 + i, words.w1);
    store(block.w2 + i, words.w2);
    store(block.w3 + i, words.w3);
  }
}

DDPM_FAST_INLINE void uniform_block(float* out, const WordBlock& block) {
  for (int64_t i = 0; i < BLOCK; ++i) {
    out[4 * i + 0] = uniform_from_word(block.w0[i]);
    out[4 * i + 1] = uniform_from_word(block.w1[i]);
    out[4 * i + 2] = uniform_from_word(block.w2[i]);
    out[4 * i + 3] = uniform_from_word(block.w3[i]);
  }
}

DDPM_FAST_INLINE void normal_block(float* out, const WordBlock& block) {
  for (int64_t i = 0; i < BLOCK; ++i) {
    float z0, z1, z2, z3;
    box_muller(block.w0[i], block.w1[i], z0, z1);
    box_muller(block.w2[i], block.w3[i], z2, z3);
    out[4 * i + 0] = z0;
    out[4 * i + 1] = z1;
    out[4 * i + 2] = z2;
    out[4 * i + 3] = z3;
  }
}

template <void (*FILL)(float*, const WordBlock&)>
void fill(float* out, int64_t count, uint32_t first_counter, const Draw& draw) {
  WordBlock block;
  for (; count > 0; count -= 4 * BLOCK, out += 4 * BLOCK, first_counter += uint32_t(BLOCK)) {
    fill_words(block, first_counter, 1, draw);
    if (count >= 4 * BLOCK) {
      FILL(out, block);
    } else {
      alignas(64) float tail[4 * BLOCK];
      FILL(tail, block);
      std::memcpy(out, tail, size_t(count) * sizeof(float));
    }
  }
}

void box_muller_pairs(const uint32_t* words, float* out, int64_t pairs) {
  for (int64_t i = 0; i < pairs; ++i) {
    box_muller(words[2 * i], words[2 * i + 1], out[2 * i], out[2 * i + 1]);
  }
}

// Lane j of a counter is half j % 2 (low first) of word j / 2, so the interleaved words are the
// lanes in order.
DDPM_FAST_INLINE void interleave_lanes(uint32_t* lanes, const WordBlock& block) {
  for (int64_t i = 0; i < BLOCK; ++i) {
    lanes[4 * i + 0] = block.w0[i];
    lanes[4 * i + 1] = block.w1[i];
    lanes[4 * i + 2] = block.w2[i];
    lanes[4 * i + 3] = block.w3[i];
  }
}

template <typename T>
void dropout(const T* x, T* out, int64_t count, uint32_t first_counter, const Draw& draw,
             uint32_t threshold, double scale_f64) {
  const T scale = T(scale_f64);
  WordBlock block;
  alignas(64) uint32_t lane_pairs[4 * BLOCK];
  for (; count > 0; count -= 8 * BLOCK, first_counter += uint32_t(BLOCK)) {
    fill_words(block, first_counter, 1, draw);
    interleave_lanes(lane_pairs, block);
    const int64_t here = count < 8 * BLOCK ? count : 8 * BLOCK;
    for (int64_t i = 0; i < here / 2; ++i) {
      const uint32_t pair = lane_pairs[i];
      const T low = x[2 * i] * scale;
      const T high = x[2 * i + 1] * scale;
      out[2 * i] = (pair & 0xFFFFu) >= threshold ? low : T(0);
      out[2 * i + 1] = (pair >> 16) >= threshold ? high : T(0);
    }
    if (here % 2 == 1) {
      out[here - 1] = (lane_pairs[here / 2] & 0xFFFFu) >= threshold ? x[here - 1] * scale : T(0);
    }
    x += here;
    out += here;
  }
}

constexpr int64_t TILE = 4 * BLOCK;  // elements; the tiles below (2 KiB each) stay in L1

struct alignas(64) Tile {
  float values[TILE];
};

DDPM_FAST_INLINE float unit_of(float x) { return x; }
DDPM_FAST_INLINE float unit_of(uint8_t pixel) { return unit_from_pixel(float(int32_t(pixel))); }

// Elements first .. first + count - 1 of an image, mirrored or not.
template <typename T>
void load_image(Tile& to, const T* image, int64_t first, int64_t count, int64_t width,
                bool mirrored) {
  if (!mirrored) {
    for (int64_t i = 0; i < count; ++i) to.values[i] = unit_of(image[first + i]);
    return;
  }
  for (int64_t i = 0; i < count;) {
    const int64_t in_row = width - (first + i) % width;
    const int64_t here = in_row < count - i ? in_row : count - i;
    const T* from = image + mirrored_element(first + i, width);
    for (int64_t j = 0; j < here; ++j) to.values[i + j] = unit_of(from[-j]);
    i += here;
  }
}

// `noise` itself, or a tile drawn from element `first` on.
DDPM_FAST_INLINE const float* noise_tile(Tile& tile, const float* noise, int64_t first,
                                         const Draw& draw) {
  if (noise != nullptr) return noise;
  WordBlock block;
  fill_words(block, uint32_t(first / 4), 1, draw);
  normal_block(tile.values, block);
  return tile.values;
}

template <typename T>
void forward(const ForwardPiece& piece, const ForwardStep& step, Prediction prediction) {
  Tile x_0, drawn, x_t;
  const T* image = static_cast<const T*>(piece.x_0);
  for (int64_t at = 0; at < piece.count; at += TILE) {
    const int64_t count = piece.count - at < TILE ? piece.count - at : TILE;
    load_image(x_0, image, piece.first + at, count, piece.width, piece.mirrored);
    const float* noise = piece.noise == nullptr ? nullptr : piece.noise + at;
    const float* eps = noise_tile(drawn, noise, piece.first + at, piece.draw);
    for (int64_t i = 0; i < count; ++i) x_t.values[i] = noised(x_0.values[i], eps[i], step);
    std::memcpy(piece.x_t + at, x_t.values, size_t(count) * sizeof(float));
    const float* target = eps;
    if (prediction == Prediction::x_0) {
      target = x_0.values;
    } else if (prediction == Prediction::v) {
      for (int64_t i = 0; i < count; ++i) {
        x_t.values[i] = target_of(x_0.values[i], eps[i], step, Prediction::v);
      }
      target = x_t.values;
    }
    std::memcpy(piece.target + at, target, size_t(count) * sizeof(float));
  }
}

// The net's output, with guidance if there is a second one.
DDPM_FAST_INLINE const float* guided_tile(Tile& tile, const ReversePiece& piece, int64_t at,
                                          int64_t count) {
  const float* output = piece.output + at;
  if (piece.unconditional == nullptr) return output;
  const float* unconditional = piece.unconditional + at;
  for (int64_t i = 0; i < count; ++i) {
    tile.values[i] = guided(output[i], unconditional[i], piece.guidance);
  }
  return tile.values;
}

void reverse_x_0(const ReversePiece& piece, const ReverseStep& step) {
  Tile guided_output, x_0;
  for (int64_t at = 0; at < piece.count; at += TILE) {
    const int64_t count = piece.count - at < TILE ? piece.count - at : TILE;
    const float* out = guided_tile(guided_output, piece, at, count);
    const float* x_t = piece.x_t + at;
    for (int64_t i = 0; i < count; ++i) x_0.values[i] = raw_x_0(x_t[i], out[i], step);
    std::memcpy(piece.x_0 + at, x_0.values, size_t(count) * sizeof(float));
  }
}

void clip_tile(float* x_0, int64_t count, Clip clip, float limit) {
  if (clip == Clip::unit) {
    for (int64_t i = 0; i < count; ++i) x_0[i] = clipped(x_0[i], Clip::unit, limit);
  } else if (clip == Clip::dynamic) {
    for (int64_t i = 0; i < count; ++i) x_0[i] = clipped(x_0[i], Clip::dynamic, limit);
  }
}

void add_noise(float* x_prev, const float* z, int64_t count, const float* variance_values,
               const ReverseStep& step) {
  if (variance_values == nullptr) {
    for (int64_t i = 0; i < count; ++i) x_prev[i] += step.std * z[i];
  } else {
    for (int64_t i = 0; i < count; ++i) {
      x_prev[i] += learned_std(variance_values[i], step) * z[i];
    }
  }
}

void reverse(const ReversePiece& piece, const ReverseStep& step) {
  Tile guided_output, x_0, x_prev, drawn;
  for (int64_t at = 0; at < piece.count; at += TILE) {
    const int64_t count = piece.count - at < TILE ? piece.count - at : TILE;
    const float* out = guided_tile(guided_output, piece, at, count);
    const float* x_t = piece.x_t + at;
    for (int64_t i = 0; i < count; ++i) x_0.values[i] = raw_x_0(x_t[i], out[i], step);
    clip_tile(x_0.values, count, piece.clip, piece.limit);
    for (int64_t i = 0; i < count; ++i) {
      x_prev.values[i] = previous(x_0.values[i], x_t[i], out[i], step);
    }
    if (piece.noisy) {
      const float* noise = piece.noise == nullptr ? nullptr : piece.noise + at;
      const float* values = piece.variance_values == nullptr ? nullptr : piece.variance_values + at;
      const float* z = noise_tile(drawn, noise, piece.first + at, piece.draw);
      add_noise(x_prev.values, z, count, values, step);
    }
    std::memcpy(piece.x_0 + at, x_0.values, size_t(count) * sizeof(float));
    std::memcpy(piece.x_prev + at, x_prev.values, size_t(count) * sizeof(float));
  }
}

}  // namespace

extern const CpuLoops DDPM_FAST_TABLE(DDPM_FAST_LEVEL);
const CpuLoops DDPM_FAST_TABLE(DDPM_FAST_LEVEL) = {
    DDPM_FAST_NAME(DDPM_FAST_LEVEL),
    fill<uniform_block>,
    fill<normal_block>,
    box_muller_pairs,
    dropout<float>,
    dropout<double>,
    forward<float>,
    forward<uint8_t>,
    reverse_x_0,
    reverse,
};

}  // namespace ddpm_fast
