"""Refuse arguments that cannot be split into micro-batches."""

from lightning_mgpu.engine.pipelining.arguments import Call
from lightning_mgpu.engine.pipelining.microbatch import SplitError
from lightning_mgpu.engine.pipelining.origin import is_wrapped, storages, tensors_of

__all__: list[str] = []


def check_kinds(call: Call, whole: set[str]) -> None:
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
                f"`{name}` is a tensor of `torch.func` (vmap, grad, jvp), which cannot go to other"
                " threads. Call the module outside of the transformation, or take"
                " `strategy='dp'`, where each replica computes the step whole."
            )
        if reason is not None and argument_of(name) not in whole:
            raise SplitError(
                f"`{name}` is a {reason} tensor, which cannot be split by sample. Hand on strided"
                f" tensors, or name `{argument_of(name)}` in `broadcast_args` if every sample needs"
                " all of it."
            )
    for name, value in call.objects.items():
        held = tensors_of(value)
        if held and argument_of(name) not in whole:
            raise SplitError(
                f"`{name}` is a `{type(value).__name__}`, which holds tensors ({held}) and would"
                " go to every micro-batch whole. Hand on its tensors, or a dict or dataclass of"
                f" them; or name `{argument_of(name)}` in `broadcast_args`."
            )


def check_graphs(call: Call, of_graphs: set[int], whole: set[str]) -> None:
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
                f"`{name}` of shape {tuple(tensor.shape)} belongs to a batch of graphs, whose rows"
                " are no samples. Cut another `module`, which has an entry per graph, or take"
                " `strategy='dp'`, which splits by graphs."
            )


def check_entries(call: Call, size: int | None, whole: set[str]) -> None:
    """Refuse lists of tensors that have an entry per sample, such as images of different sizes.

    Args:
        call: The call.
        size: Samples in the step's batch, as far as known.
        whole: Parameters of `forward` that go to every micro-batch whole.

    Raises:
        SplitError: Names the argument.
    """
    for name, value in call.sequences.items():
        if len(value) != size or size == 1 or argument_of(name) in whole:
            continue
        inner = [t for n, t in call.tensors.items() if n.startswith(f"{name}[")]
        if inner and any(not t.dim() or t.shape[0] != size for t in inner):
            raise SplitError(
                f"`{name}` is a list with an entry per sample ({size}), which is not dealt out to"
                " micro-batches. Make it a tensor, or cut another `module`, whose arguments are"
                " tensors, such as a backbone or a head."
            )


def check_lists(call: Call, size: int, whole: set[str]) -> None:
    """Refuse lists that might have an entry per sample.

    Args:
        call: The call.
        size: Samples in the batch.
        whole: Parameters of `forward` that go to every micro-batch whole.

    Raises:
        SplitError: Names the argument.
    """
    for name, value in call.lists.items():
        if len(value) == size > 1 and argument_of(name) not in whole:
            raise SplitError(
                f"`{name}` is a list as long as the batch ({size}), and lists are not split. Make"
                f" it a tensor, or name `{argument_of(name)}` in `broadcast_args`."
            )


def argument_of(name: str) -> str:
    """The parameter of `forward` that a tensor's name begins with."""
    return name.partition("[")[0].partition(".")[0]
