"""Settings of torch that a worker copies."""

from dataclasses import dataclass

import torch
import torch.multiprocessing

_CUDNN_FLAGS = ("enabled", "benchmark", "deterministic", "allow_tf32")


@dataclass(frozen=True)
class TorchState:
    """Settings for all tensors of a process."""

    default_dtype: torch.dtype
    default_device: str
    deterministic: tuple[bool, bool]
    cudnn: dict[str, bool]
    sharing_strategy: str
    matmul_precision: str

    @classmethod
    def capture(cls) -> "TorchState":
        """The settings of this process."""
        return cls(
            default_dtype=torch.get_default_dtype(),
            # Without an index: each rank has a current device of its own.
            default_device=torch.get_default_device().type,
            deterministic=(
                torch.are_deterministic_algorithms_enabled(),
                torch.is_deterministic_algorithms_warn_only_enabled(),
            ),
            cudnn={name: getattr(torch.backends.cudnn, name) for name in _CUDNN_FLAGS},
            sharing_strategy=torch.multiprocessing.get_sharing_strategy(),  # type: ignore[no-untyped-call]
            matmul_precision=torch.get_float32_matmul_precision(),
        )

    def apply(self, threads: int) -> None:
        """Apply the settings to this process, with so many intra-op threads."""
        torch.set_num_threads(threads)
        torch.set_default_dtype(self.default_dtype)
        # Setting the CPU, too, would slow down every tensor factory from then on.
        # torch 2.6 cannot tell its default device once it has been set to None.
        if torch.get_default_device().type != self.default_device:
            torch.set_default_device(None if self.default_device == "cpu" else self.default_device)
        torch.use_deterministic_algorithms(self.deterministic[0], warn_only=self.deterministic[1])
        for name, value in self.cudnn.items():
            setattr(torch.backends.cudnn, name, value)
        set_sharing = torch.multiprocessing.set_sharing_strategy
        set_sharing(self.sharing_strategy)  # type: ignore[no-untyped-call]
        torch.set_float32_matmul_precision(self.matmul_precision)


def release_accelerator_memory() -> None:
    """Give memory that is cached and unused back to the devices."""
    torch.cuda.empty_cache()  # nothing where CUDA is not in use
