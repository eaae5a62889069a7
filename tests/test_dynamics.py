"""What loops do to the state, against exits and loops by hand."""

import json
from functools import partial
from itertools import combinations
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_recall import dit, masked

from elt_lightning import from_pretrained
from elt_lightning.cli import main
from elt_lightning.networks.base import LoopedNetwork
from elt_lightning.objectives.diffusion import DiffusionObjective
from elt_lightning.objectives.ilsd import ILSD
from elt_lightning.objectives.masked import MaskedObjective
from elt_lightning.processes.gaussian import GaussianProcess
from elt_lightning.processes.masking import MaskingProcess
from elt_lightning.processes.noise import sample_seeds
from elt_lightning.reproduce import dynamics
from elt_lightning.samplers.diffusion import DDIMSampler
from elt_lightning.samplers.loop_schedule import LoopSchedule
from elt_lightning.samplers.masked import MaskGITSampler
from elt_lightning.training import loop_monitor
from elt_lightning.training.loop_monitor import token_cosine
from elt_lightning.training.module import ELTModule


def test_the_cosine_between_tokens_is_that_of_all_pairs() -> None:
    torch.manual_seed(0)
    h = torch.randn(2, 4, 5)
    pairs = [F.cosine_similarity(sample[i], sample[j], dim=0) for sample in h for i, j in combinations(range(4), 2)]
    torch.testing.assert_close(token_cosine(h), torch.stack(pairs).mean())


def test_loops_are_followed_and_carried_states_compared_with_settled_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step's numbers from exits of a pass; the second step's distance from a pass begun at zero."""
    monkeypatch.setattr(dynamics, "SETTLED", 3)
    module = ELTModule(
        masked(), MaskingProcess(7), MaskedObjective, ILSD(2), lambda *given: MaskGITSampler(*given, steps=1), 3
    ).eval()
    labels, seeds = torch.arange(4) % 3, sample_seeds(0, torch.arange(4))
    update, cosine = dynamics.followed(module, labels, seeds)
    seen: list[tuple[torch.Tensor, ...]] = []
    backbone = module.network.backbone
    hook = backbone.register_forward_pre_hook(lambda _, arguments: seen.append(arguments))
    module.sample(labels, 1, seeds)
    hook.remove()
    embedded = seen[0][0]
    with torch.no_grad():
        states = [torch.zeros_like(embedded), *(backbone(embedded, None, loops)[1] for loops in (1, 2, 3))]
    for loop in (1, 2, 3):
        moved = ((states[loop] - states[loop - 1]).norm(dim=-1) / states[loop].norm(dim=-1)).mean()
        assert update[loop - 1] == pytest.approx(float(moved), rel=1e-5)
        assert cosine[loop - 1] == pytest.approx(float(token_cosine(states[loop])), rel=1e-5)


@pytest.mark.parametrize("make", [masked, dit])
def test_carried_distances_are_to_what_the_loop_settles_at(make: type[LoopedNetwork]) -> None:
    torch.manual_seed(0)
    if make is masked:
        parts = (MaskingProcess(7), MaskedObjective, ILSD(2), lambda *given: MaskGITSampler(*given, steps=3))
    else:
        parts = (GaussianProcess(), DiffusionObjective, ILSD(2), lambda *given: DDIMSampler(*given, steps=3))
    module = ELTModule(make(), *parts, 3).eval()  # type: ignore[arg-type]
    labels, seeds = torch.arange(4) % 3, sample_seeds(0, torch.arange(4))
    distances = dynamics.carried_distances(module, labels, seeds, loops=1)
    seen: list[tuple[torch.Tensor, ...]] = []
    hook = module.network.backbone.register_forward_pre_hook(lambda _, arguments: seen.append(arguments))
    module.sample(labels, 1, seeds)
    hook.remove()
    assert len(distances) == 2
    for distance, (embedded, condition, _, _, state) in zip(distances, seen[1:], strict=True):
        _, settled = module.network.backbone(embedded, condition, dynamics.SETTLED)
        expected = ((state - settled).norm(dim=-1) / settled.norm(dim=-1)).mean()
        assert distance == pytest.approx(float(expected), rel=1e-5)


def test_every_loop_is_followed_whatever_the_samplers_own_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamics, "SETTLED", 3)
    found = []
    for schedule in (LoopSchedule(), LoopSchedule("falling", tolerance=0.1)):
        torch.manual_seed(0)
        sampler = partial(MaskGITSampler, steps=3, loop_schedule=schedule)
        module = ELTModule(masked(), MaskingProcess(7), MaskedObjective, ILSD(2), sampler, 3).eval()
        found.append(dynamics.measure(module, 4, 0))
    assert found[0] == found[1]
    assert [len(distances) for distances in found[0]["carried"].values()] == [2, 2, 2]


def test_the_program_compares_checkpoints(small_squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamics, "SETTLED", 3)
    monkeypatch.chdir(small_squares.parents[3])
    dynamics.main(["--ckpt_path", f"plain={small_squares}", "--num=2", f"--output={tmp_path}"])
    found = json.loads((tmp_path / "dynamics.json").read_text())["models"]["plain"]
    assert len(found["update"]) == len(found["cosine"]) == 3
    assert "carried" not in found
    assert (tmp_path / "dynamics.png").stat().st_size > 1000


def test_validation_logs_what_loops_do_and_warns_of_tokens_that_grow_alike(
    small_squares: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(small_squares.parents[3])
    monkeypatch.setattr(loop_monitor, "ALIKE", -1.0)
    quick = ["--loop_metrics.num_validation_samples=0", "--trainer.limit_val_batches=1"]
    with pytest.warns(UserWarning, match=r"tokens have grown alike: mean cosine .* after 4 loops.* set model.network"):
        assert main(["validate", *quick, "--ckpt_path", str(small_squares), "--run_dir=watched"]) == 0
    events = EventAccumulator(str(small_squares.parents[1])).Reload()
    names = [name for name in events.Tags()["scalars"] if name.startswith("loops/")]
    logged = {name: events.Scalars(name)[-1].value for name in names}
    assert set(logged) == {f"loops/{name}@L{loop}" for name in ("update", "token_cosine") for loop in range(1, 5)}
    assert all(0 < value < 2 if "update" in name else -1 <= value <= 1 for name, value in logged.items())
    module = from_pretrained(small_squares)
    assert not module.network.backbone.layers._forward_hooks
    assert "set model.network.init_args.recall to true (" in loop_monitor.alike_line(module, 4, 0.99)
    for block in module.network.backbone.layers:
        block.residual_scale = 1.0
    assert "residual_scale to 3 or model.network.init_args.recall" in loop_monitor.alike_line(module, 4, 0.99)
