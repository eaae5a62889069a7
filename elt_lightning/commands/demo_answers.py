"""What the page of `elt demo` asks for: which models there are, what each can, and pictures."""

import argparse
import base64
import io
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import parse_qsl

import torch
from torch import Tensor, nn

from elt_lightning.checkpoints import shipped
from elt_lightning.commands.arguments import Parser, device_of, whole, wholes
from elt_lightning.commands.drawing_arguments import add_sampler_arguments, chosen_model, sampler_settings
from elt_lightning.errors import MOST, UserError
from elt_lightning.evaluation.drawing import Drawing, frames_of, load, picture_of
from elt_lightning.model import ELTModel

Cell = tuple[int, int]

FIRST = "sudoku"
"""The model that the page begins with, where the command line names none."""

FRAME_MILLISECONDS = 125

SMALL = 10**8
"""Multiply–accumulates of a loop below which threads wait for each other longer than they compute: for seconds, on a
machine that is busy."""


class Answers:
    """Answers to the page; models are loaded when they are first asked for, the first one at once.

    Args:
        options: of the command line, see
            :func:`~elt_lightning.commands.drawing_arguments.add_model_arguments`; without a model all that come along.

    Raises:
        UserError: there is no such model.
    """

    KINDS = ("models", "model", "puzzle", "draw")

    def __init__(self, options: argparse.Namespace) -> None:
        if options.model is None and options.ckpt_path is None:
            options.model = FIRST
        self.device = device_of(options.device)
        self.first: str = options.model or options.ckpt_path
        self.loaded: dict[str, Drawing] = {self.first: chosen_model(options)}
        self.own = {self.first} - {options.model}  # which shipped files say nothing of
        flags = {"weights": options.weights, "tokenizer_path": options.tokenizer_path}
        self.flags = {self.first: {name: value for name, value in flags.items() if value is not None}}
        self.names = list(dict.fromkeys([*self.own, *shipped.names()]))

    def answer(self, kind: str, query: str, check: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """Answer one of :attr:`KINDS`, queries such as ``model=squares&loops=4``, wrong ones by ``{"error": line}``.

        ``check`` is called before every pass through a network; what it raises ends the drawing, and is passed on.
        """
        try:
            options = self.parsed(query)
            options.check = check
            answer: dict[str, Any] = getattr(self, kind)(options)
        except UserError as error:
            return {"error": str(error)}
        return answer

    def parsed(self, query: str) -> argparse.Namespace:
        """Read a query as `elt sample` reads its command line (UserError: a setting is wrong, or unknown)."""
        parser = Parser(prog="elt demo", add_help=False, allow_abbrev=False)
        parser.add_argument("--model", choices=self.names, default=self.first)
        parser.add_argument("--loops", type=whole(1, MOST["loops"]))
        parser.add_argument("--class", dest="label", type=whole(0))
        parser.add_argument("--given", type=cells, default={})
        add_sampler_arguments(parser)
        return parser.parse_args([f"--{name}={value}" for name, value in parse_qsl(query, keep_blank_values=True)])

    def loaded_model(self, name: str) -> Drawing:
        """Return a model, loaded once."""
        if name not in self.loaded:
            self.loaded[name] = load(shipped.folder_of(name)).to(self.device)
        return self.loaded[name]

    def made(self, name: str) -> dict[str, Any]:
        """Return what is known of a model's data: the file of one that comes along, or its checkpoint's recipe."""
        return self.loaded_model(name).recipe if name in self.own else shipped.read_json(name, shipped.MADE)

    def models(self, options: argparse.Namespace) -> dict[str, Any]:
        """List the models, the one to begin with first."""
        return {"models": sorted(self.names, key=lambda name: name != self.first)}

    def model(self, options: argparse.Namespace) -> dict[str, Any]:
        """Return what a model draws, and which settings it has."""
        model, made = self.loaded_model(options.model), self.made(options.model)
        module, board = model.module, board_of(model, made)
        return {
            "name": options.model,
            "draws": made.get("draws", options.model),
            "classes": made.get("class_names") or [f"class {number}" for number in range(model.num_classes)],
            "train_loops": module.max_loops,
            "layers": len(module.network.backbone.layers),
            "parameters": module.num_parameters()[0],
            "has_recall": module.network.has_recall,
            "settings": module.sampler.settings(),
            "board": board and {"order": board[0], "boxes": board[1]},
        }

    def puzzle(self, options: argparse.Namespace) -> dict[str, Any]:
        """Set a puzzle that has a solution: ``given`` for :meth:`draw`, another for each seed."""
        made = self.made(options.model)
        board = board_of(self.loaded_model(options.model), made)
        if board is None:
            raise UserError(f"{options.model} draws no squares whose rules are known")
        order, boxes = board
        count = made["data"].get("init_args", {}).get("num_given") or order**2 * 2 // 5
        return {"given": [(*cell, digit) for cell, digit in puzzle(order, boxes, count, options.seed).items()]}

    def draw(self, options: argparse.Namespace) -> dict[str, Any]:
        """Draw a picture, with its cost, and the cells of a square that clash; ``python`` draws it once more."""
        model = self.loaded_model(options.model)
        asked = sampler_settings(options)
        sampler, loops = model.sampler(options.loops, **asked)
        usual = model.module.sampler.settings()
        changed = {name: value for name, value in asked.items() if value != usual[name]}
        labels = model.labels([options.label], 1)
        known = model.clues(options.given) if options.given else None
        spent: list[Tensor] = []
        began = time.perf_counter()
        with threads_for(model.module), called_before(model.module.network, options.check):
            codes = model.codes(labels, loops, sampler, options.seed, known, spent)
        pixels = model.shown(codes)[0]
        seconds = time.perf_counter() - began
        board = board_of(model, self.made(options.model))
        digits = model.digits(codes)[0].tolist() if board else []
        return {
            "picture": data_url(pixels),
            "milliseconds": 1000 * seconds,
            "macs": model.module.macs_per_sample(loops, sampler),
            "loops_run": float(torch.stack(spent).mean()),
            "digits": digits,
            "clashes": board and clashes(digits, board[1]),
            "python": python_of(options, self.flags.get(options.model, {}), changed),
        }


def board_of(model: Drawing, made: dict[str, Any]) -> tuple[int, tuple[int, int] | None] | None:
    """Return cells along a side of the squares that a model draws, and rows and columns of a box, None without boxes.

    None where it draws no digits in cells, or it is not known by which rules.
    """
    try:
        order = model.board()[0]
    except UserError:
        return None
    arguments = made["data"].get("init_args")
    return None if arguments is None else (order, arguments.get("boxes"))


def cells(text: str) -> dict[Cell, int]:
    """Parse row, column and digit of one given cell after the other."""
    numbers = wholes(0)(text)
    if len(numbers) % 3:
        raise argparse.ArgumentTypeError(f"{text!r} is not row, column and digit of cells, such as 0,2,5")
    return {(row, column): digit for row, column, digit in zip(*[iter(numbers)] * 3, strict=True)}


def clashes(digits: list[list[int]], boxes: tuple[int, int] | None) -> list[Cell]:
    """List the cells of a square whose digit stands more than once in their row, column or box."""
    places: dict[object, list[Cell]] = defaultdict(list)
    for row, line in enumerate(digits):
        for column, digit in enumerate(line):
            box = [("box", row // boxes[0], column // boxes[1])] if boxes else []
            for group in (("row", row), ("column", column), *box):
                places[group, digit].append((row, column))
    return sorted({cell for same in places.values() if len(same) > 1 for cell in same})


def puzzle(order: int, boxes: tuple[int, int] | None, count: int, number: int) -> dict[Cell, int]:
    """Take ``count`` cells of a square that follows the rules, one of many that ``number`` chooses among."""
    height, width = boxes or (1, order)
    draw = random.Random(number)

    def mixed(band: int) -> list[int]:  # lines may change places within a band, and bands with each other
        return [
            start + line
            for start in draw.sample(range(0, order, band), order // band)
            for line in draw.sample(range(band), band)
        ]

    rows, columns, digits = mixed(height), mixed(width), draw.sample(range(1, order + 1), order)
    chosen = draw.sample([(row, column) for row in range(order) for column in range(order)], count)
    shifts = [width * (row % height) + row // height for row in rows]
    return {(row, column): digits[(shifts[row] + columns[column]) % order] for row, column in sorted(chosen)}


@contextmanager
def threads_for(module: ELTModel) -> Iterator[None]:
    """Compute with one thread in the block if the model is a small one."""
    usual = torch.get_num_threads()
    torch.set_num_threads(1 if module.network.macs(1) < SMALL else usual)
    try:
        yield
    finally:
        torch.set_num_threads(usual)


@contextmanager
def called_before(network: nn.Module, check: Callable[[], None]) -> Iterator[None]:
    """Call a function before every pass through a network in the block."""
    hook = network.register_forward_pre_hook(lambda *_: check())
    try:
        yield
    finally:
        hook.remove()


def data_url(pixels: Tensor) -> str:
    """Write a picture (C, H, W), or a clip (C, F, H, W) that moves, as PNG for a page."""
    first, *others = [picture_of(pixels)] if pixels.ndim == 3 else frames_of(pixels)
    file = io.BytesIO()
    first.save(file, "PNG", save_all=bool(others), append_images=others, duration=FRAME_MILLISECONDS, loop=0)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def python_of(options: argparse.Namespace, flags: dict[str, Any], changed: dict[str, Any]) -> str:
    """Write the lines of Python that draw the same picture.

    Args:
        options: of the query.
        flags: what loads the model beside its name.
        changed: settings of the sampler that are not the model's own.
    """

    def call(function: str, first: object, named: dict[str, Any]) -> str:
        return f"{function}({', '.join([repr(first), *(f'{name}={value!r}' for name, value in named.items())])})"

    settings = {"loops": options.loops, "seed": options.seed, **changed}
    settings |= {"given": options.given} if options.given else {}
    loaded = call("elt_lightning.load", options.model, flags)
    return f"import elt_lightning\n\nmodel = {loaded}\npictures = {call('model.draw', [options.label], settings)}"
