"""Operations of a net and the share of a GPU's that they are."""

from types import SimpleNamespace

import pytest
import torch

from ddpm_fast.nn.config import UNetConfig
from ddpm_fast.nn.unet import UNet
from ddpm_fast.train.mfu import forward_flops, mfu, mfu_of, peak_tflop_s
from ddpm_fast.train.progress import Measured


def test_the_flops_are_those_of_hos_net():
    """12.44 GFLOP an image, as counted elsewhere."""
    config = UNet.from_preset("cifar10").config
    assert forward_flops(config) == pytest.approx(12.44e9, rel=1e-3)


@pytest.mark.parametrize("num_classes", [None, 10])
def test_the_flops_of_a_small_net_are_those_by_hand(num_classes):
    """One level, no attention but the middle's: every product written out."""
    c, t, side = 8, 16, 4
    config = UNetConfig(
        img_channels=1, base_channels=c, channel_mults=(1,), num_res_blocks=1, time_emb_dim=t,
        num_groups=4, image_size=side, num_classes=num_classes,
    )  # fmt: skip
    pixels = side * side

    def conv(c_in, c_out, kernel=3):
        return 2 * pixels * c_in * c_out * kernel**2

    def block(c_in):
        skip = conv(c_in, c, 1) if c_in != c else 0
        return conv(c_in, c) + conv(c, c) + 2 * t * c + skip

    attention = conv(c, 3 * c, 1) + conv(c, c, 1) + 2 * 2 * pixels * pixels * c
    time = 2 * c * t + 2 * t * t
    blocks = 3 * block(c) + 2 * block(2 * c)  # down, two in the middle; up, with the skips
    assert forward_flops(config) == conv(1, c) + blocks + attention + time + conv(c, 1)


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA H200", 989), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", None),
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA B200", 2250), ("NVIDIA GeForce GTX 1080", None),
        ("NVIDIA H200 NVL", None), ("NVIDIA GB200", None), ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA GeForce RTX 3090 Ti", None), ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ],
)  # fmt: skip
def test_a_devices_peak_is_found_by_its_name(name, peak):
    assert peak_tflop_s(name) == peak


def test_the_utilisation_is_the_flops_of_a_training_step_over_the_peak():
    config = UNet.from_preset("cifar10").config
    # 10,000 img/s x 37.3 GFLOP = 373 TFLOP/s of 989
    assert mfu(config, 10_000, "NVIDIA H200") == pytest.approx(0.377, abs=1e-3)
    assert mfu(config, 10_000, "some other") is None


@pytest.mark.parametrize(
    "device, dtype, told",
    [("cuda", torch.bfloat16, True), ("cuda", None, False), ("cpu", torch.bfloat16, False)],
)
def test_it_is_told_of_bf16_on_a_gpu_only(device, dtype, told, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    step = SimpleNamespace(
        autocast_dtype=dtype,
        net=UNet.from_preset("cifar10"),
        batches=SimpleNamespace(device=torch.device(device)),
    )
    assert mfu_of(step, 10_000) == (0.3775 if told else None)


def test_the_line_tells_it_and_each_processs_share():
    line = Measured(3, 0.5, 1e-3, 20.0, 1.0, 0.1, images_per_s_each=10.0, mfu=0.377).line()
    assert "20 img/s (10 each)" in line and "MFU 38%" in line
    assert "each" not in Measured(3, 0.5, 1e-3, 20.0, 1.0, 0.1).line()
    assert "mfu" not in Measured(3, 0.5, 1e-3, 20.0, 1.0, 0.1).row()
