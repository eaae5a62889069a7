import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins import MixedPrecision
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from elt_lightning.commands.encode_images import build_image_tokenizer
from elt_lightning.errors import UserError
from elt_lightning.files import sha256
from elt_lightning.tokenizers import vq_losses
from elt_lightning.tokenizers.base import ImageTokenizer
from elt_lightning.tokenizers.discriminator import Discriminator, halve
from elt_lightning.tokenizers.loading import load_tokenizer
from elt_lightning.tokenizers.perceptual import STAGES, PerceptualLoss
from elt_lightning.tokenizers.video_vq import ImageVQ, VideoVQ, read_tokenizer, write_tokenizer
from elt_lightning.tokenizers.vq_network import VQNetwork, VQSettings
from elt_lightning.tokenizers.vq_training import VQTraining, draw_vectors, side_by_side
from elt_lightning.training.optimiser import LearningRateSchedule
from elt_lightning.training.skip_non_finite_steps import SkipNonFiniteSteps

CLIP, PICTURE = (4, 16, 16), (16, 16)
TINY: dict[str, Any] = {
    "filters": 8,
    "multipliers": (1, 2),
    "residual_blocks": 1,
    "temporal_levels": 1,
    "codebook_size": 16,
    "code_channels": 8,
    "discriminator_filters": 4,
    "discriminator_multipliers": (2, 2),
    "revive_after": 0,
}


class PixelBatch(NamedTuple):
    pixels: Tensor
    labels: Tensor
    indices: Tensor


def batches(shape: tuple[int, ...], count: int = 2, size: int = 2, seed: int = 0) -> list[PixelBatch]:
    """Smooth random pixels: low waves of random colours and directions."""
    generator = torch.Generator().manual_seed(seed)
    waves = torch.randn(count * size, 3, 4, len(shape) + 1, generator=generator)
    places = torch.stack(torch.meshgrid(*(torch.linspace(-1, 1, side) for side in shape), indexing="ij"))
    phases = torch.einsum("bckd,d...->bck...", waves[..., :-1], places) + waves[..., -1].view(
        *waves.shape[:3], *[1] * len(shape)
    )
    pixels = torch.sigmoid(phases.sin().sum(2))
    return [PixelBatch(part, torch.zeros(size), torch.arange(size)) for part in pixels.split(size)]


class Repeated(torch.utils.data.Dataset):
    """Batch i of step i, over and over."""

    def __init__(self, content: list[PixelBatch], length: int) -> None:
        self.content, self.length = content, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> PixelBatch:
        return self.content[index % len(self.content)]


def loader(content: list[PixelBatch], length: int) -> DataLoader[PixelBatch]:
    return DataLoader(Repeated(content, length), batch_size=None)


def trained(
    module: VQTraining, steps: int, folder: Path, content: list[PixelBatch] | None = None, **trainer: Any
) -> Trainer:
    content = content or batches(module.sample_shape)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    val = {"check_val_every_n_epoch": None, "val_check_interval": 10**6, "num_sanity_val_steps": 0}
    options = {"max_steps": steps, "enable_checkpointing": False, "use_distributed_sampler": False}
    runner = Trainer(default_root_dir=folder, **quiet | val | options | trainer)
    ckpt_path = getattr(module, "resumed_from", None)
    runner.fit(module, loader(content, 10**6), loader(content, len(content)), ckpt_path=ckpt_path)
    return runner


def tiny(shape: tuple[int, ...] = CLIP, seed: int = 0, **settings: Any) -> VQTraining:
    torch.manual_seed(seed)
    return VQTraining(shape, **TINY | settings)


class Record(Callback):
    """Keeps what was logged at every step, and what a function reads of the module."""

    def __init__(self, read: Callable[[VQTraining], Any] = lambda module: None) -> None:
        self.read, self.logged, self.values = read, [], []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        self.values.append(self.read(pl_module))  # type: ignore[arg-type]


def weights(module: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


# The losses.


@pytest.mark.parametrize("temperature", [0.01, 0.7])
def test_the_entropy_loss_is_its_formula(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    distances = torch.rand(7, 5, generator=generator, dtype=torch.float64).mul(0.2).requires_grad_()
    found = vq_losses.entropy_loss(distances, temperature)
    sure, mean = 0.0, [0.0] * 5
    for row in distances.tolist():
        powers = [math.exp(-value / temperature) for value in row]
        shares = [power / sum(powers) for power in powers]
        sure -= sum(share * math.log(share) for share in shares) / 7
        mean = [before + share / 7 for before, share in zip(mean, shares, strict=True)]
    even = -sum(share * math.log(share + 1e-5) for share in mean)
    assert found.item() == pytest.approx(sure - even, abs=1e-12)
    assert torch.autograd.gradcheck(lambda values: vq_losses.entropy_loss(values, temperature), distances)
    single = vq_losses.entropy_loss(distances.detach().float(), temperature)
    assert single.item() == pytest.approx(sure - even, abs=1e-5)


def test_codebook_and_commitment_pull_one_side_each() -> None:
    torch.manual_seed(0)
    network = VQNetwork(VQSettings(filters=8, multipliers=(1,), temporal_levels=0, codebook_size=6, code_channels=4))
    encoded = torch.randn(2, 4, 2, 3, 3, requires_grad=True)
    quantized = network.quantizer(encoded)
    nearest = torch.stack([network.quantizer.codebook[code] for code in quantized.codes.tolist()])
    expected = (encoded.movedim(1, -1).flatten(0, -2) - nearest).square().mean().item()
    for loss, moves, stays in (
        (vq_losses.codebook_loss(quantized), network.quantizer.codebook, encoded),
        (vq_losses.commitment_loss(quantized), encoded, network.quantizer.codebook),
    ):
        assert loss.item() == pytest.approx(expected, rel=1e-6)
        moving, still = torch.autograd.grad(loss, [moves, stays], allow_unused=True, retain_graph=True)
        assert moving.abs().max() > 0
        assert still is None


def test_adversarial_losses_are_cross_entropies() -> None:
    real, fake = torch.tensor([[2.0], [-1.0]]), torch.tensor([[0.5], [-3.0]])
    ones, zeros = torch.ones(2, 1), torch.zeros(2, 1)
    expected = F.binary_cross_entropy_with_logits(real, ones) + F.binary_cross_entropy_with_logits(fake, zeros)
    assert vq_losses.discriminator_loss(real, fake).item() == pytest.approx(expected.item(), rel=1e-6)
    expected = F.binary_cross_entropy_with_logits(fake, ones)
    assert vq_losses.generator_loss(fake).item() == pytest.approx(expected.item(), rel=1e-6)


def test_r1_is_the_squared_gradient_and_can_be_trained_on() -> None:
    # D(x) = Σ w·x²: its gradient is 2·w·x, R1 the mean over samples of Σ 4·w²·x², dR1/dw = the mean of 8·w·x².
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(3, 2, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    x = torch.randn(5, 3, 2, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    penalty = vq_losses.r1_penalty((w * x.square()).flatten(1).sum(1, keepdim=True), x)
    assert penalty.item() == pytest.approx((4 * w.square() * x.square()).flatten(1).sum(1).mean().item(), rel=1e-6)
    (slope,) = torch.autograd.grad(penalty, w)
    assert torch.allclose(slope, (8 * w * x.square()).mean(0), rtol=1e-6)


@pytest.mark.parametrize("blur", [False, True])
@pytest.mark.parametrize("shape", [(3, 8, 6), (10, 7)])
def test_r1_of_the_discriminator_agrees_with_small_changes_of_its_weights(shape: tuple[int, ...], blur: bool) -> None:
    torch.manual_seed(0)
    discriminator = Discriminator(shape, 3, (2, 2), blur).double()
    pixels = torch.rand(2, 3, *shape, dtype=torch.float64)

    def penalty() -> Tensor:
        real = pixels.clone().requires_grad_()
        return vq_losses.r1_penalty(discriminator(real), real)

    with_gradient = [parameter for name, parameter in discriminator.named_parameters() if "weight" in name]
    slopes = torch.autograd.grad(penalty(), with_gradient)
    for parameter, slope in zip(with_gradient, slopes, strict=True):
        direction = torch.randn_like(parameter)
        values = []
        for step in (1e-9, -1e-9):  # where the activation has its corner R1 jumps: step over none
            with torch.no_grad():
                parameter.add_(direction, alpha=step)
            values.append(penalty().item())
            with torch.no_grad():
                parameter.sub_(direction, alpha=step)
        expected = (slope * direction).sum().item()
        assert (values[0] - values[1]) / 2e-9 == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_perplexity_counts_codes_in_even_use() -> None:
    assert vq_losses.perplexity(torch.tensor([3, 3, 3, 0])).item() == pytest.approx(3, rel=1e-6)
    assert vq_losses.perplexity(torch.tensor([5, 0])).item() == pytest.approx(1)
    assert vq_losses.perplexity(torch.zeros(4, dtype=torch.int64)).item() == pytest.approx(1)
    counts = torch.tensor([1, 2, 5])
    expected = math.exp(-sum(count / 8 * math.log(count / 8) for count in counts.tolist()))
    assert vq_losses.perplexity(counts).item() == pytest.approx(expected, rel=1e-6)


# The discriminator.


@pytest.mark.parametrize("shape", [(4, 6, 8), (1, 3, 5), (6, 8), (5, 3)])
@pytest.mark.parametrize("blur", [False, True])
def test_halving_is_a_weighted_average_of_neighbours(shape: tuple[int, ...], blur: bool) -> None:
    x = torch.rand(2, 3, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = x
    for axis in range(2, x.ndim):
        size = expected.shape[axis]
        slices = []
        for start in range(0, size, 2):
            pair = [start] if start + 1 == size else [start, start + 1]
            cells = dict.fromkeys(range(size), 0.0)
            for centre in pair:
                for neighbour, weight in ((-1, 0.25), (0, 0.5), (1, 0.25)) if blur else ((0, 1.0),):
                    cells[min(max(centre + neighbour, 0), size - 1)] += weight / len(pair)
            slices.append(sum(weight * expected.select(axis, cell) for cell, weight in cells.items()))
        expected = torch.stack(slices, axis)
    assert (halve(x, blur) - expected).abs().max() < 1e-12
    inner = halve(F.pad(torch.ones(1, 1, 1), (4, 3)).expand(1, 1, 4, 8), blur)[0, 0, 1]
    assert inner.tolist() == ([0, 0.125, 0.375, 0] if blur else [0, 0, 0.5, 0])


@pytest.mark.parametrize(("filters", "parameters"), [(64, 15_339_457), (128, 61_341_569)])
def test_the_discriminators_published_sizes(filters: int, parameters: int) -> None:
    with torch.device("meta"):
        discriminator = Discriminator((16, 128, 128), filters)
        assert discriminator(torch.empty(2, 3, 16, 128, 128)).shape == (2, 1)
    assert sum(parameter.numel() for parameter in discriminator.parameters()) == parameters
    assert discriminator.hidden.in_features == 1 * 4 * 4 * 4 * filters


def test_the_discriminator_is_its_formula() -> None:
    torch.manual_seed(0)
    discriminator = Discriminator((6, 8), 3, (2,)).double()
    state = discriminator.state_dict()
    pixels = torch.rand(2, 3, 6, 8, dtype=torch.float64)

    def conv(name: str, x: Tensor) -> Tensor:
        weight = state[f"{name}.weight"]
        return F.conv2d(x, weight, state.get(f"{name}.bias"), padding=weight.shape[-1] // 2)

    def leaky(x: Tensor) -> Tensor:
        return torch.where(x > 0, x, x / 5)

    def halved(x: Tensor) -> Tensor:
        return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4

    x = leaky(conv("conv_in", pixels))
    main = leaky(conv("blocks.0.conv2", halved(leaky(conv("blocks.0.conv1", x)))))
    x = (main + conv("blocks.0.shortcut", halved(x))) * 0.5**0.5
    x = leaky(conv("conv_out", x)).flatten(1)
    x = leaky(x @ state["hidden.weight"].T + state["hidden.bias"])
    expected = x @ state["logit.weight"].T + state["logit.bias"]
    assert (discriminator(pixels) - expected).abs().max() < 1e-12


# Training.


@pytest.mark.parametrize("shape", [CLIP, PICTURE])
def test_a_step_moves_both_networks_by_gradients_at_the_weights_both_had(
    shape: tuple[int, ...], tmp_path: Path
) -> None:
    module = tiny(shape, r1_every=3, entropy_temperature=0.1, learning_rate=1e-3, seed=1)
    assert module.discriminator is not None
    network, discriminator = module.network, module.discriminator
    (batch,) = batches(shape, count=1)
    reconstruction, quantized = network(batch.pixels)
    vectors, chosen = quantized.vectors, quantized.chosen
    autoencoder = (
        (reconstruction - batch.pixels).square().mean()
        + (vectors.detach() - chosen).square().mean()
        + 0.25 * (vectors - chosen.detach()).square().mean()
        + 0.1 * vq_losses.entropy_loss(quantized.distances, 0.1)
        - 0.1 * F.logsigmoid(discriminator(reconstruction)).mean()
    )
    real = batch.pixels.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(discriminator(real).sum(), real, create_graph=True)
    judge = (
        -F.logsigmoid(discriminator(batch.pixels)).mean()
        - F.logsigmoid(-discriminator(reconstruction.detach())).mean()
        + 10 * 3 * gradient.square().flatten(1).sum(1).mean()
    )
    expected = []
    for loss, part in ((autoencoder, network), (judge, discriminator)):
        slopes = torch.autograd.grad(loss, list(part.parameters()), allow_unused=True, retain_graph=True)
        for parameter, slope in zip(part.parameters(), slopes, strict=True):
            # Adam's first step with β₁ = 0: the gradient over its own size
            slope = torch.zeros_like(parameter) if slope is None else slope
            expected.append((parameter.detach().clone(), slope, slope / (slope.abs() + 1e-8)))
    trained(module, 1, tmp_path, [batch])
    found = [*network.parameters(), *discriminator.parameters()]
    compared = 0
    for parameter, (before, slope, direction) in zip(found, expected, strict=True):
        clear = slope.abs() > 1e-4 * slope.abs().max().clamp(min=1e-5)  # others are rounding, which Adam blows up
        moved = (before - parameter.detach()) / 1e-3
        assert (moved - direction)[clear].abs().max() < 0.02 if clear.any() else True
        compared += int(clear.sum())
    assert compared > 0.8 * sum(parameter.numel() for parameter in found)


@pytest.mark.slow
def test_a_tiny_tokenizer_of_clips_learns_a_few(tmp_path: Path) -> None:
    content = batches((8, 16, 16), count=2, size=4)
    module = tiny(
        (8, 16, 16),
        filters=16,
        multipliers=(1, 2),
        codebook_size=32,
        code_channels=16,
        adversarial_weight=0.0,
        entropy_temperature=0.1,
        learning_rate=2e-3,
        betas=(0.9, 0.99),
        revive_after=10,
    )
    assert module.discriminator is None
    record = Record()
    logger = TensorBoardLogger(str(tmp_path), name="", version="")
    runner = trained(module, 90, tmp_path, content, callbacks=[record], val_check_interval=90, logger=logger)
    first, last = record.logged[0], record.logged[-1]
    assert last["train/loss"] < first["train/loss"]
    assert last["train/reconstruction"] < 0.1 * first["train/reconstruction"]
    assert last["train/codes_used"] > 0.5
    assert last["train/perplexity"] > 8
    assert runner.callback_metrics["val/psnr"] > 18
    assert runner.callback_metrics["val/codes_used"] > 0.5
    tokenizer = VideoVQ(str(tmp_path / "tokenizer.safetensors"))
    pixels = content[0].pixels
    again = tokenizer.decode(tokenizer.encode(pixels))
    assert (again - pixels).square().mean() < 0.2 * pixels.var()
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0}).Reload()
    assert {"train/perplexity", "train/codes_used", "val/perplexity", "val/codes_used"} <= set(events.Tags()["scalars"])
    (picture,) = events.Images("val/reconstructions")  # four clips, each in two rows of eight frames
    assert (picture.height, picture.width) == (2 * 4 * 16, 8 * 16)


def test_pictures_train_the_same_way(tmp_path: Path) -> None:
    content = batches(PICTURE, count=2, size=8)
    settings = {"adversarial_weight": 0.0, "entropy_temperature": 0.1, "learning_rate": 5e-3, "betas": (0.9, 0.99)}
    module = tiny(PICTURE, **settings, revive_after=10)
    record = Record()
    trained(module, 80, tmp_path, content, callbacks=[record])
    assert record.logged[-1]["train/reconstruction"] < 0.3 * record.logged[0]["train/reconstruction"]
    path = str(tmp_path / "tokenizer.safetensors")
    tokenizer = build_image_tokenizer("elt_lightning.tokenizers.video_vq.ImageVQ", path)
    assert isinstance(tokenizer, ImageTokenizer)
    assert (tokenizer.downsampling, tokenizer.codebook_size, tokenizer.latent_channels) == (2, 16, None)
    assert tokenizer.code_shape(16, 24) == (8, 12)
    stored = tokenizer.store(content[0].pixels)
    assert (stored.dtype, stored.shape) == (torch.int16, (8, 64))
    assert tokenizer.decode(stored.long()).shape == (8, 3, 16, 16)
    assert tokenizer.decode(torch.zeros(1, 144, dtype=torch.int64)).shape == (1, 3, 24, 24)
    with pytest.raises(ValueError, match="150 tokens"):
        tokenizer.decode(torch.zeros(1, 150, dtype=torch.int64))


def test_the_discriminator_waits_for_its_start(tmp_path: Path) -> None:
    module = tiny(adversarial_start=3)
    assert module.discriminator is not None
    before = weights(module.discriminator)
    record = Record(lambda module: (weights(module.discriminator), weights(module.network)))
    runner = trained(module, 5, tmp_path, callbacks=[record], accumulate_grad_batches=2)
    judges = [values[0] for values in record.values[1::2]]
    for step, judge in enumerate(judges):
        same = all(torch.equal(mine, theirs) for mine, theirs in zip(judge, before, strict=True))
        assert same == (step < 3)
    assert ["train/r1" in logged for logged in record.logged] == [False] * 6 + [True] * 4
    networks = [values[1] for values in record.values[1::2]]
    assert all(not torch.equal(a[0], b[0]) for a, b in pairwise(networks))
    (optimizer,) = runner.optimizers
    assert {int(optimizer.state[weight]["step"]) for weight in module.discriminator.parameters()} == {2}
    assert {int(optimizer.state[weight]["step"]) for weight in module.network.parameters()} == {5}
    assert runner.global_step == 5


def test_r1_comes_every_few_steps_with_that_much_more_weight(tmp_path: Path) -> None:
    module = tiny(r1_every=3)
    assert module.weights["r1"] == 30
    calls: list[int] = []
    original = module.adversarial_losses

    def spied(*arguments: Any) -> dict[str, Tensor]:
        losses = original(*arguments)
        if "r1" in losses:
            calls.append(module.global_step)
        return losses

    module.adversarial_losses = spied  # type: ignore[method-assign]
    trained(module, 7, tmp_path)
    assert calls == [0, 3, 6]


def test_the_average_follows_its_formula_once_a_step(tmp_path: Path) -> None:
    module = tiny(ema_decay=0.3, learning_rate=1e-2, learning_rate_schedule=LearningRateSchedule(warmup_steps=2))
    expected = [weight.double() for weight in weights(module.network)]
    record = Record(lambda module: weights(module.network))
    trained(module, 6, tmp_path, callbacks=[record], accumulate_grad_batches=2)
    assert len(record.values) == 12
    for step, raw in enumerate(record.values[1::2]):
        decay = min(0.3, (1 + step) / (10 + step))
        expected = [decay * mean + (1 - decay) * new.double() for mean, new in zip(expected, raw, strict=True)]
    for mean, found in zip(expected, weights(module.average), strict=True):
        assert (mean - found).abs().max() < 1e-5
    assert not any(parameter.requires_grad for parameter in module.average.parameters())


def test_codes_that_nothing_uses_go_where_vectors_are(tmp_path: Path) -> None:
    module = tiny(revive_after=3, adversarial_weight=0.0)
    far = module.network.quantizer.codebook.detach().clone()
    far[8:] += 100
    for network in (module.network, module.average):
        network.quantizer.codebook.data.copy_(far)
    read = Record(lambda module: (module.network.quantizer.codebook.detach().clone(), module.last_used.clone()))
    trained(module, 5, tmp_path, callbacks=[read])
    for step in range(3):
        assert (read.values[step][0][8:] > 50).all()
    codebook, last_used = read.values[3]
    candidates = module.candidates
    assert codebook.abs().max() < 50
    assert (last_used[8:] == 3).all()
    assert (module.average.quantizer.codebook.abs() < 50).all()
    assert read.values[4][0].shape == (16, 8)
    assert candidates.shape == (2 * 2 * 8 * 8, 8)

    # which vectors: decided by seed and step alone, all different, and the first device's for every device
    module.last_used.fill_(20)
    module.last_used[[2, 5, 11]] = 0
    vectors = torch.randn(7, 8, generator=torch.Generator().manual_seed(0))
    drawn = draw_vectors(vectors, 3, module.seed, 20)
    assert torch.equal(drawn, draw_vectors(vectors, 3, module.seed, 20))
    assert not torch.equal(drawn, draw_vectors(vectors, 3, module.seed, 21))
    assert not torch.equal(drawn, draw_vectors(vectors, 3, module.seed + 1, 20))
    assert len({tuple(row) for row in drawn.tolist()} & {tuple(row) for row in vectors.tolist()}) == 3
    module.candidates = vectors
    before = module.network.quantizer.codebook.detach().clone()
    module.revive_codes(20)
    for network in (module.network, module.average):
        assert torch.equal(network.quantizer.codebook[[2, 5, 11]], drawn)
    kept = [code for code in range(16) if code not in (2, 5, 11)]
    assert torch.equal(module.network.quantizer.codebook[kept], before[kept])
    assert (module.last_used == 20).all()
    module.last_used.zero_()
    module.revive_codes(40)
    assert (module.last_used == 40).tolist() == [True] * 7 + [False] * 9
    module.candidates = torch.full((16, 8), torch.nan)
    module.revive_codes(80)
    assert module.network.quantizer.codebook.isfinite().all()


def test_clips_come_back_from_the_file_as_the_average_gives_them(tmp_path: Path) -> None:
    module = tiny(adversarial_weight=0.0, learning_rate=1e-2)
    trained(module, 3, tmp_path)
    path = tmp_path / "tokenizer.safetensors"
    tokenizer = VideoVQ(str(path))
    assert not any(parameter.requires_grad for parameter in tokenizer.parameters())
    pixels = batches(CLIP, seed=5)[0].pixels
    with torch.no_grad():
        expected, quantized = module.average(pixels)
    codes = tokenizer.encode(pixels)
    assert codes.shape == (2, 2 * 8 * 8)
    assert torch.equal(codes, quantized.codes.unflatten(0, (2, -1)))
    assert torch.equal(tokenizer.decode(codes), expected.clamp(0, 1))
    assert torch.equal(tokenizer.store(pixels), codes.to(torch.int16))
    assert (tokenizer.codebook_size, tokenizer.code_shape(4, 16, 16)) == (16, (2, 8, 8))
    assert tokenizer.code_shape(16, 32, 8) == (8, 16, 4)
    longer = tokenizer.decode(codes.flatten()[None])
    assert longer.shape == (1, 3, 8, 16, 16)
    with pytest.raises(ValueError, match="100 tokens"):
        tokenizer.decode(torch.zeros(1, 100, dtype=torch.int64))
    shown = tokenizer.present(tokenizer.decode(codes))
    assert (shown.dtype, shown.shape) == (torch.uint8, pixels.shape)
    description = json.loads(json.dumps(tokenizer.description()))
    assert description["sha256"] == sha256(path)
    again = load_tokenizer(description)
    assert torch.equal(again.encode(pixels), codes)


def test_a_resumed_training_ends_with_the_same_weights(tmp_path: Path) -> None:
    settings = {
        "revive_after": 2,
        "adversarial_start": 2,
        "r1_every": 2,
        "learning_rate_schedule": LearningRateSchedule(2, "cosine"),
    }
    straight = tiny(**settings)
    trained(straight, 6, tmp_path / "straight")
    half = tiny(**settings)
    # the schedule is of six steps: so the run stops at three without being shorter
    runner = trained(half, 6, tmp_path / "half", callbacks=[StopAfter(3)])
    assert runner.global_step == 3
    runner.save_checkpoint(tmp_path / "three.ckpt")
    resumed = tiny(seed=9, **settings)
    resumed.resumed_from = str(tmp_path / "three.ckpt")  # type: ignore[assignment]
    content = batches(CLIP)
    trained(resumed, 6, tmp_path / "resumed", content[1:] + content[:1])  # step 3 meets the second batch
    state = straight.state_dict()
    assert {"average.quantizer.codebook", "last_used"} <= state.keys()
    for name, value in resumed.state_dict().items():
        assert torch.equal(value, state[name]), name
    ends = [load_file(tmp_path / name / "tokenizer.safetensors") for name in ("straight", "resumed")]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


class StopAfter(Callback):
    """Ends a run early."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        trainer.should_stop = trainer.global_step >= self.steps


def test_a_checkpoint_writes_the_tokenizer_and_another_networks_is_refused(tmp_path: Path) -> None:
    module = tiny()
    runner = trained(module, 1, tmp_path)
    (tmp_path / "tokenizer.safetensors").unlink()
    runner.save_checkpoint(tmp_path / "one.ckpt")
    stored = load_file(tmp_path / "tokenizer.safetensors")
    assert all(torch.equal(stored[name], value) for name, value in module.average.state_dict().items())
    other = tiny(codebook_size=20)
    other.resumed_from = str(tmp_path / "one.ckpt")  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"of another tokenizer .*network.quantizer.codebook|average") as error:
        trained(other, 2, tmp_path / "other")
    assert "\n" not in str(error.value)


def test_norms_are_clipped_for_each_network_apart(tmp_path: Path) -> None:
    class Norms(Callback):
        def on_before_zero_grad(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
            for network in (pl_module.network, pl_module.discriminator):
                slopes = [weight.grad for weight in network.parameters() if weight.grad is not None]
                if slopes:
                    norms.append(float(torch.stack([slope.norm() for slope in slopes]).norm()))

    norms: list[float] = []
    trained(tiny(), 2, tmp_path, callbacks=[Norms()], gradient_clip_val=0.01)
    assert norms == pytest.approx([0.01, 0.01], rel=1e-3)  # the first step's, seen when the second begins


@pytest.mark.parametrize("scaled", [False, True])
def test_a_skipped_step_moves_no_average(scaled: bool, tmp_path: Path) -> None:
    """With a gradient scaler too, which leaves gradients where they are."""

    class Spoil(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
            if trainer.global_step == 1:
                next(pl_module.parameters()).grad.fill_(torch.nan)  # type: ignore[union-attr]

    module = tiny(revive_after=1)
    record = Record(lambda module: (weights(module.average), module.last_used.clone()))
    scaler = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=8.0))] if scaled else []
    trained(module, 2, tmp_path, callbacks=[Spoil(), SkipNonFiniteSteps(), record], plugins=scaler)
    (first, used), (second, used_then) = record.values
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(used, used_then)  # the step itself was counted


def test_mixed_precision_trains(tmp_path: Path) -> None:
    module = tiny()
    record = Record()
    trained(module, 2, tmp_path, callbacks=[record], precision="bf16-mixed")
    assert all(math.isfinite(value) for value in record.logged[-1].values())
    assert all(weight.dtype == torch.float32 for weight in module.parameters())


def test_data_of_another_size_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"samples of 3×4×8×8 .* takes 3×4×16×16: set model.sample_shape"):
        trained(tiny(), 1, tmp_path, batches((4, 8, 8)))


def test_settings_that_mean_nothing_are_refused() -> None:
    for wrong in ({"ema_decay": 1.0}, {"r1_every": 0}, {"revive_after": -1}, {"adversarial_weight": -0.1}):
        with pytest.raises(ValueError, match="ema_decay must lie"):
            tiny(**wrong)
    with pytest.raises(ValueError, match="not a multiple"):
        tiny((5, 16, 16))
    with pytest.raises(ValueError, match="inflate_from is for clips"):
        tiny(PICTURE, inflate_from="tokenizer.safetensors")


# Inflation.


def test_a_trained_tokenizer_of_pictures_starts_one_of_clips(tmp_path: Path) -> None:
    flat = tiny(PICTURE, adversarial_weight=0.0, learning_rate=1e-2)
    trained(flat, 3, tmp_path / "flat")
    path = str(tmp_path / "flat" / "tokenizer.safetensors")
    picture = batches(PICTURE, seed=3)[0].pixels
    expected = ImageVQ(path).decode(ImageVQ(path).encode(picture))

    deep = tiny(CLIP, seed=4, inflate_from=path, adversarial_weight=0.0, learning_rate=1e-2)
    trained(deep, 0, tmp_path / "deep")
    clip = picture[:, :, None].expand(-1, -1, 4, -1, -1)
    for network in (deep.network, deep.average):
        found = network(clip)[0].clamp(0, 1)
        assert (found - expected[:, :, None]).abs().max() < 1e-5
    runner = trained(deep, 2, tmp_path / "deep")
    runner.save_checkpoint(tmp_path / "deep.ckpt")
    after = weights(deep.network)
    resumed = tiny(CLIP, seed=5, inflate_from="moved away", adversarial_weight=0.0, learning_rate=1e-2)
    resumed.resumed_from = str(tmp_path / "deep.ckpt")  # type: ignore[assignment]
    trained(resumed, 2, tmp_path / "resumed")
    assert all(torch.equal(a, b) for a, b in zip(after, weights(resumed.network), strict=True))


def test_only_a_picture_tokenizer_of_the_same_shape_is_inflated(tmp_path: Path) -> None:
    flat, deep = tiny(PICTURE), tiny(CLIP)
    write_tokenizer(tmp_path / "flat.safetensors", flat.network, PICTURE)
    write_tokenizer(tmp_path / "deep.safetensors", deep.network, CLIP)
    for module, name, reason in (
        (tiny(CLIP, codebook_size=12, multipliers=(1, 3)), "flat", r"has multipliers \(1, 2\), codebook_size 16;"),
        (tiny(CLIP), "deep", "it is 3-D already;"),
        (tiny(CLIP), "nothing", "there is no tokenizer"),
    ):
        with pytest.raises(UserError, match=reason) as error:
            module.start_from(str(tmp_path / f"{name}.safetensors"))
        assert "\n" not in str(error.value)
    tiny(CLIP, temporal_levels=0, padding="zeros").start_from(str(tmp_path / "flat.safetensors"))


# The tokenizer's file.


def test_a_file_that_is_no_such_tokenizer_is_refused_in_one_line(tmp_path: Path) -> None:
    module = tiny(CLIP)
    good, bad = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    write_tokenizer(good, module.network, CLIP)
    network, shape = read_tokenizer(str(good))
    assert shape == CLIP
    assert network.settings == module.network.settings
    state = load_file(good)
    settings = {name: getattr(network.settings, name) for name in network.settings.__dataclass_fields__}
    settings["sample_shape"] = CLIP

    def refused(content: dict[str, Tensor] | bytes, metadata: dict[str, str] | None = None) -> str:
        if isinstance(content, bytes):
            bad.write_bytes(content)
        else:
            save_file(content, bad, metadata)
        with pytest.raises(UserError) as error:
            VideoVQ(str(bad))
        message = str(error.value)
        assert "\n" not in message
        assert "bad.safetensors" in message
        return message

    def told(values: dict[str, Any]) -> dict[str, str]:
        return {"format": "elt_lightning.vq.1", "settings": json.dumps(values)}

    refused(b"cut off")
    assert "metadata" in refused(state)
    assert "settings" in refused(state, {"format": "elt_lightning.vq.1"})
    assert "settings" in refused(state, told(settings | {"new": 1}))
    assert "not a multiple" in refused(state, told(settings | {"sample_shape": [3, 5, 5]}))
    message = refused(state | {"extra": torch.zeros(1)}, told(settings | {"codebook_size": 20}))
    assert "1 extra such as extra, 1 of another shape such as quantizer.codebook (16, 8)" in message
    with pytest.raises(UserError, match="of clips: VideoVQ reads it, not ImageVQ"):
        ImageVQ(str(good))
    with pytest.raises(UserError, match=r"no tokenizer .*nothing"):
        VideoVQ(str(tmp_path / "nothing"))


# Pictures and the perceptual loss.


def test_originals_stand_above_reconstructions() -> None:
    clips = torch.arange(2 * 3 * 4).view(2, 1, 3, 4, 1).expand(-1, 3, -1, -1, 5) / 255
    picture = side_by_side(clips, 1 - clips)
    assert (picture.shape, picture.dtype) == ((2 * 2 * 4, 3 * 5, 3), torch.uint8)
    for clip in range(2):
        for frame in range(3):
            for row in range(4):
                value = (clip * 3 + frame) * 4 + row
                columns = slice(5 * frame, 5 * frame + 5)
                assert (picture[8 * clip + row, columns] == value).all()
                assert (picture[8 * clip + 4 + row, columns] == 255 - value).all()
    pictures = clips[:, :, 0]
    shown = side_by_side(pictures, 1 - pictures)
    assert shown.shape == (2 * 4, 2 * 5, 3)
    assert shown[1].unique().tolist() == [1, 13]
    assert shown[5].unique().tolist() == [242, 254]


def vgg16_state(seed: int = 0) -> dict[str, Tensor]:
    """Torchvision's layout; the linear layers, which are not used, take a few bytes."""
    generator = torch.Generator().manual_seed(seed)
    state, place, before = {}, 0, 3
    for stage in STAGES:
        for channels in stage:
            kernel = torch.randn(channels, before, 3, 3, generator=generator) * (2 / (9 * before)) ** 0.5
            state[f"features.{place}.weight"] = kernel
            state[f"features.{place}.bias"] = 0.1 * torch.randn(channels, generator=generator)
            place, before = place + 2, channels
        place += 1
    for layer, outputs, inputs in ((0, 4096, 512 * 49), (3, 4096, 4096), (6, 1000, 4096)):
        state[f"classifier.{layer}.weight"] = torch.zeros(()).expand(outputs, inputs)
        state[f"classifier.{layer}.bias"] = torch.zeros(outputs)
    return state


@pytest.mark.slow
def test_the_perceptual_loss_compares_unit_features_of_five_stages(tmp_path: Path) -> None:
    state = vgg16_state()
    assert [name for name in state if name.startswith("features")][-1] == "features.28.bias"
    torch.save(state, tmp_path / "vgg16.pth")
    path = str(tmp_path / "vgg16.pth")
    module = tiny(CLIP, perceptual_weights=path)
    assert not any("features" in name for name in module.state_dict())
    perceptual = PerceptualLoss(path)
    clips = [batches(CLIP, count=1, seed=seed)[0].pixels for seed in (0, 1)]

    expected = torch.zeros(())
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    for clip in range(2):
        for frame in range(4):
            both = [((pixels[clip, :, frame] - mean.view(3, 1, 1)) / deviation.view(3, 1, 1))[None] for pixels in clips]
            place = 0
            for number, stage in enumerate(STAGES):
                both = [F.max_pool2d(x, 2) if number else x for x in both]
                for _ in stage:
                    kernel, bias = state[f"features.{place}.weight"], state[f"features.{place}.bias"]
                    both = [F.conv2d(x, kernel, bias, padding=1).clamp(min=0) for x in both]
                    place += 2
                place += 1
                units = [x / x.square().sum(1, keepdim=True).sqrt() for x in both]
                expected = expected + (units[0] - units[1]).square().sum(1).mean() / 8
    reconstruction = clips[0].clone().requires_grad_()
    found = perceptual(reconstruction, clips[1])
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    assert found > 0.1
    found.backward()
    assert reconstruction.grad.abs().max() > 0
    assert perceptual(clips[0], clips[0]).item() == 0
    record = Record()
    trained(module, 1, tmp_path, callbacks=[record])
    assert record.logged[0]["train/perceptual"] > 0


def test_other_weights_than_vgg16s_are_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    small = {name: torch.zeros(()).expand(value.shape) for name, value in vgg16_state().items()}

    def refused() -> str:
        with pytest.raises(UserError) as error:
            PerceptualLoss(str(path))
        message = str(error.value)
        assert "\n" not in message
        assert "weights.pth" in message
        assert "vgg16-397923af.pth" in message
        return message

    refused()
    path.write_bytes(b"no weights")
    refused()
    torch.save([1], path)
    refused()
    torch.save({name: value for name, value in small.items() if name != "features.7.bias"}, path)
    assert "1 missing such as features.7.bias" in refused()
