"""How the pipeline strategies cut a LightningModule, and what they show of its stages."""
