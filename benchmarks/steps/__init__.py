"""What `strategies.py` measures: steps of each strategy and of its peers."""
