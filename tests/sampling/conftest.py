"""What tests of the sampler command share."""

import pytest

from ddpm_fast.sample import main


@pytest.fixture
def draw(tmp_path, tiny_run):
    """draw(*flags, checkpoint=, out=) -> the folder; by default 6 images, 4 at a time, 3 steps."""

    def run(*flags, checkpoint=tiny_run, out=tmp_path / "out"):
        given = ("--num-images", 6, "--batch-size", 4, "--steps", 3)
        argv = ("--checkpoint", checkpoint, "--out", out, *given, *flags)
        assert main([str(word) for word in argv]) == 0
        return out

    return run
