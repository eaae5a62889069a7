"""The published numbers, against each other."""

from pathlib import Path

import pytest

from elt_lightning.networks.scales import SCALES
from elt_lightning.reproduce.imagenet import family_of
from elt_lightning.reproduce.published import (
    FIGURE_4,
    FIGURE_6,
    FIGURE_7,
    TABLE_1,
    TABLE_2,
    TABLE_3,
    TABLE_4,
    TABLE_8,
    Printed,
    Row,
)

ROWS = (*TABLE_1, *TABLE_2, *TABLE_4)
PACKAGE = Path(__file__).parent.parent / "elt_lightning"


@pytest.mark.parametrize(
    ("text", "value", "spread"),
    [
        ("101M", 101e6, None),
        ("2.1B", 2.1e9, None),
        ("3.7k", 3700.0, None),
        ("~13k", 13e3, None),
        ("0.66×", 0.66, None),
        ("96.4±2", 96.4, 2.0),
        ("88.53±0.20", 88.53, 0.2),
    ],
)
def test_numbers_are_read_as_they_are_printed(text: str, value: float, spread: float | None) -> None:
    printed = Printed(text)
    assert printed.value == pytest.approx(value)
    assert printed.spread == spread


def test_a_number_agrees_to_its_last_digit() -> None:
    assert Printed("3.7k").agrees(3749)
    assert not Printed("3.7k").agrees(3760)
    assert Printed("101M").agrees(100.6e6)
    assert not Printed("101M").agrees(100.4e6)
    assert Printed("~13k").agrees(13_400)
    with pytest.raises(ValueError, match="not a number"):
        Printed("about 5")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.place)
def test_rows_hold_together(row: Row) -> None:
    if row.num_layers is None:
        assert row.name is None
        return
    assert f"{row.num_layers}N×{row.loops}L" in row.model or row.loops == 1
    if row.depth is not None:
        assert row.depth.value == row.num_layers * row.loops
    if row.table != 4:
        assert row.name is not None
        assert family_of(row.name) == ("masked" if row.table == 1 else "diffusion")


def test_tables_have_the_rows_of_the_paper() -> None:
    assert [len(table) for table in (TABLE_1, TABLE_2, TABLE_3, TABLE_4)] == [5, 6, 4, 4]
    assert len({row.place for row in ROWS}) == len(ROWS)
    for row in TABLE_3:
        assert row.num_layers * row.loops == SCALES[row.scale].full_depth
    named = {row.name for row in TABLE_2}
    assert {TABLE_8.model, TABLE_8.baseline, *FIGURE_6} <= named
    assert FIGURE_7.loops > FIGURE_7.train_loops


def test_the_fit_goes_through_the_looped_model_of_scale_l() -> None:
    row = TABLE_1[2]
    assert row.gflops is not None
    assert row.fid is not None
    assert FIGURE_4.fid(row.gflops.value) == pytest.approx(row.fid.value, abs=0.1)


def test_no_other_module_repeats_a_published_score() -> None:
    numbers = {str(FIGURE_4.factor), FIGURE_7.fvd.text}
    for row in ROWS:
        numbers |= {number.text for number in (row.fvd, row.inception_score) if number is not None}
    for path in PACKAGE.rglob("*.py"):
        if path.name != "published.py":
            text = path.read_text()
            assert not [number for number in numbers if len(number) > 4 and number in text], path


@pytest.mark.parametrize("row", [row for row in ROWS if row.name], ids=lambda row: row.place)
def test_headers_of_configs_say_what_is_published(row: Row) -> None:
    """The comments above a config repeat its row: a number that is mended here must be mended there."""
    path = next((PACKAGE.parent / "configs").glob(f"*/{row.name}.yaml"))
    comments = [line for line in path.read_text().splitlines() if line.startswith("#")]
    header = " ".join(comments).replace(" ± ", "±")
    assert f"Table {row.table}" in header
    for name, number in (("FID", row.fid), ("FVD", row.fvd)):
        assert number is None or f"{name} {number.text}" in header
    assert row.params is not None
    assert f"{row.params.text} parameters" in header


def test_choosing_loops_copies_table_2() -> None:
    page = (PACKAGE.parent / "docs" / "choosing_loops.md").read_text()
    for row in TABLE_2[1:]:
        assert row.fid is not None
        assert row.params is not None
        assert f"| {row.fid.text} | {row.params.text} |" in page
