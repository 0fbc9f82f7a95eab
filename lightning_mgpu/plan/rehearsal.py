"""Run on one device whose steps are measured."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_mgpu.engine.batch import leaves
from lightning_mgpu.engine.pipeline.inputs.splitter import Splitter
from lightning_mgpu.engine.pipeline.partition.choice import PartitionError, canonical
from lightning_mgpu.plan.bench import Bench, NothingMeasuredError
from lightning_mgpu.plan.options import Options
from lightning_mgpu.plan.profile import Profile, Weights
from lightning_mgpu.strategies import PipelineStrategy
from lightning_mgpu.strategies.stages.placement import ForwardOverride
from lightning_mgpu.strategies.stages.split_module import find_module, own_stages


class Rehearsal(PipelineStrategy):
    """A `PipelineStrategy` on one device that measures training steps and then stops.

    Its arguments are those of `PipelineStrategy`, of which it heeds those that say what is cut and
    how the batch is split. Give it an `Options` by `prepare` before training.
    """

    _bench: Bench | None = None
    _profile: Profile | None = None
    _starts: list[str] | None = None

    def prepare(self, options: Options) -> None:
        """Set the options to plan for."""
        self._options = options
        self._trace_dir = None  # there is no timetable to be drawn

    def profile(self) -> Profile:
        """Measurements, once training is over.

        Raises:
            NothingMeasuredError: It was over too soon.
        """
        if self._profile is None:
            raise NothingMeasuredError(
                "Training ended before everything had been measured. Give it more batches."
            )
        return self._profile

    @override
    def model_to_device(self) -> None:
        model = self.lightning_module
        assert model is not None
        model.to(self.root_device)
        name, module = find_module(model, self._module)
        made = own_stages(model)
        self._prefix = f"{name}." if name and made is None else ""
        self._override = ForwardOverride(module)
        self._bench = Bench(
            module,
            self._override.plain,
            made,
            self.root_device,
            self._options.threads,
            Splitter(self._split_args, self._broadcast_args),
            lambda: self._step_batch,
        )
        self._override.install(self._forward)

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        assert self._bench is not None
        if self._bench.names and self._starts is None:
            self._starts = self._cuts(self._bench.names)
        if not self._bench.step():
            self._profile = self._measured(self._bench)
            assert self.lightning_module is not None
            self.lightning_module.trainer.should_stop = True
        return super().training_step(*args, **kwargs)

    @override
    def _release(self) -> None:
        super()._release()
        if self._bench is not None:
            self._bench.close()
        self._bench = None

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        assert self._bench is not None
        stages = max(self._options.stages)
        return self._bench.call(args, kwargs, self._options.chunks, stages)

    def _measured(self, bench: Bench) -> Profile:
        assert self.lightning_module is not None
        state = _state_bytes(self.optimizers)
        inside = {id(t) for tensors in bench.tensors for t in tensors.values()}
        model = self.lightning_module
        others = [t for t in (*model.parameters(), *model.buffers()) if id(t) not in inside]
        return Profile(
            names=self._in_full(bench.names),
            weights=[_weights(tensors.values(), state) for tensors in bench.tensors],
            rest=_weights(others, state),
            batch=bench.batch,
            least=bench.least,
            samples=bench.samples(),
            split_at=self._starts or [],
            tied=bench.tied,
        )

    def _cuts(self, names: Sequence[str]) -> list[str]:
        """Layers at which the user wants stages to begin.

        Raises:
            PartitionError: At something else than a layer.
        """
        assert self._override is not None
        starts = []
        for entry in self._split_at or ():
            cut = canonical(self._override.module, entry.removeprefix(self._prefix))
            inside = [name for name in names[1:] if f"{name}.".startswith(f"{cut}.")]
            if not inside:
                raise PartitionError(
                    f"`split_at={entry!r}`: stages can begin at {', '.join(names[1:]) or 'none'}."
                )
            starts.append(inside[0])
        return self._in_full(starts)

    def _in_full(self, names: Sequence[str]) -> list[str]:
        """Names of layers as the LightningModule knows them."""
        return [self._prefix + name for name in names]


def _weights(tensors: Iterable[Tensor], state: Mapping[int, int]) -> Weights:
    tensors = list(tensors)
    return Weights(
        parameters=sum(t.nbytes for t in tensors),
        gradients=sum(t.nbytes for t in tensors if isinstance(t, nn.Parameter) and t.requires_grad),
        state=sum(state.get(id(t), 0) for t in tensors),
    )


def _state_bytes(optimizers: Iterable[Optimizer]) -> dict[int, int]:
    """Bytes of optimizer state per parameter, by its `id`."""
    return {
        id(parameter): sum(leaf.nbytes for _, leaf in leaves(state) if isinstance(leaf, Tensor))
        for optimizer in optimizers
        for parameter, state in optimizer.state.items()
    }
