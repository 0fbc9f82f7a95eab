"""Draw a Gantt chart as interactive HTML with plotly."""

from pathlib import Path

import plotly.graph_objects as go

from lightning_mgpu.timeline.gantt import KINDS, TEXT, Chart


def draw(chart: Chart, path: Path) -> None:
    """Draw a chart to a self-contained HTML file."""
    figure = go.Figure()
    lanes = list(range(len(chart.stages)))
    figure.add_bar(
        orientation="h",
        y=lanes,
        x=[chart.milliseconds] * len(lanes),
        marker={"color": "#efefef"},
        hoverinfo="skip",
        showlegend=False,
    )
    for kind, colour in KINDS.items():
        bars = [bar for bar in chart.bars if bar.kind == kind]
        if bars:
            figure.add_bar(
                orientation="h",
                name=kind,
                y=[bar.stage for bar in bars],
                base=[bar.start for bar in bars],
                x=[bar.length for bar in bars],
                text=[str(bar.chunk) for bar in bars],
                textposition="inside",
                insidetextanchor="middle",
                textangle=0,
                textfont={"color": TEXT[kind]},
                marker={"color": colour, "line": {"color": "white", "width": 1}},
                hovertemplate=(
                    f"{kind} of micro-batch %{{text}}<br>%{{x:.3f}} ms from %{{base:.3f}} ms"
                    "<extra></extra>"
                ),
            )
    height = 200 + 60 * len(lanes)
    figure.update_layout(
        barmode="overlay",
        bargap=0.2,
        template="plotly_white",
        title={"text": f"{chart.title[0]}<br><sub>{chart.title[1]}</sub>"},
        xaxis={"title": "milliseconds", "range": [0, chart.milliseconds], "zeroline": False},
        yaxis={
            "tickvals": lanes,
            "ticktext": chart.stages,
            "autorange": "reversed",
            "fixedrange": True,
            "showgrid": False,
        },
        legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 1.02, "yanchor": "bottom"},
        uniformtext={"minsize": 9, "mode": "hide"},  # no number where it would be too small
        height=height,
    )
    figure.write_html(path, include_plotlyjs=True, default_height=f"{height}px")
