// ddpm_fast._C: pybind11 over raw pointers (as integers), sizes, dtype codes and a stream handle.
// Arguments are checked in Python (ddpm_fast/ops.py); here only their integer ranges are. The
// interpreter lock is released while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "build_info.h"  // written by setup.py
#include "kernels.h"

namespace py = pybind11;

namespace ddpm_fast {
namespace {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

std::string compiler_name() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#elif defined(_MSC_VER)
  return "msvc " + std::to_string(_MSC_VER);
#else
  return "unknown";
#endif
}

py::dict build_info() {
  py::dict info;
  info["version"] = DDPM_FAST_VERSION;
  info["compiler"] = compiler_name();
  info["flags"] = DDPM_FAST_FLAGS;
  info["cuda"] = bool(DDPM_FAST_WITH_CUDA);
  info["cuda_version"] = DDPM_FAST_CUDA_VERSION;  // "" without CUDA
  info["simd"] = cpu::simd_levels();
  info["archs"] = py::str(DDPM_FAST_CUDA_ARCHS).attr("split")();
  return info;
}

FillPlan fill_plan(int64_t samples, int64_t elements, uint64_t seed, uint32_t stream, uint32_t step,
                   uint32_t first_index) {
  return {seed, stream, step, first_index, samples, elements};
}

DropoutPlan dropout_plan(int64_t samples, int64_t elements,
                         uint32_t stream, uint32_t threshold, double scale) {
  return {samples, elements, stream, threshold, scale};
}

using release = py::call_guard<py::gil_scoped_release>;

void bind_cpu(py::module_ m) {
  m.def(
      "philox_words",
      [](uintptr_t counters, uintptr_t keys, uintptr_t out, int64_t n, int threads) {
        cpu::philox_words(pointer<int64_t>(counters), pointer<int64_t>(keys), pointer<int64_t>(out),
                          n, threads);
      },
      release());
  m.def(
      "philox_fill",
      [](bool normal, uintptr_t out, int64_t samples, int64_t elements, uint64_t seed,
         uint32_t stream, uint32_t step, uint32_t first_index, int threads) {
        cpu::philox_fill(normal, pointer<float>(out),
                         fill_plan(samples, elements, seed, stream, step, first_index), threads);
      },
      release());
  m.def(
      "box_muller",
      [](uintptr_t words, uintptr_t out, int64_t pairs) {
        cpu::box_muller(pointer<uint32_t>(words), pointer<float>(out), pairs);
      },
      release());
  m.def(
      "dropout",
      [](uintptr_t x, uintptr_t out, int dtype, int64_t samples, int64_t elements, uint32_t stream, uint32_t threshold, double scale,
         uint64_t seed, uint32_t step, uint32_t first_index, int threads) {
        cpu::dropout(
            pointer<void>(x), pointer<void>(out), Dtype(dtype),
            dropout_plan(samples, elements, stream, threshold, scale),
            seed, step, first_index, threads);
      },
      release());
  m.def("simd_levels", &cpu::simd_levels);
  m.def("simd_level", &cpu::simd_level);
  m.def("use_simd", &cpu::use_simd);
}

#if DDPM_FAST_WITH_CUDA
void bind_cuda(py::module_ m) {
  m.def(
      "philox_words",
      [](uintptr_t counters, uintptr_t keys, uintptr_t out, int64_t n, int device,
         uintptr_t stream) {
        cuda::philox_words(pointer<int64_t>(counters), pointer<int64_t>(keys),
                           pointer<int64_t>(out), n, device, pointer<void>(stream));
      },
      release());
  m.def(
      "philox_fill",
      [](bool normal, uintptr_t out, int64_t samples, int64_t elements, uint64_t seed,
         uint32_t stream, uint32_t step, uint32_t first_index, int device, uintptr_t cuda_stream) {
        cuda::philox_fill(normal, pointer<float>(out),
                          fill_plan(samples, elements, seed, stream, step, first_index), device,
                          pointer<void>(cuda_stream));
      },
      release());
  m.def(
      "dropout",
      [](uintptr_t x, uintptr_t out, int dtype, int64_t samples, int64_t elements, uint32_t stream, uint32_t threshold, double scale,
         uintptr_t rng, int device, uintptr_t cuda_stream) {
        cuda::dropout(
            pointer<void>(x), pointer<void>(out), Dtype(dtype),
            dropout_plan(samples, elements, stream, threshold, scale),
            pointer<int64_t>(rng), device, pointer<void>(cuda_stream));
      },
      release());
  m.def("why_unusable", &cuda::why_unusable);
}
#endif

}  // namespace
}  // namespace ddpm_fast

PYBIND11_MODULE(_C, m) {
  m.doc() = "ddpm_fast's compiled kernels; call them through ddpm_fast.ops.";
  m.def("build_info", &ddpm_fast::build_info);
  ddpm_fast::bind_cpu(m.def_submodule("cpu"));
#if DDPM_FAST_WITH_CUDA
  ddpm_fast::bind_cuda(m.def_submodule("cuda"));
#endif
}
