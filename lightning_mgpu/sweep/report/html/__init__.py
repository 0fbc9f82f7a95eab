"""HTML page of a report, drawn by plotly."""
