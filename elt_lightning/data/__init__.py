"""LightningDataModules. Each owns its tokenizer and its metrics, since what codes mean is a property of data."""
