"""No figure for what computes something else."""

from dataclasses import replace

import pytest
import torch

from bench import kernel_rows
from bench.ceilings import Ceilings
from bench.parity import mismatch, outputs_of
from bench.subjects import Subject, subjects_of
from ddpm_fast.kernels import SPECS
from ddpm_fast.kernels.dropout.op import SPEC

CPU, DTYPE = torch.device("cpu"), torch.float32
VALUES = next(case.values for case in SPEC.cases if case.small)
CEILINGS = Ceilings(copy_gb_s=100.0, matmul_tflop_s=1.0)


def wrong_output(**inputs):
    return 1.001 * SPEC.reference(**inputs)


def nan_output(**inputs):
    return torch.nan * SPEC.reference(**inputs)


def wrong_gradient(x, **inputs):
    y = SPEC.reference(x, **inputs)
    return y + 0.5 * (x - x.detach())


def subject(run):
    return Subject("other", run, SPEC.tolerance[DTYPE])


@pytest.mark.parametrize("run", [SPEC.fused, SPEC.reference])
def test_the_kernel_and_its_reference_pass(run):
    assert mismatch(SPEC, subject(run), VALUES, DTYPE, CPU, backward=True) == ""


@pytest.mark.parametrize(
    ("run", "backward", "start"),
    [(wrong_output, False, "output is 1.0e-03"), (nan_output, False, "output is nan"),
     (wrong_gradient, True, "gradient of x is ")],
)  # fmt: skip
def test_another_function_is_named_with_its_distance(run, backward, start):
    found = mismatch(SPEC, subject(run), VALUES, DTYPE, CPU, backward=backward)
    assert found.startswith(start)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_a_wrong_last_output_of_any_kernel_is_found(spec):
    values = min(
        (case.values for case in spec.cases if case.small),
        key=lambda values: spec.bytes_moved(values, DTYPE, False),
    )

    def right(**inputs):
        return outputs_of(spec.reference(**inputs))

    def wrong_last(**inputs):
        *others, last = right(**inputs)
        return [*others, last * 1.1 if last.is_floating_point() else last + 1]

    def without_last(**inputs):
        return right(**inputs)[:-1]

    def found(run):
        other = Subject("other", run, spec.tolerance[DTYPE])
        return mismatch(spec, other, values, DTYPE, CPU, backward=False)

    assert found(right) == ""
    assert "is 1.0e-01 from" in found(wrong_last) or "of 1 integers" in found(wrong_last)
    assert found(without_last).startswith("outputs are ")


def test_an_output_of_another_shape_is_found():
    found = mismatch(
        SPEC, subject(lambda **inputs: SPEC.reference(**inputs)[:1]), VALUES, DTYPE, CPU,
        backward=False,
    )  # fmt: skip
    assert found == "output is (1, 32, 16, 16), the reference's (4, 32, 16, 16)"


def test_a_wrong_implementation_gets_a_reason_and_no_figure():
    subjects = [Subject("ours", wrong_output, 1e-6), subject(SPEC.reference)]
    ours, other = kernel_rows.compare(
        SPEC, subjects, VALUES, CPU, DTYPE, "forward", CEILINGS, seconds=0.01
    )
    assert ours["why_not"].startswith("parity: output is ") and "ms" not in ours
    assert other["ms"] > 0 and "speedup" not in other


def test_an_implementation_that_raises_leaves_the_others_their_figures():
    def broken(**inputs):
        raise ValueError("cannot\ndo this")

    subjects = [subject(broken), Subject("ours", SPEC.fused, 1e-6)]
    other, ours = kernel_rows.compare(
        SPEC, subjects, VALUES, CPU, DTYPE, "backward", CEILINGS, seconds=0.01
    )
    assert other == {"impl": "other", "why_not": "fails: ValueError: cannot do this"}
    assert ours["ms"] > 0


def test_figures_are_rates_and_the_share_of_the_floor():
    rows = kernel_rows.compare(
        SPEC, subjects_of(SPEC, VALUES, DTYPE, CPU), VALUES, CPU, DTYPE, "forward", CEILINGS,
        seconds=0.01,
    )  # fmt: skip
    by_name = {row["impl"]: row for row in rows}
    moved = 2 * 4 * 4 * 32 * 16 * 16
    ours = by_name["ours"]
    assert ours["gb_s"] == pytest.approx(moved / ours["ms"] / 1e6, abs=0.06, rel=1e-3)
    assert ours["percent_of_floor"] == pytest.approx(ours["gb_s"], abs=0.2)  # of 100 GB/s
    assert by_name["eager"]["speedup"] > 0
    assert by_name["compiled"]["why_not"].startswith("torch.compile's CPU code")


def test_forward_and_backward_move_the_bytes_of_both():
    halves = [kernel_rows.bytes_of(SPEC, VALUES, DTYPE, which) for which in kernel_rows.PASSES]
    assert halves[2] == halves[0] + halves[1]


def test_a_kernel_without_tensors_among_its_inputs_has_no_backward():
    from ddpm_fast.kernels.philox.op import SPEC as PHILOX

    case = next(case for case in PHILOX.cases if case.small)
    assert not kernel_rows.has_backward(PHILOX, case.values, DTYPE, CPU)


def test_the_interpreters_speed_is_not_measured(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    in_triton = replace(SPEC, launches=lambda arch: ["a launch"])
    assert "no speed to measure" in subjects_of(in_triton, VALUES, DTYPE, CPU)[0].why_not
    assert subjects_of(SPEC, VALUES, DTYPE, CPU)[0].why_not == ""


def test_on_cpu_a_kernel_that_needs_a_gpu_is_left_out_by_its_own_words():
    def refuses(**inputs):
        raise RuntimeError("only on CUDA")

    ours = subjects_of(replace(SPEC, fused=refuses), VALUES, DTYPE, CPU)[0]
    assert ours.why_not == "only on CUDA"


@pytest.mark.parametrize("name", ["q_sample", "adamw_ema"])
def test_torchs_own_sequence_computes_the_kernels_function(name):
    spec = next(spec for spec in SPECS if spec.name == name)
    for case in (case for case in spec.cases if case.small):
        peers = [
            each
            for each in subjects_of(spec, case.values, DTYPE, CPU)
            if each.label.startswith("torch")
        ]
        assert len(peers) == 1
        assert mismatch(spec, peers[0], case.values, DTYPE, CPU, backward=False) == ""


def test_a_peer_that_draws_its_own_noise_is_held_to_it():
    spec = next(spec for spec in SPECS if spec.name == "q_sample")
    values = next(case.values for case in spec.cases if case.small)
    peer = subjects_of(spec, values, DTYPE, CPU)[-1]

    def too_loud(**inputs):
        x_t, *others = peer.run(**inputs)
        return (1.01 * x_t, *others)

    found = mismatch(spec, replace(peer, run=too_loud), values, DTYPE, CPU, backward=False)
    assert found.startswith("output is 1.0e-02")
