"""The words that Triton kernels draw, in the interpreter on a machine without a GPU."""

import pytest
import torch

from ddpm_fast.kernels.philox.op import reference_words
from tests.kernels.test_philox import VECTORS

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
philox_words = pytest.importorskip("ddpm_fast.kernels.group_norm_silu.tiles").philox_words

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS = 64


@triton.jit
def words_kernel(seed_ptr, counter_ptr, words_ptr, ROWS: tl.constexpr):
    """counter (ROWS, 4) -> words (ROWS, 4), int64 holding uint32; of one seed, () int64."""
    at = 4 * tl.arange(0, ROWS)
    element = tl.load(counter_ptr + at).to(tl.uint32)
    stream = tl.load(counter_ptr + at + 1).to(tl.uint32)
    sample = tl.load(counter_ptr + at + 2).to(tl.uint32)
    step = tl.load(counter_ptr + at + 3).to(tl.uint32)
    w0, w1, w2, w3 = philox_words(tl.load(seed_ptr), element, stream, sample, step)
    tl.store(words_ptr + at, w0.to(tl.int64))
    tl.store(words_ptr + at + 1, w1.to(tl.int64))
    tl.store(words_ptr + at + 2, w2.to(tl.int64))
    tl.store(words_ptr + at + 3, w3.to(tl.int64))


def triton_words(counter, key):
    """counter (ROWS, 4), key (2,) int64 holding uint32 -> words likewise."""
    low, high = key.tolist()
    seed = low | high << 32
    seed = torch.tensor(seed - 2**64 if seed >= 2**63 else seed, device=DEVICE)
    words = torch.zeros_like(counter, device=DEVICE)
    words_kernel[(1,)](seed, counter.to(DEVICE), words, ROWS=len(counter))
    return words.cpu() & 0xFFFFFFFF


@pytest.mark.parametrize("vector", VECTORS.strip().splitlines())
def test_words_equal_the_published_vectors(vector):
    numbers = torch.tensor([int(word, 16) for word in vector.split()])
    words = triton_words(numbers[:4].expand(2, 4).contiguous(), numbers[4:6])
    assert words.tolist() == [numbers[6:].tolist()] * 2


def test_words_equal_the_references_for_random_counters():
    generator = torch.Generator().manual_seed(0)
    counter = torch.randint(0, 2**32, (ROWS, 4), generator=generator)
    for _ in range(3):
        key = torch.randint(0, 2**32, (2,), generator=generator)
        expected = reference_words(counter, key.expand(ROWS, 2))
        assert torch.equal(triton_words(counter, key), expected)
