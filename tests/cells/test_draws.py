"""Masks drawn for cells: numbers of Philox4x32-10, the same whoever draws them."""

import math

import pytest
import torch

from fastbptt import cells

bernoulli_ = torch.ops.fastbptt.bernoulli_.default
LOWER = 0xFFFFFFFF


def philox(counter, key):
    """Four numbers of 32 bits, by the formula of Salmon et al., 2011."""
    x, (k0, k1) = counter, key
    for _ in range(10):
        a, b = x[0] * 0xD2511F53, x[2] * 0xCD9E8D57
        x = [(b >> 32) ^ x[1] ^ k0, b & LOWER, (a >> 32) ^ x[3] ^ k1, a & LOWER]
        k0, k1 = (k0 + 0x9E3779B9) & LOWER, (k1 + 0xBB67AE85) & LOWER
    return x


@pytest.mark.parametrize(
    "counter, key, result",
    [
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([LOWER] * 4, [LOWER] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_the_formula_by_the_answers_that_its_authors_give(counter, key, result):
    assert philox(counter, key) == [int(word, 16) for word in result.split()]


def numbers(seed, count):
    """Those that a mask of so many is made of, in its order."""
    key = [seed & LOWER, seed >> 32 & LOWER]
    blocks = [philox([b, 0, 0, 0], key) for b in range(16 * math.ceil(count / 64))]
    each = [
        blocks[first + b][2 * pair + j]
        for first in range(0, len(blocks), 16)
        for pair in range(2)
        for b in range(16)
        for j in range(2)
    ]
    return torch.tensor(each[:count])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 63, 64, 65, 130, 1000])
def test_each_number_by_the_formula(count, dtype, isa):
    generator = torch.Generator().manual_seed(count)
    seed = torch.empty((), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    generator.manual_seed(count)
    memory = torch.full((count + 2,), 7.0, dtype=dtype)
    drawn = memory[1:-1]
    assert bernoulli_(drawn, 0.3, -2.5, generator=generator) is drawn
    is_there = numbers(int(seed) % 2**64, count) < round(0.3 * 2**32)
    assert torch.equal(drawn, torch.where(is_there, -2.5, 0.0).to(dtype))
    assert memory[0] == 7 and memory[-1] == 7


def test_how_many_threads_draw_is_nothing_to_the_mask():
    before, masks = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            torch.manual_seed(3)
            masks += [cells.Bernoulli(0.4).draw((2, 30, 7, 51), torch.empty(0)) for _ in range(2)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(masks[i], masks[i + 2]) for i in range(4))
    assert not torch.equal(masks[0], masks[1])


@pytest.mark.parametrize("p", [0.0, 1e-3, 0.5, 0.9, 1 - 2**-32, 1.0])
def test_how_often(p):
    torch.manual_seed(1)
    n = 1 << 20
    drawn = bernoulli_(torch.empty(n), p)
    assert set(drawn.unique().tolist()) <= {0.0, 1.0}
    assert abs(drawn.double().mean().item() - p) <= 5 * math.sqrt(p * (1 - p) / n) + 2**-32


def test_neighbours_do_not_depend_on_each_other():
    torch.manual_seed(2)
    n = 1 << 20
    x = bernoulli_(torch.empty(n), 0.5) - 0.5
    for lag in (1, 2, 16, 31, 32, 64, 65):
        correlation = 4 * (x[lag:] * x[:-lag]).mean().item()
        assert abs(correlation) < 5 / math.sqrt(n)


def test_arguments():
    for wrong, message in [
        (torch.empty(3, dtype=torch.float16), "self must be float32 or float64, got Half"),
        (torch.empty(4, 4).t()[:, :2], "self must be contiguous"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            bernoulli_(wrong, 0.5)
    for p in (-0.1, 1.5, math.nan):
        with pytest.raises(RuntimeError, match=r"p must be in \[0, 1\], got"):
            bernoulli_(torch.empty(3), p)
    assert bernoulli_(torch.empty(0), 0.5).numel() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("value", [1.0, 4.0])
def test_watched_and_in_16_bits_it_is_torchs(value, dtype):
    like = torch.empty(0, dtype=dtype)
    draw = cells.Bernoulli(0.25, value).draw
    compiled = torch.compile(lambda x: draw((1, 9, 5, 4), x) + 0, backend="aot_eager")
    torch.manual_seed(0)
    drawn = compiled(like)
    torch.manual_seed(0)
    expected = torch.empty(1, 9, 5, 4, dtype=dtype).bernoulli_(0.25) * value
    assert torch.equal(drawn, expected)
    torch.manual_seed(0)
    is_torchs = torch.equal(draw((1, 9, 5, 4), like), expected)
    assert is_torchs == (dtype == torch.float16)


def test_opcheck():
    torch.library.opcheck(
        bernoulli_,
        (torch.empty(70), 0.5, 2.0),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
