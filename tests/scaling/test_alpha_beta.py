"""Costs of all-reduces, what a backward pass hides of them, fits, and published interconnects."""

import numpy as np
import pytest

from ddpm_fast.errors import UsageError
from ddpm_fast.scaling import claim
from ddpm_fast.scaling.alpha_beta import (
    Link,
    all_reduce_seconds,
    bucket_sizes,
    bus_bytes_per_s,
    exposed_seconds,
    fit_line,
    fit_link,
    ready_times,
    ring_seconds,
    straggler_factor,
    tree_seconds,
)
from ddpm_fast.scaling.interconnects import INTERCONNECTS, interconnect, interconnect_of
from ddpm_fast.scaling.simulate import simulate_step

MIB = 2**20
LINK = Link(alpha_s=5e-6, beta_bytes_per_s=2e9)


def test_a_large_ring_all_reduce_runs_at_the_bus_bandwidth():
    seconds = ring_seconds(1e9, 8, LINK)
    assert bus_bytes_per_s(1e9, seconds, 8) == pytest.approx(2e9, rel=1e-3)


def test_one_rank_needs_no_all_reduce():
    assert ring_seconds(1e9, 1, LINK) == tree_seconds(1e9, 1, LINK) == 0


def test_a_tree_is_cheaper_than_a_ring_among_very_many_ranks():
    assert tree_seconds(MIB, 1024, LINK) < ring_seconds(MIB, 1024, LINK)
    assert all_reduce_seconds(MIB, 1024, LINK) == tree_seconds(MIB, 1024, LINK)


def test_buckets_close_when_full_in_the_order_of_the_backward_pass():
    assert bucket_sizes([MIB, 10 * MIB, 20 * MIB, 3 * MIB]) == [MIB, 30 * MIB, 3 * MIB]


def test_exposed_time_has_the_two_limits_of_the_notes():
    buckets, backward_s = [MIB] + [25 * MIB] * 5, 0.1
    ready = ready_times(buckets, backward_s)
    for scale in (1e-3, 10.0):  # communication far below and above the backward pass
        times = [scale * b / sum(buckets) for b in buckets]
        limits = (times[-1], sum(times) - backward_s * (1 - buckets[0] / sum(buckets)))
        assert exposed_seconds(times, ready, backward_s) == pytest.approx(max(limits))


def test_the_slowest_of_many_normal_ranks_is_as_drawn():
    draws = np.random.default_rng(0).normal(1, 0.1, (20_000, 16)).max(1).mean()
    assert straggler_factor(0.1, 16) == pytest.approx(draws, rel=0.01)


def test_a_link_is_found_again_from_its_all_reduces():
    sizes = [1e3, 1e5, 1e6, 2.5e7]
    fit = fit_link(sizes, [ring_seconds(s, 4, LINK) for s in sizes], 4)
    assert fit.link.alpha_s == pytest.approx(LINK.alpha_s, rel=1e-6)
    assert fit.link.beta_bytes_per_s == pytest.approx(LINK.beta_bytes_per_s, rel=1e-6)
    assert fit.rms_residual < 1e-9


def test_residuals_say_how_far_a_fit_is_from_what_was_measured():
    sizes = [1e3, 1e5, 1e6, 2.5e7]
    noise = np.array([1.1, 0.9, 1.1, 0.9])
    fit = fit_link(sizes, [ring_seconds(s, 4, LINK) for s in sizes] * noise, 4)
    assert 0.05 < fit.rms_residual < 0.15


@pytest.mark.parametrize(
    ("sizes", "seconds", "n"), [([1, 2], [1, 2], 1), ([5, 5], [1, 1], 2), ([1, 1e9], [1, 1e-6], 2)]
)
def test_all_reduces_that_say_nothing_of_a_link_are_refused(sizes, seconds, n):
    with pytest.raises(ValueError, match=f"n={n}"):
        fit_link(sizes, seconds, n)


def test_a_line_has_no_negative_part():
    assert fit_line([4, 8], [0.5, 0.9]) == pytest.approx((0.1, 0.1))
    assert fit_line([4], [0.4]) == pytest.approx((0.0, 0.1))
    assert fit_line([4, 8], [0.4, 0.9])[0] == 0
    assert fit_line([4, 8], [0.4, 0.3])[1] == 0


def test_a_link_without_bandwidth_is_refused():
    with pytest.raises(ValueError, match="beta_bytes_per_s=0 must be positive"):
        Link(alpha_s=0, beta_bytes_per_s=0)


def test_every_interconnect_names_its_source():
    for row in INTERCONNECTS.values():
        assert any(word in row.source for word in ("NVIDIA/", "NCCL", "ASSUMED"))


def test_several_machines_are_as_fast_as_their_network():
    row = interconnect("h200-nvlink")
    assert row.link(8).beta_bytes_per_s == 475e9
    assert row.link(64).beta_bytes_per_s == 400e9
    assert row.link(64).alpha_s > row.link(8).alpha_s


def test_an_unknown_interconnect_is_refused_with_the_nearest():
    with pytest.raises(UsageError, match=r"did you mean 'h200-nvlink'.*must be one of"):
        interconnect("h200_nvlink")


@pytest.mark.parametrize(
    ("device", "row"),
    [
        ("NVIDIA H200", "h200-nvlink"),
        ("NVIDIA H200, 139 GiB", "h200-nvlink"),
        ("NVIDIA H100 80GB HBM3, 79 GiB", "h100-nvlink"),
        ("NVIDIA A100-SXM4-80GB, 79 GiB", "a100-nvlink"),
        ("NVIDIA GeForce RTX 3090, 24 GiB", "rtx3090-pcie"),
        ("NVIDIA GeForce RTX 3090 Ti", "rtx3090-pcie"),
        ("NVIDIA H200 NVL, 139 GiB", None),
        ("NVIDIA GH200 480GB, 95 GiB", None),
        ("NVIDIA H100 PCIe, 79 GiB", None),
        ("NVIDIA H100 NVL, 94 GiB", None),
        ("NVIDIA A100-PCIE-40GB", None),
        ("NVIDIA A100 80GB PCIe", None),
        ("NVIDIA A100X", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("GRID A100D-80C", None),
        ("Tesla V100", None),
    ],
)
def test_a_gpus_name_gives_the_machines_that_it_is_surely_in(device, row):
    assert interconnect_of(device) == row


@pytest.mark.parametrize(
    ("name", "images_per_s", "noted"),
    [
        ("h200-nvlink", 9000, (0.92, 0.96, 0.98, 0.99)),
        ("a100-nvlink", 4000, (0.96, 0.98, 0.99, 0.99)),
        ("rtx3090-pcie", 914, (0.25, 0.46, 0.75, 0.93)),
    ],
)
def test_modelled_efficiencies_agree_with_the_projects_notes(name, images_per_s, noted):
    # 2 points: the notes do not give the rate of one GPU, which was found from one of the four
    ours = [
        claim.weak_efficiency(images_per_s=images_per_s, batch=batch, gradient_bytes=143_000_000,
                              link=interconnect(name).link(8))
        for batch in (16, 32, 64, 128)
    ]  # fmt: skip
    assert ours == pytest.approx(noted, abs=0.02)


@pytest.mark.parametrize("rate", claim.IMAGES_PER_S)
def test_the_originals_claim_holds_between_its_two_bandwidths(rate):
    holds = claim.bandwidths(rate)
    for bandwidth, efficiency in ((holds.at_75, 0.75), (holds.at_85, 0.85)):
        link = Link(alpha_s=INTERCONNECTS["rtx3090-pcie"].hop_s, beta_bytes_per_s=bandwidth * 1e9)
        reached = claim.weak_efficiency(
            images_per_s=rate, batch=32, gradient_bytes=holds.gradient_bytes, link=link
        )
        assert reached == pytest.approx(efficiency, abs=1e-4)
        assert 5.99 <= 8 * reached <= 7
    alone = claim.bandwidths(rate, averaged_weights_too=False)
    assert alone.at_75 < 0.6 * holds.at_75


def test_the_claim_is_about_twice_the_gradients_bytes():
    # 35.7 M fp32 weights, and as many averages that the original's DDP sums too
    assert claim.bandwidths(100).gradient_bytes / 1e6 == pytest.approx(286, abs=0.5)
    alone = claim.bandwidths(100, averaged_weights_too=False).gradient_bytes
    assert alone / 1e6 == pytest.approx(143, abs=0.5)


def test_the_claims_efficiency_is_what_the_simulation_gives():
    link, rate = interconnect("rtx3090-pcie").link(8), 100.0
    step_s, size = claim.BATCH_PER_GPU / rate, claim.bandwidths(rate).gradient_bytes
    simulated = simulate_step(
        forward_s=step_s / 3, backward_s=step_s * 2 / 3, buckets=claim.even_buckets(size),
        link=link, factors=[1.0] * 8,
    )  # fmt: skip
    reached = claim.weak_efficiency(
        images_per_s=rate, batch=claim.BATCH_PER_GPU, gradient_bytes=size, link=link
    )
    assert reached == pytest.approx(step_s / simulated, rel=0.01)
    assert 0.5 < reached < 0.99


def test_the_claim_in_words_names_batch_and_bandwidths():
    text = claim.in_words()
    assert "32 images a GPU" in text and "GB/s" in text and "an estimate" in text
