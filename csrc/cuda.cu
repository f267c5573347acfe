// The CUDA part: a thread takes one counter, so four normals or eight dropout decisions, and moves
// 16 bytes at a time where alignment allows. Launches only: no allocation, no synchronisation, so
// every kernel can be captured in a graph.
#include <algorithm>
#include <stdexcept>
#include <type_traits>

#include "cuda_diffusion.cuh"
#include "cuda_random.cuh"
#include "indexing.h"
#include "kernels.h"

namespace ddpm_fast {
namespace {

constexpr int64_t MAX_BLOCKS = INT32_MAX;  // of a grid

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
