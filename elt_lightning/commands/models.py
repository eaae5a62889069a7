"""`elt models`: the trained models that come along with the package."""

from rich.console import Console
from rich.table import Table

from elt_lightning.checkpoints import shipped
from elt_lightning.checkpoints.store import CONFIG
from elt_lightning.commands.arguments import Parser

HEADINGS = ("name", "draws", "classes", "trained at", "parameters", "kB", "score there")


def run(name: str, arguments: list[str]) -> None:
    """Print the table (UserError: the command line is wrong)."""
    Parser(prog=f"elt {name}", description=__doc__, allow_abbrev=False).parse_args(arguments)
    table = Table()
    for place, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="left" if place < 2 else "right", overflow="fold")
    for model in shipped.names():
        table.add_row(model, *described(model))
    Console(width=None if Console().is_terminal else 150).print(table)
    print(f"They lie in {shipped.FOLDER}. A picture of one:")
    print(f"  elt sample --model {shipped.names()[0]} --loops 1,2,4,8")


def described(model: str) -> list[str]:
    """Return a model's cells of the table, but for its name."""
    sweep, config = shipped.read_json(model, shipped.SWEEP), shipped.read_json(model, CONFIG)
    row = shipped.recorded(sweep)
    size = sum(path.stat().st_size for path in shipped.folder_of(model).iterdir())
    return [
        shipped.read_json(model, shipped.MADE)["draws"],
        str(config["data"]["num_classes"]),
        f"{sweep['train_loops']} loops",
        f"{row['params_total']:,}",
        f"{size / 1000:,.0f}",
        f"{sweep['primary_metric']} {row['metrics'][sweep['primary_metric']]['mean']:.3g}",
    ]
