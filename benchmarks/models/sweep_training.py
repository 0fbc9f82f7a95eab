"""The training of one trial: an epoch of digits."""


def fit(lr: float, output: str) -> float:
    """Train, and return the validation loss."""
    import torch
    from lightning.pytorch import Trainer

    from lightning_mgpu.demo.data import Digits
    from lightning_mgpu.demo.lenet import LeNet

    torch.set_num_threads(1)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        default_root_dir=output,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(LeNet(lr=lr, l1=16, l2=16, channels=[4, 8]), datamodule=Digits())
    return float(trainer.callback_metrics["val_loss"])
