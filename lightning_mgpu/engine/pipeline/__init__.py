"""Compute a module in stages, with several micro-batches in flight.

Threads run the module's own `forward`, for one micro-batch after another (drawn in
`runtime.traveller`). `pipeline` stands for that `forward` and uses the folders in this order:

- `partition` watches what one call does and decides which stage each submodule belongs to.
- `inputs` split the arguments of a call into micro-batches, `outputs` join what these return.
- `runtime` takes the micro-batches through the stages, forward and backward; `profile` records it.
- `check` compares a few samples as one micro-batch and as two, on the first batch.
"""
