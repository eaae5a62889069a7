"""Files that say which class each picture of a folder is of."""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from elt_lightning.errors import UserError


def read_labels(path: str, names: Sequence[str]) -> list[str]:
    """Read the class of each picture from a text file.

    Three kinds are told apart by themselves:

    - two columns, picture and class, separated by tab, comma or space. A picture is given by its path below the root or
      by its name, with or without ending. Lines about pictures that are not there, such as a header, are passed over;
    - Kaggle's ``LOC_val_solution.csv``, where the class is the first word of the second column;
    - one class per line, in the order of the sorted pictures (``imagenet_2012_validation_synset_labels.txt``).

    Args:
        path: the file.
        names: the pictures, sorted, as paths below the root.

    Returns:
        a class name for each picture.

    Raises:
        UserError: the file is missing or of another kind, or leaves a picture without a class or with two.
    """
    try:
        lines = [line.strip() for line in Path(path).read_text("utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the labels {path} cannot be read: {error}") from error
    separator = next((mark for mark in ("\t", ",", " ") if lines and all(mark in line for line in lines)), None)
    if separator is None:
        if any(len(line.split()) > 1 for line in lines):
            raise UserError(f"{path} has lines of one and of two columns: a picture and its class, or a class, in each")
        if len(lines) != len(names):
            raise UserError(f"{path} has {len(lines)} lines, but there are {len(names)} pictures: one class for each")
        return lines
    from_kaggle = lines[0] == "ImageId,PredictionString"
    given: dict[str, str] = {}
    for line in lines:
        picture, _, class_name = line.partition(separator) if from_kaggle else line.rpartition(separator)
        picture, class_name = picture.strip(), class_name.strip()
        if from_kaggle:  # after the class, the corners of boxes
            class_name = class_name.partition(" ")[0]
        if not class_name:
            raise UserError(f"{path} gives {picture} no class")
        if given.setdefault(picture, class_name) != class_name:
            raise UserError(f"{path} gives {picture} two classes, {given[picture]} and {class_name}")
    return _looked_up(path, given, names)


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
    return found
