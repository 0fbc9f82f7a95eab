"""Hyperparameter search: each trial of Ray Tune is one job of a Hydra application.

`main` runs a sweep from its options to its results. The folders, each using those before it:

- `report` reads a journal and draws it. `space` says what is searched and for what.
- `job` is the user's application. `store` is what a sweep keeps on disk.
- `settings` checks the options of a sweep before anything starts. `search` draws values, stops
  trials early and ends the search.
- `trial` runs in the process of a trial, `driver` in the one that leads the sweep.
- `client` runs a sweep on a cluster for a machine that is no part of it.
"""
