"""Work on several devices of one process: torch and the standard library only.

Imports climb one way: `context`, `randomness` and `batch` know nothing of each other, `workers`
runs tasks in a carried context, `structure` and `batch_norm` know modules, and `replicas` puts them
together.

For the pipeline, `trace` records a module, `graph_cut` and `cutter` make a `partition` of it,
`passage` takes micro-batches through its stages, and `pipeline` stands for the module's `forward`.
"""
