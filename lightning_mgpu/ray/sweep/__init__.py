"""Hyperparameter search: each trial of Ray Tune is one job of a Hydra application.

`space` says what is searched, `searchers` and `schedulers` how; `trial` runs one job in an actor
that serves many, `reporter` sends its metrics from within Lightning's Trainer, `sweep` puts them
together.
"""
