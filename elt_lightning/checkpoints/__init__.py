"""What a checkpoint and an exported model hold, and how a model is built from one."""
