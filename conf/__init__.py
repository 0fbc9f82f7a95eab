"""Hydra configs; installed as `lightning_mgpu.conf`."""
