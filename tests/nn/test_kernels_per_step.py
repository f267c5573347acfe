"""A step's kernels, counted from its graphs, are those of the page."""

import pytest

pytest.importorskip("triton")
from bench import kernels_per_step as kernels  # noqa: E402


@pytest.fixture(scope="module")
def counts():
    return kernels.count("cifar10")


@pytest.fixture(scope="module")
def page():
    """(kind, way, of images) -> number, of the page's first table."""
    text = kernels.PAGE.read_text().split(kernels.MARKS[0])[1].split(kernels.MARKS[1])[0]
    _, _, *rows = (line.strip("| ").split(" | ") for line in text.strip().splitlines())
    columns = [(way, images) for images in (True, False) for way in ("forward", "backward")]
    return {
        (kind, *column): int(number)
        for kind, *numbers in rows
        for column, number in zip(columns, numbers[:-1], strict=True)
    }


def numbers(counts, *kinds, images=(True, False)):
    return {
        (kind, way, of_images): counts[way][kind, of_images]
        for kind in kinds
        for way in counts
        for of_images in images
    }


def test_a_step_has_the_pages_convolutions_products_norms_and_attentions(counts, page):
    found = numbers(counts, "convolutions", "products", "norms", "attention")
    assert found == {key: page[key] for key in found}


def test_a_step_has_no_more_casts_adds_and_reductions_than_the_page(counts, page):
    found = numbers(counts, "casts", "adds and other pointwise", "reductions", "copies")
    assert {key: n for key, n in found.items() if n > page[key]} == {}


def test_no_residual_of_a_block_takes_an_add_of_its_own(counts):
    """22 blocks and 6 attentions; three down- and three upsamplings take tensors that are summed:
    a residual and a bias each, at most. 14 convolutions add their own bias.
    """
    assert counts["forward"]["adds and other pointwise", True] <= 6 * 2 + 14
