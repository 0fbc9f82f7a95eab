"""Ray Train's `TorchTrainer`: its `fit` for our configs, and our strategies in its workers."""
