// Claims about csrc/diffusion_math.h against long double references that are written another way,
// over whole schedules.
#include <algorithm>
#include <limits>
#include <vector>

#include "claims.h"
#include "diffusion_math.h"

using namespace ddpm_fast;

typedef long double Real;
constexpr Real ULP = 0x1p-23L;  // relative distance of neighbouring fp32 values, at most
constexpr float NAN_F = std::numeric_limits<float>::quiet_NaN();
constexpr float INF_F = std::numeric_limits<float>::infinity();
constexpr Prediction PREDICTIONS[] = {Prediction::eps, Prediction::x_0, Prediction::v};
constexpr Clip CLIPS[] = {Clip::none, Clip::unit, Clip::dynamic};

// alphas_cumprod of the linear (Ho et al. 2020), cosine (Nichol & Dhariwal 2021) and sigmoid
// (betas; Xu et al. 2022) schedules.
static std::vector<double> schedule(int kind, int num_timesteps) {
  std::vector<double> table;
  double abar = 1.0;
  for (int t = 0; t < num_timesteps; ++t) {
    const double at = num_timesteps > 1 ? double(t) / (num_timesteps - 1) : 0.0;
    const double scale = std::min(1000.0 / num_timesteps, 20.0);
    double beta = scale * (1e-4 + at * (0.02 - 1e-4));
    if (kind == 1) {
      const auto level = [&](double x) {
        return std::pow(std::cos((x + 0.008) / 1.008 * M_PI / 2), 2);
      };
      beta = std::min(1.0 - level((t + 1.0) / num_timesteps) / level(double(t) / num_timesteps),
                      0.999);
    } else if (kind == 2) {
      beta = scale * (1e-5 + (0.02 - 1e-5) / (1.0 + std::exp(6.0 - 12.0 * at)));
    }
    table.push_back(abar *= 1.0 - beta);
  }
  return table;
}

// Calls use(abar_t, abar_prev) for every step, for strided ones and for those to the image itself.
template <typename Use>
static void for_each_step(const Use& use) {
  for (int kind = 0; kind < 3; ++kind)
    for (int num_timesteps : {1, 2, 50, 1000, 4000}) {
      const std::vector<double> table = schedule(kind, num_timesteps);
      for (int t = 0; t < num_timesteps; ++t)
        for (int stride : {1, 20, num_timesteps})
          use(table[size_t(t)], t >= stride ? table[size_t(t - stride)] : 1.0);
    }
}

static void expect_close(Real got, Real wanted, Real tolerance, const char* what) {
  EXPECT(std::fabs(got - wanted) <= tolerance, "%s is %.9Lg, not %.9Lg +- %.2Lg", what, got, wanted,
         tolerance);
}

static void expect_relative(Real got, Real wanted, const char* what) {
  expect_close(got, wanted, ULP * std::fabs(wanted), what);
}

// Deterministic values in [-scale, scale).
static float value_of(uint32_t seed, float scale) {
  const uint32_t word = philox_words(seed, make_draw(1, 2, 3, 4)).w0;
  return (2.0f * uniform_from_word(word) - 1.0f) * scale;
}

CLAIM(pixels_map_to_minus_one_to_one) {
  for (int pixel = 0; pixel < 256; ++pixel)
    expect_close(unit_from_pixel(float(pixel)), (2.0L * pixel - 255) / 255, ULP, "a pixel");
  EXPECT(unit_from_pixel(0.0f) == -1.0f && unit_from_pixel(255.0f) == 1.0f, "the ends are exact");
}

CLAIM(timesteps_are_drawn_evenly) {
  for (int64_t num_timesteps : {int64_t(1), int64_t(7), int64_t(1000), int64_t(4000)}) {
    std::vector<int64_t> counts(static_cast<size_t>(num_timesteps));
    for (int64_t draw = 0; draw < 1 << 24; ++draw) {
      const int64_t t = timestep_from_word(uint32_t(draw) << 8 | (draw & 255), num_timesteps);
      EXPECT(0 <= t && t < num_timesteps, "t %d", int(t));
      ++counts[size_t(t)];
    }
    const int64_t least = (1 << 24) / num_timesteps;
    for (int64_t count : counts) EXPECT(count == least || count == least + 1, "%d", int(count));
  }
  const int64_t huge = int64_t(1) << 39;
  EXPECT(timestep_from_word(~0u, huge) < huge, "no overflow");
}

CLAIM(half_of_the_words_mirror) {
  EXPECT(mirrored_by_word(0) && mirrored_by_word(0x7FFFFFFFu), "lower half");
  EXPECT(!mirrored_by_word(0x80000000u) && !mirrored_by_word(~0u), "upper half");
}

CLAIM(forward_step_and_targets_follow_their_equations) {
  uint32_t seed = 0;
  for_each_step([&](double abar, double) {
    const ForwardStep step = forward_step(abar);
    const Real root = std::sqrt(Real(abar)), rest = std::sqrt(1 - Real(abar));
    expect_relative(step.of_x_0, root, "of_x_0");
    expect_relative(step.of_eps, rest, "of_eps");
    const float x_0 = value_of(++seed, 1.0f), eps = value_of(++seed, 6.0f);
    const Real size = root * std::fabs(x_0) + rest * std::fabs(eps);
    const Real size_v = root * std::fabs(eps) + rest * std::fabs(x_0);
    expect_close(noised(x_0, eps, step), root * x_0 + rest * eps, 2 * ULP * size, "x_t");
    expect_close(target_of(x_0, eps, step, Prediction::v), root * eps - rest * x_0,
                 2 * ULP * size_v, "v");
    EXPECT(target_of(x_0, eps, step, Prediction::eps) == eps, "eps");
    EXPECT(target_of(x_0, eps, step, Prediction::x_0) == x_0, "x_0");
  });
}

// What a net that knew x_0 and eps would say.
static Real perfect_output(Real x_0, Real eps, Real abar, Prediction prediction) {
  if (prediction == Prediction::eps) return eps;
  if (prediction == Prediction::x_0) return x_0;
  return std::sqrt(abar) * eps - std::sqrt(1 - abar) * x_0;
}

CLAIM(a_perfect_output_gives_x_0_back) {
  uint32_t seed = 0;
  for_each_step([&](double abar, double abar_prev) {
    for (Prediction prediction : PREDICTIONS) {
      const ReverseStep step = reverse_step(
          abar, abar_prev, {prediction, Variance::fixed_large, Clip::none, -1.0, false});
      const Real x_0 = value_of(++seed, 1.0f), eps = value_of(++seed, 6.0f);
      const float x_t = float(std::sqrt(Real(abar)) * x_0 + std::sqrt(1 - Real(abar)) * eps);
      const float out = float(perfect_output(x_0, eps, abar, prediction));
      // x_t, out, their coefficients, products and the sum are rounded.
      const Real size = std::fabs(step.x_0_of_x_t * x_t) + std::fabs(step.x_0_of_out * out);
      expect_close(raw_x_0(x_t, out, step), x_0, 3 * ULP * size, "x_0");
    }
  });
}

// q(x_prev | x_t, x_0) by Bayes' rule: the product of two normal densities of x_prev.
struct Posterior {
  Real of_x_0, of_x_t, variance;
};

static Posterior posterior(Real abar, Real abar_prev) {
  const Real alpha = abar / abar_prev, beta = 1 - alpha;
  if (abar_prev == 1) return {1, 0, 0};
  const Real precision = 1 / (1 - abar_prev) + alpha / beta;
  return {std::sqrt(abar_prev) / (1 - abar_prev) / precision, std::sqrt(alpha) / beta / precision,
          1 / precision};
}

CLAIM(ddpm_step_is_the_posterior_of_bayes_rule) {
  for_each_step([](double abar, double abar_prev) {
    const Posterior wanted = posterior(abar, abar_prev);
    const Real beta = 1 - Real(abar) / abar_prev;
    for (Variance variance : {Variance::fixed_large, Variance::fixed_small}) {
      const ReverseStep step =
          reverse_step(abar, abar_prev, {Prediction::eps, variance, Clip::unit, -1.0, false});
      expect_relative(step.prev_of_x_0, wanted.of_x_0, "of x_0");
      expect_relative(step.prev_of_x_t, wanted.of_x_t, "of x_t");
      EXPECT(step.prev_of_out == 0.0f, "%g", double(step.prev_of_out));
      const Real var = variance == Variance::fixed_small ? wanted.variance : beta;
      expect_relative(step.std, std::sqrt(var), "std");
    }
  });
}

CLAIM(learned_variances_span_the_logs_of_their_bounds) {
  for_each_step([](double abar, double abar_prev) {
    if (abar_prev == 1.0) return;  // no noise
    const Real small = posterior(abar, abar_prev).variance, large = 1 - Real(abar) / abar_prev;
    for (float value : {-1.0f, -0.5f, 0.0f, 0.25f, 1.0f}) {
      ReverseRule rule{Prediction::eps, Variance::learned_range, Clip::unit, -1.0, false};
      const Real share = (value + 1.0L) / 2;
      const Real log_std = (share * std::log(large) + (1 - share) * std::log(small)) / 2;
      // The exponent's rounding is an absolute error of it, so a relative one of the std.
      expect_close(learned_std(value, reverse_step(abar, abar_prev, rule)), std::exp(log_std),
                   std::exp(log_std) * (2e-7L + 2 * ULP * std::fabs(log_std)), "learned_range");
      rule.variance = Variance::learned;  // the value is the log of the variance
      expect_close(learned_std(value, reverse_step(abar, abar_prev, rule)), std::exp(value / 2.0L),
                   2e-7L * std::exp(value / 2.0L), "learned");
    }
  });
}

struct Inputs {
  float x_0, x_t, out;
};

// Song et al. 2020, eq. 12, with the eps that the rule asks for.
static Real ddim(Real abar, Real abar_prev, const ReverseRule& rule, const Inputs& in, Real& size) {
  const Real root = std::sqrt(abar), rest = std::sqrt(1 - abar);
  const Real variance =
      rule.eta * Real(rule.eta) * (1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev);
  const Real left = 1 - abar_prev - variance;
  const Real direction = left > 0 ? std::sqrt(left) : 0;
  Real a = 0, b = 0;  // eps = a - b
  if (rule.clip != Clip::none && rule.recompute_eps) {
    a = in.x_t / rest, b = root * in.x_0 / rest;
  } else if (rule.prediction == Prediction::eps) {
    a = in.out;
  } else if (rule.prediction == Prediction::x_0) {
    a = in.x_t / rest, b = root * in.out / rest;
  } else {
    a = root * in.out, b = -rest * in.x_t;
  }
  size = std::sqrt(abar_prev) * std::fabs(in.x_0) + direction * (std::fabs(a) + std::fabs(b));
  return std::sqrt(abar_prev) * in.x_0 + direction * (a - b);
}

CLAIM(ddim_step_is_equation_12) {
  uint32_t seed = 0;
  for_each_step([&](double abar, double abar_prev) {
    for (Prediction prediction : PREDICTIONS)
      for (Clip clip : {Clip::none, Clip::unit})
        for (bool recompute_eps : {false, true})
          for (double eta : {0.0, 0.5, 1.0}) {
            const ReverseRule rule{prediction, Variance::fixed_large, clip, eta, recompute_eps};
            const ReverseStep step = reverse_step(abar, abar_prev, rule);
            const Inputs in{value_of(++seed, 1.0f), value_of(++seed, 4.0f), value_of(++seed, 4.0f)};
            Real size = 0;
            const Real wanted = ddim(abar, abar_prev, rule, in, size);
            // With eta = 1, 1 - abar_prev - std^2 cancels: fp64 leaves 2^-52 of 1 in it.
            const Real cancelled =
                std::sqrt(0x1p-50L) * (std::fabs(in.x_t) + std::fabs(in.out) + 1);
            expect_close(previous(in.x_0, in.x_t, in.out, step), wanted,
                         3 * ULP * size + (eta > 0 ? cancelled : 0), "x_prev");
          }
  });
}

CLAIM(ddim_with_eta_one_is_ddpm_with_the_small_variance) {
  uint32_t seed = 0;
  for_each_step([&](double abar, double abar_prev) {
    ReverseRule rule{Prediction::eps, Variance::fixed_small, Clip::none, -1.0, false};
    const ReverseStep ddpm = reverse_step(abar, abar_prev, rule);
    rule.eta = 1.0;
    const ReverseStep ddim_step = reverse_step(abar, abar_prev, rule);
    expect_close(ddim_step.std, ddpm.std, 2 * ULP * ddpm.std, "std");
    const float x_t = value_of(++seed, 2.0f), out = value_of(++seed, 2.0f);
    const float x_0 = raw_x_0(x_t, out, ddpm);
    const Real size = std::fabs(ddpm.prev_of_x_0) *
                          (std::fabs(ddpm.x_0_of_x_t * x_t) + std::fabs(ddpm.x_0_of_out * out)) +
                      std::fabs(x_0) + std::fabs(x_t) + std::fabs(out);
    expect_close(previous(x_0, x_t, out, ddim_step), previous(x_0, x_t, out, ddpm), 6 * ULP * size,
                 "mean");
  });
}

CLAIM(the_step_to_the_image_itself_is_x_0) {
  for_each_step([](double abar, double abar_prev) {
    if (abar_prev != 1.0) return;
    for (Prediction prediction : PREDICTIONS)
      for (double eta : {-1.0, 0.0, 1.0}) {
        const ReverseStep step =
            reverse_step(abar, 1.0, {prediction, Variance::fixed_small, Clip::unit, eta, false});
        EXPECT(previous(0.75f, 3.0f, -2.0f, step) == 0.75f, "eta %f", eta);
        EXPECT(step.std == 0.0f, "eta %f", eta);
      }
  });
}

CLAIM(guidance_blends_the_two_outputs) {
  EXPECT(guided(3.0f, 1.0f, 0.0f) == 1.0f, "weight 0: unconditional");
  EXPECT(guided(3.0f, 1.0f, 1.0f) == 3.0f, "weight 1: conditional");
  EXPECT(guided(3.0f, 1.0f, 7.5f) == 16.0f, "beyond");
  EXPECT(std::isnan(guided(NAN_F, 1.0f, 0.0f)) && std::isnan(guided(1.0f, NAN_F, 1.0f)), "NaN");
}

CLAIM(clipping_limits_and_rescales) {
  for (float x : {-INF_F, -3.0f, -1.0f, -0.5f, -0.0f, 0.5f, 1.0f, 1.5f, INF_F}) {
    EXPECT(clipped(x, Clip::none, 2.0f) == x, "%g", double(x));
    EXPECT(clipped(x, Clip::unit, 2.0f) == std::min(std::max(x, -1.0f), 1.0f), "%g", double(x));
    EXPECT(clipped(x, Clip::dynamic, 2.0f) == std::min(std::max(x, -2.0f), 2.0f) / 2.0f, "%g",
           double(x));
  }
}

CLAIM(a_nan_stays_one) {
  const ReverseStep step =
      reverse_step(0.5, 0.6, {Prediction::eps, Variance::learned_range, Clip::unit, -1.0, false});
  for (Clip clip : CLIPS) EXPECT(std::isnan(clipped(NAN_F, clip, 2.0f)), "clip %d", int(clip));
  EXPECT(std::isnan(clipped(0.5f, Clip::dynamic, NAN_F)), "limit");
  EXPECT(std::isnan(raw_x_0(NAN_F, 0.0f, step)) && std::isnan(raw_x_0(0.0f, NAN_F, step)), "x_0");
  EXPECT(std::isnan(previous(NAN_F, 0.0f, 0.0f, step)), "x_prev");
  EXPECT(std::isnan(learned_std(NAN_F, step)) && std::isnan(exp_poly(-NAN_F)), "std");
  EXPECT(std::isnan(dynamic_limit(NAN_F, NAN_F, 0.5)), "dynamic_limit");
  EXPECT(std::isnan(noised(NAN_F, 0.0f, forward_step(0.5))), "x_t");
}

// 0 * infinity is NaN: a coefficient of 0 is not the same as no term.
CLAIM(infinity_passes_through_the_terms_of_the_formula_alone) {
  for_each_step([](double abar, double abar_prev) {
    for (Prediction prediction : PREDICTIONS)
      for (Clip clip : CLIPS)
        for (bool recompute_eps : {false, true})
          for (double eta : {-1.0, 0.0, 0.5}) {
            const ReverseRule rule{prediction, Variance::fixed_large, clip, eta, recompute_eps};
            const ReverseStep step = reverse_step(abar, abar_prev, rule);
            const bool is_ddpm = eta < 0, recomputed = clip != Clip::none && recompute_eps;
            const bool needs_out = !is_ddpm && !recomputed;
            const bool needs_x_t = is_ddpm || recomputed || prediction != Prediction::eps;
            for (float wrong : {INF_F, -INF_F, NAN_F}) {
              EXPECT(std::isfinite(previous(0.5f, 2.0f, wrong, step)) != needs_out, "out");
              EXPECT(std::isfinite(previous(0.5f, wrong, 2.0f, step)) != needs_x_t, "x_t");
              EXPECT(std::isfinite(raw_x_0(wrong, 2.0f, step)) == (prediction == Prediction::x_0),
                     "x_0 of x_t");
              EXPECT(!std::isfinite(raw_x_0(2.0f, wrong, step)), "x_0 of out");
            }
            const float sum =
                step.prev_of_x_0 * 0.5f + step.prev_of_x_t * 2.0f + step.prev_of_out * -3.0f;
            EXPECT(previous(0.5f, 2.0f, -3.0f, step) == sum, "the terms in this order");
          }
  });
}

CLAIM(dynamic_limit_interpolates_and_is_at_least_one) {
  for (uint32_t i = 0; i < 10000; ++i) {
    const float low = 4.0f * uniform_from_word(i * 7919u),
                high = low + 4.0f * uniform_from_word(i * 104729u);
    const double weight = uniform_from_word(i * 1299709u);
    const Real wanted = std::max(Real(1), low + Real(weight) * (Real(high) - low));
    expect_relative(dynamic_limit(low, high, weight), wanted, "limit");
  }
  EXPECT(dynamic_limit(0.1f, 0.2f, 0.5) == 1.0f && dynamic_limit(2.0f, 2.0f, 0.7) == 2.0f, "ends");
}

CLAIM(exp_poly_is_within_2e_7_of_exp) {
  for (int i = -870000; i <= 870000; ++i) {
    const float x = float(i * 1e-4);
    expect_close(exp_poly(x) / std::exp(Real(x)), 1, 2e-7L, "exp");
  }
  for (int n = -125; n <= 125; ++n)  // between two n, where the rounding decides
    for (int ulp = -2; ulp <= 2; ++ulp) {
      const float x = float((n + 0.5) * 0.693147180559945309) * (1.0f + float(ulp) * 0x1p-23f);
      if (std::fabs(x) <= 87.0f) expect_close(exp_poly(x) / std::exp(Real(x)), 1, 2e-7L, "exp");
    }
  EXPECT(exp_poly(0.0f) == 1.0f, "exp(0)");
  EXPECT(exp_poly(1e9f) == exp_poly(87.0f) && exp_poly(-INF_F) == exp_poly(-87.0f), "clamped");
}
