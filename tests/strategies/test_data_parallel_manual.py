"""Manual optimisation under `dp`, against one device."""

from typing import Any

import boring
import pytest
import torch
from torch import Tensor, nn

from lightning_mgpu.engine.workers import LockstepError


class Adversarial(boring.Classifier):
    """Two networks against each other, as in a GAN."""

    def __init__(self, clip: str = "", use_closures: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.clip, self.use_closures = clip, use_closures
        torch.manual_seed(0)
        self.critic = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
        self.seen: list[float] = []

    def _generator_loss(self, x: Tensor) -> Tensor:
        return nn.functional.softplus(-self.critic(self(x))).mean()

    def _critic_loss(self, x: Tensor, y: Tensor) -> Tensor:
        real = self.critic(nn.functional.one_hot(y, 3).double())
        fake = self.critic(self(x).detach())
        return (nn.functional.softplus(-real) + nn.functional.softplus(fake)).mean()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        generator, critic = self.optimizers()
        for optimizer, compute in (
            (generator, lambda: self._generator_loss(x)),
            (critic, lambda: self._critic_loss(x, y)),
        ):
            with optimizer.toggle_model():
                self._optimise(optimizer, compute)
        for scheduler in self.lr_schedulers():
            scheduler.step()

    def _optimise(self, optimizer: Any, compute: Any) -> None:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = compute()
            self.manual_backward(loss)
            return loss

        if self.use_closures:
            optimizer.step(closure=closure)
            return
        self.log("loss", closure())
        if self.clip == "lightning":
            self.clip_gradients(optimizer, gradient_clip_val=0.05)
        elif self.clip == "torch":
            nn.utils.clip_grad_norm_(self.parameters(), 0.05)
            norms = [p.grad.norm() for p in self.parameters() if p.grad is not None]
            self.log("norm", torch.stack(norms).norm())
        optimizer.step()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self._generator_loss(batch[0]))

    def configure_optimizers(self) -> Any:
        optimizers = [
            torch.optim.Adam(self.net.parameters(), lr=0.02),
            torch.optim.SGD(self.critic.parameters(), lr=0.1),
        ]
        return optimizers, [torch.optim.lr_scheduler.StepLR(o, 2, gamma=0.9) for o in optimizers]


@pytest.mark.parametrize("devices", [2, 3])
@pytest.mark.parametrize(
    "kwargs",
    [{}, {"clip": "lightning"}, {"clip": "torch"}, {"use_closures": True}],
    ids=["plain", "clip_gradients", "clip_grad_norm_", "closures"],
)
def test_adversarial_networks_equal_one_device(devices: int, kwargs: dict[str, Any]) -> None:
    alone, parallel = Adversarial(**kwargs), Adversarial(**kwargs)
    one = boring.trainer("auto", 1, max_epochs=2)
    two = boring.trainer("dp", devices, max_epochs=2)
    one.fit(alone, boring.Blobs(10, 25))
    two.fit(parallel, boring.Blobs(10, 25))
    boring.assert_same_weights(alone, parallel)
    assert two.global_step == one.global_step
    torch.testing.assert_close(dict(two.callback_metrics), dict(one.callback_metrics))


def test_hooks_around_manual_backward_run_once() -> None:
    calls: list[str] = []

    class Model(Adversarial):
        def on_before_backward(self, loss: Tensor) -> None:
            calls.append("before")

        def on_after_backward(self) -> None:
            assert any(parameter.grad is not None for parameter in self.parameters())
            calls.append("after")

        def on_before_zero_grad(self, optimizer: Any) -> None:
            calls.append("zero")

    boring.trainer("dp", 2, limit_train_batches=1).fit(Model(), boring.Blobs())
    assert calls.count("before") == calls.count("after") == 2


def test_accumulated_manual_backward() -> None:
    class Model(boring.Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            self.manual_backward(self._loss(batch), retain_graph=False)
            if batch_idx % 2:
                optimizer.step()
                optimizer.zero_grad()

    alone, parallel = Model(), Model()
    boring.trainer("auto", 1).fit(alone, boring.Blobs(10, 48))
    boring.trainer("dp", 2).fit(parallel, boring.Blobs(10, 48))
    boring.assert_same_weights(alone, parallel)


def test_replicas_out_of_step_are_refused() -> None:
    class Model(Adversarial):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            if batch[1][0] == 0:  # the first shard only
                super().training_step(batch, batch_idx)

    with pytest.raises(LockstepError, match=r"Task 0 calls .* but task 1 has ended"):
        boring.trainer("dp", 2).fit(Model(), boring.Blobs(4, 4))


def test_replicas_that_call_different_things_are_refused() -> None:
    class Model(boring.Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            if batch[1][0] == 0:
                self.optimizers().zero_grad()
            self.manual_backward(self._loss(batch))

    with pytest.raises(LockstepError, match=r"`optimizer.zero_grad` \(task 0\), `manual_backward`"):
        boring.trainer("dp", 2).fit(Model(), boring.Blobs(4, 4))


@pytest.mark.parametrize("how", ["loss.backward", "p.grad ="])
def test_gradients_that_others_would_not_see_are_refused(how: str) -> None:
    class Model(boring.Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            if how == "loss.backward":
                self._loss(batch).backward()
            else:
                self.manual_backward(self._loss(batch))
                for parameter in self.parameters():
                    parameter.grad = parameter.grad * 0.5
            optimizer.step()

    with pytest.raises(RuntimeError, match=r"Use `self\.manual_backward\(loss\)`.*in place"):
        boring.trainer("dp", 2).fit(Model(), boring.Blobs())


def test_torch_optimizer_and_scheduler_with_a_metric() -> None:
    class Model(boring.Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            loss = self._loss(batch)
            self.manual_backward(loss)
            optimizer.optimizer.step()
            self.lr_schedulers().step(loss.detach())

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
            return [optimizer], [{"scheduler": schedule, "monitor": "val_loss"}]

    alone, parallel = Model(), Model()
    boring.trainer("auto", 1).fit(alone, boring.Blobs(10, 48))
    boring.trainer("dp", 2).fit(parallel, boring.Blobs(10, 48))
    boring.assert_same_weights(alone, parallel)


def test_error_in_what_is_done_for_all_reaches_the_step() -> None:
    class Model(Adversarial):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            raise ZeroDivisionError("in the hook")

    with pytest.raises(ZeroDivisionError, match="in the hook"):
        boring.trainer("dp", 2).fit(Model(), boring.Blobs())
