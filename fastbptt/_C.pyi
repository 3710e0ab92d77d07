"""The compiled part: what of it Python calls."""

from collections.abc import Sequence

from torch import Tensor

def network(
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    weights: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    batch_sizes: Tensor | None,
    batch_first: bool,
    cell: str,
    dropout: float,
    k1: int,
    k2: int,
    last_only: bool,
    recompute: bool,
    resets: Tensor | None,
    kappa: Tensor | None,
    /,
) -> tuple[Tensor, Tensor, Tensor]: ...
def check_rnn_fwd(*arguments: object) -> None: ...
def check_rnn_bwd(*arguments: object) -> None: ...
def check_network_bwd(*arguments: object) -> None: ...
def check_rnn_jvp(*arguments: object) -> None: ...
def check_rnn_bwd_jvp(*arguments: object) -> None: ...
def check_rnn_bwd_apart(*arguments: object) -> None: ...
def check_rnn_jvp_steps(*arguments: object) -> None: ...
def check_rnn_bwd_jvp_steps(*arguments: object) -> None: ...
def autocast_weights(weights: Sequence[Tensor], input: Tensor, /) -> list[Tensor]: ...
def user_forward(
    cell: int,
    input: Tensor,
    w_ih: Tensor,
    w_hh: Tensor | None,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    initial: Sequence[Tensor | None],
    extras: Sequence[Tensor],
    resets: Tensor | None,
    batch_sizes: Tensor | None,
    direction: int,
    reset_to: Sequence[Tensor],
    keep: bool,
    /,
) -> tuple[list[Tensor], list[Tensor], Tensor | None, Tensor | None]: ...
def user_backward(
    *arguments: object,
) -> tuple[
    Tensor | None,
    Tensor | None,
    Tensor | None,
    Tensor | None,
    Tensor | None,
    list[Tensor | None],
    list[Tensor | None],
    list[Tensor | None],
]: ...
def read_user_arguments(
    gates: int, extra_names: Sequence[str], /, *arguments: object
) -> tuple[
    list[int],
    list[Tensor | None],
    list[Tensor | None],
    list[Tensor],
    list[int],
    list[Tensor],
    list[int],
]: ...
def user_cell_steps(call: int, goes_back: bool, /, *products: Tensor | None) -> int: ...
def are_few_rows(rows: int, numbers: int, /) -> bool: ...
def allows_tf32() -> bool: ...
def cpu_isa() -> str: ...
def cpu_isas() -> list[str]: ...
def set_cpu_isa(isa: str, /) -> None: ...
def cuda_built() -> bool: ...
def release_workspace() -> None: ...
def workspace_limit() -> int: ...
def set_workspace_limit(bytes: int, /) -> None: ...
def stack_limit() -> int: ...
def set_stack_limit(bytes: int, /) -> None: ...
