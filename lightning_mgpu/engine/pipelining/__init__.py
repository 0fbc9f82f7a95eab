"""A module cut into stages, with micro-batches streaming through.

Cutting: `trace`, `graph_cut`, `stage_builder`, `partition`, `measure`, `balance`, `cutter`.
Running: `arguments`, `microbatch`, `values`, `schedule`, `links`, `shadow`, `passage`, `tuning`.
`pipeline` puts both together.
"""
