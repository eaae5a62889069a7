"""`make quickstart-video`, a few steps of it on a few videos."""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml
from PIL import Image

from elt_lightning.cli import main
from elt_lightning.data.toy.moving_digits import MovingDigits
from elt_lightning.reproduce import clip_reading, quickstart_video
from elt_lightning.tokenizers.video_vq import VideoVQ

CONFIGS = Path(__file__).parent.parent / "configs"


def test_the_tokenizer_that_comes_along_has_the_settings_of_its_config() -> None:
    model = yaml.safe_load((CONFIGS.parent / quickstart_video.SHARP.tokenizer_config).read_text())["model"]["init_args"]
    tokenizer = VideoVQ(str(quickstart_video.READY))
    settings = json.loads(json.dumps(asdict(tokenizer.settings)))
    assert settings == settings | {name: model[name] for name in settings if name in model}
    assert list(tokenizer.sample_shape) == model["sample_shape"]
    assert quickstart_video.READY.stat().st_size <= 2_000_000


@pytest.mark.slow
def test_the_tokenizer_that_comes_along_keeps_what_was_measured(tmp_path: Path) -> None:
    """Of a few held-out videos it keeps about as much as of all of them."""
    digits = MovingDigits(training_videos=1, val_videos=2, style="sharp")
    digits.write(tmp_path / "clips")
    tokenizer = VideoVQ(str(quickstart_video.READY))
    kept = clip_reading.measure(digits, tmp_path / "clips", tokenizer, stride=2)
    measured = json.loads((CONFIGS.parent / "docs/results/quickstart_video/tokenizer.json").read_text())
    assert measured["read"] > 0.9
    assert kept.psnr == pytest.approx(measured["psnr"], abs=1.5)
    assert kept.read > measured["read"] - 0.1


@pytest.mark.slow
def test_the_video_quickstart_runs_resumes_and_predicts_frames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("configs").symlink_to(CONFIGS)
    config = yaml.safe_load(quickstart_video.SHARP.tokenizer_config.read_text())
    config["data"]["init_args"] |= {"training_videos": 8, "val_videos": 4}
    config["trainer"]["max_steps"] = 2
    Path("tokenizer.yaml").write_text(yaml.safe_dump(config))
    small = replace(quickstart_video.SHARP, tokenizer_config=Path("tokenizer.yaml"))
    monkeypatch.setattr(quickstart_video, "SHARP", small)
    whole = quickstart_video.fit
    two_steps = lambda settings, run: whole([*settings, "--trainer.max_steps=2"], run)  # noqa: E731
    monkeypatch.setattr(quickstart_video, "fit", two_steps)
    elt = quickstart_video.elt
    few = ["--num_samples=20", "--data.init_args.batch_size=4"]
    monkeypatch.setattr(quickstart_video, "elt", lambda *words: elt(*words, *(few if words[0] == "test" else [])))
    monkeypatch.setattr(sys, "argv", ["quickstart_video", "--train_tokenizer"])
    quickstart_video.main()
    test_dir = Path("runs/clips/elt/test")
    kept = json.loads(Path("runs/clips/tokenizer.json").read_text())
    assert kept["frames"] == 4 * 10 * 8
    assert kept["read"] < 0.5 < 0.8 < kept["read_before"]  # two steps teach a tokenizer nothing
    report = json.loads((test_dir / "loops.json").read_text())
    assert [row["loops"] for row in report["rows"]] == [1, 2, 4, 8, 16]
    assert set(report["rows"][0]["metrics"]) == {"recognised", "fd_motion"}
    assert report["feature_network"] == "motion_network"
    assert 0 <= json.loads((test_dir / "reconstruction.json").read_text())["recognised"] <= 1
    assert len(json.loads((test_dir / "nearest.json").read_text())["distances"]) == 8
    with Image.open(test_dir / "loops.gif") as film:
        assert film.n_frames == 8  # type: ignore[attr-defined]

    written = (test_dir / "loops.json").stat().st_mtime_ns
    capsys.readouterr()
    quickstart_video.main()
    assert (test_dir / "loops.json").stat().st_mtime_ns == written
    suggested = capsys.readouterr().out.strip().splitlines()[-1].split()
    assert suggested[0].endswith("elt")
    assert main(suggested[1:]) == 0
    with Image.open("rest.gif") as film:
        assert film.n_frames == 8  # type: ignore[attr-defined]
