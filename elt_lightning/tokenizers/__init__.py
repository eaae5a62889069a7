"""Pixels to tokens or latents, and back. Frozen: never trained with a generator, never in its checkpoints."""
