"""Recall and carried states, against loops written out by hand."""

import json
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path

import pytest
import torch
from small_runs import SMALL_SQUARES
from torch import Tensor, nn

from elt_lightning.cli import main
from elt_lightning.networks.base import LoopedNetwork
from elt_lightning.networks.blocks import Block
from elt_lightning.networks.diffusion import LoopedDiT
from elt_lightning.networks.looped import LoopedStack
from elt_lightning.networks.masked import LoopedMaskedTransformer
from elt_lightning.networks.recall import AdditiveRecall, Recall, ResidualRecall
from elt_lightning.objectives.diffusion import DiffusionObjective
from elt_lightning.objectives.ilsd import ILSD
from elt_lightning.objectives.masked import MaskedObjective
from elt_lightning.processes.conditioning import Condition
from elt_lightning.processes.gaussian import GaussianProcess
from elt_lightning.processes.masking import MaskingProcess
from elt_lightning.processes.noise import Stream, normal, sample_seeds
from elt_lightning.samplers.base import Sampler
from elt_lightning.samplers.diffusion import DDIMSampler, DDPMSampler, DPMSolverSampler
from elt_lightning.samplers.guidance import Guidance
from elt_lightning.samplers.guided_steps import GuidedSteps
from elt_lightning.samplers.masked import MaskGITSampler
from elt_lightning.training.module import ELTModule
from elt_lightning.training.optimiser import parameter_groups

WIDTH, V, CLASSES = 16, 7, 3
TOKENS, LATENTS = MaskingProcess(V), GaussianProcess()


def randomised(network: LoopedNetwork) -> LoopedNetwork:
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in network.parameters():
            weight.copy_(0.3 * torch.randn_like(weight))
    return network.eval()


def masked(recall: bool = True, **settings: object) -> LoopedNetwork:
    size = {"num_layers": 2, "width": WIDTH, "num_heads": 2} | settings
    return randomised(LoopedMaskedTransformer(V, (3, 3), CLASSES, recall=recall, **size))  # type: ignore[arg-type]


def dit(recall: bool = True, **settings: object) -> LoopedNetwork:
    size = {"num_layers": 2, "width": WIDTH, "num_heads": 2} | settings
    return randomised(LoopedDiT((1, 6, 6), CLASSES, recall=recall, **size))  # type: ignore[arg-type]


def film() -> LoopedNetwork:
    return dit(block="film", prelude_layers=1, coda_layers=1)


def inputs(network: LoopedNetwork, batch: int = 4) -> tuple[Tensor, Condition]:
    labels, times = torch.arange(batch) % CLASSES, torch.linspace(0.1, 0.9, batch)
    if isinstance(network, LoopedDiT):
        return torch.randn(batch, *network.sample_shape), Condition(labels, times)
    return torch.randint(0, V + 1, (batch, *network.sample_shape)), Condition(labels)


class Residual(Block):
    """x + tanh(x·W), a pre-norm block as simple as can be."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH)

    def forward(self, h: Tensor, modulation: None) -> Tensor:
        return h + torch.tanh(h @ self.weight)


def by_hand(stack: LoopedStack, e: Tensor, loops: int, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """What leaves after so many loops, and the state, from the equations of the two kinds of recall."""
    prelude, layer, coda = (part[0].weight for part in (stack.prelude, stack.layers, stack.coda))  # type: ignore[union-attr]
    e = e + torch.tanh(e @ prelude)  # type: ignore[operator]
    s = torch.zeros_like(e) if state is None else state
    for _ in range(loops):
        if isinstance(stack.recall, ResidualRecall):
            x = e + s / (1 + torch.exp(-stack.recall.logit))
            s = (x - e) + torch.tanh(x @ layer)  # type: ignore[operator]
        else:
            assert isinstance(stack.recall, AdditiveRecall)
            x = s + stack.recall.weight * e
            s = x + torch.tanh(x @ layer)  # type: ignore[operator]
    h = e + s if isinstance(stack.recall, ResidualRecall) else s
    return h + torch.tanh(h @ coda), s  # type: ignore[operator]


@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("make", [AdditiveRecall, lambda: ResidualRecall(WIDTH)])
def test_recall_equals_its_equations_in_values_and_gradients(make: Callable[[], Recall], carried: bool) -> None:
    torch.manual_seed(1)
    stack = LoopedStack(Residual, 1, prelude_layers=1, coda_layers=1, recall=make()).double()
    e = torch.randn(2, 5, WIDTH, dtype=torch.float64, requires_grad=True)
    state = torch.randn_like(e) if carried else None
    at_exits, last = stack(e, None, 4, (2,), state)
    expected = {loops: by_hand(stack, e, loops, state) for loops in (2, 4)}
    for loops, h in at_exits.items():
        torch.testing.assert_close(h, expected[loops][0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(last, expected[4][1], rtol=1e-12, atol=1e-12)
    ours, theirs = at_exits[2].sum() + at_exits[4].square().sum(), expected[2][0].sum() + expected[4][0].square().sum()
    leaves = [e, *stack.parameters()]
    for mine, other in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("make", [masked, dit, film])
def test_an_exit_is_a_fresh_pass_and_a_state_goes_on_where_it_ended(make: Callable[[], LoopedNetwork]) -> None:
    network = make()
    x, condition = inputs(network)
    with torch.no_grad():
        deep = network(x, condition, 6, (1, 3))
        for loops, prediction in deep.predictions.items():
            assert torch.equal(prediction, network(x, condition, loops).predictions[loops])
        assert deep.state.shape[2] == network.width
        on = network(x, condition, 2, state=network(x, condition, 4).state)
    torch.testing.assert_close(on.predictions[2], deep.predictions[6], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(deep.predictions[1], deep.predictions[6], atol=1e-2)


@pytest.mark.parametrize("make", [masked, dit])
def test_recall_is_off_by_default_decays_by_no_optimiser_and_is_recomputed_alike(
    make: Callable[..., LoopedNetwork],
) -> None:
    network, plain = make(), make(recall=False)
    more = network.state_dict().keys() - plain.state_dict().keys()
    assert len(more) == 1
    assert not type(plain)(
        *((V, (3, 3)) if make is masked else ((1, 6, 6),)), CLASSES, 1, width=8, num_heads=1
    ).has_recall
    decaying = {id(weight) for weight in parameter_groups(network)[0]["params"]}
    assert id(network.get_parameter(next(iter(more)))) not in decaying
    x, condition = inputs(network)
    gradients = []
    for recompute in (False, True):
        network.train().backbone.activation_checkpointing = recompute
        network.zero_grad()
        sum(p.square().sum() for p in network(x, condition, 4, (2,)).predictions.values()).backward()  # type: ignore[union-attr]
        gradients.append([weight.grad for weight in network.parameters()])
    for kept, again in zip(*gradients, strict=True):
        torch.testing.assert_close(kept, again, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("guidance", "expected"),
    [
        (Guidance(2.0, interval=(0.25, 0.75)), [[10, 11, 10, 11], [20, 21, 22, 23], [30, 31]]),
        # s_k = 0.75, 0.5, 0.25, 0: the last step runs the null branch alone
        (Guidance(0.0, "linear"), [[10, 11, 12, 13], [20, 21, 22, 23], [32, 33]]),
    ],
)
def test_the_null_branch_begins_where_the_other_one_is_and_both_are_carried(
    guidance: Guidance, expected: list[list[int]]
) -> None:
    sampler = MaskGITSampler(TOKENS, CLASSES, 4, guidance=guidance, carry_state=True)
    seen: list[Tensor | None] = []

    def predict(
        x: Tensor, condition: Condition, loops: int, exits: Sequence[int] = (), state: Tensor | None = None
    ) -> tuple[dict[int, Tensor], Tensor]:
        seen.append(state)
        rows = 10 * len(seen) + torch.arange(len(x)).float()
        return {loops: torch.zeros(len(x), 1, V)}, rows.view(-1, 1, 1)

    steps = GuidedSteps(sampler, predict, 1)
    for step in range(4):
        steps(step, torch.zeros(2, 1), Condition(torch.zeros(2, dtype=torch.int64)))
    assert seen[0] is None
    assert [state.flatten().tolist() for state in seen[1:] if state is not None] == expected


def test_carried_sampling_equals_a_loop_written_by_hand() -> None:
    network, seeds = dit(), sample_seeds(3, torch.arange(4))
    labels, null = torch.arange(4) % CLASSES, torch.full((4,), CLASSES)
    sampler = DDIMSampler(LATENTS, CLASSES, 3, guidance=Guidance(1.5))
    module = ELTModule(network, LATENTS, DiffusionObjective, ILSD(4), lambda *_: sampler, CLASSES)
    samples = module.sample(labels, 2, seeds)
    z, state, null_state = normal(seeds, 0, Stream.INITIAL_NOISE, network.sample_shape), None, None
    levels = sampler.levels()
    with torch.no_grad():
        for now, after in zip_longest(levels, levels[1:]):
            told = Condition(labels, torch.full((4,), now.time))
            (of_class, state), (of_null, null_state) = (
                network(z, told.with_labels(which), 2, (), None if begin is None else now.alpha * begin)
                for which, begin in ((labels, state), (null, null_state))
            )
            clean = [LATENTS.denoised(part[2], z, told) for part in (of_null, of_class)]
            x = clean[0] + 1.5 * (clean[1] - clean[0])
            if after is None:  # the last step gives x̂ itself
                break
            z = z * after.sigma / now.sigma + (after.alpha - after.sigma / now.sigma * now.alpha) * x
    torch.testing.assert_close(samples, x, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(
        samples, module.sample(labels, 2, seeds, None, sampler.with_settings(carry_state=False)), atol=1e-2
    )


@pytest.mark.parametrize("make", [MaskGITSampler, DDPMSampler, DDIMSampler, DPMSolverSampler])
def test_carried_samples_do_not_depend_on_the_batch_and_keep_what_is_given(make: Callable[..., Sampler]) -> None:
    is_masked = make is MaskGITSampler
    network = (masked if is_masked else dit)().double()
    process = TOKENS if is_masked else LATENTS
    sampler = make(process, CLASSES, steps=4, guidance=Guidance(2.0, interval=(0.3, 0.8)))
    objective = MaskedObjective if is_masked else DiffusionObjective
    module = ELTModule(network, process, objective, ILSD(2), lambda *_: sampler, CLASSES)
    assert module.sampler.carry_state
    labels, seeds = torch.arange(5) % CLASSES, sample_seeds(1, torch.arange(5))
    known = torch.full((5, *network.sample_shape), V if is_masked else torch.nan)
    known[..., 0] = 2
    known = known.long() if is_masked else known
    together = module.sample(labels, 1, seeds, known)
    parts = [
        module.sample(*part[:1], 1, *part[1:])
        for part in zip(labels.split(2), seeds.split(2), known.split(2), strict=True)
    ]
    torch.testing.assert_close(torch.cat(parts), together)
    given = known != V if is_masked else ~known.isnan()
    assert torch.equal(together[given], known[given].to(together.dtype))


def test_a_state_needs_recall() -> None:
    network = masked(recall=False)
    x, condition = inputs(network)
    with pytest.raises(ValueError, match="without recall"):
        network(x, condition, 1, state=torch.zeros(4, 10, WIDTH))
    sampler = MaskGITSampler(TOKENS, CLASSES, 2, carry_state=True)
    with pytest.raises(ValueError, match="carry_state needs a network with recall"):
        ELTModule(network, TOKENS, MaskedObjective, ILSD(2), lambda *_: sampler, CLASSES)
    undecided = sampler.with_settings(carry_state=None)
    plain = ELTModule(network, TOKENS, MaskedObjective, ILSD(2), lambda *_: undecided, CLASSES)
    assert plain.sampler.carry_state is False


def test_commands_sweep_carried_states_and_refuse_them_without_recall(
    small_squares: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(small_squares.parents[3])
    config = Path(__file__).parent.parent / "configs" / "quickstart_recall.yaml"
    steps = ["--trainer.max_steps=2", "--trainer.val_check_interval=2", "--loop_metrics.num_validation_samples=0"]
    assert main(["fit", "--config", str(config), *SMALL_SQUARES, *steps, "--run_dir=recall"]) == 0
    swept = [
        "--loops",
        "1,2",
        "--carry_state",
        "true,false",
        "--num_samples",
        "8",
        "--save_samples",
        "s.npz",
        "--diversity",
    ]
    assert main(["test", "--ckpt_path", "recall/checkpoints/last.ckpt", "--run_dir=recall/swept", *swept]) == 0
    report = json.loads(Path("recall/swept/loops.json").read_text())
    assert report["recall"] is True
    assert [(row["loops"], row["carry_state"]) for row in report["rows"]] == [
        (loops, carried) for loops in (1, 2) for carried in (True, False)
    ]
    assert {"precision", "recall", "coverage", "distinct"} < report["rows"][0]["metrics"].keys()
    assert {path.name for path in Path("recall/swept").glob("*.npz")} == {
        f"s_L{loops}_{start}.npz" for loops in (1, 2) for start in ("carried", "from_zero")
    }
    capsys.readouterr()
    for command in (
        ["test", "--run_dir=refused"],
        ["predict", "--run_dir=refused"],
        ["sample", "--output=refused.png"],
    ):
        assert main([*command, "--ckpt_path", str(small_squares), "--carry_state", "true"]) == 2
        assert "carry_state needs a network with recall" in capsys.readouterr().err.strip().splitlines()[-1]
