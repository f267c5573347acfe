// The inner loops of the CPU part, compiled once per instruction set from cpu_loops.cpp.
#pragma once

#include <cstdint>

#include "philox.h"

namespace ddpm_fast {

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
};

extern const CpuLoops loops_baseline;
#if defined(DDPM_FAST_X86_LEVELS)
extern const CpuLoops loops_avx2;
extern const CpuLoops loops_avx512;
#endif

}  // namespace ddpm_fast
