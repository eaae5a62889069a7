"""What `elt plan` knows of a config's data, which need not be there yet."""

import pydoc
from dataclasses import dataclass
from typing import Any

from jsonargparse import ArgumentParser

from elt_lightning.commands.train import find_section
from elt_lightning.data.base import GenerativeDataModule
from elt_lightning.data.imagenet import ImageNetDataModule
from elt_lightning.data.tensors import TensorDataModule
from elt_lightning.errors import UserError
from elt_lightning.metrics.base import SampleMetric
from elt_lightning.planning import Codes
from elt_lightning.tokenizers.base import Tokenizer


class AssumedImageNet(GenerativeDataModule):
    """Stands in for ImageNet-1k at 256×256 pixels, encoded, where it is not there yet; it has no samples.

    Args:
        has_tokens: 16×16 tokens of MaskGIT's 1024 codes, or Stable Diffusion's latents 4×32×32.
        batch_size: global batch per optimiser step.
        micro_batch_size: samples per forward pass on one device; None for no accumulation.
    """

    NUM_SAMPLES, NUM_HELD_OUT = 1_281_167, 50_000

    num_classes = 1000

    def __init__(self, has_tokens: bool, batch_size: int, micro_batch_size: int | None) -> None:
        super().__init__(batch_size, micro_batch_size, num_workers=0, seed=0)
        self.input_shape = (16, 16) if has_tokens else (4, 32, 32)
        self.num_codes = 1024 if has_tokens else None
        # Of latents, `elt encode` keeps the moments: means and standard deviations.
        self.codes = Codes((16 * 16,), is_tokens=True) if has_tokens else Codes((2 * 4, 32, 32), is_tokens=False)

    @property
    def tokenizer(self) -> Tokenizer:  # noqa: D102
        raise NotImplementedError

    def build_metrics(self) -> list[SampleMetric]:  # noqa: D102
        raise NotImplementedError


@dataclass(frozen=True)
class Data:
    """What is known of the data.

    Attributes:
        module: says the shape of a sample and the number of classes.
        num_samples: to train on; None where that is known only once they are there.
        num_held_out: whose losses validation measures, 0 where that is not known.
        codes: what is kept of a picture on disk, None for data that are not encoded beforehand.
        assumed: why ImageNet-1k is assumed, None where the data themselves were asked.
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
    """Ask the data module of a config, or assume ImageNet-1k where its shards are not there yet.

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
        if not issubclass(pydoc.locate(section["class_path"]), ImageNetDataModule):  # type: ignore[arg-type]
            raise
        has_tokens = find_section(config, "model.network.init_args.num_codes")[0] is not None
        sizes = {name: section["init_args"][name] for name in ("batch_size", "micro_batch_size")}
        assumed = AssumedImageNet(has_tokens, **sizes)
        num_samples = num_samples or assumed.NUM_SAMPLES
        return Data(assumed, num_samples, assumed.NUM_HELD_OUT, assumed.codes, assumed=str(error))
    if isinstance(module, ImageNetDataModule):
        index, held_out = module.training_index, module.held_out_index.num_samples
        codes = Codes(index.stored_shape, index.num_codes is not None)
        return Data(module, num_samples or index.num_samples, held_out, codes)
    if isinstance(module, TensorDataModule):
        return Data(module, num_samples or len(module.training_set()), len(module.held_out_set()))
    return Data(module, num_samples or getattr(module, "num_train", None), getattr(module, "num_held_out", 0))
