// Claims about the kernels of csrc/cuda.cu, which the host runs (device_on_host.h): each layout and
// dtype has the bits of the CPU part. Built with ASan and UBSan, which also find an element outside
// a tensor and a vector access that is not aligned.
#include <sys/mman.h>

#include "claims.h"
#include "cuda.cu"

using namespace ddpm_fast;

struct Shape {
  int64_t channels, height, width;
};
// Whole vectors, several blocks, not whole ones, one element, rows without whole quads.
constexpr Shape SHAPES[] = {{3, 8, 8}, {3, 16, 36}, {4, 4, 8}, {1, 8, 8}, {1, 1, 1},
                            {3, 5, 7}, {2, 4, 4},   {3, 4, 6}, {4, 1, 4}, {5, 4, 4}};
constexpr int64_t SAMPLES = 3;
constexpr Counters COUNTERS = {{1, nullptr, 0}, {2, nullptr, 0}, {3, nullptr, 0}};
constexpr Prediction PREDICTIONS[] = {Prediction::eps, Prediction::x_0, Prediction::v};
static const std::vector<double> TABLE = {0.99, 0.9, 0.5, 0.1};
static const std::vector<int64_t> T = {1, 3, 2}, T_PREV = {0, 2, -1}, ROWS = {2, 0, 1};

// Bit k of `odd`: the k-th tensor starts one element behind a 16-byte boundary.
static int64_t offset_in(int odd, int k) { return odd >> k & 1; }
constexpr int NONE = 0, ALL = -1;

// Exactly `count` values, `offset` behind a 16-byte boundary.
template <typename V>
struct Values {
  Values(int64_t count, int64_t offset)
      : memory(size_t(count + offset), V(0.0f)), count(count), data(memory.data() + offset) {}
  std::vector<V> memory;
  int64_t count;
  V* data;
};
typedef Values<float> Floats;

static Floats normals(int64_t count, int64_t offset, uint32_t stream) {
  Floats out(count, offset);
  cpu::philox_fill(true, out.data, {7, stream, 0, 0, 1, count}, 1);
  return out;
}

// (samples, channels, positions) in channels-last order.
static Floats channels_last_of(const Floats& x, int64_t channels, int64_t offset) {
  const int64_t positions = x.count / SAMPLES / channels;
  Floats out(x.count, offset);
  for (int64_t n = 0; n < SAMPLES; ++n)
    for (int64_t e = 0; e < channels * positions; ++e)
      out.data[offset_of(n, e, channels, positions, true)] = x.data[n * channels * positions + e];
  return out;
}

static void expect_equal(const Floats& got, const Floats& wanted, const char* what) {
  for (int64_t i = 0; i < wanted.count; ++i)
    EXPECT(bits_from_float(got.data[i]) == bits_from_float(wanted.data[i]),
           "%s[%d] is %.9g, not %.9g", what, int(i), double(got.data[i]), double(wanted.data[i]));
}

template <typename V>
static void expect_rounded(const Values<V>& got, const Floats& wanted, const char* what) {
  for (int64_t i = 0; i < wanted.count; ++i)
    EXPECT(to_math(got.data[i]) == to_math(V(wanted.data[i])), "%s[%d] is %.9g, not %.9g rounded",
           what, int(i), double(to_math(got.data[i])), double(wanted.data[i]));
}

CLAIM(words_and_fills) {
  std::vector<int64_t> counters(400, 5), keys(200, 6), device(400), host(400);
  for (size_t i = 0; i < counters.size(); ++i) counters[i] += int64_t(i);
  cuda::philox_words(counters.data(), keys.data(), device.data(), 100, 0, nullptr);
  cpu::philox_words(counters.data(), keys.data(), host.data(), 100, 1);
  EXPECT(device == host, "words");
  for (bool normal : {false, true})
    for (int64_t elements : {1, 4, 7, 1000})
      for (int64_t offset : {0, 1}) {
        const FillPlan plan{9, 3, 4, 0xFFFFFFFFu, SAMPLES, elements};
        Floats got(SAMPLES * elements, offset), wanted(SAMPLES * elements, 0);
        cuda::philox_fill(normal, got.data, plan, 0, nullptr);
        cpu::philox_fill(normal, wanted.data, plan, 1);
        expect_equal(got, wanted, "fill");
      }
}

template <typename V>
static void expect_dropout(Dtype dtype, int64_t elements, int64_t offset) {
  const int64_t rng[3] = {5, 6, 7};
  const DropoutPlan plan{SAMPLES, elements, 8, 20000, 1.5};
  const Floats drawn = normals(SAMPLES * elements, 0, 1);
  Values<V> x(drawn.count, offset), got(drawn.count, offset);
  Floats exact(drawn.count, 0), wanted(drawn.count, 0);
  for (int64_t i = 0; i < drawn.count; ++i) {
    x.data[i] = V(drawn.data[i]);
    exact.data[i] = float(to_math(x.data[i]));
  }
  cuda::dropout(x.data, got.data, dtype, plan, rng, 0, nullptr);
  cpu::dropout(exact.data, wanted.data, Dtype::float32, plan, 5, 6, 7, 1);
  expect_rounded(got, wanted, "dropout");
}

CLAIM(dropout_of_every_dtype) {
  for (int64_t elements : {1, 8, 13, 1000})
    for (int64_t offset : {0, 1}) {
      expect_dropout<float>(Dtype::float32, elements, offset);
      expect_dropout<__half>(Dtype::float16, elements, offset);
      expect_dropout<__nv_bfloat16>(Dtype::bfloat16, elements, offset);
    }
}

static ForwardPlan forward_plan(const Shape& s, Prediction prediction, bool flip) {
  ForwardPlan plan{};
  plan.samples = SAMPLES, plan.channels = s.channels, plan.height = s.height, plan.width = s.width;
  plan.alphas_cumprod = TABLE.data(), plan.num_timesteps = int64_t(TABLE.size());
  plan.counters = COUNTERS;
  plan.flip = flip;
  plan.prediction = prediction;
  return plan;
}

// x_0 of type V into outputs of type Out.
template <typename V, typename Out>
static void expect_q_sample(const Shape& s, ForwardPlan plan, Dtype dtype, Dtype out_dtype,
                            bool given, int odd) {
  const int64_t count = SAMPLES * s.channels * s.height * s.width;
  const Floats drawn = normals(count, 0, 1), noise = normals(count, offset_in(odd, 0), 2);
  Values<V> x_0(count, offset_in(odd, 1));
  for (int64_t i = 0; i < count; ++i)
    x_0.data[i] =
        V(std::is_same<V, uint8_t>::value ? std::fabs(drawn.data[i]) * 36 : drawn.data[i]);
  std::vector<int64_t> t(SAMPLES), host_t(SAMPLES);
  plan.x_0 = x_0.data, plan.x_0_dtype = dtype;
  if (given) plan.rows = ROWS.data(), plan.t = T.data(), plan.noise = noise.data;
  Floats x_t(count, 0), target(count, 0);
  ForwardPlan host = plan;
  host.x_t = x_t.data, host.target = target.data, host.t_out = given ? nullptr : host_t.data();
  cpu::q_sample(host, 1);
  for (bool channels_last : {false, true}) {
    Values<Out> got_x_t(count, offset_in(odd, 2)), got_target(count, offset_in(odd, 3));
    plan.channels_last = channels_last;
    plan.x_t = got_x_t.data, plan.x_t_dtype = out_dtype;
    plan.target = got_target.data, plan.target_dtype = out_dtype;
    plan.t_out = given ? nullptr : t.data();
    cuda::q_sample(plan, 0, nullptr);
    EXPECT(t == host_t, "t");
    const int64_t channels = channels_last ? s.channels : 1;
    expect_rounded(got_x_t, channels_last_of(x_t, channels, 0), "x_t");
    expect_rounded(got_target, channels_last_of(target, channels, 0), "target");
  }
}

CLAIM(q_sample_in_every_layout_and_dtype) {
  int i = 0;
  for (const Shape& s : SHAPES)
    for (bool flip : {false, true})
      for (int odd : {NONE, ALL}) {
        const bool given = ++i % 3 == 0;
        const ForwardPlan plan = forward_plan(s, PREDICTIONS[i % 3], flip);
        expect_q_sample<float, float>(s, plan, Dtype::float32, Dtype::float32, given, odd);
        expect_q_sample<uint8_t, __nv_bfloat16>(s, plan, Dtype::uint8, Dtype::bfloat16, !given,
                                                odd);
        expect_q_sample<float, __half>(s, plan, Dtype::float32, Dtype::float16, given, odd);
      }
}

CLAIM(q_sample_with_one_tensor_off_its_boundary) {
  const Shape s{3, 4, 4};
  const ForwardPlan plan = forward_plan(s, Prediction::v, true);
  for (int k = 0; k < 4; ++k)
    expect_q_sample<float, float>(s, plan, Dtype::float32, Dtype::float32, true, 1 << k);
}

static void expect_posterior_step(const Shape& s, const ReverseRule& rule, double quantile,
                                  bool guides, bool given, bool channels_last, int odd) {
  const int64_t outputs = s.channels * (learns_variance(rule) ? 2 : 1);
  const int64_t positions = s.height * s.width, count = SAMPLES * s.channels * positions;
  const Floats x_t = normals(count, 0, 1), noise = normals(count, 0, 2);
  const Floats output = normals(SAMPLES * outputs * positions, 0, 3);
  const Floats other = normals(output.count, 0, 4);
  ReversePlan plan{};
  plan.samples = SAMPLES, plan.channels = s.channels, plan.positions = positions;
  plan.output_channels = outputs, plan.guidance = 1.5f;
  plan.alphas_cumprod = TABLE.data(), plan.num_timesteps = int64_t(TABLE.size());
  plan.t = {0, T.data(), 1}, plan.t_prev = {0, T_PREV.data(), 1};
  plan.rule = rule;
  plan.quantile = quantile;
  plan.counters = COUNTERS;
  Floats x_prev(count, 0), x_0(count, 0);
  ReversePlan host = plan;
  host.x_t = x_t.data, host.output = output.data, host.x_prev = x_prev.data, host.x_0 = x_0.data;
  if (guides) host.unconditional = other.data;
  if (given) host.noise = noise.data;
  cpu::posterior_step(host, 1);

  const int64_t channels = channels_last ? s.channels : 1;
  const int64_t output_channels = channels_last ? outputs : 1;
  Floats got = channels_last_of(x_t, channels, offset_in(odd, 0));  // in place
  Floats got_x_0(count, offset_in(odd, 1));
  const Floats device_output = channels_last_of(output, output_channels, offset_in(odd, 2));
  const Floats device_other = channels_last_of(other, output_channels, offset_in(odd, 3));
  const Floats device_noise = channels_last_of(noise, channels, offset_in(odd, 4));
  Values<__nv_bfloat16> copy(count, offset_in(odd, 5));
  plan.x_t = got.data, plan.x_prev = got.data, plan.x_0 = got_x_0.data;
  plan.output = device_output.data, plan.output_dtype = Dtype::float32;
  if (guides) plan.unconditional = device_other.data;
  if (given) plan.noise = device_noise.data;
  plan.copy = copy.data, plan.copy_dtype = Dtype::bfloat16;
  plan.channels_last = channels_last;
  cuda::posterior_step(plan, 0, nullptr);
  expect_equal(got, channels_last_of(x_prev, channels, 0), "x_prev");
  expect_equal(got_x_0, channels_last_of(x_0, channels, 0), "x_0");
  expect_rounded(copy, channels_last_of(x_prev, channels, 0), "copy");
}

static void expect_posterior_steps(Clip clip) {
  int i = 0;
  for (const Shape& s : SHAPES)
    for (bool channels_last : {false, true})
      for (Variance variance : {Variance::fixed_small, Variance::learned_range}) {
        const double eta = ++i % 3 == 0 ? 0.5 : -1.0, quantile = 0.5 * (i % 3);
        const ReverseRule rule{PREDICTIONS[i % 3], variance, clip, eta, i % 2 == 0};
        expect_posterior_step(s, rule, quantile, i % 4 < 2, i % 5 < 2, channels_last,
                              i % 7 == 6 ? ALL : NONE);
      }
}

CLAIM(posterior_step_in_every_layout) {
  for (Clip clip : {Clip::none, Clip::unit, Clip::dynamic}) expect_posterior_steps(clip);
}

CLAIM(posterior_step_with_one_tensor_off_its_boundary) {
  const ReverseRule rule{Prediction::v, Variance::fixed_large, Clip::unit, -1.0, false};
  for (bool channels_last : {false, true})
    for (int k = 0; k < 6; ++k)
      expect_posterior_step({3, 4, 4}, rule, -1.0, true, true, channels_last, 1 << k);
}

// Memory of which only the pages that are touched exist.
template <typename V>
struct Sparse {
  explicit Sparse(int64_t count) : bytes(size_t(count) * sizeof(V)) {
    void* mapped = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    EXPECT(mapped != MAP_FAILED, "no %zu bytes of addresses", bytes);
    data = static_cast<V*>(mapped);
  }
  ~Sparse() { munmap(data, bytes); }
  size_t bytes;
  V* data;
};

constexpr int64_t BEYOND = (int64_t(1) << 33) + 4096;

CLAIM(q_sample_reads_rows_beyond_2_to_the_33_elements) {
  for (const Shape& s : {Shape{3, 8, 8}, Shape{4, 4, 8}, Shape{3, 5, 7}}) {
    const int64_t elements = s.channels * s.height * s.width, far = BEYOND / elements;
    const std::vector<int64_t> rows = {far, far - 1, far}, t = {1, 3, 2};
    const Sparse<uint8_t> set((far + 1) * elements);
    std::vector<uint8_t> near;  // the same rows, side by side
    for (int64_t i = 0; i < 2 * elements; ++i) set.data[(far - 1) * elements + i] = uint8_t(i * 7);
    for (int64_t row : rows)
      near.insert(near.end(), set.data + row * elements, set.data + (row + 1) * elements);
    for (bool flip : {false, true})
      for (bool channels_last : {false, true}) {
        ForwardPlan plan = forward_plan(s, Prediction::x_0, flip);
        plan.x_0_dtype = Dtype::uint8, plan.t = t.data(), plan.channels_last = channels_last;
        Floats found[2] = {{SAMPLES * elements, 0}, {SAMPLES * elements, 0}};
        Floats x_t(SAMPLES * elements, 0);
        for (int is_far : {0, 1}) {
          plan.x_0 = is_far ? set.data : near.data(), plan.rows = is_far ? rows.data() : nullptr;
          plan.x_t = x_t.data, plan.target = found[is_far].data;
          cuda::q_sample(plan, 0, nullptr);
        }
        expect_equal(found[1], found[0], "target");
      }
  }
}

// The thread of one far tile by itself: a launch would go through all those before it.
template <typename Tile>
static void expect_far_tile(const Shape& s, bool channels_last) {
  const int64_t positions = s.height * s.width, elements = s.channels * positions;
  const int64_t n = BEYOND / elements, index = Tile::count(s.channels, positions) - 1;
  const Sparse<float> x_t((n + 1) * elements), noise((n + 1) * elements);
  const Sparse<float> target((n + 1) * elements);
  const std::vector<float> image(size_t(elements), 0.5f);
  std::vector<float> near[2] = {image, image};
  ForwardPlan plan = forward_plan(s, Prediction::eps, false);
  plan.x_0 = image.data(), plan.channels_last = channels_last;
  const ForwardSample sample{forward_step(0.5), 0, 0, false};
  const Draw draw = make_draw(1, 2, 3, 4);
  plan.x_t = x_t.data, plan.target = target.data;
  forward_tile<Tile>(plan, sample, draw, n, index);
  plan.noise = noise.data;
  noise.data[n * elements + elements - 1] = 3.0f;
  forward_tile<Tile>(plan, sample, draw, n, index);
  const int64_t last = offset_of(n, elements - 1, s.channels, positions, channels_last);
  EXPECT(target.data[last] == 3.0f, "%lld", static_cast<long long>(last));
  EXPECT(x_t.data[last] == noised(0.5f, 3.0f, sample.step), "%lld", static_cast<long long>(last));
}

CLAIM(tiles_beyond_2_to_the_33_elements_lie_where_their_elements_do) {
  expect_far_tile<Flat<2>>({3, 8, 8}, false);
  expect_far_tile<Interleaved<3>>({3, 8, 8}, true);
  expect_far_tile<Interleaved<4>>({4, 4, 8}, true);
  for (bool channels_last : {false, true}) expect_far_tile<Scattered>({3, 5, 7}, channels_last);
}

// As the thread of counter i, whose stride leaves the grid after it.
template <typename Run>
static void run_as_thread(int64_t i, const Run& run) {
  blockIdx.x = unsigned(i / BLOCK), threadIdx.x = unsigned(i % BLOCK), gridDim.x = ~0u;
  run();
}

CLAIM(fills_and_dropout_beyond_2_to_the_33_elements_lie_where_their_elements_do) {
  const int64_t n = BEYOND / 8;  // samples of one counter of dropout's, two of a fill's
  const Sparse<float> out((n + 1) * 8), x((n + 1) * 8);
  const FillPlan plan{9, 3, 4, 5, n + 1, 8};
  Floats wanted(8, 0);
  cpu::philox_fill(false, wanted.data, {9, 3, 4, uint32_t(5 + n), 1, 8}, 1);
  run_as_thread(2 * n + 1, [&] { fill_kernel<false, true>(out.data, plan); });
  EXPECT(std::memcmp(out.data + n * 8 + 4, wanted.data + 4, 16) == 0, "an aligned fill");
  run_as_thread(2 * n, [&] { fill_kernel<false, false>(out.data, plan); });
  EXPECT(std::memcmp(out.data + n * 8, wanted.data, 16) == 0, "a fill");
  const int64_t rng[3] = {1, 2, 3};
  std::memcpy(x.data + n * 8, wanted.data, 32);
  std::memset(out.data + n * 8, 0xFF, 32);
  run_as_thread(n, [&] {
    dropout_kernel<float, true>(x.data, out.data, {n + 1, 8, 8, 0, 1.0}, {rng});
  });
  EXPECT(std::memcmp(out.data + n * 8, wanted.data, 32) == 0, "dropout of nothing");
}
