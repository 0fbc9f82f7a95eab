"""Train the same small runs under any strategy and save what came out.

Run by the tests: ``ddp_cases.py STRATEGY OUTPUT NODES [CASE ...]`` alone, under ``torchrun``
or once per "node", on two processes in all (of two stages each for a pipeline).
"""

import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_only

sys.path.insert(0, str(Path(__file__).parent.parent))

import boring

import lightning_mgpu  # noqa: F401

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sgd": ({}, {}),
    "adam": ({"optimizer": "adam"}, {}),
    "accumulation": ({"optimizer": "adam"}, {"accumulate_grad_batches": 2}),
    "clipping": ({}, {"gradient_clip_val": 0.1}),
    "scheduler": ({"optimizer": "adam", "scheduler": True}, {}),
}


def run(strategy: str, case: str, directory: Path, **trainer: Any) -> dict[str, Any]:
    """Weights, metrics and callback state after two epochs on two processes, seed 5."""
    model_kwargs, trainer_kwargs = CASES[case]
    boring.pl.seed_everything(5, verbose=False)
    model = boring.Classifier(**model_kwargs)
    checkpoint = ModelCheckpoint(directory / case, monitor="val_loss", filename="{step}")
    stopping = EarlyStopping("val_loss", patience=3)
    trained = boring.trainer(
        strategy,
        max_epochs=2,
        callbacks=[checkpoint, stopping],
        enable_checkpointing=True,
        **{**trainer_kwargs, **trainer},
    )
    trained.fit(model, datamodule=boring.Blobs())
    return {
        "weights": model.state_dict(),
        "metrics": dict(trained.callback_metrics),
        "best score": checkpoint.best_model_score,
        "best path": Path(checkpoint.best_model_path).name,
        "stopping": stopping.state_dict(),
        "steps": trained.global_step,
        "world size": trained.world_size,
        "node rank": trained.node_rank,
    }


if __name__ == "__main__":
    strategy, output, num_nodes, *cases = sys.argv[1:]
    devices = (4 if strategy == "pipeline_ddp" else 2) // int(num_nodes)
    results = {
        case: run(strategy, case, Path(output).parent, num_nodes=int(num_nodes), devices=devices)
        for case in cases or CASES
    }
    if rank_zero_only.rank == 0:
        torch.save(results, output)
