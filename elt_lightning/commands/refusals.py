"""What the parser of configs and flags says of a wrong setting, told in one line: its key, its value, what it may be.

jsonargparse answers with an indented tree: keys, the classes that they lead through, and at the leaves a reason for
each type that was tried. The deepest place in it is where the setting is wrong.
"""

import ast
import dataclasses
import difflib
import inspect
import pydoc
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "NoneType": "null",
    "list": "a list",
    "tuple": "a list",
    "collections.abc.Iterable": "a list",
    "dict": "a section of settings",
}

NOISE = re.compile(
    "Does not validate|Subtypes:|Errors:|Given value type|Expected a path but|Subclass types|a class path|a dict with"
)
"""Lines of the tree that say nothing of the reason."""

PACKAGES = ("elt_lightning.", "lightning.pytorch.callbacks", "lightning.pytorch.loggers", "torch.optim")
"""Where classes are looked for that a name may have been meant for."""

UNKNOWN_CLASS = re.compile(
    r"Expected a dot import path string: *(\S+)|No module named (\S+)|has no attribute (\S+)", re.DOTALL
)


class Place(NamedTuple):
    """Where in the settings a reason stands."""

    key: str  # dotted, as flags are written
    class_path: str  # of the class whose setting it is; empty at the top
    depth: int  # how many keys and classes lead to it


def explain(message: str, known: Iterable[str] = ()) -> str:
    """Return one line about a refusal: where, which value, and what it may be.

    Args:
        message: of jsonargparse, or of a class that refused its settings.
        known: the names of all settings outside classes, for example "trainer.max_steps".
    """
    unknown = re.search(
        r"unrecognized arguments: (?:.* )?--([\w.]+)|does not accept option '(?:\w+:)?([^']+)'", message
    )
    if unknown:
        key = next(part for part in unknown.groups() if part)
        return f"there is no setting {key}: {alternatives(key, list(known))}"
    required = re.match(r"the following arguments are required: (.*)", message)
    if required:
        missing, measured = re.subn(r"\b(validate|test|predict)\.", "", required.group(1).replace("fit.", ""))
        instead = ": --ckpt_path PATH, of a trained model, says it all" if measured else ""
        return f"required, and given by nothing: {missing}{instead}"
    reasons, values = read_tree(message)
    if not reasons or len(reasons) == len(message.splitlines()):  # no tree
        return " ".join(message.split())
    place = max((place for place, _ in reasons), key=lambda place: place.depth)  # the first of the deepest
    here = list(dict.fromkeys(reason for other, reason in reasons if other == place))
    told = reason_of(place, here, values.get(place.key))
    return f"{place.key}: {told}" if place.key else told


def read_tree(message: str) -> tuple[list[tuple[Place, str]], dict[str, str]]:
    """Return the reasons of a message, each with its place, and {key: the value that was given}."""
    # Reasons for a callable class stand in one line with it: brought to the form of all others.
    message = re.sub(
        r"^( *)Type .* expects a function or a callable class: (.*?)\.* Got value: Namespace\(.*class_path='([^']*)'.*",
        r"\1Problem with given class_path '\3':\n\1 \2",
        message,
        flags=re.DOTALL | re.MULTILINE,
    )
    reasons: list[tuple[Place, str]] = []
    values: dict[str, str] = {}
    above: list[tuple[int, Place]] = [(-1, Place("", "", 0))]
    for line in message.splitlines():
        text = line.lstrip(" -")
        indent = len(line) - len(text)
        if not text or NOISE.match(text):
            continue
        while above[-1][0] >= indent:
            above.pop()
        place = above[-1][1]
        key = re.match(r'Parser key "([^"]+)":', text)
        problem = re.match(r"Problem with given class_path '([^']+)':", text)
        given = re.match(r"Given value: (?:NestedArg\(key='(.*)', val=(.*)\)|(.*))", text)
        if key:
            above.append((indent, Place(setting_of(place, key.group(1)), "", place.depth + 1)))
        elif problem:
            above.append((indent, Place(place.key, problem.group(1), place.depth + 1)))
        elif given:
            name, value, plain = given.groups()
            values[place.key] = plain if name is None else value if name == "class_path" else f"{name}={value}"
        else:
            reasons.append((place, text))
    return reasons, values


def setting_of(place: Place, name: str) -> str:
    """Return the key of a class's setting: dataclasses have theirs without ``init_args``."""
    between = "" if not place.class_path or dataclasses.is_dataclass(class_at(place.class_path)) else "init_args."
    return f"{place.key}.{between}{name}" if place.key else name


def class_at(path: str) -> Any:
    """Return the class of a dotted path, or None: whatever importing it raises, its reason stands elsewhere."""
    try:
        return pydoc.locate(path)
    except pydoc.ErrorDuringImport:
        return None


def reason_of(place: Place, reasons: list[str], value: str | None) -> str:
    """Return what is wrong at a place, from the reasons of all types that were tried there."""
    text = reasons[0]
    kind = place.class_path.rpartition(".")[2]
    option = re.match(r"Option '(.+)' is not accepted", text)
    if option:
        parameters = list(inspect.signature(class_at(place.class_path)).parameters)
        return f"{kind} has no setting {option.group(1)}: {alternatives(option.group(1), parameters)}"
    missing = re.match("the following arguments are required: (.+)", text)
    if missing:
        return f"{kind} needs a value for {missing.group(1)}"
    wrong_kind = re.match(r"Import path does not correspond to a subclass of (\w+)()", text) or re.match(
        r"Expected '(?P<name>.+)' to be a subclass of <class '(\w+)'>", text
    )
    if wrong_kind:
        name = wrong_kind.groupdict().get("name") or value
        return f"{name} is no {wrong_kind.group(2) or wrong_kind.group(1)}"
    types, words = [], []
    for reason in reasons:
        if reason.startswith("Expected an instantiatable class"):
            given = re.search(r", but (\S+) is abstract", reason)
            words.append(abstract_class(given.group(1) if given else str(value)))
            continue
        absent = UNKNOWN_CLASS.search(reason)
        if absent:
            words.append(no_class(next(part for part in absent.groups() if part).strip("'.")))
            continue
        section = re.match(r"Not a valid subclass of (\w+)(?:\. Got value: (.*))?", reason)
        expected = re.match(r"Expected (?:an? )?(.+?)(?:\. Got value: (.*))?$", reason)
        match = section or expected
        if match is None:
            words.append(reason)
            continue
        value = match.group(2) or value
        types.append(f"the settings of a {match.group(1)}" if section else type_in_words(match.group(1)))
    # Where either a class or a number, a word or nothing may stand, the latter was meant.
    if words and not {"a whole number", "a number"} & set(types):
        return words[0]
    return f"expected {' or '.join(dict.fromkeys(types))}" + (f", not {value}" if value is not None else "")


def type_in_words(text: str) -> str:
    """Return a type as jsonargparse prints it in words."""
    literal = re.fullmatch(r"typing\.Literal(\[.*\])", text)
    if literal:
        return "one of " + ", ".join(str(choice) for choice in ast.literal_eval(literal.group(1)))
    name = text.removeprefix("<class '").removesuffix("'>")
    return TYPES.get(name, name)


def no_class(path: str) -> str:
    """Return a line about a class that does not exist, with the nearest name that does."""
    names = {kind.__name__ for kind in classes_of(*PACKAGES)}
    name = path.rpartition(".")[2]
    if name in names:
        return f"the class {path!r} is of another kind than is needed here"
    near = sorted(other for other in names if other.startswith(name)) or difflib.get_close_matches(name, names, 1, 0.75)
    hint = f"did you mean {near[0]}?" if near else "a class_path is written package.module.Class"
    return f"there is no class {path!r}: {hint}"


def abstract_class(path: str) -> str:
    """Return a line about a class that only says what others of its kind have, and which these are."""
    name = path.rpartition(".")[2]
    pending = [kind for kind in classes_of(*PACKAGES) if kind.__name__ == name and inspect.isabstract(kind)]
    kinds: set[str] = set()
    while pending:
        kind = pending.pop()
        pending += kind.__subclasses__()
        if not inspect.isabstract(kind) and not kind.__name__.startswith("_"):
            kinds.add(kind.__name__)
    return f"{name} is abstract: choose a class of that kind, {', '.join(sorted(kinds))}"


def classes_of(*packages: str) -> Iterator[type]:
    """List the classes in these packages' modules that are loaded."""
    for name, module in list(sys.modules.items()):
        if name.startswith(packages):
            yield from (value for value in vars(module).values() if isinstance(value, type))


def alternatives(key: str, known: list[str]) -> str:
    """Return what a dotted name may have been meant for, or all names beside it."""
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    if near:
        return f"did you mean {near[0]}?"
    section = key.rpartition(".")[0]
    beside = [name.removeprefix(f"{section}.") for name in known if not section or name.startswith(f"{section}.")]
    names = dict.fromkeys(name.partition(".")[0] for name in beside or known)
    return f"there are {', '.join(names)}"
