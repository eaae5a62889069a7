"""`elt stats` on small pictures, with the network's true sizes and random weights."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from shard_files import token_index, write_shards
from test_inception import random_state
from torch import Tensor

from elt_lightning.commands.stats import run
from elt_lightning.data import imagenet
from elt_lightning.data.crops import UPRIGHT_CROP
from elt_lightning.data.imagenet import ImageNetDataModule
from elt_lightning.errors import UserError
from elt_lightning.files import sha256
from elt_lightning.metrics.inception import FIDInception
from elt_lightning.metrics.reference import PREPARATION, InceptionMoments, ReferenceImages, read_moments, write_moments


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(random_state(3), path)
    return path


@pytest.fixture
def images(tmp_path: Path) -> Tensor:
    """Five pictures (5, 3, 24, 24), which also lie in a folder without classes."""
    content = torch.randint(0, 256, (5, 3, 24, 24), generator=torch.Generator().manual_seed(1)).byte()
    (tmp_path / "pictures").mkdir()
    for number, picture in enumerate(content):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(tmp_path / "pictures" / f"{number}.png")
    return content


def stats(folder: Path, weights: Path, *flags: str) -> Path:
    """Run the command on ``folder/pictures``; give the file that it writes."""
    output = folder / "new" / "stats.npz"
    places = [f"--images={folder / 'pictures'}", f"--inception_path={weights}", f"--output={output}"]
    run("stats", [*places, *(flags or ["--size=24"]), "--num_workers=0", "--device=cpu"])
    return output


def test_moments_of_a_folder_are_written(
    weights: Path, images: Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = stats(tmp_path, weights, "--size=24", "--batch_size=2")
    assert capsys.readouterr().out == f"{output}: 5 images, 24×24, adm-centre\n"
    features = FIDInception.load(weights).features(images)
    with np.load(output) as file:
        told = {"size": 24, "crop": "adm-centre", "network": sha256(weights), "preparation": PREPARATION}
        assert set(file.files) == {"mu", "sigma", "mu_s", "sigma_s", "num_images", *told}
        assert file["num_images"] == 5
        assert {name: file[name].item() for name in told} == told
        for suffix, values in (("", features.pool), ("_s", features.spatial)):
            assert file[f"mu{suffix}"].dtype == file[f"sigma{suffix}"].dtype == np.float64
            expected = np.cov(values.double().numpy(), rowvar=False)
            np.testing.assert_allclose(file[f"mu{suffix}"], values.double().mean(0), rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(file[f"sigma{suffix}"], expected, atol=1e-3 * np.abs(expected).max())
    assert read_moments(output).num_images == 5


@pytest.mark.slow
@pytest.mark.usefixtures("images")
def test_a_file_that_exists_is_kept_unless_overwriting_is_asked_for(weights: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "stats.npz"
    output.parent.mkdir()
    output.write_text("precious")
    with pytest.raises(UserError, match=r"stats\.npz exists: .*--overwrite"):
        stats(tmp_path, weights)
    assert output.read_text() == "precious"
    stats(tmp_path, weights, "--size=24", "--overwrite")
    assert read_moments(output).num_images == 5


@pytest.mark.slow
@pytest.mark.usefixtures("images")
def test_moments_go_with_samples_of_the_same_size_crop_and_network_alone(
    weights: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """FID against pictures of another size is a number, and a wrong one."""
    shards = write_shards(tmp_path / "shards", replace(token_index([3]), crop=UPRIGHT_CROP))
    output = stats(tmp_path, weights, f"--like={shards}")
    assert capsys.readouterr().out.endswith("5 images, 32×32, adm-centre-upright\n")
    network = FIDInception.load(weights)

    def reference(path: Path | str = output) -> InceptionMoments | None:
        data = ImageNetDataModule(shards, None, None, str(weights), str(path), str(tmp_path / "cache"), num_workers=0)
        return data.load_reference(network)

    found = reference()
    assert found is not None
    assert caplog.messages == []
    asked: list[ReferenceImages] = []
    monkeypatch.setattr(imagenet, "load_or_compute", lambda images, *_: asked.append(images))
    reference(tmp_path / "pictures")
    assert asked[0].settings.items() <= found.made_with.items()
    assert [batch.shape[2:] for batch in asked[0].batches()] == [(32, 32)]
    for name, value in (("size", 256), ("crop", "adm-centre"), ("network", "0" * 64), ("preparation", "none")):
        other = replace(found, made_with=found.made_with | {name: value})
        with pytest.raises(UserError, match=rf"other\.npz is of pictures with {name} {value}, the samples have"):
            other.check("other.npz", found.made_with)
    shards = write_shards(tmp_path / "stored", token_index([3]))
    with pytest.raises(UserError, match=r"stats\.npz is of pictures with crop adm-centre-upright, the samples have"):
        reference()
    write_moments(tmp_path / "foreign.npz", InceptionMoments(found.pool))
    reference(tmp_path / "foreign.npz")
    assert ["foreign.npz does not say size, crop, network, preparation" in line for line in caplog.messages] == [True]


@pytest.mark.usefixtures("images")
def test_what_is_wrong_is_said_and_nothing_is_written(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="inception_path"):
        stats(tmp_path, tmp_path / "nowhere.pth")
    for flags, telling in (
        (["--size=24", "--batch_size=0"], "elt stats: .*batch_size"),
        (["--batch_size=2"], "elt stats: .*--like --size"),
        ([f"--like={tmp_path}", "--orientation=stored"], "--orientation is what the shards"),
        ([f"--like={tmp_path}"], r"index\.json cannot be read"),
    ):
        with pytest.raises(UserError, match=telling):
            stats(tmp_path, weights, *flags)
    with pytest.raises(UserError, match=r"elt stats: .*--images"):
        run("stats", [])
    for number in range(1, 5):
        (tmp_path / "pictures" / f"{number}.png").unlink()
    with pytest.raises(UserError, match="at least 2 images, not 1"):
        stats(tmp_path, weights)
    (tmp_path / "pictures" / "0.png").unlink()
    with pytest.raises(UserError, match="no pictures"):
        stats(tmp_path, weights)
    assert not (tmp_path / "new").exists()
