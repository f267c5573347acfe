"""The choice of implementation: who asked for ours where they cannot run, and how that is told."""

import pytest
import torch

from ddpm_fast import ops
from ddpm_fast.errors import UsageError
from ddpm_fast.kernels.calling.impl import FusedError
from ddpm_fast.optim.fused_adamw import FusedAdamW
from ddpm_fast.sample import main as sample
from ddpm_fast.train.__main__ import main as train

needs_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there they run")
X = torch.ones(1, 96, 2, 2)


def norm(**options):
    return ops.group_norm_silu(X, torch.ones(96), torch.ones(96), 4, **options)


def step(**options):
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    FusedAdamW([weight], **options).step()


CALLS = {"norm": norm, "attention": lambda **options: ops.attention(X, 1, **options), "adamw": step}


@pytest.fixture
def compiled_only(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@needs_cpu
@pytest.mark.parametrize("name", CALLS)
def test_a_refusal_names_who_asked_and_how_to_ask_otherwise(name, compiled_only, monkeypatch):
    with pytest.raises(FusedError, match='impl="fused".*impl="auto"'):
        CALLS[name](impl="fused")
    monkeypatch.setenv("DDPM_FAST_IMPL", "fused")
    with pytest.raises(FusedError, match="DDPM_FAST_IMPL=fused.*unset DDPM_FAST_IMPL") as refusal:
        CALLS[name]()
    assert isinstance(refusal.value, RuntimeError) and isinstance(refusal.value, UsageError)
    CALLS[name](impl="reference")


@needs_cpu
def test_commands_refuse_it_in_one_line(
    compiled_only, monkeypatch, refused, tiny, tiny_run, tmp_path
):
    monkeypatch.setenv("DDPM_FAST_IMPL", "fused")
    flags = [*tiny, "--iterations", 1, "--run-dir", tmp_path / "run"]
    assert "DDPM_FAST_IMPL" in refused(train, flags, 2)
    flags = ["--checkpoint", tiny_run, "--num-images", 1, "--out", tmp_path / "images"]
    assert "DDPM_FAST_IMPL" in refused(sample, [*flags, "--device", "cpu"], 2)
