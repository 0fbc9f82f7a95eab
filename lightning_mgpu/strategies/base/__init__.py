"""What the strategies have in common."""
