"""`elt push`: a trained model to Hugging Face, with a card that shows what each loop count is worth."""

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

from elt_lightning.checkpoints.pretrained import is_exported, read_pretrained
from elt_lightning.checkpoints.shipped import SWEEP, recorded
from elt_lightning.commands.arguments import Parser, add_weights_argument
from elt_lightning.commands.export import export, file_of_tokenizer
from elt_lightning.errors import UserError, first_line
from elt_lightning.files import markdown_table, parse_json, write_text

PICTURE = "loops.png"

CARD = """---
library_name: elt-lightning
tags:
- elastic-looped-transformer
- {kind}
---

# {title}

An Elastic Looped Transformer: one small stack of layers, run as often as you like in every sampling step. It has
{classes} classes and was trained at up to {loops} loops, for {steps} steps.

```python
import elt_lightning  # pip install 'elt-lightning[hub]'

model = elt_lightning.load("{title}")
pictures = model.draw(loops={loops}, seed=0)
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
        sweep = options.sweep or (Path(options.ckpt_path) if is_exported(options.ckpt_path) else None)
        measured = "" if sweep is None else measurements(sweep, folder, asked=options.sweep is not None)
        write_text(folder / "README.md", card(options.repository, checkpoint, measured))
        api = huggingface_hub.HfApi()
        try:
            api.create_repo(options.repository, private=options.private, exist_ok=True)
            api.upload_folder(repo_id=options.repository, folder_path=folder, commit_message="A model of elt_lightning")
        except Exception as error:  # whatever its HTTP library raises
            raise UserError(f"Hugging Face did not take {options.repository}: {first_line(error)}") from error
        written = ", ".join(sorted(path.name for path in folder.iterdir()))
        print(f"https://huggingface.co/{options.repository}: {written}")


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = Parser(prog="elt push", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("repository", metavar="OWNER/NAME", help="where it goes; it is made if there is none")
    add("--ckpt_path", required=True, metavar="PATH", help="checkpoint, or exported model")
    add_weights_argument(parser)
    add("--sweep", type=Path, metavar="DIR", help="folder of elt test, whose table and picture go into the card")
    add("--private", action="store_true", help="make the repository for its owner alone")
    return parser


def card(title: str, checkpoint: dict[str, Any], measured: str) -> str:
    """Write a model card."""
    model = checkpoint["elt"]["model"]
    settings = model["distillation"].get("init_args", model["distillation"])
    return CARD.format(
        title=title,
        kind="masked-generation" if model["network"]["init_args"].get("codebook_size") else "diffusion",
        classes=model["num_classes"],
        loops=settings["max_loops"],
        steps=checkpoint.get("global_step") or "an unknown number of",
        measured=measured,
    )


def measurements(sweep: Path, folder: Path, asked: bool) -> str:
    """Copy a sweep and its picture beside the model; return the card's table of it.

    Args:
        sweep: folder of ``loops.json``.
        folder: of the model.
        asked: whether it must be there.

    Raises:
        UserError: it is not there though it must be, or was not written by `elt test`.
    """
    if not asked and not (sweep / SWEEP).is_file():
        return ""
    try:
        report = parse_json((sweep / SWEEP).read_bytes())
        names = list(report["rows"][0]["metrics"])
        rows = [
            (
                row["loops"],
                f"{row['macs_per_sample'] / 1e9:.3g}",
                *(f"{row['metrics'][name]['mean']:.4g}" for name in names),
            )
            for row in (recorded(report, loops) for loops in sorted({row["loops"] for row in report["rows"]}))
        ]
        text = f"\n## Quality against loops\n\n{report['num_samples']:,} samples for each row.\n\n"
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise UserError(f"{sweep} has no {SWEEP} that elt test wrote ({type(error).__name__}: {error})") from error
    shutil.copyfile(sweep / SWEEP, folder / SWEEP)
    text += markdown_table(("loops", "10⁹ multiply–accumulates a sample", *names), rows) + "\n"
    if (sweep / PICTURE).is_file():
        shutil.copyfile(sweep / PICTURE, folder / PICTURE)
        text += f"\n![Samples, a row for each loop count]({PICTURE})\n"
    return text
