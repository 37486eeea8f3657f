"""The notebooks and pages: what is committed is clean, and all of it runs at a shrunken size."""

import hashlib
import json
import os
import re
import subprocess
import sys

import card
import matplotlib.pyplot as plt
import nbformat
import pytest
import torch
from conftest import ROOT

import utils

TRAINING = "vae_mnist_training.ipynb"
ANALYSIS = "vae_mnist_analysis_visualizations.ipynb"
QUICK = {"SOURCE": "digits", "LIKELIHOOD_IMAGES": 8, "LIKELIHOOD_SAMPLES": 4, "COMPARED_IMAGES": 16}


def committed(name):
    """The text of a file as it is committed: a reader's own run may have changed the file."""
    shown = subprocess.run(["git", "show", f"HEAD:{name}"], cwd=ROOT, capture_output=True)
    if shown.returncode != 0:
        pytest.skip("this folder is no git clone, so nothing is committed")
    return shown.stdout.decode()


def run_by_papermill(notebook, out, **parameters):
    """papermill, as the README has it; returns the finished notebook and the terminal's text."""
    command = [sys.executable, "-m", "papermill", "--log-output", notebook, str(out)]
    for name, value in parameters.items():
        command += ["-p", name, str(value)]
    environment = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return nbformat.read(out, 4), done.stdout + done.stderr


def run_here(notebook, **parameters):
    """The code cells of a notebook in this process, which saves starting a kernel."""
    scope = {}
    for cell in nbformat.read(ROOT / notebook, 4).cells:
        if cell.cell_type == "code":
            code = re.sub("^%.*$", "", cell.source, flags=re.MULTILINE)  # %matplotlib inline
            exec(code, scope)
            if "parameters" in cell.metadata.get("tags", []):
                scope.update(parameters)
    plt.close("all")
    return scope


@pytest.fixture(autouse=True)
def nothing_committed_changes():
    """A smoke run never touches the committed checkpoints, figures or notebooks."""
    before = digests_of_committed_files()
    yield
    assert digests_of_committed_files() == before


def digests_of_committed_files():
    paths = [*ROOT.glob("models_mnist/*reference*"), *ROOT.glob("images/*"), *ROOT.glob("*.ipynb")]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


# what is committed


@pytest.mark.parametrize("name", [TRAINING, ANALYSIS])
def test_the_committed_notebook_is_the_record_of_one_clean_run(name):
    text = committed(name)
    notebook = json.loads(text)
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert any("image/png" in output.get("data", {}) for output in outputs)
    tagged = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    assert len(tagged) == 1 and cells.index(tagged[0]) <= 3
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert "widgets" not in notebook["metadata"]
    assert len(text) < 1.5e6
    for output in outputs:
        assert output["output_type"] != "error" and output.get("name") != "stderr", output
        assert not any("widget" in kind for kind in output.get("data", {}))
        said = json.dumps({**output, "data": {**output.get("data", {}), "image/png": ""}})
        assert "Warning" not in said and "NOT MNIST" not in said
        assert not re.search(r"[\" ](/\w+){2,}", said), f"an absolute path: {said[:300]}"


@pytest.mark.parametrize("name", [TRAINING, ANALYSIS])
def test_a_cell_is_short(name):
    for cell in nbformat.read(ROOT / name, 4).cells:
        if cell.cell_type == "code":
            lines = cell.source.splitlines()
            assert len(lines) <= 20 and max(len(line) for line in lines) <= 100, cell.source


@pytest.mark.parametrize("page", card.PAGES, ids=lambda page: page.parent.name)
def test_the_tables_of_the_pages_are_those_of_the_measurements(page):
    assert page.read_text() == card.filled(page), "run: python tests/measure.py card"


@pytest.mark.parametrize("page", card.PAGES, ids=lambda page: page.parent.name)
def test_the_numbers_in_the_prose_are_those_of_the_measurements(page):
    assert card.misquoted(page.read_text(), card.read_reference()) == []


def test_the_notebook_gives_the_same_verdict_as_the_readme():
    readme = (ROOT / "README.md").read_text()
    cells = nbformat.read(ROOT / ANALYSIS, 4).cells
    notebook = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    paragraphs = [place[2].strip() for place in card.QUOTING.finditer(readme)]
    assert len(paragraphs) == 2
    for paragraph in paragraphs:
        assert paragraph in notebook


def test_every_picture_of_the_readme_is_committed_and_no_other():
    text = (ROOT / "README.md").read_text() + (ROOT / "models_mnist/README.md").read_text()
    shown = set(re.findall(r"images/(\w+\.\w+)", text))
    assert shown == {path.name for path in ROOT.glob("images/*")}


def test_the_examples_of_the_readme_run(tmp_path, digits, monkeypatch):
    text = (ROOT / "README.md").read_text()
    load, train = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    scope = {"train_images": digits.train.images[:64], "val_images": digits.val.images[:16]}
    load = load.replace('"models_mnist/', f'"{ROOT}/models_mnist/').replace(
        '"images/', f'"{ROOT}/images/'
    )
    monkeypatch.chdir(tmp_path)
    exec(load + train.replace("checkpoint=", "epochs=1, checkpoint="), scope)
    assert scope["rebuilt"].shape == (1, 1, 28, 28) and scope["samples"].shape == (10, 1, 28, 28)
    assert (tmp_path / "rebuilt.png").exists()
    assert (tmp_path / "models_mnist/mine.safetensors").exists()


@pytest.mark.parametrize("kind", ["vae", "ae"])
@pytest.mark.parametrize("name", ["digits", "mnist"])
def test_the_reference_checkpoints_are_what_they_say(kind, name, request):
    path = ROOT / f"models_mnist/{kind}_{name}_reference.safetensors"
    model = utils.load_checkpoint(path)
    settings = model.metadata["settings"]
    assert model.metadata["data"] == name and model.variational == (kind == "vae")
    recipe = {"epochs": 20, "batch_size": 64, "learning_rate": 1e-3, "beta": 1.0, "latent_dim": 32}
    assert {key: settings[key] for key in recipe} == recipe
    history = model.metadata["history"]
    assert len(history) == 20
    assert model.metadata["val_loss"] == min(row["val_loss"] for row in history)
    data = request.getfixturevalue(name)
    loss = utils.evaluate(model, data.val.images, num_samples=1).loss
    assert loss == pytest.approx(model.metadata["val_loss"], abs=0.01)


# the training notebook


@pytest.mark.slow
def test_the_training_notebook_end_to_end_without_network(tmp_path):
    data, models = tmp_path / "data", tmp_path / "models"
    options = {"SOURCE": "auto", "DATA_DIR": data, "MODEL_DIR": models, "EPOCHS": 2}
    notebook, terminal = run_by_papermill(TRAINING, tmp_path / "out.ipynb", **options, LATENT_DIM=5)
    assert os.listdir(models) == ["vae_digits_best.safetensors"]
    assert "NOT MNIST" in terminal and "epoch  2/2" in terminal
    assert "trained with different settings: epochs, latent_dim" in terminal
    assert "widgets" not in notebook.metadata


def test_the_training_cell_run_again_is_right_after_a_change(tmp_path, capsys):
    """It builds its model: the same settings find the finished run, others start from scratch."""
    options = {"SOURCE": "digits", "MODEL_DIR": str(tmp_path), "EPOCHS": 1, "LATENT_DIM": 2}
    scope = run_here(TRAINING, **options)
    (cell,) = [
        cell.source
        for cell in nbformat.read(ROOT / TRAINING, 4).cells
        if cell.cell_type == "code" and "utils.fit(" in cell.source
    ]
    first = scope["history"]
    exec(cell, scope)
    assert scope["history"] == first and "finished" in capsys.readouterr().out
    scope.update(LATENT_DIM=3, BETA=2.0)
    exec(cell, scope)
    assert scope["model"].latent_dim == 3
    assert sorted(os.listdir(tmp_path)) == [
        "vae_digits_best.1.safetensors",
        "vae_digits_best.safetensors",
    ]
    fresh = utils.VAE(3)
    assert scope["history"][0]["train_loss"] > 200, "it went on from trained weights"
    assert isinstance(fresh, utils.VAE)


def test_an_autoencoder_without_one_digit(tmp_path, capsys):
    options = {"SOURCE": "digits", "MODEL_DIR": str(tmp_path), "EPOCHS": 1, "LATENT_DIM": 2}
    run_here(TRAINING, **options, AUTOENCODER=True, LEAVE_OUT=4)
    assert os.listdir(tmp_path) == ["ae_digits_without4_best.safetensors"]
    assert "KL 0.00" in capsys.readouterr().out


@pytest.mark.parametrize(
    "parameter, value, says",
    [
        ("SOURCE", "cifar", "source"),
        ("AUTOENCODER", "false", "autoencoder"),
        ("LEAVE_OUT", False, "leave out"),
        ("LEAVE_OUT", 4.0, "leave out"),
        ("MODEL_DIR", None, "folder"),
        ("RESUME", "no", "resume"),
        ("EPOCHS", 1.5, "epochs"),
        ("LATENT_DIM", "many", "latent_dim"),
        ("SEED", -1, "seed"),
    ],
)
def test_the_training_notebook_names_a_parameter_that_makes_no_sense(
    tmp_path, parameter, value, says
):
    options = {"SOURCE": "digits", "MODEL_DIR": str(tmp_path), "EPOCHS": 1, parameter: value}
    with pytest.raises((TypeError, ValueError), match=says):
        run_here(TRAINING, **options)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("notebook", [TRAINING, ANALYSIS])
def test_the_first_cells_say_where_the_notebook_belongs(notebook, monkeypatch):
    """Beside a foreign `utils`, or in a folder without one."""
    for foreign in (None, sys):
        monkeypatch.setitem(sys.modules, "utils", foreign)
        with pytest.raises(ImportError, match="open this notebook in its own folder"):
            run_here(notebook)


# the analysis notebook


def quick_model(path, digits, latent_dim, epochs=1, data="digits", **options):
    torch.manual_seed(0)
    model = utils.VAE(latent_dim, **options)
    images = digits.train.images[:256]
    utils.fit(
        model,
        images,
        digits.val.images[:32],
        epochs=epochs,
        checkpoint=path,
        metadata={"data": data},
    )


@pytest.mark.slow
def test_the_analysis_notebook_end_to_end_without_network(tmp_path, digits):
    """On two latent dimensions and a few images, with an autoencoder beside it."""
    quick_model(tmp_path / "vae_digits_best.safetensors", digits, 2)
    quick_model(tmp_path / "ae_digits_best.safetensors", digits, 2, variational=False)
    images = tmp_path / "images"
    notebook, terminal = run_by_papermill(
        ANALYSIS,
        tmp_path / "out.ipynb",
        IMAGE_DIR=images,
        MODEL_DIR=tmp_path,
        MY_DIGIT=ROOT / "images/example_digit.jpg",
        **QUICK,
    )
    assert "vae_digits_best.safetensors: your own" in terminal
    assert "Anomaly score" in terminal and "Take care" not in terminal
    pictures = 0
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            pictures += "image/png" in output.get("data", {})
            assert output.get("name") != "stderr", output
    written = {path.stem for path in images.glob("*.png")}
    assert pictures >= 19 and "latent_plane" in written and "digits_on_demand" in written
    assert "widgets" not in notebook.metadata


def test_the_analysis_notebook_adapts_to_what_there_is(tmp_path, digits, capsys, monkeypatch):
    """One dimension, no autoencoder, a checkpoint that does not say how it was trained."""
    utils.save_checkpoint(tmp_path / "vae_digits_best.safetensors", utils.VAE(1), data="digits")
    monkeypatch.setattr(utils, "__file__", str(tmp_path / "utils.py"))  # no example, no figures
    run_here(ANALYSIS, MODEL_DIR=str(tmp_path), **QUICK)
    printed = capsys.readouterr().out
    assert "comparison with a plain autoencoder is left out" in printed
    assert "does not say how it was trained" in printed and "Section 8 is left out" in printed


def test_models_of_different_lengths_are_not_like_for_like(tmp_path, digits, capsys):
    """Finished epochs count, not planned ones."""
    quick_model(tmp_path / "vae_digits_best.safetensors", digits, 2, epochs=2)
    quick_model(tmp_path / "ae_digits_best.safetensors", digits, 2, variational=False)
    cells = [c.source for c in nbformat.read(ROOT / ANALYSIS, 4).cells if c.cell_type == "code"]
    (cell,) = [source for source in cells if "Take care" in source]
    scope = {"utils": utils, "MODEL_DIR": tmp_path, "data": digits, "device": "cpu"}
    exec(cell, scope)
    assert "different numbers of epochs" in capsys.readouterr().out


@pytest.mark.parametrize(
    "parameter, value",
    [
        ("LIKELIHOOD_IMAGES", -1),
        ("LIKELIHOOD_IMAGES", "500"),
        ("LIKELIHOOD_SAMPLES", 0),
        ("COMPARED_IMAGES", 1.5),
        ("IMAGE_DIR", ""),
        ("MY_DIGIT", ""),
    ],
)
def test_the_analysis_notebook_names_a_parameter_that_makes_no_sense(parameter, value):
    with pytest.raises((TypeError, ValueError), match=parameter):
        run_here(ANALYSIS, **{parameter: value})


def test_models_that_are_missing_or_foreign_are_named(tmp_path, digits):
    with pytest.raises(FileNotFoundError, match="there is no checkpoint at .*; .* makes one"):
        utils.load_best(tmp_path, "digits")
    quick_model(tmp_path / "vae_digits_best.safetensors", digits, 2, data="mnist")
    with pytest.raises(utils.CheckpointError, match="is not a model of digits"):
        utils.load_best(tmp_path, "digits")
    mine = utils.VAE(2, variational=False)
    reference = tmp_path / "ae_mnist_reference.safetensors"
    utils.save_checkpoint(reference, mine, allow_reference=True, data="mnist")
    assert not utils.load_best(tmp_path, "mnist", autoencoder=True).variational
