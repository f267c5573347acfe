import json

import pytest

pytest.importorskip("triton")
# 64 channels, one head: a size that the attention kernels have; 8x8 images, few programs
NET = ("--base-channels", 32, "--channel-mults", "1,2", "--attention-resolutions", 1,
       "--image-size", 8, "--batch-size", 2, "--num-groups", 8, "--dropout", 0.1)  # fmt: skip
RUN = (*NET, "--iterations", 3, "--log-every", 1, "--warmup-steps", 0, "--learning-rate", 0.01)


def losses(folder):
    rows = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(row)["loss"] for row in rows]


def test_training_on_the_kernels_has_the_references_losses(train, tmp_path, monkeypatch):
    found = {}
    for impl in ("reference", "fused"):
        monkeypatch.setenv("DDPM_FAST_IMPL", impl)
        assert train(tmp_path / impl, *RUN, "--sample-every", 0) == 0
        found[impl] = losses(tmp_path / impl)
    assert len(found["fused"]) == 3 and found["fused"][0] != found["fused"][2]
    assert found["fused"] == pytest.approx(found["reference"], rel=1e-3)
