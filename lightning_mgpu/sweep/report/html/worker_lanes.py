"""Trials on the workers that ran them."""

import plotly.graph_objects as go

from lightning_mgpu.sweep.report.html.style import about, styled
from lightning_mgpu.sweep.report.lanes import TrialBar, time_unit, timeline
from lightning_mgpu.sweep.report.model import SweepHistory
from lightning_mgpu.sweep.report.views import COLOURS

_QUIET = "#5b6470"
_INK = {"stopped": "#1f2328", "paused": "#1f2328"}  # where white could not be read


def workers(sweep: SweepHistory) -> go.Figure | None:
    """A bar for each stretch of a trial; `None` if none has started."""
    found = timeline(sweep)
    if not found.bars:
        return None
    unit, seconds = time_unit(found.end)
    figure = go.Figure()
    for outcome in COLOURS:
        _add(figure, sweep, [bar for bar in found.bars if bar.outcome == outcome], unit, seconds)
    for moment in found.resumed:
        figure.add_vline(
            moment / seconds,
            line={"dash": "dot", "color": _QUIET, "width": 1.5},
            annotation={"text": "resumed", "font": {"size": 11, "color": _QUIET}},
            annotation_position="top right",
            annotation_yanchor="bottom",
        )
    lanes = list(range(len(found.lanes)))
    styled(figure, 150 + 34 * len(lanes), barmode="overlay")
    figure.update_layout(uniformtext={"minsize": 9, "mode": "hide"}, legend={"y": 1.04})
    figure.update_xaxes(title={"text": unit}, range=[0, (found.end or 1) / seconds * 1.005])
    figure.update_yaxes(
        tickvals=lanes, ticktext=found.lanes, autorange="reversed", showgrid=False, fixedrange=True
    )
    return figure


def _add(
    figure: go.Figure, sweep: SweepHistory, bars: list[TrialBar], unit: str, seconds: float
) -> None:
    """Add the bars of one outcome."""
    if not bars:
        return
    outcome = bars[0].outcome
    figure.add_bar(
        orientation="h",
        name=outcome,
        width=0.82,  # or it depends on how many lanes have such a bar
        y=[bar.lane for bar in bars],
        base=[bar.start / seconds for bar in bars],
        x=[(bar.end - bar.start) / seconds for bar in bars],
        text=[str(bar.trial.number) for bar in bars],
        textposition="inside",
        insidetextanchor="middle",
        textangle=0,
        textfont={"color": _INK.get(outcome, "white")},
        marker={"color": COLOURS[outcome], "line": {"color": "white", "width": 1}},
        customdata=[about(sweep, bar.trial) for bar in bars],
        hovertemplate=(
            f"%{{customdata}}<br>%{{x:.3g}} {unit} from %{{base:.3g}} {unit}<extra></extra>"
        ),
    )
