// Where the work of a kernel lies: all in 64 bits, so that sets of more than 2^31 elements are
// reached (tests/csrc checks this without their memory).
#pragma once

#include "philox.h"

namespace ddpm_fast {

DDPM_FAST_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A piece of one sample: elements first .. first + count - 1 in logical C,H,W order.
struct Piece {
  int64_t sample, first, count;
};

// The index-th piece, where each sample is cut into pieces of `size` elements and one rest.
DDPM_FAST_INLINE Piece piece_at(int64_t index, int64_t elements, int64_t size) {
  const int64_t per_sample = ceil_div(elements, size);
  const int64_t sample = index / per_sample;
  const int64_t first = index % per_sample * size;
  const int64_t left = elements - first;
  return {sample, first, left < size ? left : size};
}

// Offset of element e of a sample among dense samples of so many elements.
DDPM_FAST_INLINE int64_t element_at(int64_t sample, int64_t elements, int64_t e) {
  return sample * elements + e;
}

// Offset of logical element e of a sample whose tensor has `channels` channels; a sample of it
// starts at sample * channels * positions.
DDPM_FAST_INLINE int64_t offset_of(int64_t sample, int64_t e, int64_t channels, int64_t positions,
                                   bool channels_last) {
  return element_at(sample, channels * positions,
                    channels_last ? e % positions * channels + e / positions : e);
}

// Element e of an image mirrored left to right, in rows of `width`.
template <typename Int>
DDPM_FAST_INLINE Int mirrored_element(Int e, Int width) {
  const Int w = e % width;
  return e - w + (width - 1 - w);
}

// How a GPU thread's tile lies in memory: with full vectors, or element by element.
enum class Tiling { flat, interleaved3, interleaved4, scattered };

// For tensors of (channels, positions), all of them at 16-byte boundaries or not.
DDPM_FAST_INLINE Tiling tiling_of(int64_t channels, int64_t positions, bool channels_last,
                                  bool aligned) {
  const bool small = channels * positions < INT32_MAX;
  if (!aligned || !small) return Tiling::scattered;
  if (!channels_last || channels == 1) {
    return channels * positions % 8 == 0 ? Tiling::flat : Tiling::scattered;
  }
  if (positions % 4 != 0) return Tiling::scattered;
  return channels == 3   ? Tiling::interleaved3
         : channels == 4 ? Tiling::interleaved4
                         : Tiling::scattered;
}

}  // namespace ddpm_fast
