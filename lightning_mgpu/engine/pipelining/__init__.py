"""A module cut into stages, with micro-batches streaming through.

Cutting: `trace`, `graph_cut`, `stage_builder`, `partition`, `measure`, `balance`, `cutter`.
Running: `arguments`, `microbatch`, `values`, `schedule`, `links`, `shadow`, `stage_work`,
`passage`, `output`, `tuning`; `recording` makes a `timeline` of it. `pipeline` puts all together.
Foreseeing: `timer` and `ledger` measure stages, `simulate` tells what others would take.
"""
