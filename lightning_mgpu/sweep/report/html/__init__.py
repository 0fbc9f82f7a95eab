"""The page, drawn by plotly."""
