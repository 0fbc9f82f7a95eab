"""Record which stage worked on which micro-batch, and when."""
