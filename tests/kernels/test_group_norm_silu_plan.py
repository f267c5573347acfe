"""How group_norm_silu cuts its work into programs, and what the launch table says."""

import pytest
import torch

from ddpm_fast import ops
from ddpm_fast.kernels.calling import target
from ddpm_fast.kernels.group_norm_silu import launch
from ddpm_fast.kernels.group_norm_silu.plan import make_plan, shape_class
from ddpm_fast.kernels.tuning import lookup as table
from tests.kernels.group_norm_silu_cases import DEVICE, SPEC, results


def test_images_are_counted_by_the_grids_long_axis(monkeypatch):
    """The other axes end at 65,535."""
    from ddpm_fast.kernels.group_norm_silu import forward_triton as kernels

    grids = []

    class Recorded:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *arguments, **constants: None

    for name in ("group_norm_silu_forward_kernel", "group_norm_silu_backward_kernel"):
        monkeypatch.setattr(kernels, name, Recorded())
    x, weight = torch.ones(70_000, 4, 1, 1, device=DEVICE), torch.ones(4, device=DEVICE)
    y, _, mean, rstd = launch.launch_forward(
        x, weight, weight, None, None, None, None, None, None, 2, 1e-5, True, 0, 0
    )
    launch.launch_backward(
        x, weight, weight, None, None, None, None, None, mean, rstd, y, None, 2, True, 0, 0
    )
    assert len(grids) == 2
    for longest, *others in grids:
        assert longest >= 70_000 and max(others) <= 65_535


def test_few_images_are_split_and_many_are_not():
    def splits(n):
        return make_plan("forward", n, 128, 1024, 32, itemsize=2, arch=90).SPLITS

    assert splits(1) > 8 and splits(4) > 1 and splits(256) == 1


def test_a_row_of_the_launch_table_is_one_flavours_and_used_where_it_fits(monkeypatch):
    shape = dict(c=128, hw=1024, num_groups=32, itemsize=2, dropout=False)
    row = {"GROUPS": 16, "BLOCK_HW": 128, "num_warps": 4, "evidence": "none"}

    def block_hw(row, **changes):
        rows = {shape_class(**shape): row}
        monkeypatch.setattr(table, "_table", lambda: {"group_norm_silu.forward": {"90": rows}})
        return make_plan("forward", 256, arch=90, **{**shape, **changes}).BLOCK_HW

    def own(**changes):
        return make_plan("forward", 256, arch=80, **{**shape, **changes}).BLOCK_HW

    assert block_hw(row) == 128 != own()
    for other in (dict(num_groups=8), dict(itemsize=4), dict(dropout=True), dict(hw=256)):
        assert block_hw(row, **other) == own(**other) != 128, other
    for wrong in ({"GROUPS": 64}, {"GROUPS": 0}, {"BLOCK_HW": 100}, {"BLOCK_HW": 256}):
        assert block_hw({**row, **wrong}) == own(), wrong


def test_a_devices_own_row_wins_over_its_architectures(monkeypatch):
    shape = dict(c=128, hw=1024, num_groups=32, itemsize=2, dropout=False)
    rows = {
        chip: {shape_class(**shape): {"GROUPS": 4, "BLOCK_HW": block_hw, "num_warps": 8}}
        for chip, block_hw in (("90", 256), ("90 NVIDIA H200", 512), ("80 NVIDIA H100", 128))
    }
    monkeypatch.setattr(table, "_table", lambda: {"group_norm_silu.forward": rows})

    def block_hw(device_name):
        return make_plan("forward", 256, arch=90, device_name=device_name, **shape).BLOCK_HW

    names = ("NVIDIA H200", "NVIDIA H100", "")
    assert [block_hw(name) for name in names] == [512, 256, 256]


@pytest.mark.parametrize("name", ["NVIDIA H200", ""])
def test_launches_ask_for_the_rows_of_the_tensors_own_device(monkeypatch, name):
    from ddpm_fast.kernels.adamw_ema import forward_triton as adamw_ema_triton
    from ddpm_fast.kernels.adamw_ema import launch as adamw_ema_launch
    from ddpm_fast.kernels.attention import forward_triton as attention_triton
    from ddpm_fast.kernels.attention import launch as attention_launch
    from ddpm_fast.kernels.group_norm_silu import plan as group_norm_silu_plan

    asked = []
    for module in (group_norm_silu_plan, attention_triton, adamw_ema_triton):
        monkeypatch.setattr(module, "lookup", lambda *key: asked.append(key))
    for module in (launch, attention_launch, adamw_ema_launch):
        monkeypatch.setattr(module, "device_name_of", lambda device: name)
    results(SPEC.fused, SPEC.make_inputs(dict(n=1, c1=4, hw=4, groups=2), torch.half, DEVICE, 0))
    qkv = torch.randn(1, 96, 2, 2, device=DEVICE, dtype=torch.half).requires_grad_()
    ops.attention(qkv, 1, impl="fused").sum().backward()
    adamw_ema_launch.Tables((8,), 0, torch.zeros(4, device=DEVICE))
    kernels = [kernel for kernel, *_ in asked]
    assert kernels == [
        "group_norm_silu.forward", "group_norm_silu.backward",
        "attention.forward", "attention.backward", "adamw_ema.forward",
    ]  # fmt: skip
    assert {device_name for *_, device_name in asked} == {name}


def test_a_devices_name_is_asked_of_cuda_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {device.index}")
    target.device_name_of.cache_clear()
    assert target.device_name_of(torch.device("cuda", 1)) == "card 1"
    assert target.device_name_of(torch.device("cpu")) == ""
    target.device_name_of.cache_clear()


def test_every_candidate_of_the_sweep_is_the_plan_of_its_own_flavour(monkeypatch):
    from ddpm_fast.kernels.group_norm_silu.forward_triton import sweep_candidates

    swept = set()
    for case in SPEC.cases:
        values, channels = case.values, case.values["c1"] + case.values.get("c2", 0)
        groups, dropout = values.get("groups", 32), bool(values.get("dropout"))
        for name, shape, numbers in sweep_candidates(values, 90):
            swept.add(shape)
            monkeypatch.setattr(
                table, "_table", lambda s=shape, n=numbers, k=name: {k: {"90": {s: n}}}
            )
            plan = make_plan(
                name.rpartition(".")[2], values["n"], channels, values["hw"], groups,
                itemsize=2, arch=90, dropout=dropout,
            )  # fmt: skip
            assert (numbers["GROUPS"], numbers["BLOCK_HW"]) == (plan.GROUPS, plan.BLOCK_HW)
    for shape in ("hw1024 c128", "hw256 c256", "hw64 c256", "hw16 c256"):
        assert {f"{shape} g32 16bit", f"{shape} g32 16bit dropout"} <= swept


@pytest.mark.parametrize("channels", [128, 256])
def test_what_the_backward_pass_reads_twice_stays_in_an_h200s_cache(channels):
    plan = make_plan("backward", 256, channels, 1024, 32, itemsize=2, arch=90)
    assert plan.BLOCK_HW < 1024  # else nothing is read twice
    resident_bytes = 2 * 132 * 1024 * plan.GROUPS * plan.CPG * 2 * 2  # x and dy, two programs an SM
    assert resident_bytes < 50e6
    assert plan.GROUPS * plan.CPG * 2 % 32 == 0  # whole sectors


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_every_plan_covers_every_channel_and_position_once(direction):
    for n in (1, 3, 256):
        for channels, groups in ((1, 1), (6, 2), (48, 4), (128, 32), (384, 32), (512, 32), (96, 1)):
            for hw in (1, 16, 49, 64, 1000, 1024, 4096):
                plan = make_plan(direction, n, channels, hw, groups, itemsize=2, arch=90)
                assert plan.CPG * groups == channels
                assert plan.BLOCK_C >= plan.GROUPS * plan.CPG and plan.BLOCK_G >= plan.GROUPS
                assert (plan.channel_blocks - 1) * plan.GROUPS < groups
                assert plan.channel_blocks * plan.GROUPS >= groups
                assert (plan.SPLITS - 1) * plan.RANGE < hw <= plan.SPLITS * plan.RANGE
                for size in (plan.BLOCK_C, plan.BLOCK_G, plan.BLOCK_HW, plan.num_warps):
                    assert size & (size - 1) == 0
                assert plan.BLOCK_C * plan.BLOCK_HW <= 32_768  # fits in registers
