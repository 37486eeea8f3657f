"""The notebooks: the committed ones are clean, and both run end to end at a shrunken size, far from what is committed."""

import hashlib
import json
import os
import subprocess
import sys

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


def test_the_readme_quotes_what_was_measured():
    text, measured = (ROOT / "README.md").read_text(), json.loads((ROOT / "models_mnist/reference.json").read_text())
    for key in ("test_loss", "test_bce", "test_kl", "nll_grey", "nll_binarised"):
        value = measured["vae_mnist"][key]
        assert f"{value['mean']:.2f} ± {value['std']:.2f}" in text, key


@pytest.mark.parametrize("kind", ["vae", "ae"])
def test_the_reference_checkpoints_are_what_they_say(kind, digits):
    for name in ("digits", "mnist"):
        path = ROOT / f"models_mnist/{kind}_{name}_reference.pt"
        model = utils.load_checkpoint(path)
        settings = model.metadata["settings"]
        assert (model.metadata["data"], model.variational, model.latent_dim) == (name, kind == "vae", 32)
        assert (settings["epochs"], settings["batch_size"], settings["learning_rate"], settings["beta"]) == (20, 64, 1e-3, 1.0)
        assert model.metadata["val_loss"] == min(row["val_loss"] for row in model.metadata["history"])
        assert len(model.metadata["history"]) == 20 and path.stat().st_size < 10e6
        if name == "digits":
            assert utils.evaluate(model, digits.val.images, num_samples=1).loss == pytest.approx(model.metadata["val_loss"], abs=0.01)


def test_the_vae_reference_reaches_its_recorded_loss_on_mnist(mnist):
    model = utils.load_checkpoint(ROOT / "models_mnist/vae_mnist_reference.pt")
    assert utils.evaluate(model, mnist.val.images, num_samples=1).loss == pytest.approx(model.metadata["val_loss"], abs=0.01)


def test_the_training_notebook_end_to_end_without_network(tmp_path):
    before = committed_files()
    (tmp_path / "data").mkdir()
    options = {"SOURCE": "auto", "DATA_DIR": tmp_path / "data", "MODEL_DIR": tmp_path / "models", "EPOCHS": 2, "LATENT_DIM": 5}
    notebook, terminal = run(TRAINING, tmp_path / "out.ipynb", **options)
    assert sorted(os.listdir(tmp_path / "models")) == ["vae_digits_best.pt", "vae_digits_best.resume.pt"]
    assert "NOT MNIST" in terminal and "epoch  2/2" in terminal and "No reference was measured for these settings" in terminal
    assert "widgets" not in notebook.metadata

    notebook, terminal = run(TRAINING, tmp_path / "ae.ipynb", **{**options, "AUTOENCODER": True, "LEAVE_OUT": 4, "EPOCHS": 1})
    assert "ae_digits_without4_best.pt" in os.listdir(tmp_path / "models") and "a plain autoencoder has no KL" in terminal
    assert committed_files() == before


def quick_model(path, digits, latent_dim, data="digits", **options):
    utils.fit(utils.VAE(latent_dim, **options), digits.train.images, digits.val.images, epochs=1, checkpoint=path,
              metadata={"data": data})


def test_the_analysis_notebook_end_to_end_without_network(tmp_path, digits):
    """On two latent dimensions and a few images; with an autoencoder beside it."""
    before = committed_files()
    quick_model(tmp_path / "vae_digits_best.pt", digits, 2)
    quick_model(tmp_path / "ae_digits_best.pt", digits, 2, variational=False)
    options = {"SOURCE": "digits", "MODEL_DIR": tmp_path, "LIKELIHOOD_IMAGES": 8, "LIKELIHOOD_SAMPLES": 4, "ANOMALY_IMAGES": 16}
    notebook, terminal = run(ANALYSIS, tmp_path / "out.ipynb", IMAGE_DIR=tmp_path / "images", **options)
    assert "vae_digits_best.pt: your own" in terminal
    pictures = sum("image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", []))
    assert pictures >= 14 and len(list((tmp_path / "images").glob("*.png"))) >= 14
    assert (tmp_path / "images/latent_walk.gif").stat().st_size < 1e6
    assert "widgets" not in notebook.metadata
    assert committed_files() == before


def test_the_analysis_notebook_adapts_to_one_dimension_and_no_autoencoder(tmp_path, digits):
    before = committed_files()
    quick_model(tmp_path / "vae_digits_best.pt", digits, 1)
    options = {"SOURCE": "digits", "MODEL_DIR": tmp_path, "LIKELIHOOD_IMAGES": 8, "LIKELIHOOD_SAMPLES": 1, "ANOMALY_IMAGES": 4}
    _, terminal = run(ANALYSIS, tmp_path / "out.ipynb", **options)  # IMAGE_DIR as it stands
    assert "There is no plain autoencoder" in terminal and "figures are shown here alone" in terminal
    assert committed_files() == before


def test_the_analysis_notebook_names_what_is_missing_or_foreign(tmp_path, digits):
    _, terminal = run(ANALYSIS, tmp_path / "out.ipynb", fails=True, SOURCE="digits", MODEL_DIR=tmp_path)
    assert "there is no vae_digits_best.pt or _reference.pt" in terminal
    quick_model(tmp_path / "vae_digits_best.pt", digits, 2, data="mnist")
    _, terminal = run(ANALYSIS, tmp_path / "out.ipynb", fails=True, SOURCE="digits", MODEL_DIR=tmp_path)
    assert "was trained on mnist, but digits is loaded" in terminal
