// Enough of CUDA for the host to run the kernels of csrc/cuda*.cuh: one block after the other, each of
// its threads a thread of the host. Slow, and for small grids.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct Index {
  unsigned x;
};
static thread_local Index threadIdx;
static Index blockIdx, gridDim;

// Of all threads of the block; those that have left count as waiting.
class Barrier {
 public:
  void start(int threads) { running_ = threads; }
  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    const int round = round_;
    if (++waiting_ == running_) return open();
    opened_.wait(lock, [&] { return round_ != round; });
  }
  void leave() {
    std::lock_guard<std::mutex> lock(mutex_);
    if (waiting_ == --running_ && running_ > 0) open();
  }

 private:
  void open() {
    waiting_ = 0;
    ++round_;
    opened_.notify_all();
  }
  std::mutex mutex_;
  std::condition_variable opened_;
  int running_ = 0, waiting_ = 0, round_ = 0;
};
static Barrier barrier;

static void __syncthreads() { barrier.wait(); }

template <typename Run>
void run_on_host(unsigned grid, int threads, const Run& run) {
  gridDim.x = grid;
  for (blockIdx.x = 0; blockIdx.x < grid; ++blockIdx.x) {
    barrier.start(threads);
    std::vector<std::thread> block;
    for (int i = 0; i < threads; ++i) {
      block.emplace_back([&, i] {
        threadIdx.x = unsigned(i);
        run();
        barrier.leave();
      });
    }
    for (std::thread& thread : block) thread.join();
  }
}

static unsigned atomicAdd(unsigned* to, unsigned value) {
  return __atomic_fetch_add(to, value, __ATOMIC_RELAXED);
}
static void atomicMin(unsigned* to, unsigned value) {
  unsigned old = __atomic_load_n(to, __ATOMIC_RELAXED);
  while (value < old &&
         !__atomic_compare_exchange_n(to, &old, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
}

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

// bf16 by rounding fp32 to nearest, ties to even; no NaN comes here.
struct __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float value) {
    uint32_t word;
    std::memcpy(&word, &value, 4);
    bits = uint16_t((word + 0x7FFFu + (word >> 16 & 1u)) >> 16);
  }
};
static float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t word = uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}
static __nv_bfloat16 __float2bfloat16_rn(float x) { return __nv_bfloat16(x); }

struct __half {
  _Float16 value;
  __half() = default;
  explicit __half(float x) : value(_Float16(x)) {}
};
static float __half2float(__half x) { return float(x.value); }
static __half __float2half_rn(float x) { return __half(x); }

typedef int cudaError_t;
constexpr cudaError_t cudaSuccess = 0;
static cudaError_t cudaSetDevice(int) { return cudaSuccess; }
static cudaError_t cudaGetLastError() { return cudaSuccess; }
static cudaError_t cudaGetDeviceCount(int* count) { return *count = 0; }
static const char* cudaGetErrorName(cudaError_t) { return "cudaErrorNoDevice"; }
static const char* cudaGetErrorString(cudaError_t) { return "run on the host"; }
