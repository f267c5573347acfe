"""The Frechet distance has its closed forms and knows digits from noise."""

import numpy as np
import pytest
import torch

from ddpm_fast.data import open_images
from ddpm_fast.evaluation.frechet import area_features, frechet_distance


def rng(seed=0):
    return np.random.default_rng(seed)


def features(seed, rows=200, width=5):
    """Correlated columns of unlike scale."""
    generator = rng(seed)
    mix = generator.normal(size=(width, width))
    return generator.normal(size=(rows, width)) @ mix + generator.normal(size=width)


def test_a_set_is_at_distance_0_from_itself():
    """The trace cancels to rounding: 1e-9 of a trace near 20."""
    a = features(0)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a[::-1].copy()) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (3.0, 1.0), (0.0, 2.5), (-1.0, 0.1)])
def test_two_normals_on_a_line_have_the_closed_form(mean, std):
    """(m_1 - m_2)^2 + (s_1 - s_2)^2, exactly for the samples' own moments."""
    a = rng(1).normal(size=(500, 1))
    b = mean + std * rng(2).normal(size=(400, 1))
    closed = (a.mean() - b.mean()) ** 2 + (a.std(ddof=1) - b.std(ddof=1)) ** 2
    assert frechet_distance(a, b) == pytest.approx(closed, rel=1e-9)


def test_a_shift_adds_its_squared_length():
    a = features(3)
    shift = np.array([1.0, -2, 0, 0.5, 3])
    assert frechet_distance(a, a + shift) == pytest.approx((shift**2).sum(), rel=1e-9)


def test_it_is_the_formula_with_the_root_of_the_unsymmetric_product():
    """Its eigenvalues are real and not negative: no matrix root of a library is needed."""
    a, b = features(4), features(5)
    product = np.cov(a, rowvar=False) @ np.cov(b, rowvar=False)
    root_trace = np.sqrt(np.linalg.eigvals(product).astype(complex)).real.sum()
    expected = (
        ((a.mean(0) - b.mean(0)) ** 2).sum()
        + np.trace(np.cov(a, rowvar=False))
        + np.trace(np.cov(b, rowvar=False))
        - 2 * root_trace
    )
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-8)


def test_constant_columns_and_few_rows_are_no_trouble():
    """Singular covariances: no NaN, not below 0 by more than rounding."""
    a, b = features(6, rows=3), features(7, rows=4)
    a[:, 0] = b[:, 0] = 1
    distance = frechet_distance(a, b)
    assert np.isfinite(distance) and distance > 0
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-7)


def test_float32_features_are_computed_in_fp64():
    a = (features(8) + 1000).astype(np.float32)
    b = (features(9) + 1000).astype(np.float32)
    expected = frechet_distance(a.astype(np.float64), b.astype(np.float64))
    assert frechet_distance(a, b) == expected


@pytest.mark.parametrize(
    ("a", "b"), [((5, 3), (5, 4)), ((1, 3), (5, 3)), ((5, 3), (1, 3)), ((5,), (5,)), ((5, 3), (3,))]
)
def test_features_of_other_shapes_are_refused(a, b):
    with pytest.raises(ValueError, match="must be"):
        frechet_distance(np.zeros(a), np.zeros(b))


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    images = open_images("digits", data_root=tmp_path_factory.mktemp("none")).images
    return area_features(torch.from_numpy(images).float() / 127.5 - 1)


def test_half_of_the_digits_is_near_the_other_half(digits):
    """The scale's lower end: 0.15 over random halves; the spread of ten was below 0.02."""
    order = rng().permutation(len(digits))
    half = len(digits) // 2
    distance = frechet_distance(digits[order[:half]], digits[order[half:]])
    assert 0.10 < distance < 0.20


def test_noise_is_far_from_the_digits(digits):
    """The scale's upper end: uniform noise scores about 31 against the digits."""
    noise = torch.rand(400, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert 28 < frechet_distance(area_features(noise), digits) < 34


def test_area_features_are_means_of_squares():
    x = torch.arange(2 * 3 * 16 * 16.0).view(2, 3, 16, 16)
    result = area_features(x)
    assert result.shape == (2, 3 * 64)
    assert result[0, 0] == x[0, 0, :2, :2].mean() and result[1, -1] == x[1, 2, 14:, 14:].mean()
    np.testing.assert_array_equal(area_features(x, 16), x.flatten(1).numpy())


def test_area_features_refuse_sizes_that_do_not_divide():
    with pytest.raises(ValueError, match="multiples of 8"):
        area_features(torch.zeros(1, 1, 12, 16))
