"""One job of the user's Hydra application, as a trial composes it."""
