// Claims about the CPU part's threads, for a build with ThreadSanitizer: four threads give the bits
// of one, in work that does not divide evenly among them.
#include <atomic>
#include <stdexcept>
#include <vector>

#include "claims.h"
#include "kernels.h"
#include "parallel.h"

using namespace ddpm_fast;

constexpr int64_t SAMPLES = 65, ELEMENTS = 4097;  // 4 * 65536 elements at least
constexpr size_t COUNT = size_t(SAMPLES * ELEMENTS);
constexpr Counters COUNTERS = {{1, nullptr, 0}, {2, nullptr, 0}, {3, nullptr, 0}};
static const std::vector<double> TABLE = {0.99, 0.9, 0.5, 0.1};

// run(threads, out) for one thread and for four.
template <typename T, typename Run>
static void expect_same_bits(size_t count, const Run& run) {
  std::vector<T> one(count, T(-9)), four(count, T(-9));
  run(1, one.data());
  run(4, four.data());
  EXPECT(std::memcmp(one.data(), four.data(), count * sizeof(T)) == 0, "%d values", int(count));
  EXPECT(one.back() != T(-9), "nothing was written");
}

static std::vector<float> normals() {
  std::vector<float> out(2 * COUNT);
  cpu::philox_fill(true, out.data(), {7, 0, 0, 0, 2 * SAMPLES, ELEMENTS}, 1);
  return out;
}

// Of any thread, the caller's (the last piece) too; the others do their work first.
CLAIM(an_exception_of_a_piece_is_the_callers) {
  for (int64_t pieces : {1, 2, 4})
    for (int64_t thrower = 0; thrower < pieces; ++thrower) {
      std::atomic<int64_t> done{0};
      std::string caught;
      try {
        parallel_for(8, pieces, [&](int64_t begin, int64_t end) {
          if (begin == 8 / pieces * thrower) throw std::runtime_error("piece");
          done += end - begin;
        });
      } catch (const std::runtime_error& error) {
        caught = error.what();
      }
      EXPECT(caught == "piece", "%d of %d", int(thrower), int(pieces));
      EXPECT(done == 8 - 8 / pieces, "%d units", int(done));
    }
}

CLAIM(words) {
  const std::vector<int64_t> counters(4 * COUNT, 5), keys(2 * COUNT, 6);
  expect_same_bits<int64_t>(4 * COUNT, [&](int threads, int64_t* out) {
    cpu::philox_words(counters.data(), keys.data(), out, int64_t(COUNT), threads);
  });
}

CLAIM(fill) {
  expect_same_bits<float>(COUNT, [](int threads, float* out) {
    cpu::philox_fill(true, out, {1, 2, 3, 4, SAMPLES, ELEMENTS}, threads);
  });
}

CLAIM(dropout) {
  const std::vector<float> x = normals();
  expect_same_bits<float>(COUNT, [&](int threads, float* out) {
    cpu::dropout(x.data(), out, Dtype::float32, {SAMPLES, ELEMENTS, 8, 20000, 1.5}, 1, 2, 3,
                 threads);
  });
}

CLAIM(q_sample) {
  const std::vector<float> x_0 = normals();
  std::vector<float> target(COUNT);
  std::vector<int64_t> t(SAMPLES);
  expect_same_bits<float>(COUNT, [&](int threads, float* out) {
    ForwardPlan plan{};
    plan.samples = SAMPLES, plan.channels = 1, plan.height = 17, plan.width = 241;
    plan.x_0 = x_0.data();
    plan.alphas_cumprod = TABLE.data(), plan.num_timesteps = int64_t(TABLE.size());
    plan.t_out = t.data();
    plan.counters = COUNTERS;
    plan.flip = true;
    plan.prediction = Prediction::v;
    plan.x_t = out, plan.target = target.data();
    cpu::q_sample(plan, threads);
  });
}

static void expect_posterior_step(Clip clip) {
  const std::vector<float> inputs = normals();
  std::vector<float> x_0(COUNT);
  expect_same_bits<float>(COUNT, [&](int threads, float* out) {
    std::memcpy(out, inputs.data() + COUNT, COUNT * sizeof(float));
    ReversePlan plan{};
    plan.samples = SAMPLES, plan.channels = 1, plan.positions = ELEMENTS;
    plan.x_t = out, plan.x_prev = out;  // in place
    plan.output = inputs.data(), plan.output_channels = 1;
    plan.alphas_cumprod = TABLE.data(), plan.num_timesteps = int64_t(TABLE.size());
    plan.t = {3, nullptr, 0}, plan.t_prev = {2, nullptr, 0};
    plan.rule = {Prediction::eps, Variance::fixed_large, clip, -1.0, false};
    plan.quantile = 0.9;
    plan.counters = COUNTERS;
    plan.x_0 = x_0.data();
    cpu::posterior_step(plan, threads);
  });
}

CLAIM(posterior_step) { expect_posterior_step(Clip::unit); }

CLAIM(posterior_step_with_dynamic_threshold) { expect_posterior_step(Clip::dynamic); }
