"""The same layers in ONNX Runtime, which knows each of them as one operator: inference alone.

Its threads are a pool of its own, as many as torch has. It takes the processor's best instruction
set, whatever the others are held to.
"""

from __future__ import annotations

import importlib.metadata

import torch
from torch import Tensor

from ..common.isa import held
from ..common.workload import Results, Workload

LABEL = "ONNX Runtime"
INSTALL = "pip install 'fastbptt[bench-onnx]'"
_OPSET, _IR = 17, 8  # of 2022: what every ONNX Runtime of today reads

# By the cell: the operator, its attributes, and for each of its gates torch's number of it.
_OPERATORS: dict[str, tuple[str, dict[str, int], tuple[int, ...]]] = {
    "rnn": ("RNN", {}, (0,)),
    "gru": ("GRU", {"linear_before_reset": 1}, (1, 0, 2)),  # z r h of torch's r z n
    "lstm": ("LSTM", {}, (0, 3, 1, 2)),  # i o f c of torch's i f g o
}


def unavailable() -> str | None:
    """Why ONNX Runtime cannot be measured here, or None."""
    if isa := held():
        return f"ONNX Runtime cannot be held to {isa}"
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        return f"ONNX Runtime cannot be imported ({error}): {INSTALL}"
    return None


def facts() -> dict[str, str]:
    """Its version."""
    return {"onnxruntime": importlib.metadata.version("onnxruntime")}


def model(work: Workload) -> bytes:
    """The layer as an ONNX model: from ``x`` to ``output``, ``h_n`` and of an LSTM ``c_n``."""
    from onnx import TensorProto, checker, helper, numpy_helper

    operator, attributes, order = _OPERATORS[work.row.cell]

    def gates(name: str) -> Tensor:
        parts = work.weights[f"{name}_l0"].chunk(len(order))
        return torch.cat([parts[gate] for gate in order])

    weights = {
        "w": gates("weight_ih"),
        "r": gates("weight_hh"),
        "b": torch.cat([gates("bias_ih"), gates("bias_hh")]),
    }
    states = ["h_n", "c_n"] if work.row.cell == "lstm" else ["h_n"]
    attributes = attributes | {"hidden_size": work.row.H}
    nodes = [
        helper.make_node(operator, ["x", *weights], ["directions", *states], **attributes),
        helper.make_node("Squeeze", ["directions", "axis"], ["output"]),  # of the directions: one
    ]
    constants = [
        numpy_helper.from_array(weight.unsqueeze(0).numpy(), name)
        for name, weight in weights.items()
    ]
    constants.append(helper.make_tensor("axis", TensorProto.INT64, [1], [1]))
    values = {"x": ["T", "B", work.row.H], "output": ["T", "B", work.row.H]}
    values |= {state: [1, "B", work.row.H] for state in states}
    described = {
        name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in values.items()
    }
    x = described.pop("x")
    graph = helper.make_graph(nodes, "layer", [x], list(described.values()), constants)
    opset = helper.make_opsetid("", _OPSET)
    made = helper.make_model(graph, opset_imports=[opset], ir_version=_IR)
    checker.check_model(made)
    return made.SerializeToString()


class SessionStep:
    """A workload's forward pass; as elsewhere, the outputs die within the timed call."""

    def __init__(self, work: Workload) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        # Within a call its threads spin as ever; after it they would take the next step's cores.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        providers = ["CPUExecutionProvider"]
        self.session = onnxruntime.InferenceSession(model(work), options, providers=providers)
        self.names = [output.name for output in self.session.get_outputs()]
        self.feed = {"x": work.input.numpy()}

    def clear(self) -> None:
        pass

    def run(self) -> list:
        return self.session.run(None, self.feed)

    def results(self) -> Results:
        """As workload.ModuleStep.results."""
        return dict(zip(self.names, map(torch.from_numpy, self.run()), strict=True))
