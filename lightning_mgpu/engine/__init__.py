"""Work on several devices of one process: torch and the standard library only.

`slot` and `workers` run tasks on threads, in the caller's `context` and with `randomness` of their
own; `batch` splits and joins, `leaves` stand in for parameters by way of `patches`, `batch_norm`
pools statistics and `autograd` makes one node of it all. `replication` and `pipelining` are made of
these, and know nothing of each other.
"""
