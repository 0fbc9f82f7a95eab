"""Hyperparameter search: each trial of Ray Tune is one job of a Hydra application.

`space` says what is searched, `searchers` and `schedulers` how; `trial` is the actor that runs one
trial after another, `trial_job` what it does for each, `reporter` sends metrics from within
Lightning's Trainer. `sweep` is checked before anything starts, `tuning` gives it to Ray, `run` does
it all and says what has come of it. `client` has
it run on a cluster, for a laptop.
"""
