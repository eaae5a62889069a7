"""The page of `elt demo`: what it draws is what Python draws, and a real browser shows it."""

import base64
import http.client
import io
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from elt_lightning.cli import main
from elt_lightning.commands.demo import HOST, Handler, build_parser, server
from elt_lightning.commands.demo_answers import Answers, clashes, data_url, puzzle
from elt_lightning.metrics.latin_squares import valid_lines

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")
WITHOUT = "no browser to test the page of elt demo: apt-get install chromium && pip install 'elt-lightning[dev]'"


@pytest.fixture(scope="module")
def answers() -> Answers:
    return Answers(build_parser().parse_args(["--model=squares"]))


def picture(url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,"))))


@pytest.mark.parametrize(
    "query",
    [
        "loops=3&class=2&seed=5&steps=4&guidance=2&carry_state=true",
        "loops=2",
        "model=sudoku&loops=2&given=0,0,3,2,4,1&exit_scale=0.5",
        "model=sudoku&loops=6&tolerance=0.05&carry_state=false",
        "model=diffusion&loops=1&steps=3&class=4",
    ],
)
def test_the_page_draws_what_the_python_below_it_draws(answers: Answers, query: str) -> None:
    answer, drawn = answers.answer("draw", query), dict[str, Any]()
    exec(answer["python"], drawn)
    assert np.array_equal(picture(answer["picture"]), drawn["pictures"][0])
    assert answer["macs"] > 0
    asked = int(query.partition("loops=")[2][0])
    assert 0 < answer["loops_run"] < asked if "tolerance" in query else answer["loops_run"] == asked


def test_a_clip_is_a_picture_that_moves() -> None:
    clip = torch.randint(256, (3, 4, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    moving = picture(data_url(clip))
    for number, frame in enumerate(clip.unbind(1)):
        moving.seek(number)
        assert np.array_equal(np.asarray(moving.convert("RGB")), frame.permute(1, 2, 0))


def test_two_slider_places_differ_and_the_cost_is_that_of_the_model(answers: Answers) -> None:
    few, many = (answers.answer("draw", f"loops={loops}&seed=1") for loops in (1, 16))
    assert few["picture"] != many["picture"]
    module = answers.loaded["squares"].module
    assert (few["macs"], many["macs"]) == (module.macs_per_sample(1), module.macs_per_sample(16))


@pytest.mark.parametrize(
    ("query", "telling"),
    [
        ("loops=0", "'0' is not a whole number from 1"),
        ("loops=2&class=5", "the model's classes are 0 to 4, not 5"),
        ("loops=1&exit_scale=1", "must come before the last"),
        ("loops=2&tempo=3", "unrecognized arguments: --tempo=3"),
        ("model=/etc/passwd", "invalid choice"),
        ("model=diffusion&given=0,0,1", "does not draw digits"),
        ("given=0,0", "is not row, column and digit"),
        ("given=0,0,6", "no digit from 1 to 5"),
    ],
)
def test_what_cannot_be_drawn_is_answered_by_one_line(answers: Answers, query: str, telling: str) -> None:
    answer = answers.answer("draw", query)
    assert list(answer) == ["error"]
    assert telling in answer["error"]


def test_a_checkpoint_comes_first_and_has_no_setting_that_it_lacks(
    small_squares: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(small_squares.parents[3])
    answers = Answers(build_parser().parse_args([f"--ckpt_path={small_squares}", "--weights=raw"]))
    assert answers.answer("models", "")["models"][0] == str(small_squares)
    described = answers.answer("model", "")
    assert (described["has_recall"], described["board"]) == (False, {"order": 5, "boxes": None})
    assert "carry_state needs a network with recall" in answers.answer("draw", "loops=1&carry_state=true")["error"]
    assert f"elt_lightning.load('{small_squares}', weights='raw')" in answers.answer("draw", "loops=1")["python"]


@pytest.mark.parametrize(("order", "boxes"), [(5, None), (4, (2, 2)), (6, (2, 3)), (6, (3, 2))])
def test_a_puzzle_has_a_solution_and_what_clashes_is_found(order: int, boxes: tuple[int, int] | None) -> None:
    for number in range(5):
        whole = puzzle(order, boxes, order**2, number)
        digits = torch.tensor([[whole[row, column] for column in range(order)] for row in range(order)])
        assert valid_lines(digits[None], boxes).all()
        assert not clashes(digits.tolist(), boxes)
        digits[0, 0] = digits[1, 0]  # twice in its column
        assert {(0, 0), (1, 0)} <= set(clashes(digits.tolist(), boxes))
        assert len(puzzle(order, boxes, 7, number)) == 7
    assert puzzle(order, boxes, 7, 0) != puzzle(order, boxes, 7, 1)


@contextmanager
def served(*arguments: str) -> Iterator[int]:
    """Serve a page in the block, on the port that it is given."""
    with server(build_parser().parse_args(["--port=0", *arguments])) as serving:
        Thread(target=serving.serve_forever, daemon=True).start()
        yield serving.server_port
        serving.shutdown()


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """Port of a page that begins with the sudokus."""
    with served() as number:
        yield number


def test_the_server_answers_on_this_machine_alone_and_a_busy_port_is_refused(
    port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    connection = http.client.HTTPConnection(HOST, port)
    for path, status, part in (("/", 200, b"<title>elt demo"), ("/models", 200, b'["sudoku", '), ("/x", 404, b"no")):
        connection.request("GET", path)
        response = connection.getresponse()
        assert response.status == status
        assert part in response.read()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), timeout=5)
    assert main(["demo", f"--port={port}", "--no-browser"]) == 2
    assert f"--port {port}: Address already in use: choose another" in capsys.readouterr().err


def test_a_picture_that_nobody_waits_for_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """When its page is closed or wants another one, and when the server ends: Ctrl-C waited for hours of drawing."""
    begun, check = Event(), Handler.check_awaited

    def checking(handler: Handler) -> None:
        begun.set()
        check(handler)

    monkeypatch.setattr(Handler, "check_awaited", checking)

    def asked(query: str) -> http.client.HTTPConnection:
        begun.clear()
        connection = http.client.HTTPConnection(HOST, port, timeout=60)
        connection.request("GET", f"/draw?{query}")
        assert begun.wait(60)
        return connection

    endless = "loops=32&steps=20000"
    with served("--model=squares") as port:
        asked(endless).close()
        assert b'"picture"' in asked("loops=1").getresponse().read()
        asked(endless)
    Handler.alone.submit(int).result(timeout=60)  # what the program waits for at its end


@pytest.fixture
def browser() -> Iterator[Any]:
    """A headless Chromium, or a skipped test that tells how to get one."""
    playwright = pytest.importorskip("playwright.sync_api", reason=WITHOUT)
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(WITHOUT)
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=found, args=list(FLAGS))
        yield chromium
        chromium.close()


SETTLED = "model && !running && shown === query(loops.value)"


def opened(browser: Any, address: str) -> tuple[Any, list[str]]:
    """Open a page; return it with what the browser will complain of."""
    page, complaints = browser.new_page(viewport={"width": 1160, "height": 900}), []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(address)
    return page, complaints


@pytest.mark.slow
def test_the_picture_follows_the_slider_in_a_real_browser(port: int, browser: Any) -> None:
    """Opens the page, moves the slider, gives a cell; DEMO_SCREENSHOT names a file to keep the first view in."""
    home, visited = f"http://{HOST}:{port}/", []
    page, complaints = opened(browser, home)
    page.on("request", lambda request: visited.append(request.url))
    page.reload()

    def settled() -> str:
        page.wait_for_function(SETTLED)
        return page.get_attribute("#picture", "src")

    at_one = settled()
    assert page.locator("#strip img").count() == 6
    assert page.locator("#cells .given").count() == 14
    assert "cells clash" in page.inner_text("#verdict")
    if "DEMO_SCREENSHOT" in os.environ:
        page.screenshot(path=os.environ["DEMO_SCREENSHOT"], full_page=True)
    page.locator("#loops").fill("8")
    at_eight = settled()
    assert at_eight != at_one
    assert page.inner_text("#verdict") == "✓ yes"
    assert page.inner_text("#loops_label") == "8 loops"
    assert page.get_attribute("#at_8 img", "src") == at_eight
    drawn: dict[str, Any] = {}
    exec(page.inner_text("#python"), drawn)
    assert np.array_equal(picture(at_eight), drawn["pictures"][0])

    page.click("#clear")
    page.click('[data-cell="1,2"]')
    page.click("#palette >> text=5")
    settled()
    assert "given={(1, 2): 5}" in page.inner_text("#python")
    assert page.evaluate("document.activeElement.ariaLabel") == "row 2, column 3: 5, given"
    page.keyboard.press("Enter")  # the same by keys alone
    page.keyboard.press("6")
    settled()
    assert "given={(1, 2): 6}" in page.inner_text("#python")
    page.fill("#steps", "3000")  # a minute of drawing, which nobody waits for
    page.wait_for_function("running && running.asked.includes('steps=3000')")
    page.fill("#steps", "8")
    assert settled() != at_eight
    page.fill("#tolerance", "0.05")
    settled()
    assert "at most" in page.inner_text("#macs")
    page.fill("#exit_scale", "1")
    page.locator("#loops").fill("1")
    settled()
    assert "must come before the last" in page.inner_text("#error")
    assert page.inner_text("#macs") == "…"  # not those of the picture before
    page.set_viewport_size({"width": 340, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") <= 340
    page.set_viewport_size({"width": 1160, "height": 900})
    page.select_option("#model", "diffusion")
    page.wait_for_function("model.name === 'diffusion'")
    assert settled() != at_eight
    assert not page.is_visible("#error")
    assert page.locator("#cells button").count() == 0
    page.select_option("#class", "")
    assert page.is_disabled("#guidance")
    settled()
    assert not complaints
    assert all(url.startswith((home, "data:")) for url in visited), visited


@pytest.mark.slow
def test_a_model_without_recall_is_not_shown_what_needs_it(
    small_squares: Path, browser: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(small_squares.parents[3])
    with served(f"--ckpt_path={small_squares}") as port:
        page, complaints = opened(browser, f"http://{HOST}:{port}/")
        page.wait_for_function(SETTLED)
        assert (page.is_visible("#carry_state"), page.is_visible("#tolerance")) == (False, False)
        page.fill("#guidance", "2")
        page.wait_for_function(SETTLED)
        assert "guidance=2.0" in page.inner_text("#python")
        assert "carry_state" not in page.inner_text("#python")
        page.select_option("#model", "squares")
        page.wait_for_function("model.name === 'squares'")
        assert (page.is_visible("#carry_state"), page.is_visible("#tolerance")) == (True, True)
        page.wait_for_function(SETTLED)
        assert not complaints
        page.route("**/draw*", lambda route: route.abort())  # as if the server had gone
        page.locator("#loops").fill("7")
        page.wait_for_function("!error.hidden")
        assert "look at the terminal" in page.inner_text("#error")
