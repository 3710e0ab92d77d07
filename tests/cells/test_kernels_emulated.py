"""The kernels of a GPU for users' cells, emulated: orders of threads, launches, mistakes."""

from __future__ import annotations

import ctypes

import pytest
import torch

import test_compiled
from cells.programs import CASES, Builder, gru, leaky
from emulation import user_cells
from fastbptt import _codegen, _compiled, _compiler, _device_layer, _rules
from fastbptt._layer import Gradients
from test_compiled import arguments, check, gradients, leaves_of, run

pytestmark = pytest.mark.usefixtures("kernels")

make = _compiled._make  # as it is without the fixture
ORDERS = [("forward", 0), ("reverse", 0), ("random", 1), ("random", 2)]


@pytest.fixture
def order():
    """Sets the order in which a block's threads run, and puts it back."""
    yield user_cells.set_order
    user_cells.set_order("forward")


def every_result(layer, of, kappa=None):
    results = run(layer, of, kappa)
    return [*results, *gradients(results, leaves_of(of))]


# Blocks of one warp and of some; units that a thread has some of; rows of more than one block.
@pytest.mark.parametrize("H", [1, 33, 300, 1100])
@pytest.mark.parametrize("name", ["gru", "three states", "normalized", "twice"])
def test_many_units(name, H):
    check(name, 3, 2, H)


@pytest.mark.parametrize("name", ["lstm", "layer norm lstm", "normalized", "twice"])
def test_the_same_bits_in_every_order(name, order):
    program, recurrent, _ = CASES[name]
    of = arguments(name, 4, 3, 75)
    resets = torch.rand(4, 3, generator=torch.Generator().manual_seed(2)) < 0.3
    layer, of = test_compiled.compiled(program, recurrent), of._replace(resets=resets)
    found = []
    for each in ORDERS:
        order(*each)
        found.append(every_result(layer, of))
    for others in found[1:]:
        assert all(map(torch.equal, found[0], others))


@pytest.fixture
def poisoned():
    """torch fills new memory with NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("name", ["leaky by unit", "independent", "masked", "normalized"])
def test_what_is_read_was_written(name, direction, poisoned):
    assert torch.empty(3).isnan().all()
    generator = torch.Generator().manual_seed(3)
    lengths = torch.tensor([9, 9, 4, 1])
    options = {
        "resets": torch.rand(9, 4, generator=generator) < 0.3,
        "kappa": torch.rand(9, 4, generator=generator, dtype=torch.float64),
        "direction": direction,
    }
    check(name, 9, 4, 5, **options)
    check(name, 9, 4, 5, lengths=lengths, **options)


class Recorded:
    """Kernels that note what is launched, and of whose launches one may fail."""

    CELL = ("forward", "backward", "finish")
    LAUNCH = ctypes.CFUNCTYPE(
        ctypes.c_int, ctypes.c_void_p, *[ctypes.c_uint] * 7, *[ctypes.c_void_p] * 3
    )

    def __init__(self, kernels, fails_at=None):
        self.own, self.launches, self.fails_at = kernels, [], fails_at
        self.forward, self.backward, self.finish = (getattr(kernels, name) for name in self.CELL)
        self.products = kernels.products
        self.names = {getattr(kernels, name): name for name in self.CELL}
        self.names |= dict(zip(self.products, _codegen.PRODUCT_KERNELS, strict=True))
        self.stream, through = kernels.stream, self.LAUNCH(kernels.launch)

        def launch(kernel, *rest):
            self.launches.append((self.names[kernel], *rest[:7]))
            return 77 if len(self.launches) == self.fails_at else through(kernel, *rest)

        self.callback = self.LAUNCH(launch)
        self.launch = ctypes.cast(self.callback, ctypes.c_void_p).value

    def error(self, number):
        return f"the message of {number}"


def recorded(program, fails_at=None):
    layer = user_cells.layer(program, torch.float64)
    kernels = Recorded(layer._kernels, fails_at)
    return _device_layer.DeviceLayer(program, 0, kernels), kernels


def test_launches():
    layer, kernels = recorded(gru())
    of = arguments("gru", 3, 2, 300)
    results = run(layer, of)
    assert kernels.launches == [("forward", 4, 1, 1, 256, 1, 1, 0)] * 3
    kernels.launches.clear()
    gradients(results, leaves_of(of))
    one = 4, 1, 1, 256, 1, 1, 0
    assert kernels.launches == [*[("backward", *one)] * 3, ("finish", *one)]


def test_launches_of_a_packed_batch():
    layer, kernels = recorded(leaky())
    of = arguments("leaky", 1, 6, 5)
    of = of._replace(
        x=of.x[0],
        initial=[None],
        batch_sizes=torch.tensor([3, 2, 1]),
        direction=-1,
    )
    states, last, kept = layer.forward(of)
    assert [launch[1] for launch in kernels.launches] == [1, 2, 3]
    kernels.launches.clear()
    wanted = Gradients(*[True] * 5, [False], [True], [])
    layer.backward(of, states, kept, states, wanted=wanted)
    assert [launch[:2] for launch in kernels.launches] == [("backward", n) for n in (3, 2, 1)]


def test_normalized_rows_have_a_block_each():
    program, recurrent, _ = CASES["layer norm lstm"]
    layer = user_cells.layer(program, torch.float64)
    kernels = Recorded(layer._kernels)
    layer = _device_layer.DeviceLayer(program, recurrent, kernels)
    run(layer, arguments("layer norm lstm", 2, 3, 1000))
    norms = len(layer.shape.norms)
    assert norms == 3
    assert kernels.launches == [("forward", 3, 1, 1, 512, 1, 1, 16 * norms * 8)] * 2


def test_a_launch_that_fails():
    layer, kernels = recorded(leaky(), fails_at=2)
    with pytest.raises(RuntimeError, match="could not be launched: the message of 77"):
        layer.forward(arguments("leaky", 5, 2, 3))
    assert len(kernels.launches) == 2


def test_a_fault_of_a_kernel_is_found():
    """The emulation itself: a thread that waits for the others at a place of its own."""
    program, recurrent, _ = CASES["twice"]

    def change(source):
        body = "    sums[0] ="
        assert body in source
        return source.replace(body, f"    if (threadIdx.x == 1) sync_block();\n{body}", 1)

    layer = user_cells.layer(program, torch.float64, recurrent, change)
    with pytest.raises(
        RuntimeError, match="(?s)could not be launched: .*wait at different barriers"
    ):
        layer.forward(arguments("twice", 2, 2, 5))


@pytest.mark.parametrize("name", ["elman", "gru", "lstm", "layer norm gru"])
def test_a_wrong_derivative_fails(name, monkeypatch):
    """One that is wrong by a thousandth."""
    check(name, 4, 2, 5)

    def fresh(program, recurrent=0, dtype=torch.float64):
        return user_cells.layer(program, dtype, recurrent)

    monkeypatch.setattr(test_compiled, "compiled", fresh)
    monkeypatch.setitem(_rules.DERIVATIVE, "tanh", ("{g} * (number<V>(1.001) - {y} * {y})",))
    with pytest.raises(AssertionError, match="not close"):
        check(name, 4, 2, 5)


def test_a_cell_of_too_many_arguments_has_none():
    names = [f"a{i}" for i in range(300)]
    b = Builder(1, 1, *names)
    total = b.gate(0)
    for name in names:
        total = b.add(total, b["extra", name])
    assert not _device_layer.fits(b.program(total))
    with pytest.raises(_compiler.Unavailable, match="too many arguments"):
        make(b.program(total), torch.float64, 0, "cuda:0")
    assert _device_layer.fits(gru())
    assert _device_layer.fits(CASES["layer norm lstm"][0])


def test_numbers_of_other_dtypes_and_shapes():
    of = arguments("leaky", 3, 2, 5)._replace(extras=[torch.tensor(0.25, dtype=torch.float64)])
    layer = test_compiled.compiled(leaky())
    expected = layer.forward(of)[0][0]
    for number in (torch.tensor(0.25), torch.tensor([0.25], dtype=torch.float64)):
        assert torch.equal(layer.forward(of._replace(extras=[number]))[0][0], expected)
