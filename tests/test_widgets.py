"""The last two sections of the analysis notebook: what upload, canvas and sliders answer."""

import asyncio
import html
import re
import shutil
import sys
import threading
import types
from unittest.mock import Mock

import ipywidgets
import matplotlib.pyplot as plt
import nbformat
import pytest
from conftest import ROOT

ANALYSIS = ROOT / "vae_mnist_analysis_visualizations.ipynb"
EXAMPLE = ROOT / "images/example_digit.jpg"
SEVEN = [(75, 60), (225, 60), (180, 155), (140, 250)]
BAR = [(100, 155), (200, 155)]
ONE = [(150, 50), (150, 250)]


def run_cells(models, live=True):
    """The names of a page of its own, on the 5,000 digits, as if a person sat before it.

    Of the notebook it runs the cells before section 1 (settings, data, models), and those of the
    last two sections; with the reference models, whatever models of one's own there are.
    """
    cells = nbformat.read(ANALYSIS, 4).cells
    titles = [cell.source.partition("\n")[0] for cell in cells]
    (first,) = [i for i, title in enumerate(titles) if title.startswith("## 1. ")]
    needed = cells[:first] + cells[titles.index("## 7. Your own digit") :]
    scope = {}
    for source in (cell.source for cell in needed if cell.cell_type == "code"):
        exec(re.sub("^( *)%.*", r"\1pass", source, flags=re.M), scope)
        if "SOURCE" in source and "SEED" in source:
            scope.update(SOURCE="mnist5k", MODEL_DIR=models)
        if live and "live" in scope:
            scope["live"] = True
    plt.close("all")
    return scope


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for reference in (ROOT / "models_mnist").glob("*_reference.safetensors"):
        shutil.copy(reference, folder)
    return folder


@pytest.fixture(scope="module")
def live_page(models):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return run_cells(models)


@pytest.fixture
def page(live_page, monkeypatch):
    """The page as it is after "clear", with a pen that need not rest long; pyplot is refused."""

    def refused(*_, **__):
        pytest.fail("pyplot in a callback")

    in_a_thread(live_page["clear"], None)
    monkeypatch.setattr(plt, "figure", refused)
    monkeypatch.setitem(live_page, "REST", 0.05)
    monkeypatch.chdir(ROOT)
    return live_page


def in_a_thread(function, *arguments):
    """Call as a kernel does: in a thread without a pyplot of its own, in an event loop.

    Returns when the pen has rested and the answer is there.
    """
    errors = []

    async def act():
        function(*arguments)
        await asyncio.sleep(0.1)

    def call():
        try:
            asyncio.run(act())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    assert errors == []


def is_empty(page):
    """Whether no picture is shown."""
    return page["answer"].value == page["NOTHING"]


def said(page):
    return html.unescape(page["verdict"].value)


def send(page, event, x, y):
    page["canvas"]._handle_frontend_event(None, {"event": event, "x": x, "y": y}, [])


def draw(page, *strokes):
    """Strokes of the mouse, by the messages that a browser sends."""
    for stroke in strokes:
        send(page, "mouse_down", *stroke[0])
        for point in stroke[1:]:
            send(page, "mouse_move", *point)
        send(page, "mouse_up", *stroke[-1])


def choose(page, name, content):
    """Choose a file, by the message that a browser sends."""
    (button,) = page["upload"].children
    file = {"name": name, "type": "image/png", "size": len(content), "last_modified": 0}
    in_a_thread(button.set_state, {"value": [{**file, "content": memoryview(content)}]})


def test_a_drawing_is_judged_once_when_the_pen_has_rested(page, monkeypatch):
    judged = []
    monkeypatch.setitem(page, "judge_drawing", lambda: judged.append(len(page["strokes"])))
    in_a_thread(draw, page, SEVEN, BAR)
    assert judged == [2]


def test_undo_takes_back_a_stroke_and_clear_all(page):
    in_a_thread(draw, page, SEVEN)
    seven = page["answer"].value
    assert "Not flagged" in said(page) and "training digits: 7 (" in said(page)
    in_a_thread(draw, page, BAR)
    assert page["answer"].value != seven
    in_a_thread(page["undo"], None)
    assert page["answer"].value == seven
    for _ in range(2):  # the second time there is nothing left
        in_a_thread(page["undo"], None)
        assert is_empty(page) and said(page) == ""
    in_a_thread(draw, page, SEVEN)
    in_a_thread(page["clear"], None)
    assert is_empty(page) and page["strokes"] == []


def test_clear_before_the_pen_has_rested(page):
    def draw_and_clear():
        draw(page, SEVEN)
        page["clear"](None)

    in_a_thread(draw_and_clear)
    assert is_empty(page)


@pytest.mark.parametrize("stroke", [[(150, 150), (160, 155)], [(0, 0)]])
def test_a_dot_is_not_called_no_ink(page, stroke):
    in_a_thread(draw, page, stroke)
    assert "a dot, a blob or a short stroke is no digit" in said(page)
    assert "lines or squares" not in said(page)
    assert is_empty(page)


@pytest.mark.parametrize("event", ["mouse_out", "mouse_move"])
def test_a_stroke_ends_where_it_leaves_the_square(page, event):
    def leave_and_come_back():
        send(page, "mouse_down", *ONE[0])
        send(page, "mouse_move", *ONE[1])
        send(page, event, 150, 340)
        send(page, "mouse_move", 20, 20)

    in_a_thread(leave_and_come_back)
    assert page["strokes"] == [[*ONE, (150, 340)]] and page["stroke"] == []
    assert "A stroke left the square" in said(page) and "training digits: 1 (" in said(page)


def test_a_hint_is_painted_until_the_first_stroke(page, monkeypatch):
    painted = []
    monkeypatch.setattr(page["canvas"], "put_image_data", painted.append)
    in_a_thread(page["clear"], None)
    assert painted[-1].min() < 200
    in_a_thread(draw, page, SEVEN)
    assert painted[-1].min() == 255
    page["repaint"]()  # of a reloaded page
    assert painted[-1].min() == 0


def test_a_picture_is_shown_also_twice_in_a_row(page):
    for _ in range(2):
        (button,) = page["upload"].children
        choose(page, "drei/süß 三.jpg", EXAMPLE.read_bytes())
        assert "Anomaly score" in said(page) and not is_empty(page)
        assert page["upload"].children != (button,), "its counter says (1)"


def test_the_value_of_either_version_of_ipywidgets_is_understood(page):
    content = EXAMPLE.read_bytes()
    seven = {"five.jpg": {"metadata": {"name": "five.jpg"}, "content": content}}
    eight = ({"name": "five.jpg", "content": memoryview(content)},)
    for value in (seven, eight):
        page["clear"](None)
        page["uploaded"]({"new": value})
        assert "Anomaly score" in said(page)


@pytest.mark.parametrize("name", ["a/süß 7.png", "<b>.png"])
def test_a_file_that_is_no_picture_is_named_as_its_owner_calls_it(page, name):
    choose(page, name, EXAMPLE.read_bytes())
    choose(page, name, b"no picture")
    assert name in said(page) and "<b>" not in page["verdict"].value
    assert "tmp" not in said(page) and "picture-file" not in said(page)
    assert is_empty(page), "the picture of the one before"


def test_a_picture_is_found_by_its_name(page):
    field = page["field"]
    in_a_thread(draw, page, SEVEN)
    in_a_thread(field.set_state, {"value": ' "images/example_digit.jpg" '})
    assert "training digits: 5 (" in said(page) and page["strokes"] == []
    for wrong, says in (
        ("no_such.jpg", "There is no no_such.jpg in this"),
        ("images", "images cannot be read"),
        ("README.md", "README.md cannot be read"),
    ):
        in_a_thread(field.set_state, {"value": wrong})
        assert says in said(page) and is_empty(page)
    in_a_thread(page["clear"], None)
    assert field.value == ""


def test_sliders_move_a_digit_and_are_reset(page):
    start_from, view = page["start_from"], page["view"]
    first = page["sliders"][page["top"][0]]
    in_a_thread(draw, page, SEVEN)
    views = []
    for i in range(11):  # the ten digits and one's own
        in_a_thread(start_from.set_state, {"index": i})
        views.append(view.value)
    assert len(set(views)) == 11
    in_a_thread(draw, page, BAR)
    assert view.value != views[-1], "the drawing goes on"
    start, own_value = view.value, first.value
    in_a_thread(first.set_state, {"value": first.min})
    assert view.value != start
    in_a_thread(page["start_again"], None)
    assert view.value == start and first.value == own_value


def test_without_ipycanvas_the_rest_works_and_says_what_to_install(models, monkeypatch):
    colab = types.SimpleNamespace(output=Mock())
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    monkeypatch.setitem(sys.modules, "ipycanvas", None)
    monkeypatch.chdir(ROOT)
    page = run_cells(models)
    assert "%pip install ipycanvas" in page["paper"].value
    colab.output.enable_custom_widget_manager.assert_called_once_with()
    choose(page, "five.jpg", EXAMPLE.read_bytes())
    assert "Anomaly score" in said(page)
    in_a_thread(page["clear"], None)
    assert is_empty(page)


def test_a_page_that_nobody_sits_before_makes_no_widget(models, monkeypatch, capsys):
    def refused(*_, **__):
        pytest.fail("a widget")

    monkeypatch.setattr(ipywidgets.Widget, "__init__", refused)
    monkeypatch.chdir(ROOT)
    run_cells(models, live=False)
    assert "The controls need a running kernel" in capsys.readouterr().out
