"""rsl_rl: its recurrent model in rollouts and updates, and what its exporters make of it."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("rsl_rl")

from rsl_rl.models import RNNModel
from rsl_rl.utils import split_and_pad_trajectories
from tensordict import TensorDict

import fastbptt
from clients.swap import assert_same, assert_trains_alike, converted

every_cell = pytest.mark.parametrize("cell", ["lstm", "gru"])
T, B, I, A = 9, 3, 4, 2


def make_models(cell: str) -> tuple[RNNModel, RNNModel]:
    observed = TensorDict({"policy": torch.zeros(B, I)}, [B])
    theirs = RNNModel(
        observed, {"actor": ["policy"]}, "actor", A, [8], rnn_type=cell, rnn_hidden_dim=6,
        rnn_num_layers=2,
    )  # fmt: skip
    return converted(theirs), theirs


def observations(*shape: int) -> TensorDict:
    return TensorDict({"policy": torch.randn(*shape, I)}, shape)


@every_cell
def test_rollout(cell):
    """Step by step, with environments that end and are reset."""
    ours, theirs = make_models(cell)
    with torch.no_grad():
        for _ in range(T):
            observed, dones = observations(B), torch.rand(B) < 0.3
            assert_same(ours(observed), theirs(observed))
            assert_same(ours.get_hidden_state(), theirs.get_hidden_state())
            for model in (ours, theirs):
                model.reset(dones)


@every_cell
def test_update(cell):
    """On trajectories cut at the ends of episodes and padded, from the states stored for them."""
    ours, theirs = make_models(cell)
    dones = (torch.rand(T, B, 1) < 0.3).byte()
    padded, masks = split_and_pad_trajectories(observations(T, B), dones)
    states = [torch.randn(2, masks.shape[1], 6) for _ in range(2 if cell == "lstm" else 1)]
    states = tuple(states) if cell == "lstm" else states[0]
    target = torch.randn(T, B, A)

    def loss(model: RNNModel) -> torch.Tensor:
        return (model(padded, masks=masks, hidden_state=states) - target).square().mean()

    assert_trains_alike(ours, theirs, loss)


@every_cell
@pytest.mark.parametrize("reverted", [False, True])
def test_as_jit(cell, reverted, tmp_path):
    """As its runner exports. A file of the reverted model is one that needs no fastbptt to run."""
    ours, theirs = (model.as_jit() for model in make_models(cell))
    observed = torch.randn(T, 1, I)
    with torch.no_grad():
        for x in observed:
            assert_same(ours(x), theirs(x))
        exported = fastbptt.revert(ours) if reverted else ours
        torch.jit.script(exported).save(tmp_path / "policy.pt")
        scripted = torch.jit.load(tmp_path / "policy.pt")
        assert ("fastbptt::" in str(scripted.inlined_graph)) != reverted
        for model in (scripted, theirs):
            model.reset()
        for x in observed:
            assert_same(scripted(x), theirs(x))


@every_cell
@pytest.mark.parametrize("dynamo", [False, True])
def test_as_onnx(cell, dynamo, tmp_path):
    """As its runner exports: the file computes what torch's does, with ONNX's own operator."""
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    results = []
    for name, model in zip(("ours", "theirs"), make_models(cell), strict=True):
        exported, path = model.as_onnx(), tmp_path / f"{name}.onnx"
        inputs = exported.get_dummy_inputs()
        torch.onnx.export(
            exported.eval(), inputs, path, export_params=True, opset_version=18, verbose=False,
            input_names=exported.input_names, output_names=exported.output_names,
            dynamo=dynamo,
        )  # fmt: skip
        assert cell.upper() in {node.op_type for node in onnx.load(path).graph.node}
        session = onnxruntime.InferenceSession(path)
        generator = torch.Generator().manual_seed(1)
        feed = {
            name: torch.randn(x.shape, generator=generator).numpy()
            for name, x in zip(exported.input_names, inputs, strict=True)
        }
        results.append([torch.from_numpy(each) for each in session.run(None, feed)])
    assert_same(*results)
