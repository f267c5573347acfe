// The inner loops of the CPU part, compiled once per instruction set from cpu_loops.cpp.
#pragma once

#include <cstdint>

#include "diffusion_math.h"
#include "philox.h"

namespace ddpm_fast {

// A piece of one sample for q_sample: `count` elements from element 4 * first_counter on.
struct ForwardPiece {
  const void* x_0;  // element 0 of the sample's row
  int64_t first, count, width;
  bool mirrored;
  const float* noise;  // of the piece; null: drawn
  Draw draw;
  float* x_t;     // of the piece
  float* target;  // of the piece
};

// A piece of one sample for posterior_step; pointers to its first element.
struct ReversePiece {
  const float* x_t;
  const float* output;
  const float* unconditional;    // null: no guidance
  const float* variance_values;  // null: std from the step
  const float* noise;            // null: drawn
  float* x_prev;                 // may be x_t
  float* x_0;
  int64_t first, count;
  Draw draw;
  bool noisy;
  float guidance;
  Clip clip;
  float limit;  // for Clip::dynamic
};

struct CpuLoops {
  const char* level;
  // out[i], i < count: element 4 * first_counter + i of the draw.
  void (*uniform)(float* out, int64_t count, uint32_t first_counter, const Draw& draw);
  void (*normal)(float* out, int64_t count, uint32_t first_counter, const Draw& draw);
  void (*box_muller)(const uint32_t* words, float* out, int64_t pairs);
  // x[i], i < count, is element 8 * first_counter + i.
  void (*dropout_f32)(const float* x, float* out, int64_t count, uint32_t first_counter,
                      const Draw& draw, uint32_t threshold, double scale);
  void (*dropout_f64)(const double* x, double* out, int64_t count, uint32_t first_counter,
                      const Draw& draw, uint32_t threshold, double scale);
  void (*forward_f32)(const ForwardPiece& piece, const ForwardStep& step, Prediction prediction);
  void (*forward_u8)(const ForwardPiece& piece, const ForwardStep& step, Prediction prediction);
  // Before any clipping: x_0 only.
  void (*reverse_x_0)(const ReversePiece& piece, const ReverseStep& step);
  void (*reverse)(const ReversePiece& piece, const ReverseStep& step);
};

extern const CpuLoops loops_baseline;
#if defined(DDPM_FAST_X86_LEVELS)
extern const CpuLoops loops_avx2;
extern const CpuLoops loops_avx512;
#endif

}  // namespace ddpm_fast
