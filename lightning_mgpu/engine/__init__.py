"""Work on several devices of one process: torch and the standard library only.

`workers` run tasks on threads (`worker_thread`), in the caller's `context` and with `randomness` of
their own; `batch` splits and joins; `parameter_leaves` stand in for parameters by `entry_swap`;
`batch_norm` pools statistics and `autograd` makes one node of it all. `data_parallel` and
`pipeline` are made of these, and know nothing of each other.
"""
