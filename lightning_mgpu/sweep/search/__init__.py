"""How values are drawn, which trials stop early, and when the search ends."""
