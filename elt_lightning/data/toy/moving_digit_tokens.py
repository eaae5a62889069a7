"""Tokens of moving digits, judged by a network that names motions."""

from pathlib import Path

from elt_lightning.data.clip_batches import ClipBatch
from elt_lightning.data.toy.moving_digits import LISTS, VIDEOS
from elt_lightning.data.ucf101 import list_videos
from elt_lightning.data.video_tokens import VideoTokensDataModule, length_of, read_all
from elt_lightning.metrics.base import SampleMetric
from elt_lightning.metrics.motion import MotionNetwork, load_or_train_motion_network, motion_metrics


class MovingDigitsTokensDataModule(VideoTokensDataModule):
    """Tokens of moving digits; samples are judged by a network that names motions.

    ``recognised`` is the share of samples that it reads as the motion asked for, ``fd_motion`` a Fréchet distance over
    its features to held-out clips.

    Args:
        training_shards: folder with ``index.json`` and the shards of the training clips.
        val_shards: the same of the clips that losses are measured on; None for the training clips.
        tokenizer_path: where the tokenizer's file lies; by default where it lay when the clips were encoded.
        root: folder of the videos, as :class:`~elt_lightning.data.toy.moving_digits.MovingDigitsDataModule` wrote them.
        stride: frames of the video from one frame of a clip to the next, as they were encoded.
        batch_size: global batch per optimiser step.
        micro_batch_size: samples per forward pass on one device; None for no accumulation.
        num_workers: loader processes.
        shuffle_block: samples that a loader process shuffles at once.
        seed: of the order of training samples.
    """

    primary_metric = "recognised"
    higher_is_better = True

    def __init__(
        self,
        training_shards: str = "data/moving_digits_tokens/train",
        val_shards: str | None = "data/moving_digits_tokens/test",
        tokenizer_path: str | None = None,
        root: str = "data/moving_digits",
        stride: int = 2,
        batch_size: int = 64,
        micro_batch_size: int | None = None,
        num_workers: int = 0,
        shuffle_block: int = 2048,
        seed: int = 0,
    ) -> None:
        super().__init__(
            training_shards, val_shards, tokenizer_path, batch_size, micro_batch_size, num_workers, shuffle_block, seed
        )
        self.root, self.shape = root, self.clip_shape(stride)

    def prepare_data(self) -> None:
        """Train the motion network, once."""
        self.load_motion_network()

    def load_motion_network(self) -> MotionNetwork:
        """Load the network that names motions, training it where there is no cached one for this shape of clips."""
        training, val = (self._read(side, 2) for side in (False, True))
        name = f"motion_network_{self.shape.num_frames}x{self.shape.size}_{self.shape.stride}.safetensors"
        return load_or_train_motion_network(
            Path(self.root) / name, training.pixels, training.labels, val.pixels, val.labels
        )

    def _read(self, val: bool, most: int) -> ClipBatch:
        """Read up to ``most`` clips of each video, but the same one only once: sharp videos are a clip long.

        Raises:
            UserError: a video cannot be read.
        """
        videos = list_videos(f"{self.root}/{VIDEOS}", f"{self.root}/{LISTS}", 1, val)
        starts = length_of(videos[0]) - self.shape.span + 1
        return read_all(videos, self.shape, max(1, min(most, starts)))

    def build_metrics(self) -> list[SampleMetric]:
        """Build ``recognised``, and ``fd_motion`` against held-out clips."""
        real = self._read(val=True, most=4)
        return motion_metrics(self.load_motion_network(), (part.float() / 255 for part in real.pixels.split(64)))
