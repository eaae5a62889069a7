"""Train what a table or figure of the paper lacks, then render it; or run the chain of commands behind it alone.

python -m elt_lightning.reproduce table 1 --imagenet data/imagenet --vqgan vqgan.bin

`make table1` and its like run this. Training resumes where it was interrupted; models whose data are not there
(no --vqgan, --vae, or folder of --ucf101) are not trained, and only what was measured before is rendered. With --smoke
small models on data that the project makes stand in, and every title is marked.
"""

import argparse
import re
import shutil
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from elt_lightning.cli import status_of
from elt_lightning.reproduce import figures, imagenet, tables, ucf101, update_norms
from elt_lightning.reproduce.commands import elt, fit, last_checkpoint
from elt_lightning.reproduce.published import TABLE_1, TABLE_2

MASKED, DIFFUSION = tuple(str(row.name) for row in TABLE_1), tuple(str(row.name) for row in TABLE_2)


@dataclass(frozen=True)
class Need:
    """What a table or figure is made of."""

    models: tuple[str, ...] = ()  # of Tables 1 and 2
    modes: tuple[str, ...] = ("ilsd",)  # ways in which each of them is trained
    train_only: bool = False  # they are not measured
    clips: tuple[str, ...] = ()  # models of Table 4
    bench: str | None = None  # subcommand of `elt bench` that measures it
    # of `SMALL_MODELS`, what stands in with --smoke; figures without any show the committed ablations
    small: tuple[str, ...] = ()


TABLES = {
    1: Need(MASKED),
    2: Need(DIFFUSION),
    3: Need(bench="inference"),
    4: Need(clips=("elt_6n4l", "magvit_l")),
    8: Need(bench="train"),
}
FIGURES = {
    1: Need(("elt_4n8l",), modes=("ilsd", "vanilla"), train_only=True, small=("ilsd", "vanilla")),
    4: Need(MASKED),
    5: Need(MASKED + DIFFUSION),
    6: Need(("dit_32", "elt_16n2l", "elt_8n4l"), train_only=True, small=("ilsd", "unlooped")),
    7: Need(clips=("elt_6n4l",)),
    8: Need(("elt_l_8n3l", "elt_8n4l"), modes=("ilsd", "vanilla")),
    13: Need(("elt_l_8n3l",), modes=("ilsd", "vanilla", "ground_truth", "distillation")),
    14: Need(("elt_8n4l",), train_only=True, small=("diffusion",)),
}

BENCHMARKS = {"inference": "inference.json", "train": "training.json"}
"""Of each subcommand of `elt bench`, the file that Table 3 or 8 reads."""

FOLLOWED = ["--trainer.val_check_interval=200", "--loop_metrics.num_validation_samples=200"]
VANILLA = "--model.distillation.mode=vanilla"
SMALL_MODELS: dict[str, list[object]] = {
    "ilsd": ["configs/quickstart.yaml", *FOLLOWED],
    "vanilla": ["configs/quickstart.yaml", *FOLLOWED, VANILLA],
    "unlooped": [
        *("configs/quickstart.yaml", *FOLLOWED, VANILLA),
        *("--model.distillation.max_loops=1", "--model.network.init_args.num_layers=8"),  # at the same compute
    ],
    "diffusion": ["configs/quickstart_diffusion.yaml"],
}
"""The small models: of each its config, and what sets it apart."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Train and measure what is missing, then render (UserError: a setting is missing or wrong)."""
    words = sys.argv[1:] if arguments is None else arguments
    # The Makefile's variables are the same names in capitals.
    options = build_parser().parse_args(
        [re.sub(r"^--[A-Z0-9_]+", lambda name: name[0].lower(), word) for word in words]
    )
    if options.what == "imagenet":
        run_imagenet(options)
    elif options.what == "ucf101":
        run_ucf101(options)
    else:
        need = (TABLES if options.what == "table" else FIGURES)[options.number]
        options = small_stand_ins(need, options) if options.smoke else prepare(need, options)
        if not options.dry_run:
            render(need, options)


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(prog="reproduce", description=__doc__, allow_abbrev=False)
    shared = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add = shared.add_argument
    add("--smoke", action="store_true", help="small models on data that the project makes")
    add("--dry_run", action="store_true", help="show the commands alone")
    add("--imagenet", type=Path, default=Path("data/imagenet"), help="folder with train/ and val/")
    add("--val_labels", type=Path, help="classes of val/, where its pictures lie in one flat folder")
    add("--vqgan", help="MaskGIT's VQGAN, for masked models")
    add("--vae", help="Stable Diffusion's autoencoder, for diffusion models")
    add("--inception", default="download", help="FID's Inception weights")
    reference = "data/imagenet256/VIRTUAL_imagenet256_labeled.npz"
    add("--reference", default=reference, help="npz of reference moments, or a folder of pictures")
    add("--data", type=Path, default=Path("data/imagenet256"), help="where shards of these go")
    add("--models", help="comma-separated, of Tables 1 and 2: train these alone")
    add("--test_flags", default="", help="further flags of elt test for these: loops, samples to keep")
    add("--runs", type=Path, default=Path("runs/imagenet256"), help="where their runs go")
    add("--ucf101", type=Path, default=Path("data/ucf101"), help="folder with UCF-101/ and ucfTrainTestlist/")
    add("--i3d", help="FVD's I3D, as TorchScript")
    add("--c3d", help="C3D of the Inception score, as TorchScript")
    add("--tokenizer", default="video-vq", help="of elt encode ucf101: video-vq or tats")
    add("--tokenizer_path", help="a ready tokenizer of clips; by default one is trained")
    add("--video_config", type=Path, default=Path("configs/ucf101/elt_6n4l.yaml"), help="for ucf101: what to train")
    add("--video_loops", default="2,3,4,5,6", help="for ucf101: loop counts to measure")
    protocol = "--data.init_args.protocol=magvit-10kx4 --num_samples=10000 --repeats=4"
    add("--protocol_flags", default=protocol, help="further flags of elt test for clips")
    add("--video_runs", type=Path, default=Path("runs/ucf101"), help="where runs on clips go")
    add("--benchmarks", type=Path, default=Path("benchmarks"), help="where elt bench writes")
    add("--results", type=Path, default=Path("docs/results"), help="where tables and figures go")
    add("--small", type=Path, default=Path("runs/small_scale"), help="where all goes that --smoke makes")
    kinds = parser.add_subparsers(dest="what", required=True)
    for name, known in (("table", TABLES), ("figure", FIGURES)):
        kinds.add_parser(name, parents=[shared], allow_abbrev=False).add_argument("number", type=int, choices=known)
    for name in ("imagenet", "ucf101"):
        kinds.add_parser(name, parents=[shared], allow_abbrev=False)
    return parser


def run_imagenet(options: Namespace) -> Namespace:
    """Train and measure models of Tables 1 and 2 from pictures on; return where that went."""
    if options.smoke:
        shutil.rmtree(options.small / "imagenet", ignore_errors=True)
        options = imagenet.smoke(options)
    models = options.models or ("elt_l_8n3l,elt_8n4l" if options.smoke else "elt_l_8n3l")
    imagenet.run(models.split(","), options)
    return options


def run_ucf101(options: Namespace) -> Namespace:
    """Train and measure one model of Table 4 from videos on; return where that went."""
    if options.smoke:
        shutil.rmtree(options.small / "ucf101", ignore_errors=True)
        options = ucf101.smoke(options)
    ucf101.run(options.video_config, "1,2,3" if options.smoke else options.video_loops, options)
    return options


def prepare(need: Need, options: Namespace) -> Namespace:
    """Train and measure what a table or figure lacks, as far as its data are there."""
    measure_speed(need, options)
    wanted = [name for name in need.models if options.models is None or name in options.models.split(",")]
    for mode in need.modes:
        for family, option in (("masked", "vqgan"), ("diffusion", "vae")):
            models = [name for name in wanted if imagenet.family_of(name) == family]
            if models and getattr(options, option) is None:
                print(f"without {option.upper()}= nothing is trained of {', '.join(models)}, {mode}")
            elif models:
                imagenet.run(models, options, mode, need.train_only)
    for name in need.clips:
        if not (options.ucf101 / "UCF-101").is_dir():
            print(f"without {options.ucf101 / 'UCF-101'} nothing is trained of {name}")
            continue
        ucf101.run(Path(f"configs/ucf101/{name}.yaml"), "1" if name == "magvit_l" else options.video_loops, options)
        if len(need.clips) > 1 and name == "elt_6n4l":
            ucf101.measure_at_24_steps(options)
    return options


def small_stand_ins(need: Need, options: Namespace) -> Namespace:
    """Train and measure the small models that stand in, and return where their measurements are."""
    options = Namespace(**vars(options) | {"benchmarks": options.small / "benchmarks"})
    measure_speed(need, options, "--scale", "tiny,tiny_dit", "--rounds", "3", "--turn_seconds", "0.05")
    for name in need.small:
        fit(["--config", *SMALL_MODELS[name]], options.small / name, options.dry_run)
    if options.what == "figure":
        measured = options.small if options.number == 6 else Path("docs/results")
        return Namespace(**vars(options) | {"runs": measured, "video_runs": measured})
    for chain, run, model in (("imagenet", run_imagenet, "elt_8n4l"), ("ucf101", run_ucf101, "elt_6n4l")):
        runs = options.small / chain / "runs"
        if (need.models if chain == "imagenet" else need.clips) and not (runs / model / "test/loops.json").is_file():
            run(options)
        options = Namespace(**vars(options) | {"runs" if chain == "imagenet" else "video_runs": runs})
    return options


def measure_speed(need: Need, options: Namespace, *flags: str) -> None:
    """Run `elt bench`, where a table is of it and its file is not there."""
    if need.bench and not (options.benchmarks / BENCHMARKS[need.bench]).is_file():
        path = options.benchmarks / BENCHMARKS[need.bench]
        elt("bench", need.bench, *flags, "--output", path, dry_run=options.dry_run)


def render(need: Need, options: Namespace) -> None:
    """Write the table or figure."""
    measured = options.video_runs if need.clips else options.runs
    output = options.small if options.smoke else options.results
    if options.what == "table":
        tables.write(options.number, measured, options.benchmarks, output / "tables", options.smoke)
        return
    small = options.small
    norms = small / "update_norms" if options.smoke else options.runs / "elt_8n4l" / "update_norms"
    trained = last_checkpoint(small / "diffusion" if options.smoke else options.runs / "elt_8n4l")
    if options.number == 14 and trained.is_file():
        update_norms.main(["--ckpt_path", str(trained), "--output", str(norms)])
    sources = figures.Sources(
        measured,
        ilsd=last_checkpoint(small / "ilsd" if options.smoke else options.runs / "elt_4n8l"),
        vanilla=last_checkpoint(small / "vanilla" if options.smoke else options.runs / "vanilla" / "elt_4n8l"),
        tokenizer_path=None if options.smoke else options.vae,
        norms=norms / "update_norms.csv",
        small_scale=options.smoke,
    )
    figures.write(options.number, sources, output / "figures")


if __name__ == "__main__":
    sys.exit(status_of(main, "reproduce"))
