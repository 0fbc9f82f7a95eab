"""A module computed in stages, with micro-batches streaming through.

Threads run the module's own `forward`, for one micro-batch after another (drawn in `traveller`).

Cutting: `observation` watches what `forward` calls, `measure` what that costs, `choice` and
`balance` deal it out, `cutter` puts that together.
Running: `arguments`, `origin`, `refused`, `splitter` and `microbatch` split a call, `given` hands
it to micro-batches. `traveller` takes one through the stages: `units` and `glue` notice where it
comes to another, `turns` let it in by `schedule`, `segments`, `stand_ins` and `position` keep its
graph apart, `recompute` and `memory` spare parts of it, `shadow` stands for parameters. `passage`
does so with all, forward and backward; `structure`, `joining` and `output` put together what they
return. `tuning` tries numbers of micro-batches; `recording` makes a `timeline`. `pipeline` is all
of it.
Checking: `trial` runs a few samples, `calm` and `held` keep that from having effects, `parity`,
`comparison` and `left_behind` compare; `assigned` looks at attributes before a call.
Foreseeing: `simulate` tells what other numbers of stages would take.
"""
