// Claims about csrc/indexing.h, and about the pieces that csrc/cpu.cpp makes with it: at small sizes
// exhaustively and beyond 2^33 elements by arithmetic in 128 bits.
#include <vector>

#include "claims.h"
#include "cpu.cpp"
#include "diffusion_math.h"
#include "indexing.h"

using namespace ddpm_fast;

__extension__ typedef __int128 Wide;
constexpr int64_t GIB = int64_t(1) << 30;

#define LL(value) static_cast<long long>(value)

CLAIM(ceil_div_rounds_up) {
  for (int64_t a : {int64_t(0), int64_t(1), 4095L, 4096L, 4097L, 8 * GIB - 1, 8 * GIB, 8 * GIB + 1})
    for (int64_t b : {1, 3, 4, 8, 128, 4096})
      EXPECT(ceil_div(a, b) == a / b + (a % b != 0), "%lld / %lld", LL(a), LL(b));
}

CLAIM(pieces_cover_every_element_once) {
  for (int64_t samples = 1; samples <= 3; ++samples)
    for (int64_t elements = 1; elements <= 70; ++elements)
      for (int64_t size : {1, 2, 3, 4, 5, 8, 32, 100}) {
        std::vector<int> seen(size_t(samples * elements));
        for (int64_t i = 0; i < samples * ceil_div(elements, size); ++i) {
          const Piece piece = piece_at(i, elements, size);
          EXPECT(piece.first % size == 0 && piece.count > 0 && piece.count <= size, "%lld", LL(i));
          EXPECT(piece.first + piece.count <= elements, "%lld", LL(i));
          for (int64_t j = 0; j < piece.count; ++j)
            ++seen[size_t(piece.sample * elements + piece.first + j)];
        }
        for (int count : seen) EXPECT(count == 1, "%lld of %lld", LL(size), LL(elements));
      }
}

// Pieces index - 1 and index are neighbours in memory, in 128 bits.
static void expect_neighbours(int64_t index, int64_t elements, int64_t size) {
  const Piece before = piece_at(index - 1, elements, size), piece = piece_at(index, elements, size);
  const Wide end = Wide(before.sample) * elements + before.first + before.count;
  EXPECT(end == Wide(piece.sample) * elements + piece.first, "index %lld", LL(index));
  EXPECT(piece.count > 0 && piece.count <= size, "index %lld", LL(index));
}

CLAIM(pieces_are_whole_beyond_2_to_the_33_elements) {
  struct Set {
    int64_t samples, elements, size;
  };
  const Set sets[] = {{1, 8 * GIB + 5, 4096},       {3, 8 * GIB + 1, 1024},
                      {1 << 22, 3 * 4096, 128},     {(1 << 23) + 1, 1025, 4},
                      {8 * GIB + 3, 1, 4096},       {4 * GIB, 3, 2},
                      {(1 << 13) + 1, 1 << 20, 128}};
  for (const Set& set : sets) {
    EXPECT(Wide(set.samples) * set.elements > 8 * GIB, "%lld", LL(set.elements));
    const int64_t per_sample = ceil_div(set.elements, set.size);
    const int64_t pieces = set.samples * per_sample;
    const Piece last = piece_at(pieces - 1, set.elements, set.size);
    EXPECT(last.sample == set.samples - 1, "%lld", LL(last.sample));
    EXPECT(last.first + last.count == set.elements, "%lld", LL(last.first));
    const Piece start = piece_at(pieces - per_sample, set.elements, set.size);
    EXPECT(start.sample == set.samples - 1 && start.first == 0, "%lld", LL(start.first));
    for (int64_t centre : {per_sample, pieces / 2, pieces, GIB, 2 * GIB, 4 * GIB, 8 * GIB})
      for (int64_t i = centre - 3; i <= centre + 3; ++i)
        if (i >= 1 && i < pieces) expect_neighbours(i, set.elements, set.size);
  }
}

CLAIM(offsets_are_those_of_the_dense_layouts) {
  for (int64_t channels = 1; channels <= 5; ++channels)
    for (int64_t positions = 1; positions <= 12; ++positions)
      for (int64_t n = 0; n < 3; ++n)
        for (int64_t c = 0; c < channels; ++c)
          for (int64_t p = 0; p < positions; ++p) {
            const int64_t e = c * positions + p;
            EXPECT(
                offset_of(n, e, channels, positions, false) == (n * channels + c) * positions + p,
                "n %lld e %lld", LL(n), LL(e));
            EXPECT(offset_of(n, e, channels, positions, true) == (n * positions + p) * channels + c,
                   "n %lld e %lld", LL(n), LL(e));
          }
}

CLAIM(offsets_hold_beyond_2_to_the_33_elements) {
  struct Shape {
    int64_t samples, channels, positions;
  };
  const Shape shapes[] = {
      {2, 3, 8 * GIB}, {1 << 20, 3, 4099}, {8 * GIB + 1, 1, 1}, {2, 8 * GIB, 3}};
  for (const Shape& s : shapes)
    for (int64_t n : {int64_t(0), s.samples / 2, s.samples - 1})
      for (int64_t c : {int64_t(0), s.channels / 2, s.channels - 1})
        for (int64_t p : {int64_t(0), s.positions / 2, s.positions - 1}) {
          const int64_t e = c * s.positions + p;
          const Wide start = Wide(n) * s.channels * s.positions;
          const int64_t planes = offset_of(n, e, s.channels, s.positions, false);
          const int64_t last = offset_of(n, e, s.channels, s.positions, true);
          EXPECT(planes == start + Wide(c) * s.positions + p, "%lld", LL(planes));
          EXPECT(last == start + Wide(p) * s.channels + c, "%lld", LL(last));
        }
}

CLAIM(elements_of_dense_samples_hold_beyond_2_to_the_33) {
  for (int64_t sample : {int64_t(0), int64_t(1), 2 * GIB, 8 * GIB + 1})
    for (int64_t elements : {int64_t(1), int64_t(3072), 8 * GIB + 3})
      for (int64_t e : {int64_t(0), int64_t(7), elements - 1}) {
        const Wide wanted = Wide(sample) * elements + e;
        if (wanted > INT64_MAX) continue;
        EXPECT(element_at(sample, elements, e) == wanted, "%lld of %lld", LL(sample), LL(elements));
      }
}

// Where pointers point, without any memory there: bytes behind FAR.
constexpr uintptr_t FAR = uintptr_t(1) << 40;

template <typename T>
static T* far_memory(int i) {
  return reinterpret_cast<T*>(FAR << i);
}

static void expect_at(const void* pointer, int i, Wide elements, int64_t size, const char* what) {
  const Wide found = Wide(reinterpret_cast<uintptr_t>(pointer)) - (FAR << i);
  EXPECT(found == elements * size, "%s is %lld bytes in, not %lld", what, LL(found),
         LL(elements * size));
}

CLAIM(forward_pieces_lie_where_their_elements_do_beyond_2_to_the_33) {
  ForwardPlan plan{};
  plan.channels = 3, plan.height = 32, plan.width = 64;
  plan.x_0 = far_memory<void>(0), plan.noise = far_memory<float>(1);
  plan.x_t = far_memory<void>(2), plan.target = far_memory<void>(3);
  const int64_t elements = 3 * 32 * 64;
  for (Dtype dtype : {Dtype::uint8, Dtype::float32})
    for (int64_t n : {int64_t(0), int64_t(3), 2 * GIB / elements + 1, 8 * GIB / elements + 1})
      for (int64_t first : {0, 4096}) {
        plan.x_0_dtype = dtype;
        ForwardSample sample{};
        sample.row = n + 5;
        const ForwardPiece piece = cpu::forward_piece(plan, {n, first, 100}, sample);
        const Wide at = Wide(n) * elements + first;
        expect_at(piece.x_0, 0, Wide(n + 5) * elements, dtype == Dtype::uint8 ? 1 : 4, "x_0");
        expect_at(piece.noise, 1, at, 4, "noise");
        expect_at(piece.x_t, 2, at, 4, "x_t");
        expect_at(piece.target, 3, at, 4, "target");
      }
}

CLAIM(reverse_pieces_lie_where_their_elements_do_beyond_2_to_the_33) {
  ReversePlan plan{};
  plan.channels = 3, plan.positions = 2048, plan.output_channels = 6;
  plan.rule = {Prediction::eps, Variance::learned, Clip::unit, -1.0, true};
  plan.x_t = far_memory<float>(0), plan.output = far_memory<void>(1);
  plan.unconditional = far_memory<void>(2), plan.noise = far_memory<float>(3);
  plan.x_prev = far_memory<float>(4), plan.x_0 = far_memory<float>(5);
  const int64_t elements = 3 * 2048;
  for (int64_t n : {int64_t(0), int64_t(3), 2 * GIB / elements + 1, 8 * GIB / elements + 1})
    for (int64_t first : {0, 4096}) {
      const ReversePiece piece = cpu::reverse_piece(plan, {n, first, 100}, true);
      const Wide at = Wide(n) * elements + first, at_output = Wide(n) * 2 * elements + first;
      expect_at(piece.x_t, 0, at, 4, "x_t");
      expect_at(piece.output, 1, at_output, 4, "output");
      expect_at(piece.variance_values, 1, at_output + elements, 4, "variance values");
      expect_at(piece.unconditional, 2, at_output, 4, "unconditional");
      expect_at(piece.noise, 3, at, 4, "noise");
      expect_at(piece.x_prev, 4, at, 4, "x_prev");
      expect_at(piece.x_0, 5, at, 4, "x_0");
    }
}

template <typename Int>
static void expect_mirrored(Int row, Int width) {
  for (Int column = 0; column < width; ++column) {
    const Int e = row * width + column;
    const Int mirrored = mirrored_element(e, width);
    EXPECT(mirrored == row * width + (width - 1 - column), "%lld of %lld", LL(e), LL(width));
    EXPECT(mirrored_element(mirrored, width) == e, "%lld of %lld", LL(e), LL(width));
    // The kernels load the quad that ends here and reverse it.
    if (width % 4 == 0 && e % 4 == 0) {
      EXPECT((mirrored - 3) % 4 == 0, "%lld of %lld", LL(e), LL(width));
      EXPECT(mirrored_element(Int(e + 3), width) == mirrored - 3, "%lld", LL(e));
    }
  }
}

CLAIM(mirroring_reverses_rows_and_quads) {
  for (int64_t width = 1; width <= 36; ++width) {
    for (int64_t row : {int64_t(0), int64_t(1), int64_t(7), 8 * GIB / width, 16 * GIB / width + 3})
      expect_mirrored<int64_t>(row, width);
    // 32 bits, for samples of less than 2^31 elements.
    for (uint32_t row : {0u, 1u, 7u, uint32_t(INT32_MAX / width - 1)})
      expect_mirrored<uint32_t>(row, uint32_t(width));
  }
}

CLAIM(tiles_are_whole_and_start_at_vector_boundaries) {
  for (int64_t channels = 1; channels <= 9; ++channels)
    for (int64_t positions = 1; positions <= 130; ++positions)
      for (bool channels_last : {false, true}) {
        const int64_t elements = channels * positions;
        EXPECT(tiling_of(channels, positions, channels_last, false) == Tiling::scattered,
               "not aligned: %lld", LL(elements));
        const Tiling tiling = tiling_of(channels, positions, channels_last, true);
        if (tiling == Tiling::flat) {
          EXPECT(!channels_last || channels == 1, "%lld channels", LL(channels));
          EXPECT(elements * 2 % 16 == 0, "a sample of 2-byte values: %lld", LL(elements));
        } else if (tiling != Tiling::scattered) {
          EXPECT(channels_last, "%lld channels", LL(channels));
          EXPECT(channels == (tiling == Tiling::interleaved3 ? 3 : 4), "%lld", LL(channels));
          EXPECT(positions * 4 % 16 == 0, "a plane of 4-byte values: %lld", LL(positions));
          EXPECT(elements * 2 % 8 == 0, "a sample of 2-byte values: %lld", LL(elements));
        }
      }
}

CLAIM(images_of_usual_sizes_get_vectors) {
  for (int64_t side : {8, 28, 32, 64, 256}) {
    EXPECT(tiling_of(3, side * side, false, true) == Tiling::flat, "%lld", LL(side));
    EXPECT(tiling_of(1, side * side, true, true) == Tiling::flat, "%lld", LL(side));
    EXPECT(tiling_of(3, side * side, true, true) == Tiling::interleaved3, "%lld", LL(side));
    EXPECT(tiling_of(4, side * side, true, true) == Tiling::interleaved4, "%lld", LL(side));
  }
}

CLAIM(samples_of_2_to_the_31_elements_and_more_are_scattered) {
  for (bool channels_last : {false, true}) {
    EXPECT(tiling_of(4, GIB / 2, channels_last, true) == Tiling::scattered, "2^31");
    EXPECT(tiling_of(4, 4 * GIB, channels_last, true) == Tiling::scattered, "2^34");
    EXPECT(tiling_of(4, GIB / 2 - 4, channels_last, true) != Tiling::scattered, "below 2^31");
  }
}

CLAIM(quantiles_interpolate_between_neighbouring_ranks) {
  for (int64_t n : {int64_t(1), int64_t(2), int64_t(3), int64_t(12288), 2 * GIB + 1, 8 * GIB + 1})
    for (double q : {0.0, 0.25, 0.5, 0.9, 0.995, 1.0}) {
      const Quantile quantile = quantile_of(q, n);
      EXPECT(0 <= quantile.low && quantile.low <= quantile.high && quantile.high < n, "%f", q);
      EXPECT(quantile.high <= quantile.low + 1, "%f of %lld", q, LL(n));
      EXPECT(0.0 <= quantile.weight && quantile.weight < 1.0, "%f of %lld", q, LL(n));
      const long double rank = static_cast<long double>(q) * (n - 1);
      const long double got = static_cast<long double>(quantile.low) + quantile.weight;
      // The product rounds once in fp64.
      EXPECT(fabsl(got - rank) <= rank * 0x1p-53L, "%f of %lld: %Lf not %Lf", q, LL(n), got, rank);
    }
  EXPECT(quantile_of(1.0, 8 * GIB + 1).low == 8 * GIB, "the largest value");
}
