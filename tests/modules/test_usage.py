"""Every way people use recurrent modules, for each cell beside torch's own."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
)
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import fastbptt
from common import (
    Case,
    assert_matches,
    cotangent,
    parts,
    python,
    step,
    tensors_of,
    through_file,
    through_pickle,
    twin,
    whole,
)

STACKS = {
    "rnn": Case(6, 3, 4, 5, layers=2, bidirectional=True),
    "gru": Case(6, 3, 4, 5, layers=2, bidirectional=True, cell="gru"),
    "lstm": Case(6, 3, 4, 5, layers=2, bidirectional=True, cell="lstm", proj=3),
}


@pytest.fixture(params=STACKS)
def case(request):
    return STACKS[request.param]


def both(case, **kwargs):
    """Our module and torch's with the same parameters."""
    ours = case.module(**kwargs)
    return ours, twin(ours)


def loss_of(results):
    """A scalar in which every number of a call's results has its own weight."""
    return sum((t * cotangent(t, i)).sum() for i, t in enumerate(tensors_of(results)))


def gradients(module):
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def detached(states):
    return whole([t.detach() for t in parts(states)])


class First(nn.Module):
    """What indexes a recurrent module's outputs inside an nn.Sequential."""

    def forward(self, results):
        return results[0]


def tagger(recurrent):
    """Recurrent module, norm and head in a Sequential; the first parameter is the embedding's."""
    torch.manual_seed(3)
    dtype = recurrent.weight_ih_l0.dtype
    width = (recurrent.proj_size or recurrent.hidden_size) * (1 + recurrent.bidirectional)
    return nn.Sequential(
        nn.Embedding(7, recurrent.input_size, dtype=dtype),
        recurrent,
        First(),
        nn.LayerNorm(width, dtype=dtype),
        nn.Linear(width, 2, dtype=dtype),
    )


def numbers(seed=0, shape=(6, 3)):
    return torch.randint(7, shape, generator=torch.Generator().manual_seed(seed))


# Copies and files.


@pytest.mark.parametrize("clone", [copy.deepcopy, copy.copy, through_pickle, through_file])
def test_copies_have_every_setting(case, clone):
    settings = {"truncation": 4, "dropout": 0.3}
    if case.cell in ("gru", "lstm"):
        settings["recompute"] = True
    module = case.module(**settings).eval()
    module.note = {"kept": 1}
    module.bias_hh_l0.requires_grad_(False)
    module.register_buffer("scale", torch.ones(3))
    expected = step(module, *case.data())
    other = clone(module)
    assert repr(other) == repr(module) and not other.training and other.note == {"kept": 1}
    assert other.recompute == module.recompute and list(other.state_dict()) == list(
        module.state_dict()
    )
    assert_matches(step(other, *case.data()), expected, rtol=0)
    other.train()
    torch.manual_seed(1)
    dropped = step(other, *case.data())
    torch.manual_seed(1)
    assert_matches(step(module.train(), *case.data()), dropped, rtol=0)
    assert (dropped["output"] - expected["output"]).abs().max() > 1e-3


def test_deepcopy_is_independent(case):
    module, theirs = both(case)
    other = copy.deepcopy(module)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert_matches(step(module, *case.data()), step(theirs, *case.data()))
    assert not torch.equal(module(case.data()[0])[0], other(case.data()[0])[0])


@pytest.mark.parametrize("assign", [False, True], ids="assign={}".format)
def test_state_dict_through_a_file(case, assign):
    ours, theirs = both(case)
    for source, target in ((ours, theirs), (theirs, ours)):
        file = io.BytesIO()
        torch.save(source.state_dict(), file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
        with torch.no_grad():
            for p in target.parameters():
                p.fill_(0.5)
        target.load_state_dict(state, strict=True, assign=assign)
        assert_matches(step(ours, *case.data()), step(theirs, *case.data()))


def test_made_on_meta_and_filled_later(case):
    ours, theirs = both(case)
    with torch.device("meta"):
        other = case.module()
    assert other.weight_ih_l0.is_meta
    filled = copy.deepcopy(other).to_empty(device="cpu")
    filled.load_state_dict(ours.state_dict())
    other.load_state_dict(ours.state_dict(), assign=True)
    expected = step(theirs, *case.data())
    for module in (filled, other):
        assert_matches(step(module, *case.data()), expected)


# Types and devices.


def test_casts(case):
    ours, theirs = both(case)
    x, hx = case.data()
    for change in (
        lambda m: m.float(),
        lambda m: m.double(),
        lambda m: m.to(torch.float32),
        lambda m: m.to("cpu", torch.float64),
        lambda m: m.type(torch.float64),
    ):
        assert change(ours) is ours
        dtype = change(theirs).weight_ih_l0.dtype
        assert {p.dtype for p in ours.parameters()} == {dtype} and len(ours.all_weights) == 4
        actual, expected = (step(m, x, hx) for m in (ours, theirs))
        assert_matches(actual, expected, rtol=64 * torch.finfo(dtype).eps)
        assert all(t.dtype == dtype for t in actual.values())


@pytest.mark.parametrize("cast", ["half", "bfloat16"])
@pytest.mark.usefixtures("few_kernels")
def test_falls_back_with_one_warning_where_there_is_no_kernel(case, cast):
    ours, theirs = (getattr(m, cast)() for m in both(case))
    x, hx = case.data()
    x = getattr(x, cast)()
    hx = whole([getattr(t, cast)() for t in parts(hx)])
    with pytest.warns(UserWarning, match=f"no kernel for {cast.replace('half', 'float16')}") as w:
        actual = step(ours, x, hx)
    assert len(w) == 1
    assert_matches(actual, step(theirs, x, hx), rtol=0)
    ours.double()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(ours, *case.data())


# What asks for a gradient, and when.


def test_some_parameters_frozen(case):
    ours, theirs = both(case)
    for frozen in ("weight_ih_l0", "bias_hh_l1_reverse", "weight_hh_l1"):
        for module in (ours, theirs):
            module.get_parameter(frozen).requires_grad_(False)
        actual, expected = step(ours, *case.data()), step(theirs, *case.data())
        assert "d" + frozen not in actual
        assert_matches(actual, expected)


def test_in_eval_mode(case):
    ours, theirs = both(case, dropout=0.5)
    ours.eval(), theirs.eval()
    expected = step(theirs, *case.data())
    assert_matches(step(ours, *case.data()), expected)
    ours.recompute = True  # of which the Elman cell takes no notice
    assert_matches(step(ours, *case.data()), expected)


def test_dropout_is_torchs_in_training(case):
    results = []
    for module in both(case, dropout=0.5):
        torch.manual_seed(5)
        results.append(step(module, *case.data()))
    assert_matches(*results)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(case, context):
    ours, theirs = both(case)
    x, hx = case.data()
    with context():
        actual, expected = tensors_of(ours(x, hx)), tensors_of(theirs(x, hx))
        stateless = tensors_of(ours(x)), tensors_of(theirs(x))
    for a, b in (*zip(actual, expected, strict=True), *zip(*stateless, strict=True)):
        assert not a.requires_grad and a.is_inference() == b.is_inference()
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    if context is torch.inference_mode:
        # An inference tensor as input: refused where torch refuses it, else computed.
        for module in (ours, theirs):
            with pytest.raises(RuntimeError, match="[Ii]nference tensor"):
                loss_of(module(actual[0][..., : case.I], hx)).backward()
    # The module still trains afterwards.
    assert_matches(step(ours, *case.data()), step(theirs, *case.data()))


def test_input_that_asks_for_a_gradient_through_frozen_weights(case):
    results = []
    for module in both(case):
        module.requires_grad_(False)
        results.append(step(module, *case.data()))
        assert set(results[-1]) >= {"dinput", "dhx"} and "dweight_ih_l0" not in results[-1]
    assert_matches(*results)


# Hooks.


def test_hooks(case):
    x, hx = case.data()
    logs = []
    for module in both(case):
        log = []

        def note(name, log=log):
            def hook(module, *arguments):
                tensors = [t for a in arguments for t in nn_tensors(a)]
                log.append((name, [t.detach().clone() for t in tensors]))

            return hook

        handles = [
            module.register_forward_pre_hook(note("forward pre")),
            module.register_forward_hook(note("forward")),
            module.register_full_backward_pre_hook(note("backward pre")),
            module.register_full_backward_hook(note("backward")),
            module.weight_hh_l1.register_hook(lambda grad, log=log: log.append(("w", [grad]))),
            module.weight_hh_l0.register_post_accumulate_grad_hook(
                lambda p, log=log: log.append(("accumulated", [p.grad.clone()]))
            ),
        ]
        step(module, x, hx)
        for handle in handles:
            handle.remove()
        count = len(log)
        step(module, x, hx)
        assert len(log) == count
        logs.append({f"{name} {i}": t for name, tensors in log for i, t in enumerate(tensors)})
    assert len(logs[0]) > 10
    assert_matches(*logs)


def nn_tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for v in value for t in nn_tensors(v)] if isinstance(value, tuple | list) else []


def test_forward_hook_may_replace_the_output(case):
    results = []
    for module in both(case):
        module.register_forward_hook(lambda m, args, out: (out[0] * 2, out[1]))
        module.register_forward_pre_hook(lambda m, args: (args[0] + 1, *args[1:]))
        results.append(step(module, *case.data()))
    assert_matches(*results)


# Training loops.


def test_clipped_and_accumulated(case):
    results = []
    for module in both(case):
        model = tagger(module)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        norms = []
        for _ in range(2):
            for micro in range(3):
                loss = model(numbers(micro)).square().mean() / 3
                loss.backward()
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.05, foreach=True))
            nn.utils.clip_grad_value_(model.parameters(), 0.02)
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        named = {n: p.detach() for n, p in model.named_parameters()}
        results.append(named | {f"norm {i}": norm for i, norm in enumerate(norms)})
    assert results[0]["norm 0"] > 0.05, "nothing was clipped"
    assert_matches(*results)


def test_state_carried_and_detached(case):
    """The loop of truncated backpropagation: the state of one segment enters the next."""
    results = []
    for module in both(case):
        states = None
        for i in range(3):
            x = case.data()[0] * (i + 1)
            output, states = module(x, states)
            (output.square().sum() + loss_of((output, states))).backward()
            states = detached(states)
        results.append(gradients(module) | dict(zip("hc", parts(states), strict=False)))
    assert_matches(*results)


def test_same_module_called_twice_in_one_graph(case):
    results = []
    for module in both(case):
        x, hx = case.data()
        x = x.requires_grad_()
        output, states = module(x, hx)
        loss_of(module(output[..., : case.I].tanh() + x, states)).backward()
        results.append(gradients(module) | {"dinput": x.grad})
        x.grad = None
    assert_matches(*results)


@pytest.mark.parametrize("use_reentrant", [False, True], ids="use_reentrant={}".format)
@pytest.mark.parametrize("truncation", [None, 4], ids="truncation={}".format)
def test_checkpoint(case, use_reentrant, truncation):
    module = case.module(dropout=0.5, truncation=truncation)
    x, hx = case.data()

    def run(x, *states):
        output, states = module(x, whole(states))
        return output, *parts(states)

    def checkpointed(x, hx):
        output, *states = checkpoint(run, x, *parts(hx), use_reentrant=use_reentrant)
        return output, whole(states)

    torch.manual_seed(1)
    expected = step(module, x, hx)
    torch.manual_seed(1)
    assert_matches(step(module, x, hx, call=checkpointed), expected)


def test_checkpointed_sequential(case):
    results = []
    for module in both(case):
        model = tagger(module)
        embedded = model[0](numbers())
        checkpoint_sequential(model[1:], 2, embedded, use_reentrant=False).square().sum().backward()
        results.append(gradients(model))
    assert_matches(*results)


@pytest.mark.parametrize("optimizer", ["Adam", "AdamW", "RMSprop", "LBFGS"])
def test_optimizers(case, optimizer):
    results = []
    for module in both(case):
        model = tagger(module)
        options = {"LBFGS": {"max_iter": 3}}.get(optimizer, {"lr": 1e-3})
        stepper = getattr(torch.optim, optimizer)(model.parameters(), **options)

        def closure(model=model, stepper=stepper):
            stepper.zero_grad()
            loss = model(numbers()).square().mean()
            loss.backward()
            return loss

        losses = [stepper.step(closure).detach() for _ in range(4)]
        results.append({f"loss {i}": loss for i, loss in enumerate(losses)})
    assert results[0]["loss 3"] < results[0]["loss 0"]
    # Rounding that the two differ by is divided by gradients as small as the optimizer's epsilon.
    assert_matches(*results, rtol=1e-10)


def test_averaged_model(case):
    results = []
    for module in both(case):
        model = tagger(module)
        averaged = torch.optim.swa_utils.AveragedModel(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for _ in range(3):
            model(numbers()).square().mean().backward()
            optimizer.step()
            averaged.update_parameters(model)
        output = averaged(numbers())
        assert not torch.equal(output, model(numbers()))
        results.append({"output": output.detach(), **dict(averaged.state_dict())})
    assert_matches(*results)


# Replicas and processes.


def replica_of(module):
    """What DataParallel makes of a module on each device, here on the CPU."""
    replica = module._replicate_for_data_parallel()
    replica._former_parameters = {}
    for name, parameter in module._parameters.items():
        # As torch.nn.parallel.replicate: copies that are no leaves, and no Parameters.
        copied = parameter.clone()
        setattr(replica, name, copied)
        replica._former_parameters[name] = copied
    return replica


def test_replicas(case):
    results = []
    x, hx = case.data()
    for module in both(case):
        halves = [(x[:, :2], whole([t[:, :2] for t in parts(hx)]))]
        halves.append((x[:, 2:], whole([t[:, 2:] for t in parts(hx)])))
        replicas = [replica_of(module) for _ in halves]
        assert not list(replicas[0].parameters())
        outputs = [r(*half)[0] for r, half in zip(replicas, halves, strict=True)]
        output = torch.cat(outputs, 1)
        output.square().sum().backward()
        results.append(gradients(module) | {"output": output.detach()})
        assert_matches(
            {"output": torch.cat(outputs, 1).detach()}, {"output": module(x, hx)[0].detach()}
        )
    assert len(results[0]) == 1 + len(list(module.parameters()))
    assert_matches(*results)


def test_data_parallel_without_devices(case):
    results = []
    for module in both(case):
        model = nn.DataParallel(module)
        results.append(step(module, *case.data(), call=model))
    assert_matches(*results)


def test_shared_memory(case):
    ours, theirs = both(case)
    assert ours.share_memory() is ours
    assert all(p.is_shared() for p in ours.parameters())
    assert_matches(step(ours, *case.data()), step(theirs, *case.data()))
    ours.flatten_parameters()  # must not take the weights out of shared memory
    assert all(p.is_shared() for p in ours.parameters())


def grow(module):
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(1.5)


def test_trained_by_another_process(case):
    ours, theirs = both(case)
    ours.share_memory()
    context = multiprocessing.get_context("fork")
    worker = context.Process(target=grow, args=(ours,))
    worker.start()
    worker.join(60)
    assert worker.exitcode == 0
    grow(theirs)
    assert_matches(step(ours, *case.data()), step(theirs, *case.data()))


def test_distributed_data_parallel(tmp_path):
    """DDP in one process, also with static graph and with gradients as views of the buckets."""
    script = """
import sys, copy, torch, fastbptt
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from fastbptt.convert import convert

dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
torch.manual_seed(0)
x = torch.randn(6, 3, 4, dtype=torch.float64)
for make in (torch.nn.RNN, torch.nn.GRU, torch.nn.LSTM):
    theirs = make(4, 5, 2, bidirectional=True, dtype=torch.float64)
    for options in ({}, {"static_graph": True}, {"gradient_as_bucket_view": True},
                    {"find_unused_parameters": True}):
        plain, before, after = (copy.deepcopy(theirs) for _ in range(3))
        wrapped = [plain, DDP(convert(before), **options), convert(DDP(after, **options))]
        assert type(before) is type(after) is getattr(fastbptt, make.__name__)
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in wrapped]
        for _ in range(3):
            for module, optimizer in zip(wrapped, optimizers):
                optimizer.zero_grad()
                module(x)[0].square().sum().backward()
                optimizer.step()
        for other in (before, after):
            for (name, a), b in zip(other.named_parameters(), plain.parameters()):
                torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12, msg=name)
dist.destroy_process_group()
print("done")
"""
    assert python(script, tmp_path / "store").stdout.endswith("done\n")  # after what Gloo says


# Calls.


def test_flatten_parameters(case):
    ours, theirs = both(case)
    for module in (ours, theirs):
        assert module.flatten_parameters() is None
    assert_matches(step(ours, *case.data()), step(theirs, *case.data()))
    names = [[id(w) for w in weights] for weights in ours.all_weights]
    assert names == [[id(getattr(ours, name)) for name in group] for group in ours._all_weights]
    assert len(names) == 4


class OnGpu(nn.Parameter):
    """A weight that says that it is on a GPU."""

    is_cuda = True


def test_flatten_parameters_on_a_gpu(monkeypatch):
    """torch.nn's would ask cuDNN for its name of the cell; it has none for the identity."""
    asked = []
    monkeypatch.setattr(torch.backends.cudnn, "is_acceptable", lambda tensor: True)
    monkeypatch.setattr(torch, "_use_cudnn_rnn_flatten_weight", lambda: asked.append("torch"))
    for module in (nn.RNN(3, 4), fastbptt.RNN(3, 4, nonlinearity="identity")):
        for name, weight in list(module.named_parameters()):
            setattr(module, name, OnGpu(weight.detach()))
        module.flatten_parameters()
        assert asked.pop() == "torch" if type(module) is nn.RNN else not asked


@pytest.mark.parametrize("batch_first", [False, True], ids="batch_first={}".format)
def test_unsorted_sequences_there_and_back(batch_first, case):
    case = Case(**{**vars(case), "batch_first": batch_first})
    lengths = torch.tensor([2, 6, 4])
    results = []
    for module in both(case):
        x, hx = case.data()
        x = x.requires_grad_()
        packed = pack_padded_sequence(x, lengths, batch_first, enforce_sorted=False)
        output, states = module(packed, hx)
        assert isinstance(output, PackedSequence)
        padded, got = pad_packed_sequence(output, batch_first, total_length=7)
        assert got.tolist() == lengths.tolist()
        loss_of((padded, states)).backward()
        named = dict(zip("hc", parts(detached(states)), strict=False))
        results.append(gradients(module) | named | {"padded": padded.detach(), "dx": x.grad})
    assert_matches(*results)


def test_sequences_packed_from_a_list(case):
    sequences = [torch.randn(n, case.I, dtype=case.dtype) for n in (3, 7, 1, 3)]
    results = []
    for module in both(case):
        output, states = module(pack_sequence(sequences, enforce_sorted=False))
        loss_of((output, states)).backward()
        results.append(gradients(module) | {"output": output.data.detach()})
        alone = torch.cat([module(s)[0] for s in sequences]).detach()
        together = torch.cat(torch.nn.utils.rnn.unpack_sequence(output)).detach()
        assert_matches({"output": together}, {"output": alone})
    assert_matches(*results)


@pytest.mark.parametrize("batch_first", [False, True], ids="batch_first={}".format)
def test_empty_batch(batch_first, case):
    case = Case(**{**vars(case), "B": 0, "batch_first": batch_first})
    ours, theirs = both(case)
    assert_matches(step(ours, *case.data()), step(theirs, *case.data()))
    x, _ = case.data()
    assert [t.shape for t in tensors_of(ours(x))] == [t.shape for t in tensors_of(theirs(x))]


def test_keyword_arguments(case):
    x, hx = case.data()
    ours, theirs = both(case)
    for a, b in zip(
        tensors_of(ours(hx=hx, input=x)), tensors_of(theirs(hx=hx, input=x)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_functional_call(case):
    x, hx = case.data()
    ours, theirs = both(case)
    torch.manual_seed(8)
    new = {n: torch.randn_like(p) for n, p in ours.named_parameters()}
    results = []
    for module in (ours, theirs):
        leaves = {n: t.clone().requires_grad_() for n, t in new.items()}
        values = {n: t * 2 for n, t in leaves.items()}  # as a hypernetwork gives them: no leaves
        loss_of(torch.func.functional_call(module, values, (x,), {"hx": hx})).backward()
        results.append({n: t.grad for n, t in leaves.items()})
        assert not gradients(module)
    assert_matches(*results)
    partly = {"weight_hh_l0": new["weight_hh_l0"]}
    a, b = (torch.func.functional_call(m, partly, (x, hx))[0].detach() for m in (ours, theirs))
    assert_matches({"output": a}, {"output": b})
    assert_matches(step(ours, x, hx), step(theirs, x, hx))  # its own again


def test_tied_weights(case):
    results = []
    for first, second in zip(both(case), both(case), strict=True):
        second.weight_hh_l0 = first.weight_hh_l0
        second.weight_hh_l0_reverse = first.weight_hh_l0
        x, hx = case.data()
        output, states = first(x, hx)
        loss_of(second(output[..., : case.I] + x, states)).backward()
        pair = nn.ModuleList([first, second])
        results.append(gradients(pair))
        assert len(results[-1]) == 2 * len(gradients(first)) - 2
        pair.double()  # which makes the list of weights anew
        assert second.weight_hh_l0_reverse is first.weight_hh_l0
        assert pickle.loads(pickle.dumps(pair))[1].weight_hh_l0_reverse.shape
    assert_matches(*results)


def test_containers(case):
    ours, theirs = (tagger(m) for m in both(case))
    results = []
    for model in (ours, theirs):
        output = model(numbers())
        output.square().sum().backward()
        results.append({"output": output.detach(), **gradients(model)})
        assert model[1:3](model[0](numbers())).shape == (6, 3, model[3].normalized_shape[0])
    assert_matches(*results)


def test_stacked_with_skips_in_a_module_list(case):
    results = []
    case = Case(**{**vars(case), "I": 6, "H": 3, "layers": 1, "proj": 0})
    for i in range(2):
        layers = nn.ModuleList([both(Case(**{**vars(case), "seed": s}))[i] for s in range(3)])
        x = case.data()[0].requires_grad_()
        out = x
        for layer in layers:
            out = out + layer(out)[0]
        out.square().sum().backward()
        results.append({"output": out.detach(), "dinput": x.grad, **gradients(layers)})
    assert_matches(*results)


def test_one_step_at_a_time(case):
    """As a policy or a sampler does it: T calls of one step equal one call of T."""
    case = Case(**{**vars(case), "bidirectional": False})
    module = case.module()
    expected = step(module, *case.data())

    def call(x, states):
        outputs = []
        for x_t in x.split(1):
            output, states = module(x_t, states)
            outputs.append(output)
        return torch.cat(outputs), states

    assert_matches(step(module, *case.data(), call=call), expected)


def test_reset_parameters_and_apply(case):
    ours, theirs = both(case)
    states = []
    for module in (ours, theirs):
        torch.manual_seed(4)
        module.reset_parameters()

        def orthogonal(m):
            for name, p in m.named_parameters():
                if "weight_hh" in name:
                    nn.init.orthogonal_(p)

        assert module.apply(orthogonal) is module
        states.append(dict(module.state_dict()))
    assert_matches(*states, rtol=0)
    assert_matches(step(ours, *case.data()), step(theirs, *case.data()))


def test_vector_of_parameters_and_back(case):
    ours, theirs = both(case)
    vector = nn.utils.parameters_to_vector(theirs.parameters()) * 1.5
    for module in (ours, theirs):
        nn.utils.vector_to_parameters(vector, module.parameters())  # views of one vector
    assert_matches(step(ours, *case.data()), step(theirs, *case.data()))
