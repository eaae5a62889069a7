"""`elt push`: a trained model to Hugging Face, with a card that shows what each loop count is worth."""

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

from elt_lightning.checkpoints.pretrained import meant, read_pretrained
from elt_lightning.checkpoints.shipped import SWEEP, recorded
from elt_lightning.commands.arguments import Parser, add_weights_argument
from elt_lightning.commands.export import export, file_of_tokenizer
from elt_lightning.errors import UserError, first_line
from elt_lightning.files import markdown_table, parse_json, write_text
from elt_lightning.samplers.base import SETTINGS

PICTURE = "loops.png"

CARD = """---
library_name: elt-lightning
tags:
- elastic-looped-transformer
- {kind}
{license}---

# {title}

An Elastic Looped Transformer: one small stack of layers, run as often as you like in every sampling step. It has
{classes} classes and was trained at up to {loops} loops, for {steps} steps.

```python
import elt_lightning  # pip install 'elt-lightning[hub]'

model = elt_lightning.load("{title}")
pictures = model.draw(classes={some}, loops={loops}, seed=0)
```
{measured}"""


def run(name: str, arguments: list[str]) -> None:
    """Write the model and its card into a folder aside, and upload it.

    Raises:
        UserError: the command line, the model or its sweep is wrong; huggingface_hub or a token is missing; or the
            upload is refused.
    """
    options = build_parser().parse_args(arguments)
    try:
        import huggingface_hub
    except ModuleNotFoundError as error:
        raise UserError("elt push needs huggingface_hub: pip install 'elt-lightning[hub]'") from error
    if huggingface_hub.get_token() is None:
        raise UserError("Hugging Face asks for a token that may write: run `hf auth login`, or set HF_TOKEN")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        checkpoint = read_pretrained(options.ckpt_path)
        export(checkpoint, options.weights, folder, file_of_tokenizer(checkpoint))
        sweep = options.sweep or (Path(checkpoint["elt"]["folder"]) if "exported" in checkpoint else None)
        measured = ""
        if sweep is not None and (options.sweep or (sweep / SWEEP).is_file()):
            measured = measurements(sweep, folder, meant(checkpoint, options.weights), checkpoint.get("global_step"))
        write_text(folder / "README.md", card(options.repository, checkpoint, measured, options.license))
        api = huggingface_hub.HfApi()
        try:
            api.create_repo(options.repository, private=options.private, exist_ok=True)
            if options.private and not api.repo_info(options.repository).private:
                raise UserError(f"--private: {options.repository} is there already, and everyone may see it")
            api.upload_folder(repo_id=options.repository, folder_path=folder, commit_message="A model of elt_lightning")
        except UserError:
            raise
        except Exception as error:  # whatever its HTTP library raises
            raise UserError(f"Hugging Face did not take {options.repository}: {first_line(error)}") from error
        written = ", ".join(sorted(path.name for path in folder.iterdir()))
        print(f"https://huggingface.co/{options.repository}: {written}")
        if not measured:
            print("its card has no table of loops: --sweep takes a folder of elt test")


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = Parser(prog="elt push", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("repository", metavar="OWNER/NAME", help="where it goes; it is made if there is none")
    add("--ckpt_path", required=True, metavar="PATH", help="checkpoint, exported model, or name of elt models")
    add_weights_argument(parser)
    add("--sweep", type=Path, metavar="DIR", help="folder of elt test, whose table and picture go into the card")
    add("--license", metavar="ID", help="of the model, as Hugging Face writes it, such as apache-2.0")
    add("--private", action="store_true", help="make the repository for its owner alone")
    return parser


def card(title: str, checkpoint: dict[str, Any], measured: str, licence: str | None = None) -> str:
    """Write a model card."""
    model = checkpoint["elt"]["model"]
    settings = model["distillation"].get("init_args", model["distillation"])
    return CARD.format(
        title=title,
        kind="masked-generation" if model["network"].get("init_args", {}).get("codebook_size") else "diffusion",
        license=f"license: {licence}\n" if licence else "",
        some=list(range(min(4, model["num_classes"]))),
        classes=model["num_classes"],
        loops=settings["max_loops"],
        steps=checkpoint.get("global_step") or "an unknown number of",
        measured=measured,
    )


def measurements(sweep: Path, folder: Path, weights: str, steps: int | None) -> str:
    """Copy a sweep and its picture beside the model; return the card's table of it.

    Args:
        sweep: folder of ``loops.json``.
        folder: of the model.
        weights: of the model, "ema" or "raw".
        steps: that it was trained for; None where that is not known.

    Raises:
        UserError: there is no sweep that `elt test` wrote, or it is of another model.
    """
    try:
        report = parse_json((sweep / SWEEP).read_bytes())
        best = [recorded(report, loops) for loops in sorted({row["loops"] for row in report["rows"]})]
        names = list(best[0]["metrics"])
        swept = [name for name in SETTINGS if len({str(row.get(name)) for row in report["rows"]}) > 1]
        rows = [
            (
                row["loops"],
                *(row.get(name) for name in swept),
                f"{row['macs_per_sample'] / 1e9:.3g}",
                *(_score(**row["metrics"][name]) for name in names),
            )
            for row in best
        ]
        direction = "higher" if report["higher_is_better"] else "lower"
        given = ", parts of each given" if report.get("parts_given") else ""
        text = f"\n## Quality against loops\n\n{report['num_samples']:,} samples for each row{given}"
        text += f"; {report['primary_metric']}: {direction} is better.\n\n"
        of_model = {"weights": weights, "train_steps": steps}
        of_sweep = {name: report.get(name) or value for name, value in of_model.items()}
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise UserError(f"{sweep} has no {SWEEP} that elt test wrote ({type(error).__name__}: {error})") from error
    for name, value in of_sweep.items():
        if of_model[name] not in (None, value):
            raise UserError(f"{sweep} is of another model: its {name} are {value}, those of this one {of_model[name]}")
    shutil.copyfile(sweep / SWEEP, folder / SWEEP)
    text += markdown_table(("loops", *swept, "10⁹ multiply–accumulates a sample", *names), rows) + "\n"
    if (sweep / PICTURE).is_file():
        shutil.copyfile(sweep / PICTURE, folder / PICTURE)
        text += f"\n![Samples, a row for each loop count]({PICTURE})\n"
    return text


def _score(mean: float, std: float | None) -> str:
    return f"{mean:.4g}" + ("" if std is None else f" ± {std:.2g}")
