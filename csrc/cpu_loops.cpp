// One thread's share of each CPU kernel, as loops over structure-of-arrays blocks that the compiler
// vectorises. setup.py compiles this file once per instruction set; DDPM_FAST_LEVEL names the table
// it defines. Only internal-linkage code here: a shared inline function could be kept from the
// AVX-512 object and run elsewhere.
#include "cpu_loops.h"

#include <cstring>

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

}  // namespace

extern const CpuLoops DDPM_FAST_TABLE(DDPM_FAST_LEVEL);
const CpuLoops DDPM_FAST_TABLE(DDPM_FAST_LEVEL) = {
    DDPM_FAST_NAME(DDPM_FAST_LEVEL),
    fill<uniform_block>,
    fill<normal_block>,
    box_muller_pairs,
    dropout<float>,
    dropout<double>,
};

}  // namespace ddpm_fast
