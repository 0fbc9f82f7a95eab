"""Bar chart: epochs trained and epochs saved by early stopping, per trial."""

import plotly.graph_objects as go

from lightning_mgpu.sweep.report.html.style import about, styled
from lightning_mgpu.sweep.report.model import STATUSES, SweepHistory
from lightning_mgpu.sweep.report.views import COLOURS, longest_first

_NUMBERS = 40  # of trials; where there are more, some are left out


def epochs(sweep: SweepHistory) -> go.Figure | None:
    """Draw epochs trained and saved per trial; `None` without epochs to show."""
    if not sweep.has_epochs or sweep.longest <= 1:
        return None
    order = {trial.number: place for place, trial in enumerate(longest_first(sweep))}
    figure = go.Figure()
    _trained(figure, sweep, order)
    _saved(figure, sweep, order)
    styled(figure, 320, barmode="stack", bargap=0.15, yaxis={"title": {"text": "epochs"}})
    figure.update_layout(legend={"traceorder": "normal"})
    shown = list(order)[:: 1 if len(order) <= _NUMBERS else len(order) // (_NUMBERS // 2)]
    figure.update_xaxes(
        title={"text": "trial, the longest first"},
        tickvals=[order[number] for number in shown],
        ticktext=[str(number) for number in shown],
        tickangle=0,
        showgrid=False,
    )
    return figure


def _trained(figure: go.Figure, sweep: SweepHistory, order: dict[int, int]) -> None:
    for status in STATUSES:
        members = [t for t in sweep.trials if t.number in order and t.status == status]
        if members:
            figure.add_bar(
                name=f"trained, {status}",
                x=[order[trial.number] for trial in members],
                y=[sweep.epochs(trial) for trial in members],
                text=[about(sweep, trial) for trial in members],
                textposition="none",
                marker={"color": COLOURS[status]},
                hovertemplate="%{text}<br>%{y:.4g} epochs<extra></extra>",
            )


def _saved(figure: go.Figure, sweep: SweepHistory, order: dict[int, int]) -> None:
    cut = [trial for trial in sweep.trials if trial.number in order and sweep.saved(trial)]
    if cut:
        figure.add_bar(
            name="saved",
            x=[order[trial.number] for trial in cut],
            y=[sweep.saved(trial) for trial in cut],
            marker={
                "color": "#f6f7f9",
                "line": {"width": 0},
                "pattern": {"shape": "/", "fgcolor": "#c9ced6", "size": 6, "solidity": 0.25},
            },
            hovertemplate="%{y:.4g} epochs saved<extra></extra>",
        )
