"""Hyperparameter search with Ray Tune: ``hydra/sweeper=ray_tune``.

Hydra imports this package at the start of every application on the machine, so nothing here imports
more than Hydra itself and the few lines that register our strategies; the search lies in
`lightning_mgpu.sweep`.
"""
