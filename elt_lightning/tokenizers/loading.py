"""From a tokenizer's description, as checkpoints and indices of shards hold it, to the tokenizer."""

from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from elt_lightning.errors import UserError
from elt_lightning.files import sha256
from elt_lightning.tokenizers.base import Tokenizer


def load_tokenizer(description: dict[str, Any], path: str | None = None) -> Tokenizer:
    """Build the tokenizer of a description, on the CPU.

    Args:
        description: from :meth:`Tokenizer.description`.
        path: where its file or folder lies now, when it has moved.

    Raises:
        UserError: the file is missing, or its content is not what was described.
    """
    description = dict(description)
    expected = description.pop("sha256", None)
    if expected is not None and path is not None:
        description["init_args"] = description["init_args"] | {"path": path}
    found = description["init_args"].get("path")
    another = UserError(f"{found} is not the tokenizer that the model or its data were made with (its sha256 differs)")
    if expected is not None and Path(found).is_file() and sha256(found) != expected:
        raise another  # without asking the constructor, which might take it for a damaged file of its own kind
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--tokenizer", type=Tokenizer)  # add_subclass_arguments would hide the constructor's UserError
    tokenizer: Tokenizer = parser.instantiate(parser.parse_object({"tokenizer": description})).tokenizer
    if expected is not None and tokenizer.description().get("sha256") != expected:
        raise another  # a folder, or a name on Hugging Face
    return tokenizer.eval()
