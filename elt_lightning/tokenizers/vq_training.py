"""Training of a vector-quantised tokenizer, MAGVIT's way: videogvt/trainers/vqgan_trainer.py of google-research/magvit.

Autoencoder and discriminator move at once, each by the gradients at the weights both had before, as there. One sum of
losses and one optimiser do it: in each network's losses the other stands still. So accumulation, clipping, precision
and several devices are Lightning's own, and a step is a step: data order, schedule and checkpoints count it once.
"""

import copy
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_
from torch.optim import Adam, Optimizer

from elt_lightning.errors import UserError
from elt_lightning.processes.noise import Stream, random_bits, sample_seeds
from elt_lightning.tokenizers import vq_losses
from elt_lightning.tokenizers.base import to_bytes
from elt_lightning.tokenizers.continuous import PixelScaling
from elt_lightning.tokenizers.discriminator import Discriminator
from elt_lightning.tokenizers.perceptual import PerceptualLoss
from elt_lightning.tokenizers.video_vq import read_tokenizer, write_tokenizer
from elt_lightning.tokenizers.vq_network import Quantized, VQNetwork, VQSettings, inflate, times
from elt_lightning.training.optimiser import LearningRateSchedule, with_schedule
from elt_lightning.training.runs import log_picture
from elt_lightning.training.skip_non_finite_steps import is_skipped
from elt_lightning.training.weights import differences

FREE_IN_2D = ("dimensions", "temporal_levels", "padding")
"""Settings in which a 2-D tokenizer that is inflated may differ: the weights' shapes do not depend on them."""


class VQTraining(LightningModule):
    """Train a tokenizer of clips or of pictures on batches that have ``pixels``: (B, 3, *sample_shape) in [0, 1].

    Data whose codes are pixels, as for diffusion without an autoencoder, will do too.

    The average of its weights is what validation judges and what the run's folder gets as ``tokenizer.safetensors``, at
    every checkpoint and at the end; :class:`~elt_lightning.tokenizers.video_vq.VideoVQ` and ``ImageVQ`` read it.
    Defaults are MAGVIT-B's for UCF-101, but for ``revive_after``, which MAGVIT does not have, and the network of the
    perceptual loss. Letters: B batch, V codes, N vectors.

    Args:
        sample_shape: (frames, height, width) of clips, or (height, width) of pictures; it decides between 3-D and 2-D.
        filters: as the next six, of :class:`~elt_lightning.tokenizers.vq_network.VQSettings`.
        multipliers: of ``filters``, one for each level.
        residual_blocks: in a level.
        temporal_levels: at how many changes of level frames are halved.
        codebook_size: V.
        code_channels: channels of a code.
        padding: what kernels see beyond the border.
        inflate_from: a 2-D tokenizer's file; a 3-D one of the same settings starts from it. Not read when resuming.
        commitment_weight: of the loss that ties vectors to their codes.
        entropy_weight: of the loss that keeps all codes in use.
        entropy_temperature: of its softmax.
        perceptual_weights: file of VGG16's weights, see :class:`~elt_lightning.tokenizers.perceptual.PerceptualLoss`;
            None leaves the loss out.
        perceptual_weight: of that loss.
        adversarial_weight: of the discriminator's judgement; 0 trains without a discriminator.
        adversarial_start: optimiser step from which there is a discriminator.
        r1_weight: of the penalty on the discriminator's gradient at real samples.
        r1_every: optimiser steps from one penalty to the next, with the weight times this number. MAGVIT: 1;
            StyleGAN2: 16, which saves most of its time.
        discriminator_filters: as the next two, of :class:`~elt_lightning.tokenizers.discriminator.Discriminator`.
        discriminator_multipliers: of its filters, one for each halving.
        discriminator_blur: smooth before halving.
        learning_rate: the peak, of both networks.
        betas: of Adam.
        learning_rate_schedule: warm-up and decay. MAGVIT: one epoch of warm-up, then cosine.
        ema_decay: of the average, which warms up as min(decay, (1 + t)/(10 + t)) after t steps.
        revive_after: a code that no vector chose for this many steps is moved to a vector of the batch; 0: never.
        num_pictures: clips or pictures shown in TensorBoard at validation.
        seed: decides which vectors become codes; linked to ``seed_everything``.

    Raises:
        ValueError: a setting is out of range.
        UserError: the file of the perceptual loss is missing or wrong.
    """

    last_used: Tensor
    validation_usage: Tensor
    candidates: Tensor

    def __init__(
        self,
        sample_shape: tuple[int, ...] = (16, 128, 128),
        filters: int = 64,
        multipliers: tuple[int, ...] = (1, 2, 2, 4),
        residual_blocks: int = 2,
        temporal_levels: int = 2,
        codebook_size: int = 1024,
        code_channels: int = 256,
        padding: Literal["reflect", "replicate", "zeros"] = "reflect",
        inflate_from: str | None = None,
        commitment_weight: float = 0.25,
        entropy_weight: float = 0.1,
        entropy_temperature: float = 0.01,
        perceptual_weights: str | None = None,
        perceptual_weight: float = 0.1,
        adversarial_weight: float = 0.1,
        adversarial_start: int = 0,
        r1_weight: float = 10.0,
        r1_every: int = 1,
        discriminator_filters: int = 64,
        discriminator_multipliers: tuple[int, ...] = (2, 4, 4, 4, 4),
        discriminator_blur: bool = False,
        learning_rate: float = 1e-4,
        betas: tuple[float, float] = (0.0, 0.99),
        learning_rate_schedule: LearningRateSchedule | None = None,
        ema_decay: float = 0.999,
        revive_after: int = 200,
        num_pictures: int = 4,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= ema_decay < 1 or r1_every < 1 or min(adversarial_weight, adversarial_start, revive_after) < 0:
            raise ValueError(
                "ema_decay must lie in [0, 1), r1_every be at least 1, adversarial_weight, adversarial_start and "
                f"revive_after at least 0, not {ema_decay}, {r1_every}, {adversarial_weight}, {adversarial_start}, "
                f"{revive_after}"
            )
        if inflate_from is not None and len(sample_shape) != 3:
            raise ValueError(f"inflate_from is for clips; sample_shape {times(tuple(sample_shape))} is of pictures")
        settings = VQSettings(
            len(sample_shape),
            filters,
            tuple(multipliers),
            residual_blocks,
            temporal_levels,
            codebook_size,
            code_channels,
            padding,
        )
        self.sample_shape = tuple(sample_shape)
        settings.grid(self.sample_shape)
        self.network = VQNetwork(settings)
        self.average = copy.deepcopy(self.network).requires_grad_(False)
        self.discriminator: Discriminator | None = None
        if adversarial_weight > 0:
            self.discriminator = Discriminator(
                self.sample_shape, discriminator_filters, tuple(discriminator_multipliers), discriminator_blur
            )
        self.perceptual = None if perceptual_weights is None else PerceptualLoss(perceptual_weights)
        self.weights = {
            "reconstruction": 1.0,
            "codebook": 1.0,
            "commitment": commitment_weight,
            "entropy": entropy_weight,
            "perceptual": perceptual_weight,
            "adversarial": adversarial_weight,
            "discriminator": 1.0,
            "r1": r1_weight * r1_every,
        }
        self.inflate_from, self.entropy_temperature = inflate_from, entropy_temperature
        self.adversarial_start, self.r1_every = adversarial_start, r1_every
        self.learning_rate, self.betas = learning_rate, betas
        self.learning_rate_schedule = learning_rate_schedule or LearningRateSchedule()
        self.ema_decay, self.revive_after = ema_decay, revive_after
        self.num_pictures, self.seed = num_pictures, seed
        self.register_buffer("last_used", torch.zeros(codebook_size, dtype=torch.int64))  # optimiser step
        self.register_buffer("validation_usage", torch.zeros(codebook_size, dtype=torch.int64), persistent=False)

    def on_fit_start(self) -> None:
        """Start from a 2-D tokenizer, if one is given and no checkpoint is resumed."""
        if self.inflate_from is not None and self.trainer.ckpt_path is None:
            self.start_from(self.inflate_from)

    def start_from(self, path: str) -> None:
        """Inflate a 2-D tokenizer into the network and its average; the discriminator is not in such a file.

        Raises:
            UserError: the file is missing or wrong, or the tokenizer is of another shape.
        """
        flat, _ = read_tokenizer(path)
        here, there = asdict(self.network.settings), asdict(flat.settings)
        different = [f"{name} {there[name]}" for name in here if name not in FREE_IN_2D and here[name] != there[name]]
        if flat.settings.dimensions != 2 or different:
            what = f"has {', '.join(different)}" if different else "is 3-D already"
            raise UserError(f"{path} cannot be inflated into this tokenizer: it {what}; settings must be the same")
        for network in (self.network, self.average):
            network.load_state_dict(inflate(flat.state_dict(), network))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the sum of all losses of both networks."""
        pixels = self.pixels_of(batch)
        reconstruction, quantized = self.network(pixels)
        losses = self.autoencoder_losses(pixels, reconstruction.float(), quantized)
        if self.discriminator is not None and self.global_step >= self.adversarial_start:
            losses |= self.adversarial_losses(self.discriminator, pixels, reconstruction.float())
        loss = sum((self.weights[name] * value for name, value in losses.items()), start=pixels.new_zeros(()))
        if self.discriminator is not None and self.global_step < self.adversarial_start:
            # several devices wait for a gradient of every weight, so provide one
            loss = loss + 0 * sum(parameter.sum() for parameter in self.discriminator.parameters())
        usage = self.over_devices(self.count_codes(quantized))
        self.last_used.masked_fill_(usage > 0, self.global_step)
        self.candidates = quantized.vectors.detach()
        logged = losses | {
            "loss": loss,
            "perplexity": vq_losses.perplexity(usage),
            "codes_used": (usage > 0).float().mean(),
        }
        self.log_dict({f"train/{name}": value.detach() for name, value in logged.items()}, batch_size=len(pixels))
        return loss

    def autoencoder_losses(self, pixels: Tensor, reconstruction: Tensor, quantized: Quantized) -> dict[str, Tensor]:
        """Return what the autoencoder is judged by, without the discriminator."""
        losses = {
            "reconstruction": F.mse_loss(reconstruction, pixels),
            "codebook": vq_losses.codebook_loss(quantized),
            "commitment": vq_losses.commitment_loss(quantized),
            "entropy": vq_losses.entropy_loss(quantized.distances, self.entropy_temperature),
        }
        if self.perceptual is not None:
            losses["perceptual"] = self.perceptual(reconstruction, pixels)
        return losses

    def adversarial_losses(
        self, discriminator: Discriminator, pixels: Tensor, reconstruction: Tensor
    ) -> dict[str, Tensor]:
        """Return the losses of both networks at each other: one's gradients do not reach the other."""
        still = {name: parameter.detach() for name, parameter in discriminator.named_parameters()}
        penalised = self.weights["r1"] > 0 and self.global_step % self.r1_every == 0
        real = pixels.detach().requires_grad_(penalised)
        real_logits = discriminator(real)
        losses = {
            "adversarial": vq_losses.generator_loss(functional_call(discriminator, still, (reconstruction,)).float()),
            "discriminator": vq_losses.discriminator_loss(
                real_logits.float(), discriminator(reconstruction.detach()).float()
            ),
        }
        if penalised:
            losses["r1"] = vq_losses.r1_penalty(real_logits.float(), real)
        return losses

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        """Move the weights, then the average, then the codes that nothing uses; a skipped step moves none of them."""
        super().optimizer_step(*arguments, **options)
        if is_skipped(self.trainer):
            return
        self.move_average(self.global_step)
        if self.revive_after > 0:
            self.revive_codes(self.global_step)

    @torch.no_grad()
    def move_average(self, step: int) -> None:
        """Move the average towards the weights that optimiser step ``step`` (0-based) gave."""
        decay = min(self.ema_decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.network.parameters()), 1 - decay)

    @torch.no_grad()
    def revive_codes(self, step: int) -> None:
        """Put codes that went unused for ``revive_after`` steps where vectors of the first device's batch are.

        The average's go there at once too: where they were means nothing. With fewer vectors than such codes the rest
        waits for the next step.
        """
        dead = (step - self.last_used >= self.revive_after).nonzero().flatten()[: len(self.candidates)]
        if len(dead) == 0:
            return
        chosen = draw_vectors(self.candidates, len(dead), self.seed, step)
        chosen = self.over_devices(chosen if self.global_rank == 0 else torch.zeros_like(chosen))
        finite = chosen.isfinite().all(1)  # a gradient scaler may skip a step whose vectors are broken
        for network in (self.network, self.average):
            network.quantizer.codebook[dead[finite]] = chosen[finite]
        self.last_used[dead] = step

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Leave a discriminator that has not started out of the step: Adam would count a gradient of zero."""
        if self.discriminator is not None and self.global_step < self.adversarial_start:
            self.discriminator.zero_grad(set_to_none=True)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the norms of the two networks' gradients apart: neither is to shrink the other's step."""
        if not gradient_clip_val or gradient_clip_algorithm == "value":
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        for group in optimizer.param_groups:
            clip_grad_norm_(group["params"], gradient_clip_val)

    def on_validation_epoch_start(self) -> None:
        """Forget how often codes were used."""
        self.validation_usage.zero_()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log what the average's reconstructions lose, and show the first batch's."""
        pixels = self.pixels_of(batch)
        reconstruction, quantized = self.average(pixels)
        reconstruction = reconstruction.float().clamp(0, 1)
        self.validation_usage += self.count_codes(quantized)
        errors = (reconstruction - pixels).square().flatten(1).mean(1)
        values = {"reconstruction": errors.mean(), "psnr": -10 * errors.clamp(min=1e-10).log10().mean()}
        if self.perceptual is not None:
            values["perceptual"] = self.perceptual(reconstruction, pixels)
        # Lightning weighs ranks by the mean of their counts, cut to a whole number: as a multiple it stays exact.
        count = len(pixels) * self.trainer.world_size
        self.log_dict({f"val/{name}": value for name, value in values.items()}, batch_size=count, sync_dist=True)
        if batch_idx == 0 and self.trainer.is_global_zero:
            picture = side_by_side(pixels[: self.num_pictures], reconstruction[: self.num_pictures])
            log_picture(self.trainer, "val/reconstructions", picture)

    def on_validation_epoch_end(self) -> None:
        """Log how many codes all held-out samples use, and how evenly."""
        usage = self.over_devices(self.validation_usage)
        values = {"perplexity": vq_losses.perplexity(usage), "codes_used": (usage > 0).float().mean()}
        # Every rank has the same already; sync_dist only tells Lightning.
        self.log_dict({f"val/{name}": value for name, value in values.items()}, sync_dist=True)

    def pixels_of(self, batch: Any) -> Tensor:
        """Take the pixels of a batch, (B, 3, *sample_shape); those of a data set for diffusion are grey or colours.

        Raises:
            UserError: they have another shape, or the data are codes of a tokenizer already.
        """
        if hasattr(batch, "pixels"):
            pixels: Tensor = batch.pixels
        else:
            tokenizer = self.trainer.datamodule.tokenizer  # type: ignore[attr-defined]
            if not isinstance(tokenizer, PixelScaling):
                raise UserError("a tokenizer is trained on pixels: these data are codes of one, leave out their shards")
            pixels = tokenizer.decode(batch.x)
            pixels = pixels.expand(-1, 3, -1, -1) if pixels.shape[1] == 1 else pixels
        found = tuple(pixels.shape[1:])
        if found != (3, *self.sample_shape):
            raise UserError(
                f"the data have samples of {times(found)} and the tokenizer takes {times((3, *self.sample_shape))}: "
                "set model.sample_shape to what the data give"
            )
        return pixels

    def count_codes(self, quantized: Quantized) -> Tensor:
        """Count how many vectors of this device's batch chose each code: (V,) int64."""
        return torch.bincount(quantized.codes, minlength=len(self.last_used))

    def over_devices(self, values: Tensor) -> Tensor:
        """Sum over devices."""
        return self.trainer.strategy.reduce(values, reduce_op="sum")

    def export(self, path: str | Path) -> None:
        """Write the average as a tokenizer's file."""
        write_tokenizer(path, self.average, self.sample_shape)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write the tokenizer that goes with a checkpoint into the run's folder."""
        self.export_to_run()

    def on_train_end(self) -> None:
        """Write the tokenizer into the run's folder."""
        if not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.export_to_run()

    def export_to_run(self) -> None:
        """Write ``tokenizer.safetensors`` into the run's folder, once for all devices."""
        if self.trainer.is_global_zero:
            self.export(Path(self.trainer.default_root_dir) / "tokenizer.safetensors")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another tokenizer, and broken weights, before anything is loaded.

        Raises:
            UserError: names, shapes or types of the weights differ, or not all are finite.
        """
        if faults := differences(self.state_dict(), checkpoint["state_dict"]):
            raise UserError(
                f"the checkpoint is of another tokenizer (tensors: {faults}): give the settings of its training"
            )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build Adam over both networks, a group each, and its schedule in optimiser steps."""
        networks = [self.network] if self.discriminator is None else [self.network, self.discriminator]
        groups = [{"params": list(network.parameters())} for network in networks]
        optimizer = Adam(groups, self.learning_rate, self.betas)
        return with_schedule(optimizer, self.learning_rate_schedule, int(self.trainer.estimated_stepping_batches))


def draw_vectors(vectors: Tensor, count: int, seed: int, step: int) -> Tensor:
    """Draw ``count`` ≤ N different rows of vectors (N, D); which ones depends on (seed, step, N) alone."""
    seeds = sample_seeds(seed, torch.arange(len(vectors), device=vectors.device))
    order = random_bits(seeds, step, Stream.REVIVED_CODES, 1).flatten().argsort(stable=True)
    return vectors[order[:count]]


def side_by_side(originals: Tensor, reconstructions: Tensor) -> Tensor:
    """Lay originals above reconstructions, as one picture (height, width, 3) uint8.

    Args:
        originals: (B, 3, F, H, W), a pair of rows for each clip with its frames side by side, or (B, 3, H, W), one pair
            of rows with all pictures side by side.
        reconstructions: the same shape.
    """
    rows = torch.stack([originals, reconstructions], 1)  # B, 2, 3, (F,) H, W
    if rows.ndim == 5:
        rows = rows.permute(1, 2, 0, 3, 4)[None]  # the pictures as frames of one clip
    rows = to_bytes(rows).permute(0, 1, 4, 3, 5, 2)  # B, 2, H, F, W, 3
    return rows.flatten(3, 4).flatten(0, 2)
