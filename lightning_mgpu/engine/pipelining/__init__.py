"""A module cut into stages, with micro-batches streaming through.

Cutting: `trace`, `graph_cut`, `stage_builder`, `partition`, `measure`, `balance`, `cutter`.
Running: `arguments`, `origin`, `refused`, `splitter`, `microbatch`, `values`, `schedule`, `links`,
`shadow`, `memory`, `stage_work`, `passage`, `joining`, `output`, `tuning`; `recording` makes a
`timeline` of it. `pipeline` puts all together.
Checking: `trial` runs a few samples, `calm` and `held` keep that from having effects, `parity`,
`comparison` and `left_behind` compare; `assigned` looks at attributes before a call.
Foreseeing: `timer` and `ledger` measure stages, `simulate` tells what others would take.
"""
