"""`elt encode ucf101`: clips of UCF-101, or of videos laid out like it, to shards of tokens."""

import argparse
from pathlib import Path

from elt_lightning.commands.arguments import device_of, whole
from elt_lightning.commands.encoding import add_shared_arguments, build_tokenizer, encode_into_shards
from elt_lightning.data.encode_clips import ClipEncoding, ClipSource, ClipTokenizer
from elt_lightning.data.ucf101 import Split, list_videos, read_classes
from elt_lightning.errors import UserError
from elt_lightning.tokenizers.base import ImageTokenizer, Tokenizer

TOKENIZERS = {
    "video-vq": "elt_lightning.tokenizers.video_vq.VideoVQ",
    "tats": "elt_lightning.tokenizers.tats.TATSVQGAN",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line of `elt encode ucf101`."""
    parser.set_defaults(run=encode_ucf101)
    add = parser.add_argument
    add("--root", required=True, metavar="DIR", help="folder of <Class>/v_<Class>_gXX_cYY.avi")
    add("--annotations", required=True, metavar="DIR", help="ucfTrainTestlist: classInd.txt, trainlist01.txt, …")
    add("--split", default="1", choices=("1", "2", "3", "all"), help="which lists; all takes every video (default 1)")
    add("--val", action="store_true", help="encode the videos of the split's testlist")
    add("--tokenizer", required=True, help=f"{', '.join(TOKENIZERS)}, or the class path of another")
    add("--num_frames", type=whole(1), default=16, help="frames of a clip (default 16)")
    add("--stride", type=whole(1), default=1, help="frames from one to the next (default 1)")
    add("--clips_per_video", type=whole(1), default=1, help="at evenly spaced moments (default 1, the middle)")
    add_shared_arguments(parser, "clip", size=128, samples_per_shard=2000, batch_size=16)


def encode_ucf101(options: argparse.Namespace) -> None:
    """Encode clips.

    Raises:
        UserError: the command line, the videos, their lists, the tokenizer or the output folder are wrong.
    """
    if options.output.resolve().is_relative_to(Path(options.root).resolve()):
        raise UserError(f"--output {options.output} lies in --root: choose a folder beside it")
    device = device_of(options.device)
    split: Split = "all" if options.split == "all" else int(options.split)
    videos = list_videos(options.root, options.annotations, split, options.val)
    otherwise = f"a tokenizer of clips: choose one of {', '.join(TOKENIZERS)}"
    built = build_tokenizer(options.tokenizer, options.tokenizer_path, TOKENIZERS, is_of_clips, otherwise)
    tokenizer: ClipTokenizer = built.to(device).eval()
    source = ClipSource(
        videos, read_classes(options.annotations), options.clips_per_video, options.samples_per_shard, options.seed
    )
    encoding = ClipEncoding(source, tokenizer, options.size, options.mirrored, options.num_frames, options.stride)
    encode_into_shards(encoding, options, device)


def is_of_clips(kind: type) -> bool:
    """Return whether a class is a tokenizer of clips."""
    return issubclass(kind, Tokenizer) and not issubclass(kind, ImageTokenizer) and hasattr(kind, "code_shape")
