"""The command ``python -m lightning_mgpu``: help, modes, checkpoints, signals."""
