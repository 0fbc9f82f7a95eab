"""Run hooks of a LightningModule on the replicas of `dp`: steps, logs, metrics, checks."""
