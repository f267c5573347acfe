// The forward process and one reverse step of diffusion: one copy of each formula, inline for host
// and device. Coefficients are found once a sample in fp64 and rounded once; what is done to each
// element is fp32.
//
//   forward  x_t    = sqrt(abar) x_0 + sqrt(1 - abar) eps       Ho et al. 2020, eq. 4
//   reverse  x_0    = clip(a x_t + b out)                       out: the net's eps, x_0 or v
//            x_prev = c x_0 + d x_t + e out + std z             z: standard normal
//            DDPM: Ho et al. 2020, eq. 7 and 15; DDIM: Song et al. 2020, eq. 12 and 16
#pragma once

#include <cmath>

#include "philox.h"

namespace ddpm_fast {

enum class Prediction : int { eps = 0, x_0 = 1, v = 2 };
enum class Variance : int { fixed_large = 0, fixed_small = 1, learned = 2, learned_range = 3 };
enum class Clip : int { none = 0, unit = 1, dynamic = 2 };

DDPM_FAST_INLINE float unit_from_pixel(float pixel) { return pixel / 127.5f - 1.0f; }

DDPM_FAST_INLINE int64_t timestep_from_word(uint32_t word, int64_t num_timesteps) {
  return int64_t((uint64_t(word >> 8) * uint64_t(num_timesteps)) >> 24);
}

DDPM_FAST_INLINE bool mirrored_by_word(uint32_t word) { return word >> 31 == 0; }

struct ForwardStep {
  float of_x_0, of_eps;
};

DDPM_FAST_INLINE ForwardStep forward_step(double abar) {
  return {float(sqrt(abar)), float(sqrt(1.0 - abar))};
}

DDPM_FAST_INLINE float noised(float x_0, float eps, const ForwardStep& step) {
  return step.of_x_0 * x_0 + step.of_eps * eps;
}

// v = sqrt(abar) eps - sqrt(1 - abar) x_0.  Salimans & Ho 2022, section 4
DDPM_FAST_INLINE float target_of(float x_0, float eps, const ForwardStep& step,
                                 Prediction prediction) {
  if (prediction == Prediction::eps) return eps;
  if (prediction == Prediction::x_0) return x_0;
  return step.of_x_0 * eps - step.of_eps * x_0;
}

struct ReverseStep {
  float x_0_of_x_t, x_0_of_out;
  float prev_of_x_0, prev_of_x_t, prev_of_out;
  float std;
  float log_std, log_std_of_value;  // learned variance: std = exp(log_std + log_std_of_value v)
  // The terms that the formula has: an absent one is no product with 0, which makes infinity NaN.
  bool x_0_has_x_t, prev_has_x_t, prev_has_out;
};

struct ReverseRule {
  Prediction prediction;
  Variance variance;
  Clip clip;
  double eta;  // below 0: DDPM
  bool recompute_eps;
};

DDPM_FAST_INLINE ReverseStep reverse_ddpm(double abar, double abar_prev, const ReverseRule& rule) {
  ReverseStep step{};
  const double alpha = abar / abar_prev;
  const double beta = 1.0 - alpha;
  const double small = beta * (1.0 - abar_prev) / (1.0 - abar);
  step.prev_of_x_0 = float(sqrt(abar_prev) * beta / (1.0 - abar));
  step.prev_of_x_t = float(sqrt(alpha) * (1.0 - abar_prev) / (1.0 - abar));
  step.prev_has_x_t = true;
  step.std = float(sqrt(rule.variance == Variance::fixed_small ? small : beta));
  if (rule.variance == Variance::learned) {
    step.log_std_of_value = 0.5f;
  } else if (rule.variance == Variance::learned_range && small > 0.0) {
    // log var = (1 + v) / 2 log beta + (1 - v) / 2 log small.  Nichol & Dhariwal 2021, eq. 15
    step.log_std = float(0.25 * (log(beta) + log(small)));
    step.log_std_of_value = float(0.25 * (log(beta) - log(small)));
  }
  return step;
}

DDPM_FAST_INLINE ReverseStep reverse_ddim(double abar, double abar_prev, const ReverseRule& rule) {
  ReverseStep step{};
  const double root = sqrt(abar), rest = sqrt(1.0 - abar);
  const double std = rule.eta * sqrt((1.0 - abar_prev) / (1.0 - abar) * (1.0 - abar / abar_prev));
  const double left = 1.0 - abar_prev - std * std;
  const double direction = left > 0.0 ? sqrt(left) : 0.0;
  double of_x_0 = sqrt(abar_prev), of_x_t = 0.0, of_out = 0.0;
  if (rule.clip != Clip::none && rule.recompute_eps) {
    of_x_0 -= direction * root / rest;
    of_x_t = direction / rest;
  } else if (rule.prediction == Prediction::eps) {
    of_out = direction;
  } else if (rule.prediction == Prediction::x_0) {
    of_x_t = direction / rest;
    of_out = -direction * root / rest;
  } else {
    of_x_t = direction * rest;
    of_out = direction * root;
  }
  step.prev_of_x_0 = float(of_x_0);
  step.prev_of_x_t = float(of_x_t);
  step.prev_of_out = float(of_out);
  step.prev_has_out = rule.clip == Clip::none || !rule.recompute_eps;
  step.prev_has_x_t = !step.prev_has_out || rule.prediction != Prediction::eps;
  step.std = float(std);
  return step;
}

// From abar to abar_prev; 1: to the image itself, which gets no noise.
DDPM_FAST_INLINE ReverseStep reverse_step(double abar, double abar_prev, const ReverseRule& rule) {
  ReverseStep step =
      rule.eta < 0.0 ? reverse_ddpm(abar, abar_prev, rule) : reverse_ddim(abar, abar_prev, rule);
  step.x_0_has_x_t = rule.prediction != Prediction::x_0;
  if (rule.prediction == Prediction::eps) {
    step.x_0_of_x_t = float(1.0 / sqrt(abar));
    step.x_0_of_out = float(-sqrt(1.0 / abar - 1.0));
  } else if (rule.prediction == Prediction::x_0) {
    step.x_0_of_out = 1.0f;
  } else {
    step.x_0_of_x_t = float(sqrt(abar));
    step.x_0_of_out = float(-sqrt(1.0 - abar));
  }
  return step;
}

DDPM_FAST_INLINE bool learns_variance(const ReverseRule& rule) {
  return rule.variance == Variance::learned || rule.variance == Variance::learned_range;
}

// Classifier-free guidance.  Ho & Salimans 2022, eq. 6, with weight 1 = the conditional output
DDPM_FAST_INLINE float guided(float conditional, float unconditional, float guidance) {
  return unconditional + guidance * (conditional - unconditional);
}

DDPM_FAST_INLINE float raw_x_0(float x_t, float out, const ReverseStep& step) {
  const float of_out = step.x_0_of_out * out;
  return step.x_0_has_x_t ? step.x_0_of_x_t * x_t + of_out : of_out;
}

// A NaN stays one, as in torch.clamp.
DDPM_FAST_INLINE float clamped(float x, float limit) {
  x = x < -limit ? -limit : x;
  return x > limit ? limit : x;
}

// Clip::dynamic: Saharia et al. 2022 (Imagen), section 2.3
DDPM_FAST_INLINE float clipped(float x_0, Clip clip, float limit) {
  if (clip == Clip::none) return x_0;
  if (clip == Clip::unit) return clamped(x_0, 1.0f);
  return clamped(x_0, limit) / limit;
}

DDPM_FAST_INLINE float previous(float x_0, float x_t, float out, const ReverseStep& step) {
  float sum = step.prev_of_x_0 * x_0;
  if (step.prev_has_x_t) sum += step.prev_of_x_t * x_t;
  if (step.prev_has_out) sum += step.prev_of_out * out;
  return sum;
}

// e^x for |x| <= 87: x = n ln 2 + f, then the polynomial in f of Cephes' expf; clamped beyond.
// Adding 1.5 * 2^23 rounds to an integer, whose low bits are those of n; defined for a NaN too.
DDPM_FAST_INLINE float exp_poly(float x) {
  x = clamped(x, 87.0f);
  const float rounded = x * 1.44269504088896341f + 12582912.0f;
  const uint32_t n = bits_from_float(rounded);
  const float e = rounded - 12582912.0f;
  float f = x - e * 0.693359375f;
  f = f - e * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * f * f + f + 1.0f;
  return p * float_from_bits((n + 127u) << 23);
}

DDPM_FAST_INLINE float learned_std(float value, const ReverseStep& step) {
  return exp_poly(step.log_std + step.log_std_of_value * value);
}

// Which order statistics of n values, and in what shares, make up their quantile q in [0, 1].
struct Quantile {
  int64_t low, high;
  double weight;  // of the high one
};

DDPM_FAST_INLINE Quantile quantile_of(double q, int64_t n) {
  const double rank = q * double(n - 1);
  const int64_t low = int64_t(rank);
  return {low, low + 1 < n ? low + 1 : low, rank - double(low)};
}

DDPM_FAST_INLINE float dynamic_limit(float low, float high, double weight) {
  const float value = float(double(low) + weight * (double(high) - double(low)));
  return value < 1.0f ? 1.0f : value;
}

}  // namespace ddpm_fast
