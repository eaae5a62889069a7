"""The LightningModule, its optimiser, precision and strategies, and the callbacks of a run."""
