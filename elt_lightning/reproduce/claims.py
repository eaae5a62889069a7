"""`make claims`: each claim of the paper, the small experiment that tests it, what was measured, and a verdict.

Reads ``<results>/<experiment>/ablation.json``, ``<results>/update_norms/update_norms.csv``, and of `elt bench train`
``<benchmarks>/training.json``; writes ``<results>/README.md``. Every number and every verdict on that page is computed
here from those files. A claim is one entry of :data:`CLAIMS`; what an experiment lacks, or an experiment that was not
run, is "not measured yet".
"""

import argparse
import csv
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from elt_lightning.bench.report import time_over, with_spread
from elt_lightning.bench.runs import read_runs
from elt_lightning.cli import status_of
from elt_lightning.errors import UserError
from elt_lightning.files import written_aside

EXPERIMENTS = {
    "ablation": "masked images, Latin squares",
    "ablation_diffusion": "diffusion images, Latin squares",
    "ablation_video": "masked clips, moving digits",
    "ablation_sudoku": "masked puzzles, sudoku",
    "ablation_terms": "masked images in shorter runs, Latin squares",
}
"""Folders of results, and what was trained there: the family, then the data."""

INTRODUCTION = """
<!-- Written by `make claims`: change elt_lightning/reproduce/claims.py or the results, not this file. -->
# The paper's claims at a scale that runs here

Each claim of the paper beside the small experiments that test it. The models are small, and the tasks were made to
tell depths apart: a verdict here says nothing about the paper's own scale. Every number and verdict is computed from
the JSON files beside this page. A seed counts where the criterion holds in it, by however little. Numbers are means ±
standard deviations over the seeds, shares in percent: how far they lie apart says how much a verdict is worth.
Where an arm hardly learned in some seeds, below a fifth of the best arm's score at its own L_max, its verdict says so:
such seeds tell more of training small models than of the claim.

| claim | verdicts, in how many seeds |
|---|---|
"""

CLOSING = """
`make claims` writes this page again; `make claims RUN=1` first runs what is missing of the experiments. The paper's
tables are in [tables](tables), curves of the small configs in [curves](curves).
"""

KEPT = 0.9
"""A loop count keeps the quality of L_max where it has this share of it."""

HARDLY = 0.2
"""An arm hardly learned where at its own L_max it has less than this share of the best arm's score."""

SAME_TIME = 1.05
"""A way of training costs the same as another where its step takes at most so many times as long."""

Seeds = list[float]
"""One value for each seed."""


class NotMeasuredError(Exception):
    """The experiment has no such arm, loop count or curve."""


@dataclass(frozen=True)
class Arm:
    """One way of training, over seeds.

    Attributes:
        label: for readers.
        max_loops: L_max.
        depth: N·L_max, the layers that a pass of training goes through.
        scores: {loops: one score per seed}.
        higher_is_better: the direction of the scores.
        held_out: {loops: (steps, one loss per seed at each of them)} over training.
    """

    label: str
    max_loops: int
    depth: int
    scores: dict[int, Seeds]
    higher_is_better: bool
    held_out: dict[int, tuple[list[int], list[Seeds]]]

    def at(self, loops: int) -> Seeds:
        """Scores at a loop count.

        Raises:
            NotMeasuredError: it was not measured.
        """
        if loops not in self.scores:
            raise NotMeasuredError
        return self.scores[loops]

    def share(self, loops: int) -> Seeds:
        """Quality at a loop count as a share of that at L_max; of distances the inverse: below 1 is worse."""
        pairs = zip(self.at(loops), self.at(self.max_loops), strict=True)
        if self.higher_is_better:
            return [score / full if full else float("nan") for score, full in pairs]
        return [full / score if score else float("nan") for score, full in pairs]

    def losses(self) -> tuple[list[int], list[Seeds]]:
        """Held-out loss at L_max over training: steps, and a value per seed at each.

        Raises:
            NotMeasuredError: it was not followed.
        """
        if self.max_loops not in self.held_out:
            raise NotMeasuredError
        return self.held_out[self.max_loops]

    def show(self, loops: int) -> str:
        """Write mean and standard deviation of the scores at a loop count."""
        return self.write(self.at(loops))

    def write(self, values: Seeds) -> str:
        """Write mean and standard deviation: shares in percent, other scores as they are."""
        factor = 100 if self.higher_is_better and max(values) <= 1 else 1
        return spread([factor * value for value in values])


@dataclass(frozen=True)
class Experiment:
    """What one ablation measured.

    Attributes:
        name: its folder.
        metric: that claims are judged by.
        arms: by name.
    """

    name: str
    metric: str
    arms: dict[str, Arm]

    def arm(self, name: str) -> Arm:
        """Give an arm.

        Raises:
            NotMeasuredError: there is none of that name.
        """
        if name not in self.arms:
            raise NotMeasuredError
        return self.arms[name]

    def unlooped(self, like: Arm) -> Arm:
        """Give the unlooped arm that is as deep as another at L_max, and so costs the same.

        Raises:
            NotMeasuredError: there is none.
        """
        for name, arm in self.arms.items():
            if arm.max_loops == 1 and arm.depth == like.depth and not name.endswith("_little"):
                return arm
        raise NotMeasuredError

    def reservation(self, *arms: Arm) -> str:
        """Say which of several arms hardly learned in some seeds; of distances that is not told."""
        whole = [arm.at(arm.max_loops) for arm in self.arms.values() if arm.higher_is_better]
        best = [max(seed) for seed in zip(*whole, strict=True)]
        reservations = []
        for arm in arms:
            pairs = zip(arm.at(arm.max_loops), best, strict=False)
            hardly = sum(score < HARDLY * most for score, most in pairs)
            if hardly:
                reservations.append(
                    f"{arm.label}: hardly learned in {hardly} of {len(best)} seeds, even at its own L_max"
                )
        return "; ".join(reservations)


@dataclass(frozen=True)
class Finding:
    """What an experiment says of a claim.

    Attributes:
        measured: the numbers.
        holds: for each seed, whether it holds there.
        differences: for each seed by how much one side is ahead, where two sides are compared.
        note: what a reader should know besides.
        reservation: what speaks against reading much into it.
    """

    measured: str
    holds: list[bool]
    differences: Seeds | None = None
    note: str = ""
    reservation: str = ""

    def verdict(self) -> str:
        """Say in how many seeds it holds, whether it does on average, and whether clear of the seeds' spread."""
        held, seeds = sum(self.holds), len(self.holds)
        if held == seeds:
            text = f"holds in {held} of {seeds} seeds" if seeds > 1 else "holds in the one seed there is"
        elif held == 0:
            text = f"does not hold, in none of {seeds} seeds" if seeds > 1 else "does not hold in the one seed there is"
        else:
            text = f"holds in {held} of {seeds} seeds only"
        if self.differences and 0 < held < seeds and mean(self.differences) < 0:
            text += ", and not on average"
        if self.differences and seeds > 1 and abs(mean(self.differences)) <= stdev(self.differences):
            text += "; the difference is within the seeds' spread"
        return "; ".join([text, *filter(None, (self.note, self.reservation))])


Test = Callable[[Experiment], Finding]


@dataclass(frozen=True)
class Claim:
    """One claim.

    Attributes:
        title: in a sentence.
        source: where it stands in the paper.
        criterion: when a seed counts as one in which it holds.
        test: computes the finding of one experiment.
        experiments: the folders that can test it.
    """

    title: str
    source: str
    criterion: str
    test: Test
    experiments: Sequence[str] = ("ablation", "ablation_diffusion", "ablation_video", "ablation_sudoku")


def spread(values: Seeds, digits: int = 1) -> str:
    """Write mean and sample standard deviation."""
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def ahead(one: Arm, at: int, other: Arm, other_at: int) -> Seeds:
    """By how much one arm is better than another, for each seed: above 0 is better, whatever the metric's direction."""
    sign = 1 if one.higher_is_better else -1
    return [sign * (a - b) for a, b in zip(one.at(at), other.at(other_at), strict=True)]


def every(columns: Sequence[Sequence[bool]]) -> list[bool]:
    """For each seed, whether all of several things hold."""
    return [all(seed) for seed in zip(*columns, strict=True)]


def by_loops(arm: Arm, loops: Sequence[int]) -> str:
    """Write the scores at several loop counts."""
    return ", ".join(f"{arm.show(count)} at L = {count}" for count in loops)


def vanilla_is_below_before(experiment: Experiment) -> Finding:
    """Vanilla looping against ILSD at every L below L_max."""
    ilsd, vanilla = experiment.arm("ilsd"), experiment.arm("vanilla")
    counts = range(1, ilsd.max_loops)
    holds = every([[gap > 0 for gap in ahead(ilsd, count, vanilla, count)] for count in counts])
    measured = f"vanilla {by_loops(vanilla, counts)}; ILSD {by_loops(ilsd, counts)}"
    return Finding(measured, holds, reservation=experiment.reservation(vanilla))


def vanilla_falls_beyond(experiment: Experiment) -> Finding:
    """Vanilla looping two loops above L_max against itself at L_max."""
    vanilla = experiment.arm("vanilla")
    counts = (vanilla.max_loops, vanilla.max_loops + 2)
    lost = ahead(vanilla, counts[0], vanilla, counts[1])
    measured = f"vanilla {by_loops(vanilla, counts)}"
    return Finding(measured, [gap > 0 for gap in lost], lost, reservation=experiment.reservation(vanilla))


def nothing_lost_at_the_full_count(experiment: Experiment) -> Finding:
    """ILSD against vanilla looping at L_max."""
    ilsd, vanilla = experiment.arm("ilsd"), experiment.arm("vanilla")
    loops = ilsd.max_loops
    gaps = ahead(ilsd, loops, vanilla, loops)
    measured = f"at L = {loops} ILSD {ilsd.show(loops)}, vanilla {vanilla.show(loops)}"
    return Finding(measured, [gap >= 0 for gap in gaps], gaps, reservation=experiment.reservation(vanilla))


def quality_is_kept_below(experiment: Experiment) -> Finding:
    """ILSD at every L below L_max against itself at L_max."""
    ilsd = experiment.arm("ilsd")
    counts = range(1, ilsd.max_loops)
    kept = {count: [share >= KEPT for share in ilsd.share(count)] for count in counts}
    enough = [count for count in counts if all(all(kept[above]) for above in range(count, ilsd.max_loops))]
    note = f"in every seed it does from L = {enough[0]} on" if enough and enough[0] > 1 else ""
    return Finding(f"ILSD {by_loops(ilsd, range(1, ilsd.max_loops + 1))}", every(list(kept.values())), note=note)


def every_loop_improves(experiment: Experiment) -> Finding:
    """ILSD at each L up to L_max against the L before."""
    ilsd = experiment.arm("ilsd")
    counts = range(1, ilsd.max_loops + 1)
    holds = every([[gap > 0 for gap in ahead(ilsd, count + 1, ilsd, count)] for count in counts[:-1]])
    return Finding(f"ILSD {by_loops(ilsd, counts)}", holds)


def quality_is_kept_above(experiment: Experiment) -> Finding:
    """ILSD one and two loops above L_max against itself at L_max."""
    ilsd = experiment.arm("ilsd")
    counts = (ilsd.max_loops + 1, ilsd.max_loops + 2)
    holds = every([[share >= KEPT for share in ilsd.share(count)] for count in counts])
    return Finding(f"ILSD {by_loops(ilsd, (ilsd.max_loops, *counts))}", holds)


def quality_decays_far_above(experiment: Experiment) -> Finding:
    """ILSD at the largest L that was measured, at least twice L_max, against itself at L_max."""
    ilsd = experiment.arm("ilsd")
    far = max(ilsd.scores)
    if far < 2 * ilsd.max_loops:
        raise NotMeasuredError
    lost = ahead(ilsd, ilsd.max_loops, ilsd, far)
    counts = [count for count in sorted(ilsd.scores) if count >= ilsd.max_loops]
    return Finding(f"ILSD {by_loops(ilsd, counts)}", [gap > 0 for gap in lost], lost)


def too_few_layers_fail(experiment: Experiment) -> Finding:
    """One layer against two at the same depth."""
    ilsd, one = experiment.arm("ilsd"), experiment.arm("one_layer")
    gaps = ahead(ilsd, ilsd.max_loops, one, one.max_loops)
    measured = (
        f"{one.label} {one.show(one.max_loops)}, {ilsd.label} {ilsd.show(ilsd.max_loops)}, both of depth {ilsd.depth}"
    )
    return Finding(measured, [gap > 0 for gap in gaps], gaps, reservation=experiment.reservation(one))


def beats(other: str) -> Test:
    """Make a test of ILSD against another way to train the students, by the mean over L from 1 to L_max."""

    def test(experiment: Experiment) -> Finding:
        ilsd, arm = experiment.arm("ilsd"), experiment.arm(other)
        counts = range(1, ilsd.max_loops + 1)

        def averages(of: Arm) -> Seeds:
            return [mean(seed) for seed in zip(*(of.at(count) for count in counts), strict=True)]

        each = [ahead(ilsd, count, arm, count) for count in counts]
        gaps = [mean(seed) for seed in zip(*each, strict=True)]
        both = f"ILSD {ilsd.write(averages(ilsd))}, {arm.label} {arm.write(averages(arm))}"
        measured = f"mean over L = 1 to {ilsd.max_loops}: {both}"
        return Finding(measured, [gap > 0 for gap in gaps], gaps, reservation=experiment.reservation(arm))

    return test


def as_good_as_unlooped(experiment: Experiment) -> Finding:
    """ILSD at L_max against the unlooped model of the same compute."""
    ilsd = experiment.arm("ilsd")
    unlooped = experiment.unlooped(like=ilsd)
    gaps = ahead(ilsd, ilsd.max_loops, unlooped, 1)
    measured = f"ILSD {ilsd.show(ilsd.max_loops)} at L = {ilsd.max_loops}, {unlooped.label} {unlooped.show(1)}"
    return Finding(measured, [gap >= 0 for gap in gaps], gaps, reservation=experiment.reservation(unlooped))


def converges_sooner(experiment: Experiment) -> Finding:
    """The step at which ILSD's held-out loss at L_max reaches the final one of the unlooped model."""
    ilsd = experiment.arm("ilsd")
    steps, losses = ilsd.losses()
    unlooped_steps, unlooped = experiment.unlooped(like=ilsd).losses()
    reached: list[int | None] = []
    for seed, target in enumerate(unlooped[-1]):
        reached.append(next((step for step, loss in zip(steps, losses, strict=True) if loss[seed] <= target), None))
    when = ", ".join("never" if step is None else f"at step {step + 1:,}" for step in reached)
    measured = f"the unlooped model's loss after {unlooped_steps[-1] + 1:,} steps is reached, seed by seed: {when}"
    measured += f"; losses at the end: ILSD {spread(losses[-1], 3)}, unlooped {spread(unlooped[-1], 3)}"
    gaps = [other - own for other, own in zip(unlooped[-1], losses[-1], strict=True)]
    return Finding(measured, [step is not None and step < steps[-1] for step in reached], gaps)


def robust_on_little_data(experiment: Experiment) -> Finding:
    """Held-out loss after training on little data, ILSD against the unlooped model."""
    ilsd, unlooped = experiment.arm("ilsd_little"), experiment.arm("unlooped_8_little")
    ours, theirs = ilsd.losses()[1][-1], unlooped.losses()[1][-1]
    gaps = [b - a for a, b in zip(ours, theirs, strict=True)]
    measured = (
        f"held-out loss: {ilsd.label} {spread(ours, 3)}, {unlooped.label} {spread(theirs, 3)}; {experiment.metric}: "
        f"{ilsd.show(ilsd.max_loops)} and {unlooped.show(1)}"
    )
    return Finding(measured, [gap > 0 for gap in gaps], gaps)


ALL = tuple(EXPERIMENTS)
ONE_LAYER = ("ablation", "ablation_terms")
"""Experiments with an arm of a single layer."""

FOLLOWED = ("ablation_sudoku", "ablation_terms")
"""Experiments that follow losses over training and measure loop counts far above L_max."""


CLAIMS = (
    Claim(
        "Vanilla looping is worse than ILSD below the loop count of training",
        "Figures 1 and 8",
        "ILSD is better at every L below L_max",
        vanilla_is_below_before,
    ),
    Claim(
        "Vanilla looping is worse above the loop count of training than at it",
        "Figures 1 and 8",
        "vanilla looping is worse at L_max + 2 than at L_max",
        vanilla_falls_beyond,
    ),
    Claim(
        "ILSD loses nothing at the loop count of training",
        "Figure 8",
        "ILSD is at least as good as vanilla looping at L_max",
        nothing_lost_at_the_full_count,
    ),
    Claim(
        "ILSD holds quality at every L",
        "Figures 1 and 8",
        f"every L below L_max has at least {100 * KEPT:.0f} % of the quality at L_max",
        quality_is_kept_below,
    ),
    Claim(
        "With ILSD, every loop up to L_max improves quality",
        "Figures 4 and 8",
        "each L up to L_max is better than the one before",
        every_loop_improves,
    ),
    Claim(
        "ILSD holds quality modestly above L_max",
        "Figure 7",
        f"L_max + 1 and L_max + 2 have at least {100 * KEPT:.0f} % of the quality at L_max",
        quality_is_kept_above,
        ALL,
    ),
    Claim(
        "L far above L_max decays",
        "In words",
        "the largest L measured, at least twice L_max, is worse than L_max",
        quality_decays_far_above,
        FOLLOWED,
    ),
    Claim(
        "Too few unique layers fail",
        "Table 2, 1N×32L",
        "one layer is worse than two at the same depth",
        too_few_layers_fail,
        ONE_LAYER,
    ),
    Claim(
        "The students need the teacher",
        "Figure 13, of which we have no printed number",
        "ILSD is better than students from the data alone, on average over L up to L_max",
        beats("ground_truth"),
        ("ablation", *FOLLOWED),
    ),
    Claim(
        "The students need the data",
        "Figure 13, of which we have no printed number",
        "ILSD is better than students from the teacher alone, on average over L up to L_max",
        beats("distillation"),
        ("ablation_terms",),
    ),
    Claim(
        "At equal compute, the looped model is as good as the unlooped one",
        "Tables 1 and 2",
        "ILSD at L_max is at least as good as the unlooped model of the same depth",
        as_good_as_unlooped,
        ALL,
    ),
    Claim(
        "The looped model converges sooner than the unlooped one",
        "Figure 6",
        "ILSD's held-out loss at L_max reaches the unlooped model's final one before the last step",
        converges_sooner,
        FOLLOWED,
    ),
    Claim(
        "The looped model is robust on little data",
        "In words",
        "trained on 1,000 squares, ILSD's held-out loss at L_max is below the unlooped model's",
        robust_on_little_data,
        ("ablation_terms",),
    ),
    Claim(
        "ILSD is better than deep supervision (a question to the paper, not one of its claims)",
        "arXiv 2609.40305",
        "ILSD is better on average over L up to L_max",
        beats("deep_supervision"),
        ("ablation",),
    ),
)


def main() -> None:
    """Write the page.

    Raises:
        UserError: a file of results is damaged.
    """
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--results", type=Path, default=Path("docs/results"), help="folder of the results")
    parser.add_argument("--benchmarks", type=Path, default=Path("benchmarks"), help="folder of what `elt bench` wrote")
    options = parser.parse_args()
    for name in EXPERIMENTS:
        if not (options.results / name / "ablation.json").is_file():
            print(f"{options.results / name / 'ablation.json'} is not there: what it tests stays not measured")
    with written_aside(options.results / "README.md") as aside:
        aside.write_text(page(options.results, options.benchmarks))
    print(options.results / "README.md")


def read_experiment(folder: Path) -> Experiment | None:
    """Read an ablation's results; None where there are none.

    Raises:
        UserError: the file is no such summary.
    """
    path = folder / "ablation.json"
    if not path.is_file():
        return None
    try:
        summary = json.loads(path.read_text())
        metric = summary["config"].get("metrics", [summary["primary_metric"]])[0]
        arms = {name: read_arm(name, arm, summary, metric) for name, arm in summary["arms"].items()}
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} was not written by `make ablation`: {error}") from error
    return Experiment(folder.name, metric, arms)


def read_arm(name: str, arm: dict[str, Any], summary: dict[str, Any], metric: str) -> Arm:
    """Read one arm of a summary."""
    settings = summary["config"]["arms"][name]
    held_out = {
        int(curve.rpartition("@L")[2]): (values["steps"], values["values"])
        for curve, values in arm.get("held_out", {}).items()
    }
    return Arm(
        label=arm["label"],
        max_loops=settings["max_loops"],
        depth=settings["num_layers"] * settings["max_loops"],
        scores={row["loops"]: row["metrics"][metric] for row in arm["rows"]},
        higher_is_better=summary["higher_is_better"],
        held_out=held_out,
    )


def page(results: Path, benchmarks: Path) -> str:
    """Write the page of all claims.

    Raises:
        UserError: a file of results is damaged.
    """
    experiments = {name: read_experiment(results / name) for name in EXPERIMENTS}
    lines = INTRODUCTION.strip().splitlines()
    sections: list[str] = []
    for number, claim in enumerate(CLAIMS, start=1):
        rows, short = section_rows(claim, experiments)
        lines.append(f"| [{number}. {claim.title}](#claim-{number}) | {'; '.join(short)} |")
        sections += [
            "",
            f'<a id="claim-{number}"></a>',
            "",
            f"## {number}. {claim.title}",
            "",
            f"{claim.source}. A seed counts where {claim.criterion}.",
            "",
            "| experiment | measured | verdict |",
            "|---|---|---|",
            *rows,
        ]
    sections += [*cost_section(benchmarks), *norms_section(results), *experiments_section(experiments, results)]
    return "\n".join([*lines, *sections]) + "\n"


def section_rows(claim: Claim, experiments: dict[str, Experiment | None]) -> tuple[list[str], list[str]]:
    """Write a claim's table, a row for each experiment, and its verdicts in few words."""
    rows, short = [], []
    for name in claim.experiments:
        experiment = experiments[name]
        what = EXPERIMENTS[name]
        try:
            if experiment is None:
                raise NotMeasuredError
            finding = claim.test(experiment)
        except NotMeasuredError:
            rows.append(f"| {what} | | not measured yet |")
            short.append(f"{what.partition(',')[0]}: not measured yet")
            continue
        linked = f"{what}, {experiment.metric} ([figure]({name}/ablation.png))"
        rows.append(f"| {linked} | {finding.measured} | **{finding.verdict()}** |")
        reserved = ", with a reservation" if finding.reservation else ""
        short.append(f"{what.partition(',')[0]}: {sum(finding.holds)} of {len(finding.holds)}{reserved}")
    return rows, short


def cost_section(benchmarks: Path) -> list[str]:
    """Say what a step of ILSD costs beside one of vanilla looping, where both took turns in one run of `elt bench`."""
    lines = [
        "",
        "## What ILSD costs",
        "",
        "Section 3 and Table 8 of the paper: nothing but one more application of the head. Seconds of a training step",
        f"over those of vanilla looping, which took turns in one run; it holds up to {SAME_TIME:.2f} times.",
    ]
    runs = read_runs(benchmarks / "training.json")
    rows = [(run["device"], row, time_over(row, run["rows"], way="vanilla")) for run in runs for row in run["rows"]]
    compared = [(device, row, ratio) for device, row, ratio in rows if row["way"] == "ilsd" and ratio is not None]
    if not compared:
        return [*lines, "", "Not measured yet."]
    lines += ["", "| device | width | N×L | batch | torch.compile | loops recomputed | ILSD / vanilla | verdict |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for device, row, ratio in compared:
        verdict = "holds" if round(ratio[0], 2) <= SAME_TIME else "does not hold"
        what = (device, row["width"], f"{row['num_layers']}×{row['loops']}", row["batch_size"], row["compile"])
        recomputed = "yes" if row["checkpoint_loops"] else "no"
        cells = [*map(str, what), recomputed, with_spread(ratio), f"**{verdict}**"]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", "`elt bench train` measures it; all of it is in [benchmarks](../../benchmarks/figures.md)."]


def norms_section(results: Path) -> list[str]:
    """Say what the update norms of one model show, beside the paper's Figure 14."""
    title = [
        "",
        "## Update norms",
        "",
        "The paper's Figure 14: early sampling steps update more in late loops than late steps do.",
    ]
    path = results / "update_norms" / "update_norms.csv"
    if not path.is_file():
        return [*title, "", "Not measured yet."]
    with path.open(newline="") as file:
        rows = [(int(row["step"]), int(row["loop"]), float(row["update_norm"])) for row in csv.DictReader(file)]
    steps, loops = max(row[0] for row in rows), max(row[1] for row in rows)
    early = mean(norm for step, loop, norm in rows if loop == loops and step <= steps // 2)
    late = mean(norm for step, loop, norm in rows if loop == loops and step > steps // 2)
    verdict = "holds" if early > late else "does not hold"
    return [
        *title,
        "",
        f"Loop {loops} of one diffusion model, one seed, {steps} steps: {early:.2f} on average over the first half of",
        f"the steps, {late:.2f} over the second: **{verdict}** ([figure](update_norms/update_norms.png)). The model is",
        "that of `configs/quickstart_diffusion.yaml`; `make fig14 SMOKE=1` trains and measures it again, and",
        "`python -m elt_lightning.reproduce.update_norms --ckpt_path …` measures any.",
    ]


def experiments_section(experiments: dict[str, Experiment | None], results: Path) -> list[str]:
    """List the experiments with their commands and files."""
    lines = [
        "",
        "## The experiments",
        "",
        "| experiment | command | steps | seeds | samples | results |",
        "|---|---|---|---|---|---|",
    ]
    for name, what in EXPERIMENTS.items():
        command = f"`make {name.replace('_', '-')}`"
        if experiments[name] is None:
            lines.append(f"| {what} | {command} | | | | not measured yet |")
            continue
        summary = json.loads((results / name / "ablation.json").read_text())
        links = ", ".join(f"[{ending}]({name}/ablation.{ending})" for ending in ("png", "md", "json"))
        seeds = len(summary["config"]["seeds"])
        steps = summary["config"].get("settings", {}).get("trainer.max_steps", "")
        lines.append(f"| {what} | {command} | {steps} | {seeds} | {summary['num_samples']:,} | {links} |")
    return [*lines, "", *CLOSING.strip().splitlines()]


if __name__ == "__main__":
    sys.exit(status_of(main, "claims"))
