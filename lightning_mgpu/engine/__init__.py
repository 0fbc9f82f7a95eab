"""Work on several devices of one process: torch and the standard library only.

Imports climb one way. `context`, `randomness`, `batch`, `batch_norm` and `autograd` know of nothing
else; `slot` and `workers` run tasks on threads; `structure`, `remap` and `leaves` take modules
apart, from which `master` and `copies` make the `replicas`; `loss` puts both sides together.

For the pipeline, `trace` records a module, `graph_cut` and `cutter` make a `partition` of it,
`passage` takes micro-batches through its stages, and `pipeline` stands for the module's `forward`.
"""
