"""Refuse arguments that cannot be split into micro-batches."""

import torch

from lightning_mgpu.engine.pipeline.inputs.call_arguments import CallArguments
from lightning_mgpu.engine.pipeline.inputs.entries import tensors_of as tensors_in
from lightning_mgpu.engine.pipeline.inputs.origin import is_wrapped, storages, tensors_of
from lightning_mgpu.engine.pipeline.microbatch import SplitError


def check_kinds(call: CallArguments, whole: set[str]) -> None:
    """Refuse what cannot be taken apart.

    Args:
        call: The call.
        whole: Parameters of `forward` that go to every micro-batch whole.

    Raises:
        SplitError: Names the argument and says what to do instead.
    """
    for name, tensor in call.tensors.items():
        reason = is_wrapped(tensor)
        if reason == "functorch":
            raise SplitError(
                f"`{name}` is a tensor of `torch.func` (vmap, grad, jvp), which cannot be used"
                " in other threads. Call the module outside of the transformation, or use"
                " `strategy='dp'`, where each replica computes the whole step."
            )
        if reason is not None and argument_of(name) not in whole:
            raise SplitError(
                f"`{name}` is a {reason} tensor, which cannot be split by sample. Pass strided"
                f" tensors, or name `{argument_of(name)}` in `broadcast_args` if every sample"
                " needs all of it."
            )
    for name, value in call.objects.items():
        held = tensors_of(value)
        if held and argument_of(name) not in whole:
            raise SplitError(
                f"`{name}` is a `{type(value).__name__}`, which holds tensors ({held}) and"
                " would go to every micro-batch whole. Pass its tensors, or a dict or"
                f" dataclass of them; or name `{argument_of(name)}` in `broadcast_args`."
            )


def check_graphs(call: CallArguments, of_graphs: set[int], whole: set[str]) -> None:
    """Refuse tensors of batches of graphs, such as nodes and edges.

    Args:
        call: The call.
        of_graphs: The memory that they lie in.
        whole: Parameters of `forward` that go to every micro-batch whole.

    Raises:
        SplitError: Names the argument.
    """
    for name, tensor in call.tensors.items():
        if argument_of(name) not in whole and storages([tensor]) & of_graphs:
            raise SplitError(
                f"`{name}` of shape {tuple(tensor.shape)} belongs to a batch of graphs, whose"
                " rows are not samples. Split another `module`, which has an entry per graph,"
                " or use `strategy='dp'`, which splits by graphs."
            )


def check_pieces(call: CallArguments, whole: set[str]) -> None:
    """Refuse lists and batches of graphs whose tensors want a gradient.

    Args:
        call: The call.
        whole: Parameters of `forward` that go to every micro-batch whole.

    Raises:
        SplitError: Names the argument.
    """
    if not torch.is_grad_enabled():
        return
    for name, piece in call.pieces.items():
        if argument_of(name) not in whole and any(t.requires_grad for t in tensors_in(piece)):
            raise SplitError(
                f"`{name}` is a `{type(piece).__name__}` with an entry per sample, and tensors"
                " in it require gradients, which micro-batches do not send back. Stack or pad"
                " them into a tensor, or compute them within the split module."
            )


def argument_of(name: str) -> str:
    """The parameter of `forward` that a tensor's name begins with."""
    return name.partition("[")[0].partition(".")[0]
