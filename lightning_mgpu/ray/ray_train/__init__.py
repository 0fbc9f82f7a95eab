"""Ray Train's `TorchTrainer`: `fit` for our configs, and our strategies in its workers."""
