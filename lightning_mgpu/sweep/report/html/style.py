"""Style of plotly's figures, and their texts about trials."""

import math
from html import escape
from typing import Any

import plotly.graph_objects as go

from lightning_mgpu.sweep.report.axes import Axis, shorten, text
from lightning_mgpu.sweep.report.model import SweepHistory, Trial

_GRID = "#e8eaed"
_HOVERED = 12  # values of a trial that are shown where the mouse is


def styled(figure: go.Figure, height: int, **layout: Any) -> go.Figure:
    """Apply the style common to all figures."""
    figure.update_layout(
        template="plotly_white",
        height=height,
        margin={"l": 64, "r": 20, "t": 36, "b": 52},
        font={"family": "system-ui, -apple-system, 'Segoe UI', sans-serif", "size": 13},
        legend={"orientation": "h", "x": 0, "y": 1.01, "yanchor": "bottom"},
        hoverlabel={"align": "left", "bgcolor": "white", "font": {"color": "#1f2328"}},
        hovermode="closest",
        showlegend=True,
    )
    figure.update_xaxes(gridcolor=_GRID, zeroline=False, automargin=True)
    figure.update_yaxes(gridcolor=_GRID, zeroline=False, automargin=True)
    figure.update_layout(**layout)
    return figure


def described(axis: Axis, **more: Any) -> dict[str, Any]:
    """Plotly's description of an axis."""
    found: dict[str, Any] = {"title": {"text": escape(shorten(axis.label, 40))}, **more}
    if axis.log:
        found["type"] = "log"
    if marks := axis.marks():
        found |= {"tickvals": [at for at, _ in marks], "ticktext": [escape(t) for _, t in marks]}
    if axis.limits is not None:
        found["range"] = [math.log10(at) if axis.log else at for at in axis.limits]
    return found


def about(sweep: SweepHistory, trial: Trial) -> str:
    """Describe a trial for the hover text."""
    value = sweep.value(trial)
    lines = [f"<b>trial {trial.number}</b>, {trial.status}"]
    if trial.reason:
        lines.append(escape(shorten(trial.reason, 80)))
    if value is not None:
        lines.append(f"{escape(sweep.metric)} = {value:.5g}")
    params = list(trial.params.items())
    lines += [f"{escape(name)} = {escape(shorten(text(v), 50))}" for name, v in params[:_HOVERED]]
    if len(params) > _HOVERED:
        lines.append(f"… and {len(params) - _HOVERED} more")
    return "<br>".join(lines)
