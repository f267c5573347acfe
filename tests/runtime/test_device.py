"""Which GPU a process takes, and that it is the current one from then on."""

import pytest
import torch

from ddpm_fast.runtime.ranks import rank_device


@pytest.mark.parametrize(
    ("name", "local_rank", "current"),
    [("cuda:1", None, [1]), ("cuda", None, []), ("auto", None, []), ("auto", 1, [1])],
)
def test_a_named_gpu_and_a_ranks_own_become_the_current_device(
    name, local_rank, current, monkeypatch
):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(device.index))
    monkeypatch.setenv("WORLD_SIZE", "1" if local_rank is None else "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    device = rank_device(name)
    assert device.type == "cuda" and chosen == current
