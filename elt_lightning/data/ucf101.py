"""UCF-101 as it is published: folders of AVI files, and lists that say which are trained on.

Source: "UCF101: A dataset of 101 human actions classes from videos in the wild", K. Soomro, A. R. Zamir and M. Shah,
2012; www.crcv.ucf.edu/data/UCF101.php.
"""

import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from elt_lightning.data.base import BatchedDataModule
from elt_lightning.data.clip_batches import ClipBatch, ClipLoader, FixedClips, TrainingClips
from elt_lightning.data.clips import ClipShape, Video
from elt_lightning.errors import UserError
from elt_lightning.files import counted_by_suffix, read_lines

logger = logging.getLogger(__name__)

Split = Literal["all"] | int

WHERE = "UCF101.rar and UCF101TrainTestSplits-RecognitionTask.zip of www.crcv.ucf.edu/data/UCF101.php, unpacked"


class UCF101DataModule(BatchedDataModule):
    """Clips of UCF-101, or of videos laid out like it, to train a tokenizer on.

    In training every epoch shows one clip of each video, of another moment each time; what a video gives is a function
    of (seed, epoch, its place in the list), and the order is that of every data set here: a resumed run goes on with
    the batch that was next. Losses are measured on the middle of each held-out video.

    Args:
        root: folder of ``<Class>/v_<Class>_gXX_cYY.avi``.
        annotations: folder of ``classInd.txt``, ``trainlist0N.txt`` and ``testlist0N.txt``.
        split: N; or "all", which trains on every video below ``root`` and measures losses on the same.
        num_frames: of a clip.
        size: of a clip's frames in pixels: the short side is resized to it, the middle of the long side kept.
        stride: frames of the video from one frame of the clip to the next.
        mirrored: mirror every second clip in training, on average.
        max_broken: share of the videos that may be unreadable or too short. They are named in the log; in training
            another one takes the place, measuring leaves them out.
        batch_size: global batch per optimiser step.
        micro_batch_size: samples per forward pass on one device; None for no accumulation.
        num_workers: loader processes on each device.
        seed: of the order of training samples, and the moments that are cut out.
    """

    def __init__(
        self,
        root: str = "data/ucf101/UCF-101",
        annotations: str = "data/ucf101/ucfTrainTestlist",
        split: Split = 1,
        num_frames: int = 16,
        size: int = 128,
        stride: int = 1,
        mirrored: bool = False,
        max_broken: float = 0.01,
        batch_size: int = 32,
        micro_batch_size: int | None = None,
        num_workers: int = 4,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, micro_batch_size, num_workers, seed)
        if not 0 <= max_broken <= 1:
            raise ValueError(f"max_broken is a share from 0 to 1, not {max_broken}")
        self.root, self.annotations, self.split = root, annotations, split
        self.shape = ClipShape(num_frames, size, stride)
        self.mirrored, self.max_broken = mirrored, max_broken

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of their numbers."""
        return read_classes(self.annotations)

    def videos(self, val: bool) -> list[Video]:
        """List the videos that are trained on, or those held out (UserError: lists or videos are missing)."""
        return list_videos(self.root, self.annotations, self.split, val)

    def setup(self, stage: str) -> None:
        """Read the lists, so that missing files are reported before anything else begins."""
        self._training_videos, self._val_videos = self.videos(val=False), self.videos(val=True)

    def train_dataloader(self) -> ClipLoader:  # noqa: D102
        clips = TrainingClips(self._training_videos, self.shape, self.mirrored, self.seed)
        return ClipLoader(clips, self.training_order(len(clips)), self.num_workers, self.max_broken)

    def val_dataloader(self) -> ClipLoader:  # noqa: D102
        clips = FixedClips(self._val_videos, self.shape)
        return ClipLoader(clips, self.val_order(len(clips)), self.num_workers, self.max_broken)

    def test_dataloader(self) -> ClipLoader:  # noqa: D102
        return self.val_dataloader()

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Turn bytes into float in [0, 1], on the device."""
        return batch._replace(pixels=batch.pixels.float() / 255) if isinstance(batch, ClipBatch) else batch


def read_classes(annotations: str | Path) -> tuple[str, ...]:
    """Read the names of the classes in the order of their numbers, which are 1, 2, … in the file and 0, 1, … here.

    Raises:
        UserError: the file is missing or holds something else.
    """
    path = Path(annotations) / "classInd.txt"
    numbered = [line.split() for line in _lines(path)]
    if not numbered or [words[0] for words in numbered] != [str(number + 1) for number in range(len(numbered))]:
        raise UserError(f"{path} does not number classes from 1 on, a line each such as '1 ApplyEyeMakeup'")
    if any(len(words) != 2 for words in numbered):
        raise UserError(f"{path} has a line that is not a number and a name")
    return tuple(name for _, name in numbered)


def list_videos(root: str | Path, annotations: str | Path, split: Split, val: bool) -> list[Video]:
    """List the videos of one side of a split, sorted by name.

    The sides are those of ``testlist0N.txt`` (``val``) and ``trainlist0N.txt``; of the split "all" both are every video
    below the root.

    Raises:
        UserError: a list or a video is missing, or a class is unknown.
    """
    labels = {name: label for label, name in enumerate(read_classes(annotations))}
    found = sorted(_present(Path(root)))
    check_unique(str(root), map(with_small_suffix, found))
    present = {with_small_suffix(name): name for name in found}
    if split == "all":
        where, names = str(root), sorted(present)
    else:
        path = Path(annotations) / f"{'test' if val else 'train'}list{split:02d}.txt"
        where, names = str(path), sorted(with_small_suffix(line.split()[0]) for line in _lines(path))
        check_unique(where, names)
    videos = []
    for name in names:
        class_name = name.partition("/")[0]
        if class_name not in labels:
            raise UserError(f"{where}: {name} is of a class that {annotations}/classInd.txt does not have")
        videos.append(Video(name, os.path.join(root, present.get(name, name)), labels[class_name]))
    missing = [name for name in names if name not in present]
    if missing:
        raise UserError(
            f"{len(missing)} of the {len(names)} videos of {where} are not below {root}, such as {missing[0]}: {WHERE}"
        )
    if not videos:
        raise UserError(f"{where} has no videos: {WHERE}")
    return videos


def check_unique(where: str, names: Iterable[str]) -> None:
    """Check that a list or folder has no video twice, but for its suffix in capitals (UserError: it has)."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"{where} has {len(twice)} videos more than once, such as {twice[0]}: keep one of each")


def with_small_suffix(name: str) -> str:
    """Write a file's suffix in small letters: lists and file systems need not agree on case."""
    stem, suffix = os.path.splitext(name)
    return stem + suffix.lower()


def _present(root: Path) -> Iterator[str]:
    """Find the videos below a root: their names, ``<Class>/<file>``. Other files there are counted in the log."""
    others: list[str] = []
    try:
        for folder in os.scandir(root):
            if folder.is_dir() and not folder.name.startswith("."):
                for file in os.scandir(folder):
                    if file.name.lower().endswith(".avi") and not file.name.startswith("."):
                        yield f"{folder.name}/{file.name}"
                    elif not file.name.startswith("."):
                        others.append(file.name)
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}): it takes {WHERE}") from error
    if others:
        logger.warning("left out of %s, as no .avi: %s", root, counted_by_suffix(others))


def _lines(path: Path) -> list[str]:
    """Read the lines of a text file that are not empty."""
    try:
        return read_lines(path)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise UserError(f"{path} cannot be read ({reason}): it takes {WHERE}") from error
