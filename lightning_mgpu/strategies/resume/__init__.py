"""Go on with training as if it had not been interrupted."""
