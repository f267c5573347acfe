// Philox4x32-10 and what is made of its words: uniforms, normals, 16-bit dropout lanes.
// One copy of each formula, inline for the host (where the compiler vectorises it over blocks of
// counters) and the device.
//
//   words    Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; Random123's test
//            vectors hold
//            key      (seed low 32, seed high 32)
//            counter  (element / 4, stream, sample, step); dropout: (element / 8, ...)
//   uniform  word >> 8, times 2^-24: [0, 1), 24 bits
//   normal   Box-Muller on the word pairs (w0, w1) -> (z0, z1) and (w2, w3) -> (z2, z3) of one
//            counter:
//              u  = fl32(a + 1) / 2^32    in [2^-32, 1]; fl32 rounds once, to nearest, ties to even
//              z0 = sqrt(-2 ln u) cos(2 pi b / 2^32)
//              z1 = sqrt(-2 ln u) sin(2 pi b / 2^32)
//            Here in fp32 with polynomials: |z| <= 6.67, within 2e-6 of the fp64 value.
//
// Every fp32 operation below is an IEEE add, multiply or square root, so builds without contraction
// to fma (-ffp-contract=off, nvcc --fmad=false) give the same bits on every instruction set and
// device.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define DDPM_FAST_INLINE static __host__ __device__ __forceinline__
#define DDPM_FAST_INLINE_MEMBER __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define DDPM_FAST_INLINE static inline __attribute__((always_inline))
#define DDPM_FAST_INLINE_MEMBER inline __attribute__((always_inline))
#else
#define DDPM_FAST_INLINE static __forceinline
#define DDPM_FAST_INLINE_MEMBER __forceinline
#endif

#if defined(__CUDA_ARCH__) || (defined(__clang__) && !defined(__CUDACC__))
#define DDPM_FAST_UNROLL _Pragma("unroll")
#elif defined(__GNUC__) && !defined(__CUDACC__)
#define DDPM_FAST_UNROLL _Pragma("GCC unroll 16")
#else
#define DDPM_FAST_UNROLL
#endif

namespace ddpm_fast {

// What identifies a sequence of words, all but the element.
struct Draw {
  uint32_t key_low, key_high;  // the 64-bit seed
  uint32_t stream, sample, step;
};

DDPM_FAST_INLINE Draw make_draw(uint64_t seed, uint32_t stream, uint32_t sample, uint32_t step) {
  return {uint32_t(seed), uint32_t(seed >> 32), stream, sample, step};
}

template <typename U32>
struct Words {
  U32 w0, w1, w2, w3;
};

DDPM_FAST_INLINE void multiply_wide(uint32_t a, uint32_t b, uint32_t& high, uint32_t& low) {
  const uint64_t product = uint64_t(a) * b;
  high = uint32_t(product >> 32);
  low = uint32_t(product);
}

DDPM_FAST_INLINE uint32_t xor3(uint32_t a, uint32_t b, uint32_t key) { return a ^ b ^ key; }

// U32 is uint32_t, or a SIMD vector of them with its own multiply_wide and xor3 (simd.h).
template <typename U32>
DDPM_FAST_INLINE Words<U32> philox4x32_10(U32 c0, U32 c1, U32 c2, U32 c3, uint32_t k0,
                                          uint32_t k1) {
  DDPM_FAST_UNROLL
  for (int round = 0; round < 10; ++round) {
    U32 high0, low0, high1, low1;
    multiply_wide(c0, 0xD2511F53u, high0, low0);
    multiply_wide(c2, 0xCD9E8D57u, high1, low1);
    c0 = xor3(high1, c1, k0);
    c1 = low1;
    c2 = xor3(high0, c3, k1);
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {c0, c1, c2, c3};
}

DDPM_FAST_INLINE Words<uint32_t> philox_words(uint32_t element_counter, const Draw& draw) {
  return philox4x32_10(element_counter, draw.stream, draw.sample, draw.step, draw.key_low,
                       draw.key_high);
}

// Row i of counters (n, 4) and keys (n, 2) to row i of out (n, 4), all int64 holding uint32.
DDPM_FAST_INLINE void philox_words_row(const int64_t* counters, const int64_t* keys, int64_t* out,
                                       int64_t i) {
  const int64_t* c = counters + 4 * i;
  const Words<uint32_t> words =
      philox4x32_10(uint32_t(c[0]), uint32_t(c[1]), uint32_t(c[2]), uint32_t(c[3]),
                    uint32_t(keys[2 * i]), uint32_t(keys[2 * i + 1]));
  out[4 * i + 0] = words.w0;
  out[4 * i + 1] = words.w1;
  out[4 * i + 2] = words.w2;
  out[4 * i + 3] = words.w3;
}

// Dropout's lane 0..7 of a counter: half lane % 2 (low first) of word lane / 2. Kept iff lane >=
// threshold.
DDPM_FAST_INLINE uint32_t lane_of(const Words<uint32_t>& words, uint32_t lane) {
  const uint32_t even = lane & 4 ? words.w2 : words.w0;
  const uint32_t odd = lane & 4 ? words.w3 : words.w1;
  const uint32_t pair = lane & 2 ? odd : even;
  return lane & 1 ? pair >> 16 : pair & 0xFFFFu;
}

DDPM_FAST_INLINE float float_from_bits(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

DDPM_FAST_INLINE uint32_t bits_from_float(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

DDPM_FAST_INLINE float uniform_from_word(uint32_t word) {
  return float(int32_t(word >> 8)) * 0x1p-24f;
}

// u = fl32(word + 1) / 2^32. Both halves are exact, so their sum is the one rounding; the
// conversions are signed because AVX2 has no unsigned one.
DDPM_FAST_INLINE float open_uniform_from_word(uint32_t word) {
  const float high = float(int32_t(word >> 16)) * 65536.0f;
  const float low = float(int32_t(word & 0xFFFFu) + 1);
  return (high + low) * 0x1p-32f;
}

// ln u for normal fp32 u > 0: u = m 2^e with m in [sqrt(1/2), sqrt(2)), then the polynomial in m -
// 1 of Cephes' logf.
DDPM_FAST_INLINE float log_poly(float u) {
  const uint32_t bits = bits_from_float(u);
  const int32_t exponent = int32_t(bits - 0x3F3504F3u) >> 23;
  const float f = float_from_bits(bits - (uint32_t(exponent) << 23)) - 1.0f;
  const float e = float(exponent);
  const float f2 = f * f;
  float p = 7.0376836292e-2f;
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  p = p * f * f2;
  p = p + e * -2.12194440e-4f;  // ln 2 = 0.693359375 - 2.12194440e-4
  p = p - 0.5f * f2;
  return (f + p) + e * 0.693359375f;
}

// cos and sin of 2 pi word / 2^32. The nearest quarter turn comes off as an integer, exactly;
// Cephes' polynomials do the rest in [-pi/4, pi/4].
DDPM_FAST_INLINE void cos_sin_of_word(uint32_t word, float& cos_out, float& sin_out) {
  const uint32_t quarter = (word + 0x20000000u) >> 30;
  const int32_t rest = int32_t(word - (quarter << 30));
  const float t = float(rest) * (1.57079632679489662f * 0x1p-30f);
  const float t2 = t * t;
  float s = -1.9515295891e-4f;
  s = s * t2 + 8.3321608736e-3f;
  s = s * t2 - 1.6666654611e-1f;
  s = s * t2 * t + t;
  float c = 2.443315711809948e-5f;
  c = c * t2 - 1.388731625493765e-3f;
  c = c * t2 + 4.166664568298827e-2f;
  c = c * t2 * t2 - 0.5f * t2 + 1.0f;
  const uint32_t swap = 0u - (quarter & 1u);  // all ones in odd quarters
  const uint32_t cos_bits = (bits_from_float(c) & ~swap) | (bits_from_float(s) & swap);
  const uint32_t sin_bits = (bits_from_float(s) & ~swap) | (bits_from_float(c) & swap);
  cos_out = float_from_bits(cos_bits ^ (((quarter + 1u) & 2u) << 30));
  sin_out = float_from_bits(sin_bits ^ ((quarter & 2u) << 30));
}

DDPM_FAST_INLINE void box_muller(uint32_t a, uint32_t b, float& z0, float& z1) {
  const float radius = sqrtf(-2.0f * log_poly(open_uniform_from_word(a)));
  float cosine, sine;
  cos_sin_of_word(b, cosine, sine);
  z0 = radius * cosine;
  z1 = radius * sine;
}

}  // namespace ddpm_fast
