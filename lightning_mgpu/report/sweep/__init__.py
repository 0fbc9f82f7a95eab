"""A sweep's report: its journal, read and drawn.

`journal` reads what `lightning_mgpu.ray.sweep.journal` has written, in the terms of `model`;
`axes`, `views`, `lanes` and `importance` say what is to be seen in it; `html` (plotly) and `png`
(matplotlib) draw that. `draw` of `command` does all of it.
"""
