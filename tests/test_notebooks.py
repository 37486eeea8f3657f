"""The notebooks: the committed ones are clean, and both run end to end at a shrunken size, far from what is committed."""

import hashlib
import json
import os
import re
import subprocess
import sys

import card
import nbformat
import pytest
from conftest import ROOT

import utils

TRAINING, ANALYSIS = "vae_mnist_training.ipynb", "vae_mnist_analysis_visualizations.ipynb"


def run(notebook, out, fails=False, **parameters):
    """papermill, as the README has it; returns the finished notebook and what was seen in the terminal."""
    options = [word for name, value in parameters.items() for word in ("-p", name, str(value))]
    done = subprocess.run([sys.executable, "-m", "papermill", "--log-output", notebook, str(out), *options], cwd=ROOT,
                          capture_output=True, text=True, env={k: v for k, v in os.environ.items() if k != "MPLBACKEND"})
    assert (done.returncode != 0) == fails, done.stdout[-3000:] + done.stderr[-3000:]
    return nbformat.read(out, 4), done.stdout + done.stderr


def committed_files():
    """Digests of all that a run must not touch."""
    paths = [*ROOT.glob("models_mnist/*_reference.pt"), *ROOT.glob("models_mnist/*.json"), *ROOT.glob("images/*"),
             *ROOT.glob("*.ipynb")]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


@pytest.mark.parametrize("name", [TRAINING, ANALYSIS])
def test_the_committed_notebook_is_the_record_of_one_clean_run(name):
    notebook = json.loads((ROOT / name).read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert "widgets" not in notebook["metadata"] and not any("widget" in key for o in outputs for key in o.get("data", {}))
    assert [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])] == [cells[1]]
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert (ROOT / name).stat().st_size < 1.5e6
    text = json.dumps(notebook)
    assert "NOT MNIST" not in text and str(ROOT) not in text


@pytest.mark.parametrize("page", card.PAGES, ids=lambda page: page.parent.name)
def test_the_pages_say_what_was_measured(page, monkeypatch):
    """Every figure in their tables; and one that is changed would be noticed."""
    assert page.read_text() == card.filled(page), "run: python tests/measure.py card"
    assert len(re.findall(r"<!-- table: ", page.read_text())) == len(card.PLACE.findall(page.read_text()))
    spread = card.spread
    monkeypatch.setattr(card, "spread", lambda found, *args: spread([1.01 * value + 0.01 for value in found], *args))
    assert page.read_text() != card.filled(page)


def test_the_notebook_says_the_same_verdict():
    text = "\n".join(cell.source for cell in nbformat.read(ROOT / ANALYSIS, 4).cells if cell.cell_type == "markdown")
    for paragraph in card.verdict(json.loads((ROOT / "models_mnist/reference.json").read_text())).split("\n\n"):
        assert paragraph in text, f"not in the analysis notebook: {paragraph}"


def test_ahead_means_by_more_than_the_spread():
    assert card.ahead([1.0, 1.2], [2.0, 2.2]) == 1 and card.ahead([2.0, 2.2], [1.0, 1.2]) == -1
    assert card.ahead([1.0, 2.0], [1.5, 2.5]) == 0 and card.ahead([0.9, 0.91], [0.8, 0.81], higher=True) == 1


def test_the_loading_example_of_the_readme_runs():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    done = subprocess.run([sys.executable, "-c", code + "print(tuple(rebuilt.shape))"], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "(1, 1, 28, 28)", done.stderr


@pytest.mark.parametrize("kind", ["vae", "ae"])
def test_the_reference_checkpoints_are_what_they_say(kind, digits):
    for name in ("digits", "mnist"):
        path = ROOT / f"models_mnist/{kind}_{name}_reference.pt"
        model = utils.load_checkpoint(path)
        settings = model.metadata["settings"]
        assert (model.metadata["data"], model.variational, model.latent_dim) == (name, kind == "vae", 32)
        recipe = {"epochs": 20, "batch_size": 64, "learning_rate": 1e-3, "beta": 1.0}
        assert {key: settings[key] for key in recipe} == recipe
        assert model.metadata["val_loss"] == min(row["val_loss"] for row in model.metadata["history"])
        assert len(model.metadata["history"]) == 20 and path.stat().st_size < 10e6
        if name == "digits":
            loss = utils.evaluate(model, digits.val.images, num_samples=1).loss
            assert loss == pytest.approx(model.metadata["val_loss"], abs=0.01)


def test_the_vae_reference_reaches_its_recorded_loss_on_mnist(mnist):
    model = utils.load_checkpoint(ROOT / "models_mnist/vae_mnist_reference.pt")
    assert utils.evaluate(model, mnist.val.images, num_samples=1).loss == pytest.approx(model.metadata["val_loss"], abs=0.01)


def test_the_training_notebook_end_to_end_without_network(tmp_path):
    before = committed_files()
    (tmp_path / "data").mkdir()
    options = {"SOURCE": "auto", "DATA_DIR": tmp_path / "data", "MODEL_DIR": tmp_path / "models", "EPOCHS": 2, "LATENT_DIM": 5}
    notebook, terminal = run(TRAINING, tmp_path / "out.ipynb", **options)
    kept = sorted(path.name for path in (tmp_path / "models").glob("*.pt"))
    assert kept == ["vae_digits_best.pt"]
    assert "NOT MNIST" in terminal and "epoch  2/2" in terminal and "No reference was measured for these settings" in terminal
    assert "widgets" not in notebook.metadata

    _, terminal = run(TRAINING, tmp_path / "ae.ipynb", **{**options, "AUTOENCODER": True, "LEAVE_OUT": 4, "EPOCHS": 1})
    assert "ae_digits_without4_best.pt" in os.listdir(tmp_path / "models") and "KL 0.00" in terminal
    _, terminal = run(TRAINING, tmp_path / "out.ipynb", **{**options, "EPOCHS": 1})  # one thing changed: a new run
    assert "kept as vae_digits_best.epochs2.pt" in terminal and "epoch  1/1" in terminal
    assert committed_files() == before


@pytest.mark.parametrize("parameter, value, says", [
    ("AUTOENCODER", "false", "autoencoder is 'false'; it must be True or False"), ("LEAVE_OUT", "False", "leave out is False"),
    ("LEAVE_OUT", "4.0", "leave out is 4.0"), ("MODEL_DIR", "None", "folder is None"), ("RESUME", "no", "resume is 'no'"),
    ("EPOCHS", "1.5", "epochs is 1.5"), ("LATENT_DIM", "many", "latent_dim is 'many'"), ("SEED", "-1", "seed is -1")])
def test_the_training_notebook_names_a_parameter_that_makes_no_sense(tmp_path, parameter, value, says):
    """Its cells in one process, as papermill would fill them in, which takes minutes for so many."""
    typed = {"None": None, "False": False, "4.0": 4.0, "1.5": 1.5, "-1": -1}.get(value, value)
    values = {"SOURCE": "digits", "MODEL_DIR": str(tmp_path), "EPOCHS": 1, parameter: typed}
    cells = [cell for cell in nbformat.read(ROOT / TRAINING, 4).cells if cell.cell_type == "code"]
    scope = {}
    with pytest.raises(ValueError, match=says), pytest.MonkeyPatch.context() as patch:
        patch.setattr("matplotlib.pyplot.show", lambda: None)
        for cell in cells:
            exec(cell.source, scope)
            if "parameters" in cell.metadata.get("tags", []):
                scope |= values
    assert not list(tmp_path.glob("*.pt"))


def quick_model(path, digits, latent_dim, data="digits", **options):
    utils.fit(utils.VAE(latent_dim, **options), digits.train.images, digits.val.images, epochs=1, checkpoint=path,
              metadata={"data": data})


QUICK = {"SOURCE": "digits", "LIKELIHOOD_IMAGES": 8, "LIKELIHOOD_SAMPLES": 4, "ANOMALY_IMAGES": 16}


def test_the_analysis_notebook_end_to_end_without_network(tmp_path, digits):
    """On two latent dimensions and a few images; with an autoencoder beside it."""
    before = committed_files()
    quick_model(tmp_path / "vae_digits_best.pt", digits, 2)
    quick_model(tmp_path / "ae_digits_best.pt", digits, 2, variational=False)
    notebook, terminal = run(ANALYSIS, tmp_path / "out.ipynb", IMAGE_DIR=tmp_path / "images", MODEL_DIR=tmp_path, **QUICK,
                             MY_DIGIT=ROOT / "images/example_digit.jpg")
    assert "vae_digits_best.pt: your own" in terminal and "anomaly score" in terminal and "Take care" not in terminal
    pictures = sum("image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", []))
    assert pictures >= 18 and len(list((tmp_path / "images").glob("*.png"))) >= 18
    assert "widgets" not in notebook.metadata
    assert committed_files() == before


def test_the_analysis_notebook_adapts_to_what_there_is(tmp_path, digits):
    """One dimension, no autoencoder, and a checkpoint that does not say how it was trained; no figure is written unasked."""
    before = committed_files()
    utils.save_checkpoint(tmp_path / "vae_digits_best.pt", utils.VAE(1), data="digits")
    _, terminal = run(ANALYSIS, tmp_path / "out.ipynb", MODEL_DIR=tmp_path, **QUICK)
    assert "left out: there is no checkpoint at" in terminal and "ae_digits_best.pt; vae" in terminal
    assert "does not say how it was trained" in terminal
    assert committed_files() == before


def test_models_that_are_missing_or_foreign_are_named(tmp_path, digits):
    with pytest.raises(FileNotFoundError, match="there is no checkpoint at .*vae_digits_best.pt; .* makes one"):
        utils.load_best(tmp_path, "digits")
    quick_model(tmp_path / "vae_digits_best.pt", digits, 2, data="mnist")
    with pytest.raises(utils.CheckpointError, match="was trained on mnist, but digits is loaded"):
        utils.load_best(tmp_path, "digits")
    quick_model(tmp_path / "ae_mnist_reference_of_mine.pt", digits, 2, data="mnist", variational=False)
    (tmp_path / "ae_mnist_reference_of_mine.pt").rename(tmp_path / "ae_mnist_reference.pt")
    assert not utils.load_best(tmp_path, "mnist", autoencoder=True).variational


def test_a_run_is_compared_with_the_reference_only_where_one_was_measured(few, tmp_path, monkeypatch):
    model = utils.load_checkpoint(ROOT / "models_mnist/vae_mnist_reference.pt")
    (tmp_path / "models_mnist").mkdir()
    file = tmp_path / "models_mnist/reference.json"
    monkeypatch.setattr(utils, "__file__", str(tmp_path / "utils.py"))
    file.write_text('{"test": {"vae": {"0": {"loss": 90.0}, "1": {"loss": 91.0}}}}')
    assert "expected 90.5 +- 0.7, yours 91.0: as expected" in utils.compare_with_reference(model, 91.0)
    assert "check this" in utils.compare_with_reference(model, 101.0)
    for content in ("", "[]", "{}", '{"test": {"vae": 3}}'):
        file.write_text(content)
        assert "nothing to compare with" in utils.compare_with_reference(model, 91.0)
    utils.fit(other := utils.VAE(2), *few, epochs=1)
    assert "No reference was measured" in utils.compare_with_reference(other, 91.0)
