"""Cut a LightningModule into stages for the pipeline strategies, and display them."""
