"""Data of MNIST's format: files of every kind of it, the download, and `make fashion` from the files to its tables."""

import gzip
import hashlib
import json
import struct
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from torch import Tensor

from elt_lightning.cli import main
from elt_lightning.data import fashion_mnist
from elt_lightning.data.fashion_mnist import FashionMNISTDataModule, download, find_root
from elt_lightning.data.idx import find_halves
from elt_lightning.errors import UserError
from elt_lightning.reproduce import fashion

CONFIGS = Path(__file__).parent.parent / "configs"


def idx(values: Tensor) -> bytes:
    """Lay bytes out as the format's description says."""
    sizes = b"".join(struct.pack(">I", size) for size in values.shape)
    return bytes([0, 0, 8, values.ndim]) + sizes + bytes(values.flatten().tolist())


def pictures(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw pictures (count, 28, 28) uint8 and labels (count,) in [0, 10)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 28, 28), generator=generator).byte(), torch.arange(count) % 10


def write(folder: Path, half: str, images: Tensor, labels: Tensor, dot: str = "-", zipped: bool = True) -> None:
    folder.mkdir(exist_ok=True)
    for kind, values in (("images", images), ("labels", labels)):
        content = idx(values)
        path = folder / f"{half}-{kind}{dot}idx{values.ndim}-ubyte{'.gz' if zipped else ''}"
        path.write_bytes(gzip.compress(content) if zipped else content)


@pytest.mark.parametrize(
    ("name", "val", "dot", "zipped"),
    [
        ("", "t10k", "-", True),  # MNIST, KMNIST, Fashion-MNIST
        ("", "t10k", ".", False),  # as some archives unpack them
        ("emnist-letters-", "test", "-", True),
    ],
)
def test_files_of_every_kind_are_read(tmp_path: Path, name: str, val: str, dot: str, zipped: bool) -> None:
    """Values come out as they are, EMNIST's upright and from 0 up, whatever the files are called."""
    training, held_out = pictures(30, 0), pictures(20, 1)
    for half, (images, labels) in ((f"{name}train", training), (f"{name}{val}", held_out)):
        stored = (images.transpose(1, 2), labels + 1) if name else (images, labels)
        write(tmp_path, half, *stored, dot=dot, zipped=zipped)
    data = FashionMNISTDataModule(root=str(tmp_path), name="letters")
    assert (data.num_classes, data.input_shape, data.primary_metric) == (10, (1, 28, 28), "fd_letters")
    for dataset, (images, labels) in ((data.training_set(), training), (data.val_set(), held_out)):
        batch = dataset[torch.tensor([5, 3])]
        assert torch.equal(((batch.x + 1) / 2 * 255).round().byte()[:, 0], images[[5, 3]])
        assert torch.equal(batch.labels, labels[[5, 3]])


def test_what_is_wrong_with_files_is_said(tmp_path: Path) -> None:
    images, labels = pictures(20, 0)
    with pytest.raises(UserError, match="no pictures of the IDX format"):
        find_halves(str(tmp_path))
    write(tmp_path, "train", images, labels)
    with pytest.raises(UserError, match="has no t10k-images-idx3-ubyte, with or without"):
        find_halves(str(tmp_path))
    write(tmp_path, "t10k", images, labels)
    write(tmp_path, "emnist-mnist-train", images, labels)
    with pytest.raises(UserError, match="several data sets, of emnist-mnist-, no name: give the file"):
        find_halves(str(tmp_path))
    training, _ = find_halves(str(tmp_path / "train-images-idx3-ubyte.gz"))
    assert torch.equal(training.images(), images)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    for content, message in (
        (whole[:-100], "cannot be read"),
        (gzip.compress(gzip.decompress(whole)[:-1]), r"holds 15679 bytes, not 20×28×28"),
        (gzip.compress(idx(labels)), "no IDX file of bytes in 3 dimensions"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            training.images()
    path.write_bytes(whole)
    (tmp_path / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(UserError, match="has no labels: neither train-labels-idx1-ubyte nor"):
        training.labels()
    write(tmp_path, "train", images, labels[:-1])
    with pytest.raises(UserError, match="20 pictures and 19 labels"):
        FashionMNISTDataModule(root=str(path)).training_set()


class Publisher(BaseHTTPRequestHandler):
    """Serves files from memory, from a byte on where that is asked for; breaks an answer off after ``most`` bytes."""

    files: dict[str, bytes]
    most = 10**9
    asked: list[str | None]

    def do_GET(self) -> None:
        content, asked = self.files[self.path[1:]], self.headers["Range"]
        self.asked.append(asked)
        self.send_response(200 if asked is None else 206)
        self.end_headers()
        first = 0 if asked is None else int(asked.removeprefix("bytes=").removesuffix("-"))
        self.wfile.write(content[first : first + self.most])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def publisher(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Publisher]]:
    """Stand in for the publisher's server, with four small files and their true sizes and hashes."""
    content = {name: idx(torch.arange(12 + number).byte()) for number, name in enumerate(fashion_mnist.PUBLISHED)}
    Publisher.files = {name: gzip.compress(part) for name, part in content.items()}
    Publisher.asked, Publisher.most = [], 10**9
    published = {name: (len(Publisher.files[name]), hashlib.sha256(content[name]).hexdigest()) for name in content}
    server = HTTPServer(("127.0.0.1", 0), Publisher)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(fashion_mnist, "PUBLISHED", published)
    monkeypatch.setattr(fashion_mnist, "URL", f"http://127.0.0.1:{server.server_port}")
    yield Publisher
    server.shutdown()
    server.server_close()


def test_a_download_goes_on_and_is_checked(
    tmp_path: Path, publisher: type[Publisher], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fashion_mnist, "DEBIAN", "nowhere")
    with pytest.raises(UserError, match="neither in data/fashion_mnist nor in nowhere: --"):
        find_root(None)
    publisher.most = 30
    for _ in range(100):
        try:
            assert find_root("download") == "data/fashion_mnist"
            break
        except UserError as error:
            assert "bytes came): try again, which goes on" in str(error)  # noqa: PT017 (it comes a few times)
    assert "bytes=30-" in publisher.asked
    folder = Path(find_root(None))
    assert {path.name: path.read_bytes() for path in folder.glob("*.gz")} == publisher.files
    count = len(publisher.asked)
    download(folder)
    assert len(publisher.asked) == count

    name = "t10k-labels-idx1-ubyte.gz"
    (folder / name).unlink()
    publisher.most = 10**9
    publisher.files = publisher.files | {name: bytes(len(publisher.files[name]))}
    with pytest.raises(UserError, match="is not the published file, it cannot be unpacked"):
        download(folder)
    monkeypatch.setattr(fashion_mnist, "URL", "http://127.0.0.1:9")  # where nobody answers
    with pytest.raises(UserError, match=r"t10k-labels-idx1-ubyte.gz cannot be downloaded \(.*refused.*\): try again"):
        download(folder)


def test_encoding_keeps_pictures_and_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What `elt encode images` makes of a file is its pictures, in its order; the data module takes only tokens."""
    (images, labels), output = pictures(30, 0), tmp_path / "shards"
    write(tmp_path / "files", "train", images, labels)
    write(tmp_path / "files", "t10k", images, labels)
    path = tmp_path / "files" / "train-images-idx3-ubyte.gz"
    flags = ["--root", str(path), "--size", "28", "--num_workers", "0", "--samples_per_shard", "20"]
    assert main(["encode", "images", *flags, "--tokenizer", "pixels", "--output", str(output)]) == 0
    assert "lists 30 pictures, 10 classes, 2 shards" in capsys.readouterr().out
    index = fashion_mnist.ShardIndex.read(str(output))
    (batch,) = fashion_mnist.HeldOutStream(str(output), index, 30).batches(reader=0)
    assert torch.equal(((batch.x.float() + 1) * 255 / 2).round().byte(), images[:, None].expand(-1, 3, -1, -1))
    assert torch.equal(batch.labels, labels)
    with pytest.raises(UserError, match="must hold tokens"):
        FashionMNISTDataModule(str(tmp_path / "files"), str(output), str(output))
    assert main(["encode", "images", *flags, "--tokenizer", "pixels", "--labels", "x", "--output", "y"]) == 2
    assert "has its labels in a file beside it" in capsys.readouterr().err


@pytest.mark.slow
def test_make_fashion_from_files_to_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tokenizer learns pixels, the masked model its tokens, the diffusion model pixels; all of them are judged."""
    monkeypatch.chdir(tmp_path)
    Path("configs").symlink_to(CONFIGS)
    monkeypatch.setattr(sys, "argv", ["fashion", "--smoke"])
    fashion.main()
    assert "reads" in capsys.readouterr().out
    for kind in ("masked", "diffusion"):
        folder = Path("runs/fashion/smoke") / kind / "test"
        report = json.loads((folder / "loops.json").read_text())
        assert [(row["loops"], row["carry_state"]) for row in report["rows"]] == [(loops, True) for loops in (1, 2, 4)]
        assert set(report["rows"][0]["metrics"]) == {"recognised", "fd_fashion"}
        floor = json.loads((folder / "reconstruction.json").read_text())
        if kind == "diffusion":  # pixels lose nothing: the held-out pictures are compared with themselves
            assert floor["fd_fashion"] < 1e-3
            assert floor["recognised"] > 0.8
        assert (folder / "nearest.png").exists()
