"""`elt encode imagenet` end to end, on small real folders."""

import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from image_folders import CLASSES, write_broken, write_class_folders, write_flat, write_label_files, write_tars
from PIL import Image
from torch import Tensor

from elt_lightning.cli import main
from elt_lightning.commands.encode import run
from elt_lightning.data import encode
from elt_lightning.data.crops import adm_centre_crop, decode_picture
from elt_lightning.data.shards import ShardIndex
from elt_lightning.errors import UserError
from elt_lightning.files import sha256
from elt_lightning.tokenizers.base import ImageTokenizer
from elt_lightning.training import meter


class Brightness(ImageTokenizer):
    """The mean of each 4×4 pixels as one of as many levels as a file says."""

    downsampling = 4

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        self.codebook_size = int(Path(path).read_text())

    def encode(self, pixels: Tensor) -> Tensor:
        means = torch.nn.functional.avg_pool2d(pixels.mean(1, keepdim=True), 4)
        return (means * (self.codebook_size or 0) * 0.999).long().flatten(1)

    def decode(self, codes: Tensor) -> Tensor:
        raise NotImplementedError

    def description(self) -> dict[str, Any]:
        return {"class_path": "test_encode.Brightness", "init_args": {"path": self.path}, "sha256": sha256(self.path)}


class Moments(ImageTokenizer):
    """Mean and standard deviation of each colour in 8×8 pixels."""

    downsampling, latent_channels, latent_scale = 8, 3, 0.5

    def encode(self, pixels: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(pixels, 8)

    def store(self, pixels: Tensor) -> Tensor:
        means = self.encode(pixels)
        return torch.cat([means, (self.encode(pixels**2) - means**2).clamp_min(0).sqrt()], 1).half()

    def decode(self, codes: Tensor) -> Tensor:
        raise NotImplementedError

    def description(self) -> dict[str, Any]:
        return {"class_path": "test_encode.Moments", "init_args": {}}


class Stuck(Moments):
    """Halts at the picture that the environment says, so that it can be killed there."""

    pictures = 0

    def store(self, pixels: Tensor) -> Tensor:
        self.pictures += len(pixels)
        if self.pictures == int(os.environ.get("STUCK_AT", "0")):
            time.sleep(600)
        return super().store(pixels)


class NotFinite(Moments):
    def store(self, pixels: Tensor) -> Tensor:
        return super().store(pixels) / 0


class Misshapen(Moments):
    latent_scale = None


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fifteen pictures of three classes."""
    root = tmp_path_factory.mktemp("imagenet") / "train"
    write_class_folders(root)
    return root


def elt_encode(root: Path | str, output: Path, *flags: str, tokenizer: str = "test_encode.Moments") -> None:
    small = ["--size=32", "--samples_per_shard=4", "--batch_size=3", "--num_workers=0", "--tokenizer", tokenizer]
    run("encode", ["imagenet", "--root", str(root), "--output", str(output), *small, *flags])


def read(folder: Path) -> dict[int, tuple[np.ndarray, dict[str, Any]]]:
    """Read all samples of the shards that the index lists, by number."""
    samples = {}
    for shard in ShardIndex.read(str(folder)).shards:
        found = list(webdataset.tarfile_to_samples()([{"url": str(folder / shard.name)}]))
        assert len(found) == shard.num_samples
        for members in found:
            codes = np.load(io.BytesIO(members["codes.npy"]), allow_pickle=False)
            assert int(members["__key__"]) not in samples
            samples[int(members["__key__"])] = (codes, json.loads(members["json"]))
    return samples


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- what is written ----


def test_pixels_come_out_as_the_crop_says_with_labels_sources_and_mirror_images(root: Path, tmp_path: Path) -> None:
    elt_encode(root, tmp_path / "out", "--mirrored", tokenizer="pixels")
    index = ShardIndex.read(str(tmp_path / "out"))
    assert (index.classes, index.image_size, index.copies) == (CLASSES, 32, 2)
    assert (index.input_shape, index.stored_shape) == ((3, 32, 32), (3, 32, 32))
    assert (index.codebook_size, index.latent_scale, index.unreadable) == (None, None, ())
    assert [(shard.name, shard.num_samples) for shard in index.shards] == [
        ("00000.tar", 4), ("00001.tar", 4), ("00002.tar", 4), ("00003.tar", 3)
    ]  # fmt: skip
    samples = read(tmp_path / "out")
    assert sorted(samples) == list(range(15))
    assert len({about["source"] for _, about in samples.values()}) == 15
    for codes, about in samples.values():
        picture = Image.open(root / about["source"]).convert("RGB")
        expected = (adm_centre_crop(picture, 32) / 127.5 - 1).transpose(2, 0, 1).astype(np.float16)
        assert codes.dtype == np.float16
        assert np.allclose(codes[0], expected, atol=1e-3)
        assert np.array_equal(codes[1], codes[0][..., ::-1])
        assert CLASSES[about["label"]] == about["source"][:9]


def test_tokens_and_moments_are_what_the_tokenizer_gives(root: Path, tmp_path: Path) -> None:
    levels = tmp_path / "levels.txt"
    levels.write_text("300")
    elt_encode(root, tmp_path / "tokens", f"--tokenizer_path={levels}", tokenizer="test_encode.Brightness")
    elt_encode(root, tmp_path / "moments", "--mirrored")
    tokens, moments = ShardIndex.read(str(tmp_path / "tokens")), ShardIndex.read(str(tmp_path / "moments"))
    assert (tokens.input_shape, tokens.stored_shape, tokens.codebook_size) == ((8, 8), (64,), 300)
    assert tokens.tokenizer["sha256"] == sha256(levels)
    assert (moments.input_shape, moments.stored_shape, moments.latent_scale) == ((3, 4, 4), (6, 4, 4), 0.5)
    samples = read(tmp_path / "moments")
    for number, (codes, about) in read(tmp_path / "tokens").items():
        crop = adm_centre_crop(Image.open(root / about["source"]).convert("RGB"), 32) / 255
        patches = crop.reshape(8, 4, 8, 4, 3).mean((1, 3, 4))
        assert codes.dtype == np.int16
        assert np.abs(codes[0].reshape(8, 8) - np.floor(patches * 300 * 0.999)).max() <= 1
        for copy, pixels in zip(samples[number][0], (crop, crop[:, ::-1]), strict=True):
            blocks = pixels.reshape(4, 8, 4, 8, 3)
            expected = np.concatenate([blocks.mean((1, 3)), blocks.std((1, 3))], -1).transpose(2, 0, 1)
            assert np.allclose(copy, expected, atol=2e-3)


def test_the_result_depends_neither_on_batches_nor_on_processes(root: Path, tmp_path: Path) -> None:
    elt_encode(root, tmp_path / "a")
    elt_encode(root, tmp_path / "b", "--batch_size=1", "--num_workers=2")
    elt_encode(root, tmp_path / "c", "--batch_size=64")
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == contents(tmp_path / "c")


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_shares_together_make_what_one_process_makes(
    root: Path, tmp_path: Path, order: tuple[int, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    elt_encode(root, tmp_path / "whole")
    for done, number in enumerate(order):
        assert not (tmp_path / "shares" / "index.json").exists()
        elt_encode(root, tmp_path / "shares", f"--shard={number}/3")
        assert ("are missing" in capsys.readouterr().out) == (done < 2)
    assert contents(tmp_path / "shares") == contents(tmp_path / "whole")


def test_more_shares_than_shards_leave_some_without_work(root: Path, tmp_path: Path) -> None:
    for number in (7, *range(7)):
        elt_encode(root, tmp_path / "out", f"--shard={number}/8")
    assert len(read(tmp_path / "out")) == 15


def test_tars_become_a_shard_each(tmp_path: Path) -> None:
    written = write_tars(tmp_path / "tars", counts=(4, 0, 3))
    pattern = str(tmp_path / "tars" / "train-{000..002}.tar")
    elt_encode(pattern, tmp_path / "one", "--shard=1/2")
    elt_encode(pattern, tmp_path / "one", "--shard=0/2")
    index = ShardIndex.read(str(tmp_path / "one"))
    assert index.classes == ("0", "1", "2", "3")
    assert [(shard.name, shard.num_samples) for shard in index.shards] == [("00000.tar", 4), ("00002.tar", 3)]
    samples = read(tmp_path / "one")
    for (content, label), number in zip(written, sorted(samples), strict=True):
        codes, about = samples[number]
        assert about["label"] == label
        crop = adm_centre_crop(decode_picture(content), 32) / 255
        assert np.allclose(codes[0, :3], crop.reshape(4, 8, 4, 8, 3).mean((1, 3)).transpose(2, 0, 1), atol=1e-3)
    elt_encode(tmp_path / "tars", tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_validation_set_takes_its_labels_from_a_file_and_its_classes_from_the_training_set(
    root: Path, tmp_path: Path
) -> None:
    elt_encode(root, tmp_path / "train")
    classes = write_flat(tmp_path / "flat")
    classes = [CLASSES[2] if name == CLASSES[0] else name for name in classes]  # one class does not occur
    labels = write_label_files(tmp_path, tmp_path / "flat", classes)
    expected = dict(zip(sorted(os.listdir(tmp_path / "flat")), classes, strict=True))
    for place, (kind, path) in enumerate(labels.items()):
        location = tmp_path / "train" / ("index.json" if place % 2 else "")
        elt_encode(tmp_path / "flat", tmp_path / kind, f"--labels={path}", f"--classes_from={location}")
        assert ShardIndex.read(str(tmp_path / kind)).classes == CLASSES
        samples = read(tmp_path / kind).values()
        assert {about["source"]: CLASSES[about["label"]] for _, about in samples} == expected


# ---- going on ----


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("the device is gone")])
def test_a_run_that_was_stopped_goes_on_where_it_was(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    elt_encode(root, tmp_path / "whole")
    encoded = []

    def fail_in_the_third_shard(*arguments: Any) -> np.ndarray:
        encoded.append(arguments)
        if len(encoded) == 6:  # two batches to a shard
            raise error
        return original(*arguments)

    original = encode.encode_pixels
    monkeypatch.setattr(encode, "encode_pixels", fail_in_the_third_shard)
    with pytest.raises(type(error)):
        elt_encode(root, tmp_path / "out")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert sorted(before) == ["00000.json", "00000.tar", "00001.json", "00001.tar", "encode.json"]
    elt_encode(root, tmp_path / "out")
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert before.items() <= after.items()
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert len(encoded) == 6 + 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_to_all_processes_end_it_with_their_status_and_nothing_half_done(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], number: int
) -> None:
    """Neither are its loader processes taken for lost, which a terminal and a scheduler signal as well."""
    calls = []

    def send_in_the_second_shard(*arguments: Any) -> np.ndarray:
        calls.append(arguments)
        if len(calls) == 3:
            loaders = [process.pid for process in multiprocessing.active_children()]
            assert loaders
            for process in (*loaders, os.getpid()):
                os.kill(process or 0, number)
        return original(*arguments)

    original = encode.encode_pixels
    monkeypatch.setattr(encode, "encode_pixels", send_in_the_second_shard)
    flags = [f"--root={root}", f"--output={tmp_path / 'out'}", "--size=32", "--samples_per_shard=4", "--batch_size=3"]
    with pytest.raises(SystemExit) as ended:
        main(["encode", "imagenet", "--tokenizer=test_encode.Moments", "--num_workers=1", *flags])
    assert ended.value.code == 128 + number
    name = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}[signal.Signals(number)]
    assert capfd.readouterr().err == f"elt: ended by {name}\n"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["00000.json", "00000.tar", "encode.json"]


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_where_it_was(root: Path, tmp_path: Path) -> None:
    elt_encode(root, tmp_path / "whole", "--batch_size=1", tokenizer="test_encode.Stuck")
    code = (
        "import sys; from pathlib import Path; from test_encode import elt_encode;"
        "elt_encode(sys.argv[1], Path(sys.argv[2]), '--batch_size=1', tokenizer='test_encode.Stuck')"
    )
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(root), str(out)],
        cwd=Path(__file__).parent,
        env=os.environ | {"STUCK_AT": "10"},
    )
    while not list(out.glob(".00002.*.tar")):
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert list(out.glob(".00002.*.tar"))
    assert not (out / "00002.tar").exists()
    first = (out / "00000.tar").stat().st_mtime_ns
    elt_encode(root, out, "--batch_size=1", tokenizer="test_encode.Stuck")
    assert (out / "00000.tar").stat().st_mtime_ns == first
    assert contents(out) == contents(tmp_path / "whole")


def test_a_shard_that_was_deleted_or_left_half_done_is_made_anew(root: Path, tmp_path: Path) -> None:
    elt_encode(root, tmp_path / "out")
    whole = contents(tmp_path / "out")
    (tmp_path / "out" / "00001.tar").unlink()
    (tmp_path / "out" / "00002.json").unlink()
    (tmp_path / "out" / "00003.json").write_text('{"num_sam')
    elt_encode(root, tmp_path / "out")
    assert contents(tmp_path / "out") == whole


def test_the_index_of_a_finished_folder_can_be_made_anew(root: Path, tmp_path: Path) -> None:
    elt_encode(root, tmp_path / "out")
    whole = contents(tmp_path / "out")
    (tmp_path / "out" / "index.json").unlink()
    elt_encode(root, tmp_path / "out", "--shard=0/2")
    assert contents(tmp_path / "out") == whole


def test_two_processes_with_the_same_share_end_with_a_clear_line(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second takes what the first had begun for what a killed one left."""
    original = encode.encode_pixels

    def begin_again(*arguments: Any) -> np.ndarray:
        monkeypatch.setattr(encode, "encode_pixels", original)
        elt_encode(root, tmp_path / "out")
        return original(*arguments)

    monkeypatch.setattr(encode, "encode_pixels", begin_again)
    with pytest.raises(UserError, match="another process writes it too"):
        elt_encode(root, tmp_path / "out")
    elt_encode(root, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


# ---- settings ----


@pytest.mark.parametrize(
    ("flags", "telling"),
    [
        (["--size=64"], r"other size \(32, now 64\)"),
        (["--mirrored"], r"other mirrored \(False, now True\)"),
        (["--seed=1"], r"other seed \(0, now 1\)"),
        (["--samples_per_shard=5"], r"other samples_per_shard \(4, now 5\)"),
        (["--tokenizer=pixels"], "other tokenizer"),
        (["--classes_from=other"], "other classes"),
    ],
)
def test_a_folder_of_other_settings_is_left_alone(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], telling: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if "classes" in flags[0]:
        write_class_folders(tmp_path / "four", classes=(*CLASSES, "n09999999"))
        elt_encode(tmp_path / "four", tmp_path / "other")
    elt_encode(root, tmp_path / "out", "--shard=0/2")
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match=telling):
        elt_encode(root, tmp_path / "out", *flags)
    assert contents(tmp_path / "out") == before


def test_a_folder_of_other_pictures_or_labels_is_left_alone(tmp_path: Path) -> None:
    classes = write_flat(tmp_path / "flat")
    labels = write_label_files(tmp_path, tmp_path / "flat", classes)
    elt_encode(tmp_path / "flat", tmp_path / "out", f"--labels={labels['kaggle']}")
    with pytest.raises(UserError, match="other labels"):
        elt_encode(tmp_path / "flat", tmp_path / "out", f"--labels={labels['commas']}")
    write_broken(tmp_path / "flat")
    labels["kaggle"].write_text(
        labels["kaggle"].read_text() + "".join(f"broken_{x},{CLASSES[0]}\n" for x in ("cut", "empty", "text"))
    )
    with pytest.raises(UserError, match="other pictures"):
        elt_encode(tmp_path / "flat", tmp_path / "out", f"--labels={labels['kaggle']}")


def test_a_tokenizer_may_lie_elsewhere_but_must_be_the_same(root: Path, tmp_path: Path) -> None:
    for name, content in (("a", "300"), ("b", "300"), ("c", "200")):
        (tmp_path / name).write_text(content)
    for number, name in enumerate("ab"):
        elt_encode(
            root, tmp_path / "out", f"--shard={number}/2", f"--tokenizer_path={tmp_path / name}",
            tokenizer="test_encode.Brightness",
        )  # fmt: skip
    assert ShardIndex.read(str(tmp_path / "out")).tokenizer["init_args"] == {"path": str(tmp_path / "a")}
    with pytest.raises(UserError, match="other tokenizer"):
        elt_encode(root, tmp_path / "out", f"--tokenizer_path={tmp_path / 'c'}", tokenizer="test_encode.Brightness")


def test_a_folder_with_other_files_and_the_pictures_own_are_refused(root: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(UserError, match="did not write"):
        elt_encode(root, tmp_path / "out")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written to"):
        elt_encode(root, tmp_path / "file")
    with pytest.raises(UserError, match="lies in --root"):
        elt_encode(root, root / "out")
    assert os.listdir(tmp_path / "out") == ["thesis.tex"]


# ---- bad input ----


@pytest.fixture
def with_broken(tmp_path: Path) -> Path:
    """Fifteen pictures and three that cannot be read."""
    write_class_folders(tmp_path / "broken")
    write_broken(tmp_path / "broken" / CLASSES[1])
    return tmp_path / "broken"


def test_unreadable_pictures_are_named_counted_and_skipped(
    with_broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    elt_encode(with_broken, tmp_path / "out", "--max_unreadable=0.2", "--num_workers=1")
    captured = capsys.readouterr()
    index = ShardIndex.read(str(tmp_path / "out"))
    broken = {f"{CLASSES[1]}/broken_{name}.JPEG" for name in ("cut", "empty", "text")}
    assert set(index.unreadable) == broken
    assert all(captured.err.count(f"unreadable, skipped: {name} (") == 1 for name in broken)
    assert "3 unreadable" in captured.out
    assert index.num_samples == len(read(tmp_path / "out")) == 15
    assert broken.isdisjoint(about["source"] for _, about in read(tmp_path / "out").values())


def test_too_many_unreadable_pictures_give_no_index_until_they_are_allowed(with_broken: Path, tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(UserError, match=r"3 pictures cannot be read, more than --max_unreadable 0\.01.*broken_"):
            elt_encode(with_broken, tmp_path / "out")
    before = contents(tmp_path / "out")
    assert "index.json" not in before
    elt_encode(with_broken, tmp_path / "out", "--max_unreadable=0.2")
    after = contents(tmp_path / "out")
    assert after.pop("index.json")
    assert after == before


def test_a_run_stops_early_where_much_is_unreadable(
    with_broken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "FEW", 6)
    with pytest.raises(UserError, match=r"[12] pictures cannot be read.*\(.*Error"):
        elt_encode(with_broken, tmp_path / "out", "--max_unreadable=0.1")
    assert not (tmp_path / "out" / "00004.tar").exists()
    assert not list((tmp_path / "out").glob(".*"))


def test_a_shard_whose_pictures_are_all_unreadable_is_left_out(with_broken: Path, tmp_path: Path) -> None:
    elt_encode(with_broken, tmp_path / "out", "--max_unreadable=0.5", "--samples_per_shard=1")
    index = ShardIndex.read(str(tmp_path / "out"))
    assert len(index.shards) == len(read(tmp_path / "out")) == 15
    assert len(list((tmp_path / "out").glob("*.tar"))) == 18


def test_not_one_readable_picture_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "in" / "class").mkdir(parents=True)
    write_broken(tmp_path / "in" / "class")
    with pytest.raises(UserError, match="not one picture"):
        elt_encode(tmp_path / "in", tmp_path / "out", "--max_unreadable=1")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_tar_stops_the_run_after_those_before_it(tmp_path: Path, workers: int) -> None:
    write_tars(tmp_path / "tars", counts=(4, 4, 4))
    path = tmp_path / "tars" / "train-001.tar"
    whole = path.read_bytes()
    header = whole.index(b"train/000012.jpg")
    path.write_bytes(whole[:header] + b"\1" * 200 + whole[header + 200 :])
    with pytest.raises(UserError, match=r"train-001\.tar"):
        elt_encode(tmp_path / "tars", tmp_path / "out", f"--num_workers={workers}")
    assert sorted(contents(tmp_path / "out")) == ["00000.json", "00000.tar", "encode.json"]
    path.write_bytes(whole)
    elt_encode(tmp_path / "tars", tmp_path / "out")
    assert len(read(tmp_path / "out")) == 12


def test_a_tar_that_was_cut_short_is_noticed_before_any_work(tmp_path: Path) -> None:
    write_tars(tmp_path / "tars", counts=(4, 4))
    path = tmp_path / "tars" / "train-001.tar"
    path.write_bytes(path.read_bytes()[:5120])
    with pytest.raises(UserError, match=r"train-001\.tar"):
        elt_encode(tmp_path / "tars", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "telling"), [("NotFinite", "not finite"), ("Misshapen", r"shape \(6, 4, 4\)")])
def test_codes_that_cannot_be_right_are_not_written(root: Path, tmp_path: Path, name: str, telling: str) -> None:
    with pytest.raises(UserError, match=telling):
        elt_encode(root, tmp_path / "out", tokenizer=f"test_encode.{name}")
    assert sorted(contents(tmp_path / "out")) == ["encode.json"]


@pytest.mark.parametrize(
    ("flags", "telling"),
    [
        (["--tokenizer=sd_vae"], "sd-vae, maskgit-vqgan, pixels"),
        (["--tokenizer=test_encode.Nothing"], "Nothing"),
        (["--tokenizer=pathlib.Path"], "not an ImageTokenizer"),
        (["--tokenizer=pixel"], "nor a class that can be imported$"),
        (["--tokenizer=test_encode.Brightness"], "needs its file: --tokenizer_path PATH"),
        (["--tokenizer=pixels", "--tokenizer_path=x"], "takes no --tokenizer_path"),
        (["--size=36"], "36 is not a multiple of 8"),
        (["--size=0"], "whole number from 1"),
        (["--shard=2/2"], "I/N"),
        (["--shard=1"], "I/N"),
        (["--max_unreadable=2"], "from 0 to 1"),
        (["--max_unreadable=few"], "from 0 to 1"),
        (["--device=abacus"], "--device abacus"),
        (["--device=meta"], "--device meta"),
        (["--classes_from=missing"], "missing/index.json"),
        (["--labels=missing"], "missing"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_a_wrong_command_line_is_refused_in_one_line(
    root: Path, tmp_path: Path, flags: list[str], telling: str
) -> None:
    with pytest.raises(UserError, match=telling) as refusal:
        elt_encode(root, tmp_path / "out", *flags)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [[], ["ucf"], ["imagenet"]])
def test_what_is_missing_is_said(arguments: list[str]) -> None:
    with pytest.raises(UserError, match=r"elt encode.*(required|invalid choice)"):
        run("encode", arguments)


def test_progress_is_lines_in_a_pipe(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    elt_encode(root, tmp_path / "out", "--shard=0/2")
    lines = capsys.readouterr().out.splitlines()
    assert "4 shards, 2 of them this process's, 2 still to do" in lines[0]
    assert "8 pictures encoded now, 0 unreadable" in lines[-1]
    assert "images/s; 2 of 4 shards are missing" in lines[-1]
    elt_encode(root, tmp_path / "out")
    last = capsys.readouterr().out.splitlines()[-1]
    assert f"{tmp_path / 'out' / 'index.json'} lists 15 pictures, 3 classes, 4 shards" in last


def test_progress_is_a_bar_on_a_terminal(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(meter, "EVERY_SECONDS_ON_TERMINALS", 0.0)
    elt_encode(root, tmp_path / "out")
    assert "15/15" in capsys.readouterr().out
