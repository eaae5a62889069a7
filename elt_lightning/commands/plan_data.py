"""What `elt plan` knows of a config's data, which need not be there yet."""

import pydoc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jsonargparse import ArgumentParser
from torch import Tensor

from elt_lightning.commands.train import find_section
from elt_lightning.data.base import GenerativeDataModule
from elt_lightning.data.encoded import EncodedDataModule
from elt_lightning.data.imagenet import ImageNetDataModule
from elt_lightning.data.tensors import TensorDataModule
from elt_lightning.data.video_tokens import UCF101TokensDataModule
from elt_lightning.errors import UserError
from elt_lightning.metrics.base import SampleMetric
from elt_lightning.planning import Codes
from elt_lightning.tokenizers.base import Tokenizer


@dataclass(frozen=True)
class Published:
    """What is known of a published data set once it is encoded.

    Attributes:
        name: in the plan.
        num_classes: number of classes.
        input_shape: the token grid, or latents.
        num_codes: codebook size, None for latents.
        stored: of what ``elt encode`` keeps of a sample: of latents the moments, means and standard deviations.
        num_samples: to train on.
        num_held_out: the others.
    """

    name: str
    num_classes: int
    input_shape: tuple[int, ...]
    num_codes: int | None
    stored: tuple[int, ...]
    num_samples: int
    num_held_out: int


IMAGENET_TOKENS = Published("ImageNet-1k", 1000, (16, 16), 1024, (256,), 1_281_167, 50_000)
IMAGENET_LATENTS = Published("ImageNet-1k", 1000, (4, 32, 32), None, (8, 32, 32), 1_281_167, 50_000)
UCF101_TOKENS = Published("UCF-101, split 1", 101, (4, 16, 16), 1024, (1024,), 9537, 3783)


class Assumed(GenerativeDataModule):
    """Stands in for a published data set, encoded, where it is not there yet; it has no samples.

    Args:
        published: the data set.
        batch_size: global batch per optimiser step.
        micro_batch_size: samples per forward pass on one device; None for no accumulation.
    """

    def __init__(self, published: Published, batch_size: int, micro_batch_size: int | None) -> None:
        super().__init__(batch_size, micro_batch_size, num_workers=0, seed=0)
        self.num_classes, self.input_shape = published.num_classes, published.input_shape
        self.num_codes = published.num_codes

    @property
    def tokenizer(self) -> Tokenizer:  # noqa: D102
        raise NotImplementedError

    def build_metrics(self) -> list[SampleMetric]:  # noqa: D102
        raise NotImplementedError

    def all_codes(self, held_out: bool, batch_size: int) -> Iterator[Tensor]:  # noqa: D102
        raise NotImplementedError


@dataclass(frozen=True)
class Data:
    """What is known of the data.

    Attributes:
        module: says the shape of a sample and the number of classes.
        num_samples: to train on; None where that is known only once they are there.
        num_held_out: whose losses validation measures, 0 where that is not known.
        codes: what is kept of a picture on disk, None for data that are not encoded beforehand.
        assumed: what data set is assumed, and why; None where the data themselves were asked.
    """

    module: GenerativeDataModule
    num_samples: int | None
    num_held_out: int = 0
    codes: Codes | None = None
    assumed: str | None = None

    def disk(self) -> dict[str, int]:
        """Bytes of the encoded sets, by what they are; nothing where nothing is encoded."""
        if self.codes is None or self.num_samples is None:
            return {}
        return {
            "training_codes": self.num_samples * self.codes.num_bytes,
            "training_shards": self.num_samples * self.codes.bytes_in_shard(copies=1),
            "training_shards_mirrored": self.num_samples * self.codes.bytes_in_shard(copies=2),
            "held_out_shards": self.num_held_out * self.codes.bytes_in_shard(copies=1),
        }

    def as_dict(self) -> dict[str, Any]:
        """Give it as plain data."""
        return {
            "data": {
                "num_classes": self.module.num_classes,
                "input_shape": list(self.module.input_shape),
                "num_codes": self.module.num_codes,
                "num_samples": self.num_samples,
                "num_held_out": self.num_held_out,
                "assumed": self.assumed,
            },
            "disk": self.disk(),
        }


def look_at_data(config: dict[str, Any], num_samples: int | None) -> Data:
    """Ask the data module of a config, or assume the published set where its shards are not there yet.

    Args:
        config: resolved.
        num_samples: how many there are to train on, as the user says; None asks the data.

    Raises:
        UserError: other data are missing, or settings are wrong.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--data", type=GenerativeDataModule)
    section = config["data"]
    try:
        module = parser.instantiate(parser.parse_object({"data": section})).data
    except UserError as error:
        published = published_set(config)
        if published is None:
            raise
        sizes = {name: section["init_args"][name] for name in ("batch_size", "micro_batch_size")}
        return Data(
            Assumed(published, **sizes),
            num_samples or published.num_samples,
            published.num_held_out,
            Codes(published.stored, published.num_codes is not None),
            assumed=f"{published.name}, because {error}",
        )
    if isinstance(module, EncodedDataModule):
        index, held_out = module.training_index, module.held_out_index.num_samples
        codes = Codes(index.stored_shape, index.num_codes is not None)
        return Data(module, num_samples or index.num_samples, held_out, codes)
    if isinstance(module, TensorDataModule):
        return Data(module, num_samples or len(module.training_set()), len(module.held_out_set()))
    return Data(module, num_samples or getattr(module, "num_train", None), getattr(module, "num_held_out", 0))


def published_set(config: dict[str, Any]) -> Published | None:
    """Say which published set a config is for, None where it is for other data."""
    kind: Any = pydoc.locate(config["data"]["class_path"])
    has_tokens = find_section(config, "model.network.init_args.num_codes")[0] is not None
    if issubclass(kind, ImageNetDataModule):
        return IMAGENET_TOKENS if has_tokens else IMAGENET_LATENTS
    return UCF101_TOKENS if issubclass(kind, UCF101TokensDataModule) else None
