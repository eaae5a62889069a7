"""Files that say which class each picture of a folder is of."""

import csv
import logging
import re
from collections.abc import Sequence
from pathlib import PurePosixPath

from elt_lightning.errors import UserError
from elt_lightning.files import read_lines

logger = logging.getLogger(__name__)


def read_labels(path: str, names: Sequence[str]) -> list[str]:
    """Read the class of each picture, given by sorted paths below the root, from a text file.

    Three kinds are told apart by themselves; what stands in double quotes is taken without them:

    - two columns, picture and class, separated by tab, comma or space. A picture is given by its path below the root or
      by its name, with or without ending. Lines about pictures that are not there, such as a header, are passed over;
    - Kaggle's ``LOC_val_solution.csv``, where the class is the first word of the second column;
    - one class per line, in the order of the sorted pictures (``imagenet_2012_validation_synset_labels.txt``).

    Raises:
        UserError: the file is missing or of another kind, or leaves a picture without a class or with two.
    """
    try:
        lines = read_lines(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the labels {path} cannot be read: {error}") from error
    bare = [re.sub(r'"[^"]*"', "", line) for line in lines]  # a mark within quotes separates nothing
    separator = next((mark for mark in ("\t", ",", " ") if lines and all(mark in line for line in bare)), None)
    try:
        rows = [_columns(line, separator) for line in lines]
    except csv.Error as error:
        raise UserError(f"{path} cannot be read, a double quote has no end or is followed by more: {error}") from error
    if separator is None:
        if any(len(line.split()) > 1 for line in bare):
            raise UserError(f"{path} has lines of one and of two columns: a picture and its class, or a class, in each")
        if len(lines) != len(names):
            raise UserError(f"{path} has {len(lines)} lines, but there are {len(names)} pictures: one class for each")
        return [row[0].strip() for row in rows]
    from_kaggle = rows[0] == ["ImageId", "PredictionString"]
    given: dict[str, str] = {}
    for row in rows:
        picture, class_name = separator.join(row[:-1]).strip(), row[-1].strip()
        if from_kaggle:  # after the class, the corners of boxes
            class_name = class_name.partition(" ")[0]
        if not class_name:
            raise UserError(f"{path} gives {picture} no class")
        if given.setdefault(picture, class_name) != class_name:
            raise UserError(f"{path} gives {picture} two classes, {given[picture]} and {class_name}")
    return _looked_up(path, given, names)


def _columns(line: str, separator: str | None) -> list[str]:
    if '"' not in line:
        return line.split(separator) if separator else [line]
    return next(csv.reader([line], delimiter=separator or "\t", skipinitialspace=True, strict=True))


def _looked_up(path: str, given: dict[str, str], names: Sequence[str]) -> list[str]:
    """Find the class of each picture by its path, its name, or either without the ending."""
    found: list[str] = []
    asked: dict[str, str] = {}
    for name in names:
        pure = PurePosixPath(name)
        spellings = (name, str(pure.with_suffix("")), pure.name, pure.stem)
        spelling = next((spelling for spelling in spellings if spelling in given), None)
        if spelling is None:
            raise UserError(f"{path} has no class for the picture {name}")
        if asked.setdefault(spelling, name) != name:
            raise UserError(f"{path}: {spelling} may be {asked[spelling]} or {name}: write the path below the root")
        found.append(given[spelling])
    unknown = [picture for picture in list(given)[1:] if picture not in asked]  # the first line may be a header
    if unknown:
        logger.warning("%s: %d lines are of pictures that are not there, such as %s", path, len(unknown), unknown[0])
    return found
