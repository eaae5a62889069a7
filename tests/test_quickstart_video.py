"""`make quickstart-video`, a few steps of it on a few videos."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from elt_lightning.cli import main
from elt_lightning.reproduce import quickstart_video

CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.mark.slow
def test_the_video_quickstart_runs_resumes_and_predicts_frames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("configs").symlink_to(CONFIGS)
    small = {
        "tokenizer": [
            "--trainer.max_steps=2",
            "--model.init_args.filters=4",
            "--data.init_args.training_videos=8",
            "--data.init_args.val_videos=4",
        ],
        "elt": ["--trainer.max_steps=2"],
    }
    whole = quickstart_video.fit
    monkeypatch.setattr(quickstart_video, "fit", lambda settings, run: whole([*settings, *small[run.name]], run))
    elt = quickstart_video.elt
    few = ["--num_samples=20", "--data.init_args.batch_size=4"]
    monkeypatch.setattr(quickstart_video, "elt", lambda *words: elt(*words, *(few if words[0] == "test" else [])))
    monkeypatch.setattr(sys, "argv", ["quickstart_video"])
    quickstart_video.main()
    test_dir = Path("runs/quickstart_video/elt/test")
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
