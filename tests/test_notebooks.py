"""The notebooks: the committed ones are clean, and both run end to end at a shrunken size, far from what is committed."""

import hashlib
import json
import os
import subprocess
import sys

import nbformat
import pytest
from conftest import ROOT

TRAINING, ANALYSIS = "vae_mnist_training.ipynb", "vae_mnist_analysis_visualizations.ipynb"


def run(notebook, out, **parameters):
    """papermill, as the README has it; returns the finished notebook and what was seen in the terminal."""
    options = [word for name, value in parameters.items() for word in ("-p", name, str(value))]
    done = subprocess.run([sys.executable, "-m", "papermill", "--log-output", notebook, str(out), *options], cwd=ROOT,
                          capture_output=True, text=True, env={**os.environ, "MPLBACKEND": "agg"})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return nbformat.read(out, 4), done.stdout + done.stderr


def printed(notebook):
    return "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))


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


def test_the_training_notebook_end_to_end_without_network(tmp_path):
    before = committed_files()
    (tmp_path / "data").mkdir()
    options = {"SOURCE": "auto", "DATA_DIR": tmp_path / "data", "MODEL_DIR": tmp_path / "models", "EPOCHS": 2, "LATENT_DIM": 5}
    notebook, terminal = run(TRAINING, tmp_path / "out.ipynb", **options)
    assert sorted(os.listdir(tmp_path / "models")) == ["vae_digits_best.pt", "vae_digits_best.resume.pt"]
    assert "NOT MNIST" in terminal and "epoch  2/2" in terminal and "No reference was measured for these settings" in terminal
    assert "widgets" not in notebook.metadata

    notebook, terminal = run(TRAINING, tmp_path / "again.ipynb", **options)
    assert "holds this run, finished" in terminal

    notebook, terminal = run(TRAINING, tmp_path / "ae.ipynb", **{**options, "AUTOENCODER": True, "LEAVE_OUT": 4, "EPOCHS": 1})
    assert "ae_digits_without4_best.pt" in os.listdir(tmp_path / "models") and "a plain autoencoder has no KL" in terminal
    assert committed_files() == before
