"""From a tokenizer's description, as checkpoints and indices of shards hold it, to the tokenizer."""

from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, set_parsing_settings

from elt_lightning.errors import UserError
from elt_lightning.files import sha256
from elt_lightning.tokenizers.base import Tokenizer

set_parsing_settings(import_path_denylist=[])  # a file may not name os.system and the like as a class


def load_tokenizer(description: dict[str, Any], path: str | None = None) -> Tokenizer:
    """Build the tokenizer that :meth:`Tokenizer.description` described, on the CPU; ``path`` is where its file is now.

    Raises:
        UserError: it describes none, the file is missing, its content is not what was described, or it has none.
    """
    if not (isinstance(description, dict) and isinstance(description.get("init_args"), dict)):
        raise UserError(f"{description} describes no tokenizer: what it was read from is damaged")
    description = dict(description)
    expected = description.pop("sha256", None)
    if path is not None:
        if "path" not in description["init_args"]:
            raise UserError(f"tokenizer_path {path}: {description.get('class_path')} has no file; leave it out")
        description["init_args"] = description["init_args"] | {"path": path}
    found = description["init_args"].get("path")
    another = UserError(f"{found} is not the tokenizer that the model or its data were made with (its sha256 differs)")
    if expected is not None and Path(found).is_file() and sha256(found) != expected:
        raise another  # before the constructor, which might take it for a damaged file of its own kind
    tokenizer = build(description)
    if expected is not None and tokenizer.description().get("sha256") != expected:
        raise another  # a folder, or a name on Hugging Face
    return tokenizer.eval()


def build(description: dict[str, Any]) -> Tokenizer:
    """Build a tokenizer of a class path and its arguments.

    Raises:
        UserError: that is no tokenizer, or it refuses its arguments.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--tokenizer", type=Tokenizer)  # add_subclass_arguments would hide the constructor's UserError
    try:
        tokenizer: Tokenizer = parser.instantiate(parser.parse_object({"tokenizer": description})).tokenizer
    except UserError:
        raise
    except Exception as error:  # a class may raise anything on settings that do not suit it
        raise UserError(f"the tokenizer {description.get('class_path')} cannot be built: {error}") from error
    return tokenizer
