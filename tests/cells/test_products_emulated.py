"""The products of few rows that a user's cell takes on a GPU, emulated."""

from __future__ import annotations

import pytest
import torch

import test_compiled
from cells.programs import CASES
from emulation import user_cells
from fastbptt import _device_layer
from test_compiled import arguments, gradients, leaves_of, run
from test_kernels_emulated import ORDERS, Recorded
from test_persistent import tf32  # noqa: F401  (a fixture)

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.fixture
def order():
    yield user_cells.set_order
    user_cells.set_order("forward")


def every_result(layer, of):
    results = run(layer, of)
    return [*results, *gradients(results, leaves_of(of))]


def in_double(of):
    def cast(x):
        return x.detach().double().requires_grad_() if isinstance(x, torch.Tensor) else x

    return type(of)(*(list(map(cast, x)) if isinstance(x, list) else cast(x) for x in of))


def recorded(name):
    program, recurrent, _ = CASES[name]
    layer = test_compiled.compiled(program, recurrent, torch.float32)
    kernels = Recorded(layer._kernels)
    return _device_layer.DeviceLayer(program, recurrent, kernels), kernels


def products_of(kernels):
    return [launch for launch in kernels.launches if launch[0] not in kernels.CELL]


def tile_of(rows, columns):
    """The large ones where there are blocks enough, and how many there are."""
    blocks = lambda tile: (-(-columns // tile[1]), -(-rows // tile[0]))  # noqa: E731
    tile = (4, 4) if rows <= 4 else (16, 8)
    if rows > 4 and (rows <= 8 or blocks(tile)[0] * blocks(tile)[1] < 128):
        tile = (8, 8)
    return tile, blocks(tile)


# One row and whole tiles, rows that are missing and columns, depths that warps share unevenly.
@pytest.mark.slow(10)
@pytest.mark.parametrize("H", [1, 6, 30, 132, 300])
@pytest.mark.parametrize("B", [1, 4, 5, 13, 50])
def test_they_are_as_exact_as_float32_is(B, H):
    layer, kernels = recorded("gru")
    of = arguments("gru", 3, B, H, torch.float32)
    found = every_result(layer, of)
    program, recurrent, _ = CASES["gru"]
    exact = test_compiled.compiled(program, recurrent)
    for ours, truth in zip(found, every_result(exact, in_double(of)), strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=2e-5, atol=2e-6 * B)
    launched = [(launch[0][:2], launch[1:3]) for launch in products_of(kernels)]
    assert launched == [tile_of(B, 3 * H)] * 3 + [tile_of(B, H)] * 3
    assert {launch[0][2] for launch in products_of(kernels)} == {1 if H % 4 else 4}


def test_what_they_read_need_not_be_aligned():
    layer, kernels = recorded("gru")
    of = arguments("gru", 3, 5, 8, torch.float32)
    expected = every_result(layer, of)
    kernels.launches.clear()
    moved = torch.empty(of.w_hh.numel() + 1)[1:].view_as(of.w_hh).copy_(of.w_hh.detach())
    moved = of._replace(w_hh=moved.requires_grad_())
    for ours, own in zip(every_result(layer, moved), expected, strict=True):
        torch.testing.assert_close(ours, own)
    # In the backward pass W is copied, by columns.
    assert [launch[0] for launch in products_of(kernels)] == [(8, 8, 1)] * 3 + [(8, 8, 4)] * 3


def test_a_packed_batch_takes_smaller_ones_towards_its_end():
    layer, kernels = recorded("gru")
    of = arguments("gru", 1, 21, 5, torch.float32)
    of = of._replace(x=of.x[0], initial=[None], batch_sizes=torch.tensor([12, 6, 3]))
    states, last, kept = layer.forward(of)
    assert [(launch[0][0], launch[2]) for launch in products_of(kernels)] == [
        (8, 2),
        (8, 1),
        (4, 1),
    ]
    kernels.launches.clear()
    wanted = _device_layer.Gradients(*[True] * 5, [False], [], [])
    layer.backward(of, states, kept, states, wanted=wanted)
    assert [(launch[0][0], launch[2]) for launch in products_of(kernels)] == [(4, 1), (8, 1)]


@pytest.mark.parametrize(
    ("B", "H", "dtype"),
    [(129, 4, torch.float32), (17, 1640, torch.float32), (3, 4, torch.float64)],
    ids=str,
)
def test_many_rows_are_the_library_s(B, H, dtype):
    program, recurrent, _ = CASES["gru"]
    kernels = Recorded(test_compiled.compiled(program, recurrent, dtype)._kernels)
    layer = _device_layer.DeviceLayer(program, recurrent, kernels)
    layer.forward(arguments("gru", 2, B, H, dtype))
    assert not products_of(kernels) and len(kernels.launches) == 2


@pytest.mark.parametrize("B", [32, 33])
def test_many_rows_are_the_library_s_where_it_may_round(B, tf32):  # noqa: F811
    tf32()
    layer, kernels = recorded("gru")
    layer.forward(arguments("gru", 2, B, 4, torch.float32))
    assert bool(products_of(kernels)) == (B == 32)


@pytest.mark.slow(2)
@pytest.mark.parametrize("B", [2, 8, 16, 33])
def test_the_same_bits_in_every_order(B, order):
    program, recurrent, _ = CASES["lstm"]
    layer = test_compiled.compiled(program, recurrent, torch.float32)
    of = arguments("lstm", 2, B, 140, torch.float32)
    found = []
    for each in ORDERS:
        order(*each)
        found.append(every_result(layer, of))
    for others in found[1:]:
        assert all(map(torch.equal, found[0], others))


def test_a_launch_that_fails():
    layer, kernels = recorded("gru")
    kernels.fails_at = 3  # the second product
    with pytest.raises(RuntimeError, match="could not be launched: the message of 77"):
        layer.forward(arguments("gru", 5, 2, 3, torch.float32))
    assert [launch[0] for launch in kernels.launches] == [(4, 4, 1), "forward", (4, 4, 1)]
