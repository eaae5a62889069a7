"""`make claims`: each claim of the paper, the small experiment that tests it, what was measured, and a verdict.

Reads ``<results>/<experiment>/ablation.json``, ``<results>/update_norms/update_norms.csv``, and of `elt bench train`
``<benchmarks>/training.json``; writes ``<results>/README.md``. Every number and every verdict on that page is computed
here from those files. A claim is a function below, decorated by :func:`claim`; what an experiment lacks, or an
experiment that was not run, is "not measured yet".
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from elt_lightning.bench.report import time_over, with_spread
from elt_lightning.bench.runs import read_runs
from elt_lightning.cli import status_of
from elt_lightning.errors import UserError
from elt_lightning.files import markdown_table, with_deviation, write_text

EXPERIMENTS = {
    "ablation": "masked images, Latin squares",
    "ablation_diffusion": "diffusion images, Latin squares",
    "ablation_video": "masked clips, moving digits",
    "ablation_sudoku": "masked puzzles, sudoku",
    "ablation_terms": "masked images in shorter runs, Latin squares",
    "recall": "recall on masked images, Latin squares",
    "recall_diffusion": "recall in diffusion, Latin squares",
    "recall_video": "recall on masked clips, moving digits",
    "recall_sudoku": "recall on puzzles, sudoku",
    "fashion_masked": "masked clothes, Fashion-MNIST",
    "fashion_diffusion": "diffusion clothes, Fashion-MNIST",
    "upcycling": "masked images begun from an unlooped model, Latin squares",
    "upcycling_diffusion": "diffusion images begun from an unlooped model, Latin squares",
}
"""Folders of results, and what was trained there: the family, then the data."""

REAL = tuple(name for name in EXPERIMENTS if name.startswith("fashion"))
"""Experiments on real pictures: the paper's ways of training and those beyond it, to 16 loops."""

RECALL = tuple(name for name in EXPERIMENTS if name.startswith("recall"))
"""Experiments on drawn puzzles that go beyond the paper, to 32 loops."""

BEYOND = (*RECALL, *REAL)
"""Experiments that test recall."""

UPCYCLING = tuple(name for name in EXPERIMENTS if name.startswith("upcycling"))
"""Experiments that begin from a trained unlooped model, with each of the :data:`SHARES` of its steps."""

SHARES = (10, 25, 50)
"""In percent, as the arms' names end."""

ALL = tuple(name for name in EXPERIMENTS if name not in (*BEYOND, *UPCYCLING))
LONG = ("ablation", "ablation_diffusion", "ablation_video", "ablation_sudoku")
ONE_LAYER = ("ablation", "ablation_terms")
"""Experiments with an arm of a single layer."""

FOLLOWED = ("ablation_sudoku", "ablation_terms")
"""Experiments that follow losses over training."""

FAR = (*FOLLOWED, *BEYOND)
"""Experiments that measure loop counts far above L_max."""

INTRODUCTION = """
<!-- Written by `make claims`: change elt_lightning/reproduce/claims.py or the results, not this file. -->
# The paper's claims at a scale that runs here

Each claim of the paper, and each of what goes beyond it ([recall](../any_time.md), R1 to R6; [beginning from an
unlooped model](../upcycling.md), U1 to U5), beside the small experiments that test it. The models are small, and the
tasks were made to tell depths apart: a verdict here says nothing about the paper's own scale. Every number and verdict
is computed from the JSON files beside this page. A seed counts where the criterion holds in it, by any margin. Numbers
are means ± standard deviations over the seeds, shares in percent: their spread shows how much a verdict is worth. Where
an arm hardly learned in some seeds (below a fifth of the best arm's score at its own L_max), its verdict notes it: such
seeds tell more about training small models than about the claim.
"""

FURTHER = """
Further down: [quality for less compute](#quality-for-less-compute), [what ILSD costs](#what-ilsd-costs),
[update norms](#update-norms), [the experiments](#the-experiments).
"""

CLOSING = """
`make claims` writes this page again; `make claims RUN=1` first runs what is missing of the experiments. The paper's
tables are in [tables](tables), curves of the small configs in [curves](curves).
"""

KEPT = 0.9
"""A loop count keeps the quality of L_max where it has this share of it."""

UNHURT = 0.95
"""A loop count beyond training does not hurt where it has this share of the quality of L_max."""

HARDLY = 0.2
"""An arm hardly learned where at its own L_max it has less than this share of the best arm's score."""

SAME_TIME = 1.05
"""A way of training costs the same as another where its step takes at most this many times as long."""


class NotMeasuredError(Exception):
    """The experiment has no such arm, loop count or curve."""


class Measured(dict[Any, Any]):
    """What was measured; asking for anything else raises :class:`NotMeasuredError`."""

    def __missing__(self, name: Any) -> Any:
        raise NotMeasuredError


VARIETY = ("precision", "recall", "coverage", "distinct")
"""What `elt test --diversity` measures."""


@dataclass(frozen=True)
class Arm:
    """One way of training, over seeds."""

    label: str  # for readers
    max_loops: int  # L_max
    depth: int  # N·L_max, the layers that a pass of training goes through
    higher_is_better: bool  # the direction of the scores
    scores: Measured  # {loops: a score for each seed}, each sampling step's loop begun from zero
    carried: Measured  # the same with the state carried from step to step; empty where that was not measured
    val: Measured  # {loops: losses over training, a row for each step and a column for each seed}
    variety: Measured  # {whether carried: {measure: a value for each seed}} at L_max; empty where not measured

    def with_carried_state(self) -> "Arm":
        """Return the same arm as it was measured with the state carried."""
        return replace(self, label=f"{self.label}, carried", scores=self.carried)

    def keeps(self, loops: int, share: float = KEPT) -> pd.Series:
        """Return for each seed whether quality at a loop count is at least a share of that at L_max."""
        score, full = self.scores[loops], self.scores[self.max_loops]
        if not self.higher_is_better:
            score, full = full, score
        return (score / full.where(full != 0)) >= share

    def mean(self, counts: Iterable[int]) -> pd.Series:
        """Return for each seed the mean score over loop counts."""
        return pd.DataFrame([self.scores[count] for count in counts]).mean()

    def show(self, *loops: int) -> str:
        """Write mean and standard deviation of the scores at loop counts; several are named."""
        cells = [self.write(self.scores[count]) for count in loops]
        return cells[0] if len(loops) == 1 else ", ".join(f"{c} at L = {n}" for c, n in zip(cells, loops, strict=True))

    def write(self, values: pd.Series) -> str:
        """Write mean and standard deviation: shares in percent, other scores as they are."""
        scale = 100 if self.higher_is_better and values.max() <= 1 else 1
        return with_deviation((scale * values).tolist())


@dataclass(frozen=True)
class Experiment:
    """What one ablation measured."""

    name: str  # its folder
    metric: str  # that claims are judged by
    arms: Measured  # {name: arm}
    summary: dict[str, Any]  # its ``ablation.json``

    def unlooped(self, like: Arm) -> Arm:
        """Return the unlooped arm that is as deep as another at L_max, and so costs the same.

        Raises:
            NotMeasuredError: there is none.
        """
        for name, arm in self.arms.items():
            if arm.max_loops == 1 and arm.depth == like.depth and not name.endswith("_little"):
                return arm
        raise NotMeasuredError

    def reservation(self, arm: Arm) -> str:
        """Return a note of the seeds in which an arm hardly learned; none where the metric is a distance."""
        if not arm.higher_is_better:
            return ""
        best = pd.DataFrame([other.scores[other.max_loops] for other in self.arms.values()]).max()
        hardly = (arm.scores[arm.max_loops] < HARDLY * best).sum()
        return f"{arm.label}: hardly learned in {hardly} of {len(best)} seeds, even at its own L_max" if hardly else ""


@dataclass(frozen=True)
class Finding:
    """What an experiment says of a claim."""

    measured: str  # the numbers
    holds: pd.Series  # for each seed, whether it holds there
    differences: pd.Series | None = None  # for each seed by how much one side is ahead, where two sides are compared
    note: str = ""  # what a reader should know besides
    reservation: str = ""  # what speaks against reading much into it

    def verdict(self) -> str:
        """Return in how many seeds it holds, whether it does on average, and whether clear of the seeds' spread."""
        held, seeds = int(self.holds.sum()), len(self.holds)
        if held == seeds:
            text = f"holds in {held} of {seeds} seeds" if seeds > 1 else "holds in the one seed there is"
        elif held == 0:
            text = f"does not hold, in none of {seeds} seeds" if seeds > 1 else "does not hold in the one seed there is"
        else:
            text = f"holds in {held} of {seeds} seeds only"
        if self.differences is not None:
            if 0 < held < seeds and self.differences.mean() < 0:
                text += ", and not on average"
            if seeds > 1 and abs(self.differences.mean()) <= self.differences.std():
                text += "; the difference is within the seeds' spread"
        return "; ".join([text, *filter(None, (self.note, self.reservation))])


Test = Callable[[Experiment], Finding]


@dataclass(frozen=True)
class Claim:
    """One claim."""

    title: str  # in a sentence
    source: str  # where it stands in the paper
    criterion: str  # when a seed counts as one in which it holds
    test: Test  # computes the finding of one experiment
    experiments: Sequence[str]  # the folders that can test it


CLAIMS: list[Claim] = []


def claim(source: str, criterion: str, experiments: Sequence[str] = (*LONG, *REAL)) -> Callable[[Test], Test]:
    """Make a claim of a function that tests it; its docstring is the title."""

    def register(test: Test) -> Test:
        CLAIMS.append(Claim(str(test.__doc__).strip(" ."), source, criterion, test, experiments))
        return test

    return register


def ahead(one: Arm, at: int, other: Arm, other_at: int) -> pd.Series:
    """Return for each seed how much better one arm is: above 0 is better, whatever the metric's direction."""
    return (1 if one.higher_is_better else -1) * (one.scores[at] - other.scores[other_at])


def every(columns: Iterable[pd.Series]) -> pd.Series:
    """Return for each seed whether all of several things hold."""
    return pd.DataFrame(list(columns)).all()


@claim("Figures 1 and 8", "ILSD is better at every L below L_max")
def vanilla_is_below_before(experiment: Experiment) -> Finding:
    """Vanilla looping is worse than ILSD below the loop count of training."""
    ilsd, vanilla = experiment.arms["ilsd"], experiment.arms["vanilla"]
    counts = range(1, ilsd.max_loops)
    holds = every(ahead(ilsd, count, vanilla, count) > 0 for count in counts)
    text = f"vanilla {vanilla.show(*counts)}; ILSD {ilsd.show(*counts)}"
    return Finding(text, holds, reservation=experiment.reservation(vanilla))


@claim("Figures 1 and 8", "vanilla looping is worse at L_max + 2 than at L_max")
def vanilla_falls_beyond(experiment: Experiment) -> Finding:
    """Vanilla looping is worse above the loop count of training than at it."""
    vanilla = experiment.arms["vanilla"]
    counts = (vanilla.max_loops, vanilla.max_loops + 2)
    lost = ahead(vanilla, counts[0], vanilla, counts[1])
    return Finding(f"vanilla {vanilla.show(*counts)}", lost > 0, lost, reservation=experiment.reservation(vanilla))


@claim("Figure 8", "ILSD is at least as good as vanilla looping at L_max")
def nothing_lost_at_the_full_count(experiment: Experiment) -> Finding:
    """ILSD loses nothing at the loop count of training."""
    ilsd, vanilla = experiment.arms["ilsd"], experiment.arms["vanilla"]
    loops = ilsd.max_loops
    gaps = ahead(ilsd, loops, vanilla, loops)
    text = f"at L = {loops} ILSD {ilsd.show(loops)}, vanilla {vanilla.show(loops)}"
    return Finding(text, gaps >= 0, gaps, reservation=experiment.reservation(vanilla))


@claim("Figures 1 and 8", f"every L below L_max has at least {100 * KEPT:.0f} % of the quality at L_max")
def quality_is_kept_below(experiment: Experiment) -> Finding:
    """ILSD holds quality at every L."""
    ilsd = experiment.arms["ilsd"]
    kept = {count: ilsd.keeps(count) for count in range(1, ilsd.max_loops)}
    enough = [count for count in kept if all(kept[above].all() for above in range(count, ilsd.max_loops))]
    note = f"in every seed it does from L = {enough[0]} on" if enough and enough[0] > 1 else ""
    return Finding(f"ILSD {ilsd.show(*kept, ilsd.max_loops)}", every(kept.values()), note=note)


@claim("Figures 4 and 8", "each L up to L_max is better than the one before")
def every_loop_improves(experiment: Experiment) -> Finding:
    """With ILSD, every loop up to L_max improves quality."""
    ilsd = experiment.arms["ilsd"]
    counts = range(1, ilsd.max_loops + 1)
    holds = every(ahead(ilsd, count + 1, ilsd, count) > 0 for count in counts[:-1])
    return Finding(f"ILSD {ilsd.show(*counts)}", holds)


@claim("Figure 7", f"L_max + 1 and L_max + 2 have at least {100 * KEPT:.0f} % of the quality at L_max", ALL)
def quality_is_kept_above(experiment: Experiment) -> Finding:
    """ILSD holds quality modestly above L_max."""
    ilsd = experiment.arms["ilsd"]
    counts = (ilsd.max_loops + 1, ilsd.max_loops + 2)
    return Finding(f"ILSD {ilsd.show(ilsd.max_loops, *counts)}", every(map(ilsd.keeps, counts)))


@claim("In words", "the largest L measured, at least twice L_max, is worse than L_max", FAR)
def quality_decays_far_above(experiment: Experiment) -> Finding:
    """L far above L_max decays."""
    ilsd = experiment.arms["ilsd"]
    far = max(ilsd.scores)
    if far < 2 * ilsd.max_loops:
        raise NotMeasuredError
    lost = ahead(ilsd, ilsd.max_loops, ilsd, far)
    counts = [count for count in sorted(ilsd.scores) if count >= ilsd.max_loops]
    return Finding(f"ILSD {ilsd.show(*counts)}", lost > 0, lost)


@claim("Table 2, 1N×32L", "one layer is worse than two at the same depth", ONE_LAYER)
def too_few_layers_fail(experiment: Experiment) -> Finding:
    """Too few unique layers fail."""
    ilsd, one = experiment.arms["ilsd"], experiment.arms["one_layer"]
    gaps = ahead(ilsd, ilsd.max_loops, one, one.max_loops)
    both = ", ".join(f"{arm.label} {arm.show(arm.max_loops)}" for arm in (one, ilsd))
    text = f"{both}, both of depth {ilsd.depth}"
    return Finding(text, gaps > 0, gaps, reservation=experiment.reservation(one))


def beats(other: str, title: str) -> Test:
    """Make a test of ILSD against another way to train the students, by the mean over L from 1 to L_max."""

    def test(experiment: Experiment) -> Finding:
        ilsd, arm = experiment.arms["ilsd"], experiment.arms[other]
        counts = range(1, ilsd.max_loops + 1)
        gaps = pd.DataFrame([ahead(ilsd, count, arm, count) for count in counts]).mean()
        both = f"ILSD {ilsd.write(ilsd.mean(counts))}, {arm.label} {arm.write(arm.mean(counts))}"
        text = f"mean over L = 1 to {ilsd.max_loops}: {both}"
        return Finding(text, gaps > 0, gaps, reservation=experiment.reservation(arm))

    test.__doc__ = title
    return test


FIGURE_13 = "Figure 13, of which we have no printed number"
STUDENTS = "ILSD is better than students from the {} alone, on average over L up to L_max"
claim(FIGURE_13, STUDENTS.format("data"), ("ablation", *FOLLOWED))(
    beats("ground_truth", "The students need the teacher")
)
claim(FIGURE_13, STUDENTS.format("teacher"), ("ablation_terms",))(beats("distillation", "The students need the data"))


@claim("Tables 1 and 2", "ILSD at L_max is at least as good as the unlooped model of the same depth", (*ALL, *REAL))
def as_good_as_unlooped(experiment: Experiment) -> Finding:
    """At equal compute, the looped model is as good as the unlooped one."""
    ilsd = experiment.arms["ilsd"]
    unlooped = experiment.unlooped(like=ilsd)
    gaps = ahead(ilsd, ilsd.max_loops, unlooped, 1)
    text = f"ILSD {ilsd.show(ilsd.max_loops)} at L = {ilsd.max_loops}, {unlooped.label} {unlooped.show(1)}"
    return Finding(text, gaps >= 0, gaps, reservation=experiment.reservation(unlooped))


@claim(
    "Figure 6", "ILSD's held-out loss at L_max reaches the unlooped model's final one before the last step", FOLLOWED
)
def converges_sooner(experiment: Experiment) -> Finding:
    """The looped model converges sooner than the unlooped one."""
    ilsd = experiment.arms["ilsd"]
    losses, unlooped = ilsd.val[ilsd.max_loops], experiment.unlooped(like=ilsd).val[1]
    ours, theirs = losses.iloc[-1], unlooped.iloc[-1]
    reached = losses <= theirs  # steps, seeds
    when = ", ".join(
        f"at step {losses.index[int(reached[s].argmax())] + 1:,}" if reached[s].any() else "never" for s in reached
    )
    text = f"the unlooped model's loss after {unlooped.index[-1] + 1:,} steps is reached, seed by seed: {when}"
    text += f"; losses at the end: ILSD {with_deviation(ours, '.3f')}, unlooped {with_deviation(theirs, '.3f')}"
    return Finding(text, reached.iloc[:-1].any(), theirs - ours)


@claim(
    "In words",
    "trained on 1,000 squares, ILSD's held-out loss at L_max is below the unlooped model's",
    ("ablation_terms",),
)
def robust_on_little_data(experiment: Experiment) -> Finding:
    """The looped model is robust on little data."""
    ilsd, unlooped = experiment.arms["ilsd_little"], experiment.arms["unlooped_8_little"]
    ours, theirs = ilsd.val[ilsd.max_loops].iloc[-1], unlooped.val[unlooped.max_loops].iloc[-1]
    ends = [f"{arm.label} {with_deviation(losses, '.3f')}" for arm, losses in ((ilsd, ours), (unlooped, theirs))]
    scores = f"{ilsd.show(ilsd.max_loops)} and {unlooped.show(1)}"
    text = f"held-out loss: {', '.join(ends)}; {experiment.metric}: {scores}"
    return Finding(text, theirs > ours, theirs - ours)


claim("arXiv 2609.40305", "ILSD is better on average over L up to L_max", ("ablation",))(
    beats("deep_supervision", "ILSD is better than deep supervision (a question to the paper, not one of its claims)")
)


@claim(
    "Beyond the paper, R1",
    f"no L measured from L_max to 8·L_max has less than {100 * UNHURT:.0f} % of the score at L_max",
    BEYOND,
)
def more_loops_never_hurt(experiment: Experiment) -> Finding:
    """With recall, more loops than in training never hurt."""
    ours, paper = experiment.arms["recall_ilsd"], experiment.arms["ilsd"]
    counts = [count for count in sorted(ours.scores) if ours.max_loops <= count <= 8 * ours.max_loops]
    holds = every(ours.keeps(count, UNHURT) for count in counts)
    beside = paper.show(*(count for count in counts if count in paper.scores))
    return Finding(f"{ours.label} {ours.show(*counts)}; {paper.label} {beside}", holds)


@claim("Beyond the paper, R2", "recall from zero is at least as good as the paper's recipe at L_max", BEYOND)
def recall_costs_nothing(experiment: Experiment) -> Finding:
    """Recall costs nothing at the loop count of training."""
    ours, paper = experiment.arms["recall_ilsd"], experiment.arms["ilsd"]
    return compared(ours, paper.max_loops, paper)


@claim("Beyond the paper, R3", "recall at L_max/2, carried, is at least as good as the paper's recipe at L_max", BEYOND)
def half_the_loops_do(experiment: Experiment) -> Finding:
    """With the state carried, half the loops suffice."""
    ours, paper = experiment.arms["recall_ilsd"].with_carried_state(), experiment.arms["ilsd"]
    return compared(ours, paper.max_loops // 2, paper)


@claim("Beyond the paper, R4", "one carried loop has twice the recipe's score at L = 1, or 80 % of it at L_max", BEYOND)
def one_carried_loop_is_a_model(experiment: Experiment) -> Finding:
    """With the state carried, one loop is a usable model."""
    ours, paper = experiment.arms["recall_ilsd"].with_carried_state(), experiment.arms["ilsd"]
    one, its_one, full = ours.scores[1], paper.scores[1], paper.scores[paper.max_loops]
    holds = (
        (one >= 2 * its_one) | (one > 0.8 * full)
        if ours.higher_is_better
        else (2 * one <= its_one) | (one < full / 0.8)
    )
    return Finding(f"{ours.label} {ours.show(1)}; {paper.label} {paper.show(1, paper.max_loops)}", holds)


@claim(
    "Beyond the paper, R5",
    "recall with ILSD is better than recall with deep supervision, mean over L = 1 … L_max",
    BEYOND,
)
def ilsd_suits_recall(experiment: Experiment) -> Finding:
    """With recall, ILSD is the better way to train the students."""
    ours, other = experiment.arms["recall_ilsd"], experiment.arms["recall_deep_supervision"]
    counts = [count for count in sorted(ours.scores) if count <= ours.max_loops]
    gaps = pd.DataFrame([ahead(ours, count, other, count) for count in counts]).mean()
    return Finding(f"{ours.label} {ours.show(*counts)}; {other.label} {other.show(*counts)}", gaps > 0, gaps)


@claim(
    "Beyond the paper, R6",
    "carried at L_max, the share of different squares among the valid ones, or where there are no puzzles recall and "
    f"coverage of the features, are at least {100 * UNHURT:.0f} % of what they are from zero",
    BEYOND,
)
def carried_samples_are_varied(experiment: Experiment) -> Finding:
    """Samples drawn with the state carried are as varied as those from zero."""
    ours = experiment.arms["recall_ilsd"]
    zero, carried = ours.variety[False], ours.variety[True]
    # Puzzles are drawn with a few writings of each digit: beside real handwriting all their samples are far off.
    judged = ["distinct"] if "distinct" in zero else ["recall", "coverage"]
    holds = every(carried[name] >= UNHURT * zero[name] for name in judged)
    cells = (
        f"{name} {with_deviation(100 * carried[name])} (from zero {with_deviation(100 * zero[name])})"
        for name in judged
    )
    return Finding(f"{ours.label}, carried: {', '.join(cells)}", holds)


@claim(
    "Beyond the paper, U1",
    "at L_max averaged layers are the better beginning than none after 10, 25 and 50 % of the steps each",
    UPCYCLING,
)
def begins_ahead(experiment: Experiment) -> Finding:
    """A trained unlooped model is a better beginning than nothing."""
    pairs = [(experiment.arms[f"average_{share}"], experiment.arms[f"nothing_{share}"]) for share in SHARES]
    holds = every(ahead(one, one.max_loops, none, none.max_loops) > 0 for one, none in pairs)
    return Finding("; ".join(f"{at_l_max(one)}, {at_l_max(none)}" for one, none in pairs), holds)


@claim(
    "Beyond the paper, U2", "at L_max averaged layers with half of the steps are as good as none with all", UPCYCLING
)
def half_the_steps_do(experiment: Experiment) -> Finding:
    """Begun from a trained unlooped model, half of the steps suffice."""
    arms, nothing = [experiment.arms[f"average_{share}"] for share in SHARES], experiment.arms["nothing"]
    gaps = [ahead(arm, arm.max_loops, nothing, nothing.max_loops) for arm in arms]
    text = "; ".join(at_l_max(arm) for arm in (*arms, nothing))
    return Finding(text, gaps[-1] >= 0, gaps[-1])


def at_l_max(arm: Arm) -> str:
    """Write an arm's label and its score at L_max."""
    return f"{arm.label} {arm.show(arm.max_loops)}"


def begins_better(way: str, others: Sequence[str], title: str) -> Test:
    """Make a test of one way to begin from an unlooped model against others, by the mean over shares of the steps."""

    def test(experiment: Experiment) -> Finding:
        def over_shares(which: str) -> pd.Series:
            arms = [experiment.arms[f"{which}_{share}"] for share in SHARES]
            return pd.DataFrame([arm.scores[arm.max_loops] for arm in arms]).mean()

        scores = {which: over_shares(which) for which in (way, *others)}
        sign = 1 if experiment.summary["higher_is_better"] else -1
        gaps = pd.DataFrame([sign * (scores[way] - scores[other]) for other in others]).min()
        like = experiment.arms[f"{way}_{SHARES[0]}"]
        text = ", ".join(f"{which} {like.write(values)}" for which, values in scores.items())
        return Finding(f"at L_max, mean over {', '.join(map(str, SHARES))} % of the steps: {text}", gaps >= 0, gaps)

    test.__doc__ = title
    return test


AS_GOOD = "at L_max, on average over 10, 25 and 50 % of the steps, {} as good as {}"
claim("Beyond the paper, U3", AS_GOOD.format("averaged layers are at least", "every other choice of them"), UPCYCLING)(
    begins_better("average", ("every_kth", "first", "blocks"), "Averaged layers are the best beginning")
)
claim("Beyond the paper, U4", AS_GOOD.format("recall is at least", "the same without"), UPCYCLING)(
    begins_better("recall", ("average",), "Recall helps an unlooped model to become a looped one")
)
claim("Beyond the paper, U5", AS_GOOD.format("the outer teacher makes it at least", "training on the data"), UPCYCLING)(
    begins_better("taught", ("average",), "The unlooped model helps further, as a teacher")
)


def compared(ours: Arm, here: int, paper: Arm) -> Finding:
    """Compare an arm at a loop count with the paper's at its L_max: for each seed whether ours is at least as good."""
    there = paper.max_loops
    gaps = ahead(ours, here, paper, there)
    text = f"{ours.label} {ours.show(here)} at L = {here}; {paper.label} {paper.show(there)} at L = {there}"
    return Finding(text, gaps >= 0, gaps)


def main() -> None:
    """Write the page (UserError: a file of results is damaged)."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--results", type=Path, default=Path("docs/results"), help="folder of the results")
    parser.add_argument("--benchmarks", type=Path, default=Path("benchmarks"), help="folder of what `elt bench` wrote")
    options = parser.parse_args()
    for name in EXPERIMENTS:
        if not (options.results / name / "ablation.json").is_file():
            print(f"{options.results / name / 'ablation.json'} is not there: what it tests stays not measured")
    write_text(options.results / "README.md", page(options.results, options.benchmarks))
    print(options.results / "README.md")


def read_experiment(folder: Path) -> Experiment | None:
    """Read an ablation's results; None where there are none (UserError: the file is no such summary)."""
    path = folder / "ablation.json"
    if not path.is_file():
        return None
    try:
        summary = json.loads(path.read_text())
        metric = summary["config"].get("metrics", [summary["primary_metric"]])[0]
        arms = Measured({name: read_arm(name, summary, metric) for name in summary["arms"]})
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} was not written by `make ablation`: {error}") from error
    return Experiment(folder.name, metric, arms, summary)


def read_arm(name: str, summary: dict[str, Any], metric: str) -> Arm:
    """Read one arm of a summary."""
    arm, settings = summary["arms"][name], summary["config"]["arms"][name]

    def scores(carried: bool) -> Measured:
        rows = [row for row in arm["rows"] if bool(row.get("carry_state")) == carried]
        return Measured({row["loops"]: pd.Series(row["metrics"][metric]) for row in rows})

    val = {
        int(curve.rpartition("@L")[2]): pd.DataFrame(losses["values"], index=losses["steps"])
        for curve, losses in arm.get("val", {}).items()
    }
    varied = {
        row["carry_state"]: {name: pd.Series(values) for name, values in row["metrics"].items() if name in VARIETY}
        for row in arm.get("diversity", [])
    }
    max_loops, depth = settings["max_loops"], settings["num_layers"] * settings["max_loops"]
    measured = scores(carried=False), scores(carried=True), Measured(val), Measured(varied)
    return Arm(arm["label"], max_loops, depth, summary["higher_is_better"], *measured)


def page(results: Path, benchmarks: Path) -> str:
    """Write the page of all claims (UserError: a file of results is damaged)."""
    experiments = {name: read_experiment(results / name) for name in EXPERIMENTS}
    overview, sections = [], []
    for number, claim in enumerate(CLAIMS, start=1):
        rows, short = section_rows(claim, experiments)
        overview.append((f"[{number}. {claim.title}](#claim-{number})", "; ".join(short)))
        criterion = f"{claim.source}. A seed counts where {claim.criterion}."
        table = markdown_table(("experiment", "measured", "verdict"), rows)
        anchor = f'<a id="claim-{number}"></a>'
        sections += ["", anchor, "", f"## {number}. {claim.title}", "", criterion, "", table]
    sections += [*any_time_section(results), *cost_section(benchmarks), *norms_section(results)]
    sections += experiments_section(experiments)
    table = markdown_table(("claim", "verdicts, in how many seeds"), overview)
    return "\n".join([INTRODUCTION.strip(), "", table, "", FURTHER.strip(), *sections]) + "\n"


def section_rows(claim: Claim, experiments: dict[str, Experiment | None]) -> tuple[list[tuple[str, ...]], list[str]]:
    """Write the rows of a claim's table, one for each experiment, and its verdicts in few words."""
    rows: list[tuple[str, ...]] = []
    short = []
    for name in claim.experiments:
        experiment, what = experiments[name], EXPERIMENTS[name]
        row, verdict = (what, "", "not measured yet"), "not measured yet"
        with suppress(NotMeasuredError):
            if experiment is not None:
                finding = claim.test(experiment)
                linked = f"{what}, {experiment.metric} ([figure]({name}/ablation.png))"
                row = (linked, finding.measured, f"**{finding.verdict()}**")
                reserved = ", with a reservation" if finding.reservation else ""
                verdict = f"{finding.holds.sum()} of {len(finding.holds)}{reserved}"
        rows.append(row)
        short.append(f"{what.partition(',')[0]}: {verdict}")
    return rows, short


def any_time_section(results: Path) -> list[str]:
    """Return how much of the recipe's compute ours needs for its quality at L_max, with settings of other seeds."""
    lines = [
        "",
        "## Quality for less compute",
        "",
        "Beyond the paper: with recall, carried states, exits per sample and exit guidance, half of the",
        "multiply–accumulates do for the score that the paper's recipe has at L_max. A seed counts where the best",
        "setting for at most half of them, chosen on the other seeds' models, is as good on this one.",
    ]
    path = results / "any_time" / "any_time.json"
    if not path.is_file():
        return [*lines, "", "Not measured yet."]
    cells = []
    for name, testbed in json.loads(path.read_text())["testbeds"].items():
        ratio, found = testbed["compute_ratio_at_equal_quality"], testbed.get("held_out")
        cheapest, chosen, verdict = "none is" if ratio is None else f"{ratio:.2f}", "", "not judged: see its page"
        if (own := testbed.get("compute_ratio_of_the_recipe_itself")) is not None:
            cheapest += f" (of the recipe's own settings {own:.2f})"
        if found is not None:
            gaps = pd.Series(found["difference"])
            pairs = zip(found["compute_ratio"], gaps, strict=True)
            chosen = "; ".join(f"{share:.2f}, {gap:+.3g}" for share, gap in pairs)
            verdict = Finding("", gaps >= 0, gaps).verdict()
        cells.append((f"{name}, {testbed['metric']}", cheapest, chosen, f"**{verdict}**"))
    headings = ("testbed", "compute of the cheapest as good", "within half: compute, difference", "verdict")
    lines += ["", *markdown_table(headings, cells).splitlines()]
    return [*lines, "", "`make any-time`: [figure](any_time/any_time.png), [all settings](any_time/any_time.md)."]


def cost_section(benchmarks: Path) -> list[str]:
    """Return what a step of ILSD costs beside one of vanilla looping, both in turns in one run of `elt bench`."""
    lines = [
        "",
        "## What ILSD costs",
        "",
        "Section 3 and Table 8 of the paper: nothing but one more application of the head. Seconds of a training step",
        f"over those of vanilla looping, which took turns in one run; it holds up to {SAME_TIME:.2f} times.",
    ]
    runs = read_runs(benchmarks / "training.json")
    rows = [(run, row, time_over(row, run["rows"], way="vanilla")) for run in runs for row in run["rows"]]
    compared = [(run, row, ratio) for run, row, ratio in rows if row["way"] == "ilsd" and ratio is not None]
    if not compared:
        return [*lines, "", "Not measured yet."]
    headings = ("device", "network", "N×L", "batch", "torch.compile", "loops recomputed", "ILSD / vanilla", "verdict")
    cells = []
    for run, row, ratio in compared:
        verdict = "holds" if round(ratio[0], 2) <= SAME_TIME else "does not hold"
        recomputed = "yes" if row["activation_checkpointing"] else "no"
        device = f"{run['device']}, threads: {run['threads']}" if run["device_type"] == "cpu" else run["device"]
        network = f"{row['family']}, width {row['width']}"
        what = (device, network, f"{row['num_layers']}×{row['loops']}", row["batch_size"], row["compile"])
        cells.append((*what, recomputed, with_spread(ratio), f"**{verdict}**"))
    lines += ["", *markdown_table(headings, cells).splitlines()]
    return [*lines, "", "`elt bench train` measures it; all of it is in [benchmarks](../../benchmarks/figures.md)."]


def norms_section(results: Path) -> list[str]:
    """Return what the update norms of one model show, beside the paper's Figure 14."""
    title = [
        "",
        "## Update norms",
        "",
        "The paper's Figure 14: early sampling steps update more in late loops than late steps do.",
    ]
    path = results / "update_norms" / "update_norms.csv"
    if not path.is_file():
        return [*title, "", "Not measured yet."]
    norms = pd.read_csv(path)
    steps, loops = norms["step"].max(), norms["loop"].max()
    last = norms[norms["loop"] == loops].set_index("step")["update_norm"]
    early, late = last.loc[: steps // 2].mean(), last.loc[steps // 2 + 1 :].mean()
    verdict = "holds" if early > late else "does not hold"
    return [
        *title,
        "",
        f"Loop {loops} of one diffusion model, one seed, {steps} steps: {early:.2f} on average over the first half of",
        f"the steps, {late:.2f} over the second: **{verdict}** ([figure](update_norms/update_norms.png)). The model is",
        "that of `configs/quickstart_diffusion.yaml`; `make fig14 SMOKE=1` trains and measures it again, and",
        "`python -m elt_lightning.reproduce.update_norms --ckpt_path …` measures any.",
    ]


def experiments_section(experiments: dict[str, Experiment | None]) -> list[str]:
    """List the experiments with their commands and files."""
    rows: list[tuple[object, ...]] = []
    for name, what in EXPERIMENTS.items():
        command, experiment = f"`make {name.replace('_', '-')}`", experiments[name]
        if experiment is None:
            rows.append((what, command, "", "", "", "not measured yet"))
            continue
        links = ", ".join(f"[{ending}]({name}/ablation.{ending})" for ending in ("png", "md", "json"))
        config, samples = experiment.summary["config"], f"{experiment.summary['num_samples']:,}"
        steps = config.get("settings", {}).get("trainer.max_steps", "")
        rows.append((what, command, steps, len(config["seeds"]), samples, links))
    table = markdown_table(("experiment", "command", "steps", "seeds", "samples", "results"), rows)
    return ["", "## The experiments", "", table, "", CLOSING.strip()]


if __name__ == "__main__":
    sys.exit(status_of(main, "claims"))
