"""Settings before the parser reads them: short flags, configs with their bases, and those that a checkpoint has."""

import argparse
import inspect
import json
import os
import pydoc
import tempfile
from collections.abc import Collection
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from elt_lightning.checkpoints.pretrained import is_exported, read_description, read_recipe
from elt_lightning.checkpoints.recipe import found
from elt_lightning.checkpoints.store import read_checkpoint
from elt_lightning.errors import UserError
from elt_lightning.evaluation.plans import read_plan
from elt_lightning.samplers.base import OF_GUIDANCE, OF_LOOPS, SETTINGS

FROM_DATA = {
    "num_classes": ("model.num_classes", "model.network.init_args.num_classes"),
    "input_shape": ("model.network.init_args.input_shape",),
    "codebook_size": ("model.network.init_args.codebook_size", "model.process.init_args.codebook_size"),
}
"""What the data module decides, and which settings of the model take it; a class without the setting is passed over."""

SEEDS = ("model.seed", "data.init_args.seed", "model.init_args.seed")
LINKED = dict.fromkeys(SEEDS, "seed_everything")
LINKED |= {target: "the data" for targets in FROM_DATA.values() for target in targets}
"""{setting: what decides it}: given otherwise it would have no effect."""


def _short(section: str, *names: str, **others: str) -> dict[str, str]:
    """Return flags for settings of a section, under their own names and under others."""
    return {
        f"--{flag}": f"--{section}.{name}" for flag, name in (dict(zip(names, names, strict=True)) | others).items()
    }


_SAMPLER = "model.sampler.init_args"
_TEST = _short("loop_metrics", "loops", *SETTINGS, "num_samples", "repeats", "save_samples")
_TEST |= _short("loop_metrics", "reconstruction", "nearest", "diversity")
_PREDICTION = _short("samples", "loops", "num_samples") | _short(_SAMPLER, *SETTINGS)
_PREDICTION |= _short(f"{_SAMPLER}.guidance", **OF_GUIDANCE) | _short(f"{_SAMPLER}.loop_schedule", **OF_LOOPS)
SHORT_FLAGS = {
    "fit": _short("ema", "weights"),
    "validate": _short("loop_metrics", "loops", num_samples="num_validation_samples") | _short("ema", "weights"),
    "test": _TEST | _short("ema", "weights"),
    "predict": _PREDICTION | _short("ema", "weights"),
}
"""Short names for the settings that a command is mostly called with."""

SWITCHES = ("--loop_metrics.reconstruction", "--loop_metrics.nearest", "--loop_metrics.diversity")
"""Settings that a bare flag turns on."""

CONFIGS = Path(__file__).parent.parent / "configs"
"""Those that are installed with the package."""

MOST_SETTINGS = 100_000
"""What a config may hold; a few lines of YAML can stand for more than any memory holds."""

LISTS = tuple(f"--loop_metrics.{name}" for name in ("loops", *SETTINGS))
"""Settings that may be given as 1,2,4."""


def prepared(name: str, arguments: list[str], scratch: Path) -> list[str]:
    """Write a command's arguments as the parser reads them, the lowest layer of settings first.

    Raises:
        UserError: a config or checkpoint cannot be read, or a flag would have no effect.
    """
    arguments = long_flags(name, with_plan(name, arguments))
    (given, _), settled = named(arguments, "ckpt_path", "init_from"), set[str]()
    if given["ckpt_path"] is not None:
        settled.add("ckpt_path")
    if given["init_from"] is not None or name != "fit" or given["ckpt_path"] not in (None, "null"):
        settled.add("init_from")  # what goes on, or is measured, has begun already
    return with_stored_config(with_bases(arguments, scratch, settled), scratch, goes_on=name == "fit")


def named(arguments: list[str], *flags: str) -> tuple[dict[str, str | None], list[str]]:
    """Return the values of flags on a command line, None of those that are not there; and the other arguments.

    Raises:
        UserError: a flag has no value.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for flag in flags:
        parser.add_argument(f"--{flag}")
    try:
        options, others = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from error
    return vars(options), others


def with_plan(name: str, arguments: list[str]) -> list[str]:
    """Put the best setting of a `--plan` of `elt calibrate` before the other flags, which win over it.

    Raises:
        UserError: the command takes none, there is no file, it is no plan, or one of another model.
    """
    given, others = named(arguments, "plan", "ckpt_path")
    path, checkpoint = given.values()
    if path is None:
        return arguments
    if name not in ("test", "predict"):
        raise UserError(f"--plan is for elt test, predict and sample: elt {name} takes none")
    plan = read_plan(Path(path))
    if checkpoint not in (None, "null"):
        plan.check(read_recipe(checkpoint))
        others += ["--ckpt_path", checkpoint]
    best = {flag: value for flag, value in plan.settings.items() if value is not None}
    return [*(f"--{flag}={json.dumps(value).strip(chr(34))}" for flag, value in best.items()), *others]


def long_flags(name: str, arguments: list[str]) -> list[str]:
    """Write short flags and lists as the parser reads them: --loops 1,2 becomes --loop_metrics.loops=[1,2].

    Raises:
        UserError: a flag of what links decide, which would have no effect.
    """
    written: list[str] = []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        target = flag.removeprefix("--")
        if target in LINKED:
            raise UserError(f"{target} is decided by {LINKED[target]}: leave it out")
        flag = SHORT_FLAGS[name].get(flag, flag)
        if written and written[-1] in LISTS:
            written[-1] += f"={bracketed(argument)}"
        elif flag in SWITCHES and not equals:
            written.append(f"{flag}=true")
        elif equals:
            written.append(f"{flag}={bracketed(value) if flag in LISTS else value}")
        else:
            written.append(flag)
    return written


def bracketed(value: str) -> str:
    """Turn 1,2,4 into [1,2,4], which is how the parser reads a list."""
    return value if value.startswith("[") or value in ("auto", "null") else f"[{value}]"


def with_stored_config(arguments: list[str], scratch: Path, goes_on: bool = True) -> list[str]:
    """Make a checkpoint's own ``model`` and ``data`` sections the lowest layer: configs and flags override them.

    Of what a training begins from that is its model alone, without its outer teacher.

    Args:
        arguments: of the command line.
        scratch: folder of what is written for the parser.
        goes_on: whether a training goes on, for which an exported model, whose data are a class alone, lacks too much.

    Raises:
        UserError: the checkpoint cannot be read.
    """
    given, _ = named(arguments, "ckpt_path", "init_from")
    checkpoint, begins_at = ("" if path in (None, "null") else path for path in given.values())
    if not (checkpoint or begins_at):
        return arguments
    if checkpoint and begins_at:
        raise UserError("--init_from begins a training, --ckpt_path goes on with one: leave one of them out")
    if begins_at:
        config, checkpoint = {"model": dict(read_recipe(begins_at)["model"])}, "init_from"
        config["model"].pop("outer_teacher", None)  # another training's, at a path of its own
    elif is_exported(checkpoint) and not goes_on:
        recipe = read_description(Path(checkpoint))
        config = {"model": recipe["model"], "data": {"class_path": recipe["data"]["class_path"]}}
        config["ema"] = {"weights": recipe["weights"]}  # it has no others
    else:
        recipe = read_checkpoint(checkpoint, prefixes=())["elt"]
        config = {"model": dict(recipe["model"]), "data": found(recipe, "data")}
        if "outer_teacher" in config["model"]:  # the one setting of a model that is a path
            config["model"]["outer_teacher"] = found(recipe | config["model"], "outer_teacher")
    for target in LINKED:  # which a config may not hold
        section, last = find_section(config, target)
        if section is not None:
            section.pop(last, None)
    stored = scratch / f"{Path(checkpoint).stem}.yaml"  # a new run is named after it
    stored.write_text(yaml.safe_dump(config))
    return ["--config", str(stored), *arguments]


def trains_tokenizer(arguments: list[str]) -> bool:
    """Return whether the configs name a class as their model, as those of tokenizers do.

    Raises:
        UserError: one does and another, or the checkpoint, does not.
    """
    paths = [value for flag, value in pairwise(arguments) if flag == "--config"]
    models = [yaml.safe_load(Path(path).read_text()).get("model") for path in paths]
    kinds = {bool(model.keys() & {"class_path", "init_args"}) for model in models if isinstance(model, dict)}
    if len(kinds) > 1:
        raise UserError("of the configs and the checkpoint one trains a tokenizer, another a model of its codes")
    return True in kinds


def with_bases(arguments: list[str], scratch: Path, settled: Collection[str] = ()) -> list[str]:
    """Put the ``base`` that a config names, a path from its own folder, before it: the config's own settings win.

    Args:
        arguments: of the command line.
        scratch: folder of copies.
        settled: of ``ckpt_path`` and ``init_from``, those that the command line decides whatever a config says.

    Raises:
        UserError: a config or its base does not exist, or is none.
    """
    written: list[str] = []
    pending = list(arguments)
    while pending:
        flag, equals, value = pending.pop(0).partition("=")
        if flag not in ("--config", "-c") or not (equals or pending):
            written.append(flag + equals + value)
            continue
        for path in config_and_bases(here_or_installed(Path(value if equals else pending.pop(0))), scratch, settled):
            written += ["--config", str(path)]
    return written


def here_or_installed(path: Path) -> Path:
    """Return where a config is: one of ``configs/`` that is not below the current folder came with the package."""
    installed = CONFIGS.joinpath(*path.parts[1:])
    if path.exists() or path.parts[:1] != (CONFIGS.name,) or not installed.is_file():
        return path
    print(f"{path}: as it came with the package, {installed}")
    return installed


def config_and_bases(
    path: Path, scratch: Path, settled: Collection[str] = (), seen: tuple[Path, ...] = ()
) -> list[Path]:
    """List the files that make up a config, the lowest layer first; see :func:`with_bases`.

    Where it names a base, has paths below ``~`` or what a run's own records of how it began, a copy without those
    lines, and with whole paths.
    """
    if path in seen:
        raise UserError(f"the config {path} is its own base")
    named = f"the config {path}{f', the base of {seen[-1]},' if seen else ''}"
    try:
        config = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{named} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{named} holds no settings: needed are lines such as `model:` with others below")
    if is_larger(config, MOST_SETTINGS):
        raise UserError(f"{named} repeats itself by aliases to more than {MOST_SETTINGS} settings")
    for flag, what in (("ckpt_path", "a checkpoint"), ("init_from", "a model that `elt fit` begins from")):
        if config.get(flag) is not None and flag not in settled:
            raise UserError(f"{named} names {what}: give it on the command line, --{flag} {config[flag]}")
    for target in SEEDS:
        value: Any = config
        for key in target.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if value not in (None, config.get("seed_everything", 0)):
            raise UserError(f"{target} is decided by seed_everything: leave it out")
    # The record of a training says both, and commands other than `elt fit` have no init_from.
    written = with_home({name: value for name, value in config.items() if name not in ("ckpt_path", "init_from")})
    if "base" not in config and written == config:
        return [path]
    base = written.pop("base", None)
    copy = Path(tempfile.mkdtemp(dir=scratch)) / path.name  # the run is named after the file
    copy.write_text(yaml.safe_dump(written))
    return [
        *(config_and_bases(path.parent / str(base), scratch, settled, (*seen, path)) if base is not None else ()),
        copy,
    ]


def with_home(tree: Any) -> Any:
    """Replace ``~`` at the beginning of settings by the home folder, as a shell does in flags alone."""
    if isinstance(tree, dict):
        return {name: with_home(value) for name, value in tree.items()}
    if isinstance(tree, list):
        return [with_home(value) for value in tree]
    return os.path.expanduser(tree) if isinstance(tree, str) and tree.startswith("~/") else tree


def is_larger(tree: Any, limit: int) -> bool:
    """Return whether nested settings hold more than ``limit`` values, where YAML's aliases count every time."""
    pending, count = [tree], 0
    while pending and count <= limit:
        value = pending.pop()
        count += 1
        pending += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return count > limit


def find_section(config: dict[str, Any], target: str) -> tuple[dict[str, Any] | None, str]:
    """Return the section that holds a dotted setting, and its last name; None where the class has no such setting."""
    *path, last = target.split(".")
    section, class_path = config, ""
    for key in path:
        class_path = section.get("class_path", "")
        if not isinstance(section.get(key), dict):  # a checkpoint's may be damaged: building from it reports that
            return None, last
        section = section[key]
    if path[-1] == "init_args":
        kind = pydoc.locate(str(class_path))
        if not callable(kind) or last not in inspect.signature(kind).parameters:
            return None, last
    return section, last
