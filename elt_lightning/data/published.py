"""What published data sets look like once they are encoded, whoever has them: their indices without their shards."""

from typing import Any

from elt_lightning.data.shards import Shard, ShardIndex

NUM_SHARDS = 4


def imagenet_tokens(num_images: int) -> ShardIndex:
    """Describe MaskGIT's tokens of ImageNet 256×256, with mirror images."""
    return _index(
        num_images, copies=2, input_shape=(16, 16), stored_shape=(256,), codebook_size=1024, latent_scale=None
    )


def imagenet_moments(num_images: int) -> ShardIndex:
    """Describe the moments of Stable Diffusion's autoencoder for ImageNet 256×256."""
    shapes: dict[str, Any] = {"input_shape": (4, 32, 32), "stored_shape": (8, 32, 32)}
    return _index(num_images, copies=1, codebook_size=None, latent_scale=0.18215, **shapes)


def ucf101_tokens(num_clips: int) -> ShardIndex:
    """Describe MAGVIT's tokens of UCF-101's clips, 16 frames of 128×128."""
    shapes: dict[str, Any] = {"input_shape": (4, 16, 16), "stored_shape": (1024,), "codebook_size": 1024}
    return _index(num_clips, num_classes=101, size=128, frames=16, copies=1, latent_scale=None, **shapes)


def _index(num_samples: int, num_classes: int = 1000, size: int = 256, **codes: Any) -> ShardIndex:
    parts = ((num_samples + number) // NUM_SHARDS for number in range(NUM_SHARDS))
    shards = tuple(Shard(f"{number:05d}.tar", part) for number, part in enumerate(parts))
    return ShardIndex(tuple(map(str, range(num_classes))), size, tokenizer={}, crop="none", shards=shards, **codes)
