"""Products of parameters, however a model writes them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from layerwise.stages.models.inputs import Products, alike
from layerwise.stages.models.network import View

GENERATOR = torch.Generator().manual_seed(0)
STACKED = torch.randn((3, 6, 4), generator=GENERATOR)  # three matrices (out 6, in 4), or (in 6, out 4) turned
TALL = torch.randn((8, 4), generator=GENERATOR)  # two matrices (4, 4), one below the other
ROUTER = torch.randn((6, 4), generator=GENERATOR)
X4, X6 = torch.randn((5, 4), generator=GENERATOR), torch.randn((5, 6), generator=GENERATOR)
BATCH4, BATCH6 = torch.randn((3, 5, 4), generator=GENERATOR), torch.randn((3, 5, 6), generator=GENERATOR)

Ways = dict[str, tuple[Callable[[], Tensor], list[tuple[View, Tensor]]]]
WAYS: Ways = {
    "linear": (lambda: linear(X4, ROUTER), [(View("router"), X4)]),
    "linear of an expert": (lambda: linear(X4, STACKED[2]), [(View("stacked", (2,)), X4)]),
    "by index as a tensor": (lambda: linear(X4, STACKED[torch.tensor(1)]), [(View("stacked", (1,)), X4)]),
    "matmul with the transpose": (lambda: X4 @ STACKED[1].T, [(View("stacked", (1,)), X4)]),
    "stored as (in, out)": (lambda: torch.matmul(X6, STACKED[0]), [(View("stacked", (0,), transposed=True), X6)]),
    "mm": (lambda: torch.mm(X6, ROUTER), [(View("router", transposed=True), X6)]),
    "tokens in columns": (lambda: ROUTER @ X4.T, [(View("router"), X4)]),
    "addmm": (lambda: torch.addmm(torch.zeros(6), X4, STACKED[2].T), [(View("stacked", (2,)), X4)]),
    "addmm by keyword": (
        lambda: torch.addmm(torch.zeros(6), mat1=X4, mat2=STACKED[2].T), [(View("stacked", (2,)), X4)],
    ),
    "bmm": (
        lambda: torch.bmm(BATCH6, STACKED),
        [(View("stacked", (number,), transposed=True), BATCH6[number]) for number in range(3)],
    ),
    "bmm with the transpose": (
        lambda: torch.bmm(BATCH4, STACKED.transpose(1, 2)),
        [(View("stacked", (number,)), BATCH4[number]) for number in range(3)],
    ),
    "rows of a tall matrix": (lambda: linear(X4, TALL.chunk(2)[1]), [(View("tall", rows=(4, 8)), X4)]),
    "a view of a tall matrix": (lambda: linear(X4, TALL.view(2, 4, 4)[0]), [(View("tall", rows=(0, 4)), X4)]),
    "more than rows of tokens": (lambda: linear(BATCH4, ROUTER), [(View("router"), BATCH4.reshape(15, 4))]),
    "something that nobody watches": (lambda: linear(X4, ROUTER.clone()), []),
    "a sum is no product": (lambda: ROUTER + STACKED[0], []),
    "what was computed from it is not it": (lambda: linear(X4, 2 * ROUTER), []),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_a_product_tells_which_part_of_which_parameter_met_what(way: str) -> None:
    product, expected = WAYS[way]
    found: list[tuple[View, tuple[int, int], Tensor]] = []
    plain = product()
    with Products({"stacked": STACKED, "tall": TALL, "router": ROUTER}, lambda *seen: found.append(seen)):
        assert torch.equal(product(), plain)
    assert [view for view, _, _ in found] == [view for view, _ in expected]
    parameters = {"stacked": STACKED, "tall": TALL, "router": ROUTER}
    for (view, shape, X), (_, factor) in zip(found, expected, strict=True):
        assert torch.equal(X, factor)
        assert view.read(parameters[view.tensor]).shape == shape
    product()
    assert len(found) == len(expected), "outside nothing is told any more"


def test_all_parts_that_stand_alike_are_found_from_one() -> None:
    assert alike(View("stacked", (1,), transposed=True), STACKED) == [
        View("stacked", (number,), transposed=True) for number in range(3)
    ]
    assert alike(View("tall", rows=(4, 8)), TALL) == [View("tall", rows=(0, 4)), View("tall", rows=(4, 8))]
    assert alike(View("router"), ROUTER) == [View("router")]
