"""How `dp` runs the hooks of a LightningModule on replicas: steps, logs, metrics, checks."""
