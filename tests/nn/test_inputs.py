"""What a net takes as images, steps and classes, and what it refuses in one line."""

import numpy as np
import pytest
import torch

import ddpm_fast as df

X = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def build(**changes):
    torch.manual_seed(0)
    options = dict(
        channel_mults=(1, 2), num_res_blocks=1, time_emb_dim=8, num_groups=4, num_classes=3,
        dropout=0.0,
    )  # fmt: skip
    return df.UNet(1, 8, **{**options, **changes})


@pytest.mark.parametrize(
    "one",
    [5, 5.0, np.int64(5), np.float32(5), np.array(5), torch.tensor(5), torch.tensor(5.0),
     [5, 5, 5], (5.0, 5.0, 5.0), np.array([5, 5, 5]), torch.full((3,), 5, dtype=torch.int32)],
    ids=repr,
)  # fmt: skip
def test_one_step_stands_for_the_whole_batch(one):
    net, y = build(), torch.tensor([0, 1, 2])
    assert torch.equal(net(X, one, y), net(X, torch.tensor([5, 5, 5]), y))


@pytest.mark.parametrize(
    "one",
    [2, np.int64(2), torch.tensor(2), [2, 2, 2], np.array([2, 2, 2], dtype=np.uint8),
     torch.full((3,), 2, dtype=torch.int32), torch.full((3,), 2, dtype=torch.uint8)],
    ids=repr,
)  # fmt: skip
def test_one_class_stands_for_the_whole_batch(one):
    net, t = build(), torch.tensor([1, 2, 3])
    assert torch.equal(net(X, t, one), net(X, t, torch.tensor([2, 2, 2])))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_torchs_default_dtype_rounds_no_step(dtype):
    net, y = build(), torch.tensor([0, 1, 2])
    expected = net(X, torch.tensor([999, 998, 997]), y)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        assert torch.equal(net(X, [999.0, 998.0, 997.0], y), expected)
        assert torch.equal(net(X, 999.0, y)[0], net(X, 999, y)[0])
    finally:
        torch.set_default_dtype(before)


def test_a_compiled_net_takes_one_step():
    net, y = build(), torch.tensor([0, 1, 2])
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(X, 5, y), net(X, 5, y), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "y, shown",
    [(torch.tensor([0.0, 1.0, 2.0]), "y is torch.float32"), (1.0, "y is torch.float32"),
     ([0, 1.5, 2], "y is torch.float32"), (np.array([0.0, 1, 2]), "y is torch.float64"),
     (torch.tensor([True, False, True]), "y is torch.bool"), ("cat", "y='cat'"),
     (3, "y holds class 3, must be from 0 to 2"), (torch.tensor([[0, 1, 2]]), r"\(1, 3\)")],
)  # fmt: skip
def test_classes_that_are_no_whole_numbers_in_range_are_refused(y, shown):
    with pytest.raises(ValueError, match=shown) as caught:
        build()(X, 5, y)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "time, shown",
    [("five", "time='five' must be a number or 3 numbers"), ([1, 2], r"\(2,\), must be \(3,\)"),
     (True, "time is torch.bool"), (torch.tensor([1j] * 3), "time is torch.complex64"),
     ([[1], [2, 3]], "must be a number or 3 numbers")],
)  # fmt: skip
def test_steps_that_are_no_numbers_are_refused(time, shown):
    with pytest.raises(ValueError, match=shown) as caught:
        build()(X, time, 0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "net_dtype, x_dtype",
    [(torch.float32, torch.float64), (torch.float32, torch.float16), (torch.float32, torch.uint8),
     (torch.bfloat16, torch.float32), (torch.float64, torch.float32)],
)  # fmt: skip
def test_images_of_another_dtype_than_the_weights_are_refused_naming_both(net_dtype, x_dtype):
    with pytest.raises(ValueError, match=f"x is {x_dtype}, .* {net_dtype}"):
        build().to(net_dtype)(X.to(x_dtype), 5, 0)


def test_autocast_takes_images_that_it_casts_and_no_others():
    net = build()
    with torch.autocast("cpu", torch.bfloat16):
        assert net(X.bfloat16(), 5, 0).dtype == torch.bfloat16
        for x in (X.double(), X.to(torch.uint8)):
            with pytest.raises(ValueError, match=f"x is {x.dtype}"):
                net(x, 5, 0)


def test_an_array_is_no_image():
    with pytest.raises(ValueError, match="x is a ndarray, must be a tensor"):
        build()(X.numpy(), 5, 0)


@pytest.mark.parametrize(
    "norm, n, training, refused",
    [("in", 3, True, True), ("in", 3, False, True), ("bn", 1, True, True), ("bn", 1, False, False),
     ("bn", 2, True, False), ("gn", 1, True, True), ("gn", 2, True, False), (None, 1, True, False)],
)  # fmt: skip
def test_a_norm_of_one_value_is_refused_naming_the_norm_and_the_size(norm, n, training, refused):
    net = build(norm=norm, channel_mults=(1, 1, 1, 1), num_groups=8).train(training)
    x = torch.cat((X, X))[:n]
    if not refused:
        assert net(x, 5, 0).isfinite().all()
        return
    with pytest.raises(ValueError, match=f"norm='{norm}' has one value.*8x8 pixels.*4 levels"):
        net(x, 5, 0)


@pytest.mark.parametrize(
    "flags, refused",
    [(["--norm", "in", "--batch-size", "4"], True), (["--norm", "bn", "--batch-size", "1"], True),
     (["--norm", "bn", "--batch-size", "3", "--grad-accumulation", "2"], True),
     (["--norm", "bn", "--batch-size", "4", "--grad-accumulation", "2"], False)],
)  # fmt: skip
def test_a_run_whose_norm_has_one_value_is_refused_before_its_folder_is_made(
    flags, refused, tmp_path, monkeypatch, capsys
):
    from ddpm_fast.train.__main__ import main

    monkeypatch.chdir(tmp_path)
    small = ["--iterations", "1", "--sample-every", "0", "--base-channels", "8", "--num-groups",
             "4", "--channel-mults", "1,1,1,1,1", "--attention-resolutions", "4"]  # fmt: skip
    code = main([*small, *flags, "--run-dir", "run"])
    assert (code, (tmp_path / "run").exists()) == ((2, False) if refused else (0, True))
    if refused:
        assert f"--norm {flags[1]}" in capsys.readouterr().err.splitlines()[-1]
