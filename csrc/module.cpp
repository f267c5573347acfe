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

using release = py::call_guard<py::gil_scoped_release>;

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// How a parameter crosses pybind11: a pointer as an integer, anything else as it is.
template <typename T>
struct Opaque {
  using type = T;
  static T cast(T value) { return value; }
};
template <>
struct Opaque<void*> {
  using type = uintptr_t;
  static void* cast(uintptr_t value) { return pointer<void>(value); }
};

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

DropoutPlan dropout_plan(int64_t samples, int64_t elements, uint32_t stream, uint32_t threshold,
                         double scale) {
  return {samples, elements, stream, threshold, scale};
}

// How Python gives an integer: its value, or the address of one (stride 0) or of one a sample (1).
PerSample per_sample(int64_t value, uintptr_t at, int64_t stride = 0) {
  return {value, pointer<int64_t>(at), stride};
}

Counters counters(int64_t seed, uintptr_t seed_at, int64_t step, uintptr_t step_at,
                  int64_t first_index, uintptr_t first_index_at) {
  return {per_sample(seed, seed_at), per_sample(step, step_at),
          per_sample(first_index, first_index_at)};
}

// Defines `name` with ForwardPlan's fields as keyword arguments, then those of `run`.
template <typename... Target, typename... Names>
void bind_q_sample(py::module_ m, void (*run)(const ForwardPlan&, Target...), Names... names) {
  m.def(
      "q_sample",
      [run](int64_t samples, int64_t channels, int64_t height, int64_t width, uintptr_t x_0,
            int x_0_dtype, uintptr_t rows, uintptr_t alphas_cumprod, int64_t num_timesteps,
            uintptr_t t, uintptr_t t_out, uintptr_t noise, int64_t seed, uintptr_t seed_at,
            int64_t step, uintptr_t step_at, int64_t first_index, uintptr_t first_index_at,
            bool flip, int prediction, uintptr_t x_t, int x_t_dtype, uintptr_t target,
            int target_dtype, bool channels_last, typename Opaque<Target>::type... where) {
        const ForwardPlan plan{samples,
                               channels,
                               height,
                               width,
                               pointer<void>(x_0),
                               Dtype(x_0_dtype),
                               pointer<int64_t>(rows),
                               pointer<double>(alphas_cumprod),
                               num_timesteps,
                               pointer<int64_t>(t),
                               pointer<int64_t>(t_out),
                               pointer<float>(noise),
                               counters(seed, seed_at, step, step_at, first_index, first_index_at),
                               flip,
                               Prediction(prediction),
                               pointer<void>(x_t),
                               Dtype(x_t_dtype),
                               pointer<void>(target),
                               Dtype(target_dtype),
                               channels_last};
        run(plan, Opaque<Target>::cast(where)...);
      },
      py::kw_only(), py::arg("samples"), py::arg("channels"), py::arg("height"), py::arg("width"),
      py::arg("x_0"), py::arg("x_0_dtype"), py::arg("rows"), py::arg("alphas_cumprod"),
      py::arg("num_timesteps"), py::arg("t"), py::arg("t_out"), py::arg("noise"), py::arg("seed"),
      py::arg("seed_at"), py::arg("step"), py::arg("step_at"), py::arg("first_index"),
      py::arg("first_index_at"), py::arg("flip"), py::arg("prediction"), py::arg("x_t"),
      py::arg("x_t_dtype"), py::arg("target"), py::arg("target_dtype"), py::arg("channels_last"),
      py::arg(names)..., release());
}

// Defines posterior_step with ReversePlan's fields as keyword arguments, then those of `run`.
template <typename... Target, typename... Names>
void bind_posterior_step(py::module_ m, void (*run)(const ReversePlan&, Target...),
                         Names... names) {
  m.def(
      "posterior_step",
      [run](int64_t samples, int64_t channels, int64_t positions, uintptr_t x_t, uintptr_t output,
            int output_dtype, int64_t output_channels, uintptr_t unconditional, float guidance,
            uintptr_t alphas_cumprod, int64_t num_timesteps, int64_t t, uintptr_t t_at,
            int64_t t_stride, int64_t t_prev, uintptr_t t_prev_at, int64_t t_prev_stride,
            int prediction, int variance, double eta, bool recompute_eps, bool clip,
            double quantile, uintptr_t noise, int64_t seed, uintptr_t seed_at, int64_t step,
            uintptr_t step_at, int64_t first_index, uintptr_t first_index_at, uintptr_t x_prev,
            uintptr_t x_0, uintptr_t copy, int copy_dtype, bool channels_last,
            typename Opaque<Target>::type... where) {
        const Clip clipping = !clip ? Clip::none : quantile < 0 ? Clip::unit : Clip::dynamic;
        const ReversePlan plan{
            samples,
            channels,
            positions,
            pointer<float>(x_t),
            pointer<void>(output),
            Dtype(output_dtype),
            output_channels,
            pointer<void>(unconditional),
            guidance,
            pointer<double>(alphas_cumprod),
            num_timesteps,
            per_sample(t, t_at, t_stride),
            per_sample(t_prev, t_prev_at, t_prev_stride),
            {Prediction(prediction), Variance(variance), clipping, eta, recompute_eps},
            quantile,
            pointer<float>(noise),
            counters(seed, seed_at, step, step_at, first_index, first_index_at),
            pointer<float>(x_prev),
            pointer<float>(x_0),
            pointer<void>(copy),
            Dtype(copy_dtype),
            channels_last};
        run(plan, Opaque<Target>::cast(where)...);
      },
      py::kw_only(), py::arg("samples"), py::arg("channels"), py::arg("positions"), py::arg("x_t"),
      py::arg("output"), py::arg("output_dtype"), py::arg("output_channels"),
      py::arg("unconditional"), py::arg("guidance"), py::arg("alphas_cumprod"),
      py::arg("num_timesteps"), py::arg("t"), py::arg("t_at"), py::arg("t_stride"),
      py::arg("t_prev"), py::arg("t_prev_at"), py::arg("t_prev_stride"), py::arg("prediction"),
      py::arg("variance"), py::arg("eta"), py::arg("recompute_eps"), py::arg("clip"),
      py::arg("quantile"), py::arg("noise"), py::arg("seed"), py::arg("seed_at"), py::arg("step"),
      py::arg("step_at"), py::arg("first_index"), py::arg("first_index_at"), py::arg("x_prev"),
      py::arg("x_0"), py::arg("copy"), py::arg("copy_dtype"), py::arg("channels_last"),
      py::arg(names)..., release());
}

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
      [](uintptr_t x, uintptr_t out, int dtype, int64_t samples, int64_t elements, uint32_t stream,
         uint32_t threshold, double scale, uint64_t seed, uint32_t step, uint32_t first_index,
         int threads) {
        cpu::dropout(pointer<void>(x), pointer<void>(out), Dtype(dtype),
                     dropout_plan(samples, elements, stream, threshold, scale), seed, step,
                     first_index, threads);
      },
      release());
  bind_q_sample(m, &cpu::q_sample, "threads");
  bind_posterior_step(m, &cpu::posterior_step, "threads");
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
      [](uintptr_t x, uintptr_t out, int dtype, int64_t samples, int64_t elements, uint32_t stream,
         uint32_t threshold, double scale, uintptr_t rng, int device, uintptr_t cuda_stream) {
        cuda::dropout(pointer<void>(x), pointer<void>(out), Dtype(dtype),
                      dropout_plan(samples, elements, stream, threshold, scale),
                      pointer<int64_t>(rng), device, pointer<void>(cuda_stream));
      },
      release());
  bind_q_sample(m, &cuda::q_sample, "device", "stream");
  bind_posterior_step(m, &cuda::posterior_step, "device", "stream");
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
