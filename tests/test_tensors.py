import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from elt_lightning.cli import main
from elt_lightning.data.base import Batch
from elt_lightning.data.tensors import TensorDataModule, TensorFiles
from elt_lightning.data.toy.digits import DigitImagesDataModule, DigitsDataModule
from elt_lightning.data.toy.latin_square_images import LatinSquareImagesDataModule
from elt_lightning.data.toy.latin_squares import LatinSquaresDataModule
from elt_lightning.errors import UserError
from elt_lightning.tokenizers.base import to_bytes
from elt_lightning.tokenizers.continuous import PixelScaling

CONFIGS = Path(__file__).parent.parent / "configs"


def write(path: Path, count: int, shape: tuple[int, ...] = (1, 8, 8), codes: int | None = None, seed: int = 0) -> str:
    """Random floats, or integers below ``codes``; labels 0, 1, 2, 0, …"""
    generator = torch.Generator().manual_seed(seed)
    if codes is None:
        x = torch.randn(count, *shape, generator=generator)
    else:
        x = torch.randint(codes, (count, *shape), generator=generator, dtype=torch.int16)
    save_file({"x": x, "labels": torch.arange(count) % 3}, path)
    return str(path)


@pytest.fixture
def latents(tmp_path: Path) -> list[str]:
    return [write(tmp_path / f"latents_{part}.safetensors", 10 + part, seed=part) for part in range(3)]


def test_files_one_after_the_other_are_one_set(latents: list[str]) -> None:
    files = TensorFiles(latents)
    whole = torch.cat([torch.randn(10 + p, 1, 8, 8, generator=torch.Generator().manual_seed(p)) for p in range(3)])
    labels = torch.cat([torch.arange(10 + p) % 3 for p in range(3)])
    assert (len(files), files.sample_shape) == (33, (1, 8, 8))
    for indices in (torch.arange(33), torch.randperm(33)[:7], torch.tensor([20]), torch.tensor([32, 0, 10, 9])):
        batch = files[indices]
        assert torch.equal(batch.x, whole[indices])
        assert torch.equal(batch.labels, labels[indices])
        assert torch.equal(batch.indices, indices)


def test_a_loader_process_maps_the_files_itself(latents: list[str]) -> None:
    files = TensorFiles(latents)
    packed = pickle.dumps(files)
    assert len(packed) < 1000
    assert torch.equal(pickle.loads(packed)[torch.arange(33)].x, files[torch.arange(33)].x)


def test_a_file_is_mapped_not_read(tmp_path: Path) -> None:
    path = write(tmp_path / "large.safetensors", 100, (1, 400, 400))  # 64 MB
    before = resident_bytes()
    files = TensorFiles([path])
    assert resident_bytes() - before < files.parts[0].x.nbytes / 2
    assert torch.equal(files[torch.tensor([99])].x, files.parts[0].x[99:])


def resident_bytes() -> int:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("tells the resident memory on Linux alone")
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def test_what_the_network_needs_to_know_comes_from_the_files(latents: list[str], tmp_path: Path) -> None:
    data = TensorDataModule(latents[:2], latents[2:], num_classes=3)
    assert (data.input_shape, data.codebook_size) == ((1, 8, 8), None)
    assert (len(data.training_set()), len(data.val_set())) == (21, 12)
    assert isinstance(data.tokenizer, PixelScaling)
    tokens = write(tmp_path / "tokens.safetensors", 9, (16,), codes=5)
    data = TensorDataModule([tokens], [tokens], num_classes=3, codebook_size=5, tokenizer=PixelScaling())
    assert (data.input_shape, data.codebook_size) == ((16,), 5)
    assert data.training_set()[torch.arange(2)].x.dtype == torch.int64


def wrong_settings(folder: Path) -> Iterator[tuple[dict[str, object], str]]:
    """Settings that must be refused, and what the message has to name."""
    good, tokens = write(folder / "good.safetensors", 6), write(folder / "tokens.safetensors", 6, (16,), codes=5)
    contents: dict[str, dict[str, Tensor]] = {
        "keys": {"latents": torch.zeros(2, 1, 8, 8)},
        "flat": {"x": torch.zeros(2, 8), "labels": torch.zeros(2).long()},
        "labels": {"x": torch.zeros(2, 1, 8, 8), "labels": torch.zeros(3).long()},
        "kinds": {"x": torch.zeros(2, 1, 8, 8), "labels": torch.zeros(2)},
        "empty": {"x": torch.zeros(0, 1, 8, 8), "labels": torch.zeros(0).long()},
        "other": {"x": torch.zeros(2, 1, 4, 4), "labels": torch.zeros(2).long()},
        "channels": {"x": torch.zeros(2, 4, 8, 8), "labels": torch.zeros(2).long()},
    }
    for name, content in contents.items():
        save_file(content, folder / f"{name}.safetensors")
    (folder / "text.safetensors").write_text("not tensors")
    for name in ("missing", "text", "keys", "flat", "labels", "kinds", "empty"):
        path = str(folder / f"{name}.safetensors")
        yield {"training_files": [path], "val_files": [good]}, path
    other, channels = str(folder / "other.safetensors"), str(folder / "channels.safetensors")
    yield {"training_files": [good, other], "val_files": [good]}, other
    yield {"training_files": [good], "val_files": [other]}, other
    yield {"training_files": [], "val_files": [good]}, "training_files"
    yield {"training_files": [good], "val_files": [good], "num_classes": 2}, "num_classes is 2"
    yield {"training_files": [channels], "val_files": [channels]}, "tokenizer"
    yield {"training_files": [good], "val_files": [good], "codebook_size": 5}, "codebook_size"
    yield {"training_files": [tokens], "val_files": [tokens]}, "codebook_size"
    yield {"training_files": [tokens], "val_files": [tokens], "codebook_size": 5}, "tokenizer"
    wrong_codes = {"codebook_size": 4, "tokenizer": PixelScaling()}
    yield {"training_files": [tokens], "val_files": [tokens], **wrong_codes}, "codebook_size is 4"


def test_what_the_user_can_mend_is_said_in_one_line(tmp_path: Path) -> None:
    for settings, telling in wrong_settings(tmp_path):
        with pytest.raises(UserError) as refusal:
            TensorDataModule(**({"num_classes": 3} | settings))  # type: ignore[arg-type]
        assert telling in str(refusal.value)
        assert "\n" not in str(refusal.value)


def test_the_command_line_trains_on_files_and_compares_loop_counts_by_loss(
    latents: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    files = [f"--data.init_args.training_files=[{','.join(latents[:2])}]"]
    files += [f"--data.init_args.val_files=[{latents[2]}]"]
    data = ["--data=elt_lightning.data.tensors.TensorDataModule", *files, "--data.init_args.num_classes=3"]
    data += ["--data.init_args.batch_size=8"]
    small = ["--model.network.init_args.width=16", "--model.network.init_args.num_heads=2"]
    small += ["--model.sampler.init_args.steps=2", "--loop_metrics.num_samples=4"]
    steps = ["--trainer.max_steps=3", "--trainer.val_check_interval=2", "--run_dir=runs/files"]
    config = ["--config", str(CONFIGS / "digits_diffusion.yaml")]
    assert main(["fit", *config, *data, *small, *steps]) == 0
    checkpoint = ["--ckpt_path", "runs/files/checkpoints/last.ckpt"]
    assert main(["test", *checkpoint, "--loops=1,4,6", "--run_dir=runs/files/test"]) == 0
    report = json.loads(Path("runs/files/test/loops.json").read_text())
    assert (report["primary_metric"], report["higher_is_better"], report["feature_network"]) == ("loss", False, None)
    assert [row["loops"] for row in report["rows"]] == [1, 4, 6]
    assert all(set(row["metrics"]) == {"loss"} and row["metrics"]["loss"]["mean"] > 0 for row in report["rows"])
    assert main(["sample", *checkpoint, "--num=2", "--output=grid.png"]) == 0
    capsys.readouterr()
    assert main(["fit", *config, *data, *small, *steps[:2], "--data.init_args.val_files=[gone.safetensors]"]) == 2
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("elt: error: ")] == [
        "elt: error: the data file gone.safetensors does not exist"
    ]


def test_pixels_are_scaled_and_come_back() -> None:
    tokenizer = PixelScaling()
    grey = torch.arange(256).view(1, 1, 16, 16)
    scaled = tokenizer.encode(grey / 255)
    assert (float(scaled.min()), float(scaled.max())) == (-1, 1)
    assert torch.equal(to_bytes(tokenizer.decode(scaled)), grey.to(torch.uint8))
    assert tokenizer.decode(torch.tensor([-3.0, 3.0])).tolist() == [0, 1]
    class_path = "elt_lightning.tokenizers.continuous.PixelScaling"
    assert tokenizer.description() == {"class_path": class_path, "init_args": {}}


def test_digit_images_are_the_digits_of_the_tokens(tmp_path: Path) -> None:
    tokens, images = DigitsDataModule(root=str(tmp_path)), DigitImagesDataModule(root=str(tmp_path))
    assert (images.input_shape, images.codebook_size) == ((1, 8, 8), None)
    assert (tokens.input_shape, tokens.codebook_size) == ((8, 8), 17)
    for ours, theirs in zip(both_sets(images), both_sets(tokens), strict=True):
        assert torch.equal(images.tokenizer.decode(ours.x), tokens.tokenizer.decode(theirs.x))
        assert torch.equal(ours.labels, theirs.labels)


def both_sets(data: DigitsDataModule) -> list[Batch]:
    return [files[torch.arange(len(files))] for files in (data.training_set(), data.val_set())]


def test_latin_square_images_are_judged_as_the_tokens_are(latin_squares_root: Path) -> None:
    root = str(latin_squares_root)
    images = LatinSquareImagesDataModule(root=root, num_train=30, num_val=200)
    tokens = LatinSquaresDataModule(root=root, num_val=200)
    assert (images.input_shape, images.codebook_size, images.num_classes) == ((1, 40, 40), None, 5)
    images.prepare_data()
    images.setup("fit")
    assert len(images.training_set()) == 30
    batch = images.val_set()[torch.arange(200)]
    assert (batch.x.shape[1:], float(batch.x.min()), float(batch.x.max())) == ((1, 40, 40), -1, 1)
    scores, distance = images.build_metrics()
    for metric in (scores, distance):
        metric.update(images.tokenizer.decode(batch.x), batch.labels)
    assert scores.compute()["valid_lines"] > 0.8
    # Held-out images are the very pictures that the distance's reference is made of, as for the tokens.
    assert distance.compute()["fd_digits"] < 1e-6
    assert torch.equal(distance.reference.mean, tokens.build_metrics()[1].reference.mean)
