"""Sections 8 and 9 of the analysis notebook: what upload, canvas and sliders do, in a thread."""

import html
import io
import shutil
import threading

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

ANALYSIS = "vae_mnist_analysis_visualizations.ipynb"
EXAMPLE = ROOT / "images/example_digit.jpg"
# Of the cells above section 8, those that it builds upon, by a line of each.
ABOVE = [
    "import ipywidgets as widgets",
    "from PIL import Image, ImageDraw",
    'SOURCE = "auto"',
    "utils.seed_everything(SEED)",
    "vae = utils.load_best(",
    "def save(figure, name):",
    "firsts = torch.tensor(",
    "kl = utils.kl_per_dimension(",
    "train_mu = ",
    "start = mu[firsts[-1]]",
    "all_scores = ",
]


def cells_needed():
    cells = nbformat.read(ROOT / ANALYSIS, 4).cells
    first = next(i for i, cell in enumerate(cells) if "## 8. Your own digit" in cell.source)
    above = [cell.source for cell in cells[:first] if cell.cell_type == "code"]
    below = [cell.source for cell in cells[first:] if cell.cell_type == "code"]
    needed = []
    for line in ABOVE:
        (source,) = [source for source in above if line in source]
        needed.append(source)
    return needed + below


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The names of the cells, run on scikit-learn's digits as if a person sat before them.

    With the reference models, whatever models of one's own there are.
    """
    models = tmp_path_factory.mktemp("models")
    for reference in (ROOT / "models_mnist").glob("*_reference.safetensors"):
        shutil.copy(reference, models)
    scope = {"thresholds": {("VAE", "reconstruction"): torch.tensor(9.0)}}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        for source in cells_needed():
            exec(source.replace("%matplotlib inline", ""), scope)
            scope["SOURCE"] = "digits"
            scope["MODEL_DIR"] = models
            if "live" in scope:
                scope["live"] = True
    plt.close("all")
    return scope


def in_a_thread(function, *arguments):
    """Messages of widgets are handled in a thread that has no pyplot state of its own."""
    errors = []

    def call():
        try:
            function(*arguments)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    assert errors == []


def pixels(content):
    """The grey pixels of a PNG file; where it is transparent they are white."""
    with Image.open(io.BytesIO(content)) as picture:
        assert picture.format == "PNG"
        picture = picture.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    return np.asarray(Image.alpha_composite(white, picture).convert("L"))


def draw(page, stroke):
    """A stroke of the mouse, by the messages that a browser sends."""
    events = ["mouse_down"] + ["mouse_move"] * (len(stroke) - 1) + ["mouse_up"]
    for event, (x, y) in zip(events, [*stroke, stroke[-1]], strict=True):
        page["canvas"]._handle_frontend_event(None, {"event": event, "x": x, "y": y}, [])


def upload(page, name, content):
    file = {"name": name, "type": "image/png", "size": len(content), "last_modified": 0}
    page["upload"].set_state({"value": [{**file, "content": memoryview(content)}]})


SEVEN = [(60, 50), (120, 50), (180, 50), (145, 125), (110, 200)]
BAR = [(80, 125), (160, 125)]


@pytest.fixture
def no_pyplot(monkeypatch):
    def refused(*_, **__):
        pytest.fail("pyplot in a callback")

    monkeypatch.setattr(plt, "figure", refused)


def test_a_drawing_is_followed_stroke_by_stroke_and_cleared(page, no_pyplot):
    row, verdict = page["row"], page["verdict"]
    in_a_thread(page["clear"], None)
    assert pixels(row.value).min() == 255 and verdict.value == ""
    in_a_thread(draw, page, SEVEN)
    seven = row.value
    assert pixels(seven).std() > 30 and "Anomaly score" in verdict.value
    in_a_thread(draw, page, BAR)
    assert pixels(row.value).std() > 30 and row.value != seven
    in_a_thread(page["clear"], None)
    assert pixels(row.value).min() == 255 and verdict.value == ""
    in_a_thread(draw, page, SEVEN)
    assert row.value == seven


def test_an_uploaded_picture_is_drawn_also_twice_in_a_row(page, no_pyplot):
    for _ in range(2):
        in_a_thread(page["clear"], None)
        in_a_thread(upload, page, "drei/süß 三.jpg", EXAMPLE.read_bytes())
        assert pixels(page["row"].value).std() > 30
        assert "Anomaly score" in page["verdict"].value
        assert page["upload"].value == ()


def test_a_slider_redraws_the_digit(page, no_pyplot):
    before = pixels(page["view"].value)
    first = page["sliders"][page["top"][0]]
    in_a_thread(first.set_state, {"value": 2.5})
    after = pixels(page["view"].value)
    assert before.std() > 30 and after.std() > 30
    assert (before != after).any()


@pytest.mark.parametrize("name", ["a/b.png", "süß 七.png", "<b>.png", "n" * 300 + ".png"])
def test_a_file_that_is_no_picture_is_named_as_its_owner_calls_it(page, name):
    upload(page, name, EXAMPLE.read_bytes())
    upload(page, name, b"no picture")
    said = html.unescape(page["verdict"].value)
    assert name in said
    assert "tmp" not in said.replace(name, "") and "/picture" not in said
    assert pixels(page["row"].value).min() == 255, "the picture of the one before"


def test_the_verdict_of_a_model_of_small_digits_says_so(page, digits):
    noise = torch.rand(1, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    said = page["verdict_on"](noise)
    assert "Flagged" in said and "small, blurred digits" in said
    assert "Taken for a digit" in page["verdict_on"](digits.train.images[:1])


def test_a_page_without_a_live_kernel_makes_no_widget():
    for source in cells_needed():
        if "widgets." in source:
            assert "if live:" in source
