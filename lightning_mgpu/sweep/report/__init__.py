"""Report of a sweep: read its journal and draw it.

`reader` reads what `lightning_mgpu.sweep.store.journal` has written, in the terms of `model`;
`axes`, `views`, `lanes` and `importance` say what is to be seen in it; `html` (plotly) and `png`
(matplotlib) draw that; `draw` does all of it.
"""
