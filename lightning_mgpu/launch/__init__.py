"""Persistent worker processes: start them once, run one function on every rank, many times.

Rank 0 is the calling process itself; ranks 1..n are clean Python processes that live on between
launches. This package knows torch and cloudpickle and nothing of Lightning, so that every
multi-process strategy can share it: `pool` has the workers, `rank` what each of them is told,
`errors` what may come of it. What the driver of a sweep needs of it (`errors`, `pickler`, `state`)
imports no torch.
"""
