"""Build objects from Hydra configs, with errors that name the config key."""
