"""Opacus: per-sample gradients of our modules, its engine; and its tables by exact class."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch

pytest.importorskip("opacus")

from opacus import GradSampleModule, PrivacyEngine
from opacus.layers import DPGRU, DPLSTM, DPRNN
from opacus.validators import ModuleValidator
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence

import fastbptt
import fastbptt.opacus
from clients.swap import assert_same, converted
from common import python_blocks
from fastbptt import TBPTT, Chunked, Sliding

B, T, I, H = 3, 7, 4, 5
TOLERANCE = {"rtol": 1e-10, "atol": 1e-12}


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def samples_of(model):
    return {name: p.grad_sample for name, p in model.named_parameters()}


def assert_samples(module, losses, *, batch_first=True, reduction="sum", num=B):
    """A module's per-sample gradients are those of one backward pass for each sequence.

    losses(module, which): those of the sequences in a slice.
    """
    single = copy.deepcopy(module)
    sampled = GradSampleModule(module, batch_first=batch_first, loss_reduction=reduction)
    loss = losses(sampled, slice(0, num))
    assert loss.shape == (num,)
    getattr(loss, reduction)().backward()
    total = [0] * len(list(module.parameters()))
    for b in range(num):
        single.zero_grad()
        losses(single, slice(b, b + 1)).sum().backward()
        assert any(p.grad is not None and p.grad.abs().max() > 1e-6 for p in single.parameters())
        for i, (p, (name, q)) in enumerate(
            zip(single.parameters(), module.named_parameters(), strict=True)
        ):
            assert q.requires_grad == p.requires_grad
            if not p.requires_grad:
                assert not hasattr(q, "grad_sample")
                continue
            assert q.grad_sample.shape == (num, *p.shape)
            torch.testing.assert_close(
                q.grad_sample[b], p.grad, **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}"
            )
            total[i] = total[i] + p.grad / (num if reduction == "mean" else 1)
    for q, expected in zip(module.parameters(), total, strict=True):
        if q.requires_grad:
            torch.testing.assert_close(q.grad, torch.zeros_like(q) + expected, **TOLERANCE)


def batch(batch_first, num=B, steps=T):
    shape = (num, steps, I) if batch_first else (steps, num, I)
    return torch.randn(shape)


def part(x, which, batch_first):
    return x[which] if batch_first else x[:, which]


def by_sequence(output, states, batch_first=True):
    """A loss [B] of all results."""
    if not batch_first:
        output = output.transpose(0, 1)
    states = states if isinstance(states, tuple) else (states,)
    return output.sin().sum((1, 2)) + sum(
        (k + 1) * s.square().sum((0, 2)) for k, s in enumerate(states)
    )


CELLS = {
    "tanh": (fastbptt.RNN, {}),
    "relu": (fastbptt.RNN, {"nonlinearity": "relu"}),
    "identity": (fastbptt.RNN, {"nonlinearity": "identity"}),
    "gru": (fastbptt.GRU, {}),
    "lstm": (fastbptt.LSTM, {}),
    "projected": (fastbptt.LSTM, {"proj_size": 2}),
}
STACKS = {
    "one layer": {},
    "no biases": {"bias": False},
    "two layers": {"num_layers": 2},
    "both ways": {"num_layers": 2, "bidirectional": True},
}
TRUNCATIONS = [
    Chunked(3),
    TBPTT(2, 5),
    TBPTT(2, 4, loss="last"),
    TBPTT(3, 3, loss="last"),
    Sliding(3),
]
every_cell = pytest.mark.parametrize("cell", CELLS)


def make(cell, **options):
    cls, own = CELLS[cell]
    return cls(I, H, **own, **options)


@every_cell
@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("batch_first", [True, False])
def test_samples(cell, stack, batch_first):
    module = make(cell, batch_first=batch_first, **STACKS[stack])
    x = batch(batch_first)

    def losses(module, which):
        return by_sequence(*module(part(x, which, batch_first)), batch_first)

    assert_samples(module, losses, batch_first=batch_first)


@pytest.mark.parametrize("needs_input", [False, True])
@pytest.mark.parametrize(
    "cell, used",
    [
        (cell, used)
        for cell in CELLS
        for used in ("output", "h_n", "c_n")
        if used != "c_n" or cell in ("lstm", "projected")
    ],
)
def test_loss_of_one_result(cell, used, needs_input):
    """Whichever: Opacus' hooks see the gradient of the first alone."""
    module = make(cell, batch_first=True, num_layers=2)
    x = batch(True).requires_grad_(needs_input)

    def losses(module, which):
        output, states = module(x[which])
        h_n, c_n = states if isinstance(states, tuple) else (states, None)
        if used == "output":
            return output.square().sum((1, 2))
        return (h_n if used == "h_n" else c_n).square().sum((0, 2))

    assert_samples(module, losses)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("opacus_batch_first", [True, False])
def test_either_reduction(cell, reduction, opacus_batch_first):
    """And the two libraries need not mean the same by batch_first."""
    module = make(cell, batch_first=True)
    x = batch(True)
    assert_samples(
        module,
        lambda module, which: by_sequence(*module(x[which])),
        reduction=reduction,
        batch_first=opacus_batch_first,
    )


@pytest.mark.parametrize("cell", ["tanh", "gru", "projected"])
@pytest.mark.parametrize("keyword", [True, False])
def test_initial_states(cell, keyword):
    module = make(cell, batch_first=True, num_layers=2, bidirectional=True)
    x, h = batch(True), torch.randn(4, B, 2 if cell == "projected" else H, requires_grad=True)
    c = torch.randn(4, B, H)

    def losses(module, which):
        hx = (h[:, which], c[:, which]) if cell == "projected" else h[:, which]
        return by_sequence(*(module(x[which], hx=hx) if keyword else module(x[which], hx)))

    assert_samples(module, losses)


@pytest.mark.parametrize("cell", ["tanh", "gru", "lstm"])
@pytest.mark.parametrize("is_sorted", [True, False])
@pytest.mark.parametrize("truncation", [None, Chunked(2), TBPTT(2, 3)])
def test_packed(cell, is_sorted, truncation):
    """A sequence's gradients stand where the sequence is, however it was sorted."""
    module = make(cell, num_layers=2, bidirectional=truncation is None, truncation=truncation)
    lengths = [7, 4, 2] if is_sorted else [2, 7, 4]
    sequences = [torch.randn(length, I) for length in lengths]

    def losses(module, which):
        output, states = module(pack_sequence(sequences[which], enforce_sorted=is_sorted))
        output, _ = torch.nn.utils.rnn.pad_packed_sequence(output, batch_first=True)
        return by_sequence(output, states)

    assert_samples(module, losses)


@pytest.mark.parametrize("cell", ["tanh", "gru", "lstm"])
@pytest.mark.parametrize(
    "truncation",
    [Chunked(3), TBPTT(2, 5), TBPTT(2, 4, loss="last"), TBPTT(3, 3, loss="last"), Sliding(3)],
    ids=str,
)
@pytest.mark.parametrize("by", ["module", "call"])
def test_truncation(cell, truncation, by):
    module = make(cell, batch_first=True, truncation=truncation if by == "module" else None)
    x, options = batch(True), {"truncation": truncation} if by == "call" else {}
    full = copy.deepcopy(module)
    full.truncation = None

    def losses(module, which):
        return by_sequence(*module(x[which], **options))

    assert_samples(module, losses)
    by_sequence(*full(x)).sum().backward()
    assert not torch.allclose(full.weight_hh_l0.grad, module.weight_hh_l0.grad)


@pytest.mark.parametrize("cell", ["tanh", "gru", "lstm"])
def test_resets(cell):
    module = make(cell, batch_first=True, num_layers=2, truncation=3)
    x, resets = batch(True), torch.rand(B, T) < 0.3

    def losses(module, which):
        return by_sequence(*module(x[which], resets=resets[which]))

    assert_samples(module, losses)


def test_gates():
    """Of each sequence its own."""
    module = make("lstm", batch_first=True, num_layers=2)
    x, kappa = batch(True), torch.rand(T, B) * (torch.rand(T, B) < 0.7)

    def losses(module, which):
        return by_sequence(*module(x[which], truncation=fastbptt.Gated(kappa[:, which])))

    assert_samples(module, losses)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_several_calls(cell):
    """Of different lengths, with the state handed on, and not all in the order of the losses."""
    module = make(cell, batch_first=True)
    x, y, z = batch(True), batch(True, steps=2), batch(True, steps=4)

    def losses(module, which):
        output, states = module(x[which])
        first = by_sequence(output, states)
        second = by_sequence(*module(y[which], states))
        return first * by_sequence(*module(z[which])) + second

    assert_samples(module, losses)


def test_frozen_weights():
    module = make("lstm", batch_first=True, num_layers=2)
    module.weight_hh_l0.requires_grad_(False)
    module.bias_ih_l1.requires_grad_(False)
    x = batch(True)
    assert_samples(module, lambda module, which: by_sequence(*module(x[which])))


def test_tied_weights():
    """One Parameter under two names."""
    module = fastbptt.GRU(H, H, num_layers=2, batch_first=True)
    module.weight_hh_l1 = module.weight_hh_l0
    x = torch.randn(B, T, H)
    assert_samples(module, lambda module, which: by_sequence(*module(x[which])))


@pytest.mark.parametrize("num", [1, 0])
def test_small_batches(num):
    """Poisson sampling draws such."""
    module = make("lstm", batch_first=True, num_layers=2)
    x = batch(True, num)
    assert_samples(module, lambda m, which: by_sequence(*m(x[which])), num=num)
    if num == 0:
        for name, sample in samples_of(module).items():
            assert sample.shape == (0, *getattr(module, name).shape)


def test_accumulated_batches():
    module = make("gru", batch_first=True)
    sampled = GradSampleModule(module, loss_reduction="sum")
    expected = []
    for num in (3, 2):
        x = batch(True, num)
        alone = GradSampleModule(make("gru", batch_first=True), loss_reduction="sum")
        alone._module.load_state_dict(module.state_dict())
        for each in (sampled, alone):
            by_sequence(*each(x)).sum().backward()
        expected.append(samples_of(alone._module))
    for name, samples in samples_of(module).items():
        assert_same(samples, [each[name] for each in expected], rtol=1e-12)


@pytest.mark.parametrize("theirs", [DPRNN, DPGRU, DPLSTM])
def test_as_opacus_layers(theirs):
    """Whose steps are Python's, with the hooks on their Linears."""
    ours = {DPRNN: fastbptt.RNN, DPGRU: fastbptt.GRU, DPLSTM: fastbptt.LSTM}[theirs]
    ours, theirs = (cls(I, H, num_layers=2, batch_first=True) for cls in (ours, theirs))
    theirs.load_state_dict(ours.state_dict())
    x = batch(True)
    for module in (ours, theirs):
        sampled = GradSampleModule(module)
        by_sequence(*sampled(x)).mean().backward()
    by_name = theirs.state_dict(keep_vars=True)
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad_sample, by_name[name].grad_sample, **TOLERANCE)


class Named(torch.nn.LSTM):
    def forward(self, input, hx=None):
        return super().forward(input, hx)


class Classifier(torch.nn.Module):
    def __init__(self, recurrent=torch.nn.LSTM):
        super().__init__()
        self.embedding = torch.nn.Embedding(11, I)
        self.rnn = recurrent(I, H, num_layers=2, batch_first=True)
        self.head = torch.nn.Linear(H, 2)

    def forward(self, tokens, lengths=None):
        x = self.embedding(tokens)
        if lengths is not None:
            x = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        _, states = self.rnn(x)
        return self.head((states[0] if isinstance(states, tuple) else states)[-1])


def data(num=B):
    return torch.randint(11, (num, T)), torch.arange(num) % 2


@pytest.mark.parametrize("recurrent", [torch.nn.RNN, torch.nn.GRU, torch.nn.LSTM, Named])
@pytest.mark.parametrize("lengths", [None, torch.tensor([2, 7, 4])], ids=["padded", "packed"])
def test_in_a_model(recurrent, lengths):
    """Beside layers of Opacus' own, converted; a subclass too."""
    model = converted(Classifier(recurrent))
    tokens, labels = data()

    def losses(model, which):
        logits = model(tokens[which], None if lengths is None else lengths[which])
        return torch.nn.functional.cross_entropy(logits, labels[which], reduction="none")

    assert_samples(model, losses, reduction="mean")


@pytest.mark.parametrize("poisson", [True, False])
def test_private_training(poisson):
    """The engine validates, clips, adds its noise, and the loss falls."""
    model = converted(Classifier())
    tokens, labels = data(24)
    labels = (tokens[:, -1] > 5).long()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(tokens, labels), 6)
    engine = PrivacyEngine(accountant="rdp")
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=optimizer,
        data_loader=loader,
        noise_multiplier=0.1,
        max_grad_norm=1.0,
        poisson_sampling=poisson,
    )
    cross_entropy = torch.nn.functional.cross_entropy

    def loss_of_all():
        with torch.no_grad():
            return cross_entropy(model(tokens), labels).item()

    before = loss_of_all()
    for _ in range(20):
        for x, y in loader:
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
    assert loss_of_all() < 0.8 * before
    assert engine.get_epsilon(1e-5) > 0


def test_docs():
    preamble, *programs = python_blocks("derivatives.md")
    (program,) = (each for each in programs if "opacus" in each)
    torch.set_default_dtype(torch.float32)
    exec(preamble + program, {})


def test_clipping_without_samples():
    """Opacus' "ghost" mode: norms by one backward pass, the clipped sum by another."""
    tokens, labels = data()
    model = converted(Classifier())
    sampled = copy.deepcopy(model)
    cross_entropy = torch.nn.functional.cross_entropy

    cross_entropy(GradSampleModule(sampled)(tokens), labels).backward()
    of_each = [s.flatten(1) for s in samples_of(sampled).values()]
    norms = torch.cat(of_each, 1).norm(dim=1)
    weights = (0.5 / (norms + 1e-6)).clamp(max=1)
    expected = {name: torch.tensordot(weights, s, 1) for name, s in samples_of(sampled).items()}

    engine = PrivacyEngine()
    ghost, optimizer, criterion, _ = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        criterion=torch.nn.CrossEntropyLoss(),
        data_loader=torch.utils.data.DataLoader(torch.utils.data.TensorDataset(tokens), B),
        noise_multiplier=0.0,
        max_grad_norm=0.5,
        poisson_sampling=False,
        grad_sample_mode="ghost",
    )
    criterion(ghost(tokens), labels).backward()
    torch.testing.assert_close(ghost.per_sample_gradient_norms, norms, **TOLERANCE)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], **TOLERANCE)


def test_half_precision_under_autocast():
    module = fastbptt.LSTM(I, H, batch_first=True).float()
    exact = GradSampleModule(copy.deepcopy(module).double(), loss_reduction="sum")
    sampled = GradSampleModule(module, loss_reduction="sum")
    x = batch(True)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = sampled(x.float())
    output.float().square().sum().backward()
    exact(x)[0].square().sum().backward()
    for p, q in zip(module.parameters(), exact.parameters(), strict=True):
        assert p.grad_sample.dtype == torch.float32
        assert_same(p.grad_sample.double(), q.grad_sample, rtol=0.05)


def test_without_the_hooks():
    """Taken off again; in evaluation; and without gradients: nothing is sampled."""
    module = make("lstm", batch_first=True)
    sampled = GradSampleModule(module, loss_reduction="sum")
    x = batch(True)
    with torch.no_grad():
        sampled(x)
    sampled.eval()
    by_sequence(*sampled(x)).sum().backward()
    sampled.train()
    sampled.disable_hooks()
    by_sequence(*sampled(x)).sum().backward()
    sampled.enable_hooks()
    assert all(sample is None for sample in samples_of(module).values())
    twice = copy.deepcopy(module.weight_hh_l0.grad)
    plain = sampled.to_standard_module()
    assert plain is module and not hasattr(module.weight_hh_l0, "grad_sample")
    module.zero_grad()
    by_sequence(*module(x)).sum().backward()
    torch.testing.assert_close(2 * module.weight_hh_l0.grad, twice, **TOLERANCE)
    assert not hasattr(module.weight_hh_l0, "grad_sample")


def test_hooks_of_others():
    """Stay torch's affair."""
    module = make("gru", batch_first=True)
    seen = []
    handles = [
        module.register_forward_hook(lambda m, x, y, **_: seen.append("forward")),
        module.register_full_backward_hook(lambda m, g_in, g_out: seen.append("backward")),
    ]
    sampled = GradSampleModule(module, loss_reduction="sum")
    x = batch(True).requires_grad_()
    sampled(x)[0].sum().backward()
    assert seen == ["forward", "backward"]
    assert module.weight_hh_l0.grad_sample is not None
    for handle in handles:
        handle.remove()
    sampled(x)
    assert seen == ["forward", "backward"]


def test_errors():
    unbatched = GradSampleModule(make("lstm"))
    with pytest.raises(ValueError, match="Opacus needs a batch"):
        unbatched(torch.randn(T, I))
    states = GradSampleModule(make("lstm"))
    with pytest.raises(NotImplementedError, match="gradients for Opacus with return_states"):
        states(batch(True), return_states=True)
    with pytest.raises(NotImplementedError, match='grad_sample_mode="hooks"'):
        GradSampleModule(make("lstm"), force_functorch=True)
    parametrized = make("lstm")
    torch.nn.utils.parametrizations.weight_norm(parametrized, "weight_hh_l0")
    with pytest.raises(NotImplementedError, match="parametrized"):
        GradSampleModule(parametrized)


def test_converted_too_late():
    """Opacus' hooks are on the module as on one of torch.nn's then, which know too little."""
    model = torch.nn.Sequential(torch.nn.GRU(I, H, batch_first=True))
    sampled = GradSampleModule(model)
    fastbptt.convert(model)
    with pytest.raises(RuntimeError, match="fastbptt.convert, before GradSampleModule"):
        sampled(batch(True))[0].sum().backward()


def test_without_a_kernel(monkeypatch):
    monkeypatch.setitem(fastbptt.call.KERNEL_DTYPES, "cpu", (torch.float32,))
    sampled = GradSampleModule(make("lstm", batch_first=True))
    with pytest.raises(NotImplementedError, match="no per-sample gradients for torch.float64"):
        sampled(batch(True))


every_replacement = pytest.mark.parametrize(
    "theirs, ours, replacement",
    [(torch.nn.LSTM, fastbptt.LSTM, DPLSTM), (torch.nn.GRU, fastbptt.GRU, DPGRU)],
)


@every_replacement
def test_validator(theirs, ours, replacement):
    """It refuses torch's, and has nothing to say of ours, which its fixer leaves alone."""
    model = torch.nn.Sequential(theirs(4, 5, batch_first=True))
    assert len(ModuleValidator.validate(model)) == 1
    assert ModuleValidator.validate(converted(model)) == []
    assert type(ModuleValidator.fix_and_validate(converted(model))[0]) is ours


@pytest.fixture
def registered(theirs, ours, monkeypatch):
    """What a program says that wants Opacus' layers: what is torch's modules' is ours' too."""
    for table in (ModuleValidator.VALIDATORS, ModuleValidator.FIXERS):
        monkeypatch.setitem(table, ours, table[theirs])


@every_replacement
def test_registered(theirs, ours, replacement, registered):
    """It says of ours what it says of torch's module, and puts the same in place of it."""
    model = torch.nn.Sequential(theirs(4, 5, batch_first=True))
    expected = [str(error) for error in ModuleValidator.validate(model)]
    assert len(expected) == 1
    assert [str(error) for error in ModuleValidator.validate(converted(model))] == expected
    assert_fixed(converted(model), model, replacement)


@every_replacement
def test_reverted(theirs, ours, replacement):
    """The other way, with nothing registered."""
    model = torch.nn.Sequential(theirs(4, 5, batch_first=True))
    assert_fixed(fastbptt.revert(converted(model)), model, replacement)


def assert_fixed(model: torch.nn.Module, expected: torch.nn.Module, replacement: type) -> None:
    fixed = ModuleValidator.fix_and_validate(model)
    assert type(fixed[0]) is replacement
    x = torch.randn(2, 7, 4)
    assert_same(fixed(x), expected(x))


@every_replacement
def test_not_imported(theirs, ours, replacement):
    """Without fastbptt.opacus a gradient per sample is an error, never wrong."""
    program = f"""
import torch, fastbptt, opacus
model = opacus.GradSampleModule(fastbptt.{ours.__name__}(4, 5, batch_first=True))
try:
    model(torch.randn(2, 7, 4))[0].sum().backward()
except (RuntimeError, TypeError) as error:
    print("refused:", error)
"""
    printed = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    ).stdout
    assert printed.startswith("refused:")
