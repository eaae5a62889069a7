import json
from pathlib import Path

import pytest

from elt_lightning.bench.data import diffusion_need, flops_per_training_image, masked_need
from elt_lightning.cli import main


def test_reading_is_measured_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "benchmarks" / "data.json"
    flags = ["--num-images=40", "--batch-size=8", "--num-workers=0", "--repeats=2", f"--output={output}"]
    assert main(["bench", "data", *flags]) == 0
    content = json.loads(output.read_text())
    assert content["torch"]
    assert [reading["codes"] for reading in content["readings"]] == ["tokens", "moments of latents"]
    for reading in content["readings"]:
        assert len(reading["images_per_second"]) == 2
        assert reading["median"] > 0
        assert reading["ratio"] == pytest.approx(reading["median"] / reading["needed_per_second"])
    assert "GPUs fed" in capsys.readouterr().out


def test_what_a_gpu_needs_follows_from_the_networks_size() -> None:
    # 24 layers of 12·1024² weights at 257 tokens, or 32 of 12·2048² at 256, and attention's two products.
    masked = 24 * 257 * (12 * 1024**2 + 2 * 257 * 1024)
    assert 0.5 * 989e12 / masked_need() == pytest.approx(flops_per_training_image(masked), rel=0.02)
    diffusion = 32 * 256 * (12 * 2048**2 + 2 * 256 * 2048)
    assert 0.5 * 989e12 / diffusion_need() == pytest.approx(flops_per_training_image(diffusion), rel=0.05)


def test_a_wrong_kind_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "nothing"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
