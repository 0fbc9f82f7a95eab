"""From Hydra configs to objects, with checks whose errors name the config key."""
