"""The notebooks: what is committed is one clean run, and all of it runs, after an edit, too."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from types import SimpleNamespace

import nbformat
import pytest
from conftest import ROOT

TRAINING = "vae_mnist_training.ipynb"
ANALYSIS = "vae_mnist_analysis_visualizations.ipynb"
SMALL = {
    "SOURCE": "mnist5k",
    "LIKELIHOOD_SAMPLES": 3,
    "LIKELIHOOD_IMAGES": 8,
    "COMPARED_IMAGES": 20,
}

# what is committed


def staged(name):
    """The text of a file as git knows it: a reader's own run may have changed the file."""
    command = ["git", "show", f":{name}"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")
    if shown.returncode != 0:
        pytest.skip("this folder is no git clone, so nothing is committed")
    return shown.stdout


@pytest.mark.parametrize("name", [TRAINING, ANALYSIS])
def test_the_committed_notebook_is_the_record_of_one_clean_run(name):
    text = staged(name)
    notebook = json.loads(text)
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert "widgets" not in notebook["metadata"]
    assert len(text) < 1.5e6
    kernel = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    assert notebook["metadata"]["kernelspec"] == kernel, "Jupyter would change the file"
    for output in outputs:
        assert output["output_type"] != "error" and output.get("name") != "stderr", output
        assert not any("widget" in kind for kind in output.get("data", {}))
        said = json.dumps({**output, "data": {**output.get("data", {}), "image/png": ""}})
        assert "Warning" not in said and "5,000 IMAGES" not in said
        assert not re.search(r"[\" ](/\w+){2,}", said), f"an absolute path: {said[:300]}"


@pytest.mark.parametrize("name", [TRAINING, ANALYSIS])
def test_cells_are_short_and_settings_stand_once(name):
    notebook = nbformat.read(ROOT / name, 4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in cells:
        lines = cell.source.splitlines()
        assert len(lines) <= 20 and max(len(line) for line in lines) <= 100, cell.source
    tagged = [i for i, cell in enumerate(cells) if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1 and tagged[0] <= 3
    (settings,) = (cells[i].source for i in tagged)
    names = re.findall(r"^([A-Z_]+) = ", settings, flags=re.MULTILINE)
    assert len(names) == len(settings.splitlines()), "it holds more than plain assignments"
    others = "\n".join(cell.source for cell in cells if cell.source != settings)
    for setting in names:
        assert not re.search(rf"^{setting} = ", others, flags=re.MULTILINE), setting


def test_the_training_cell_stops_at_an_error_in_utils(tmp_path):
    """The kernel would go on with the code from before the edit."""
    notebook = nbformat.read(ROOT / TRAINING, 4)
    (source,) = [cell.source for cell in notebook.cells if "utils.fit(\n" in cell.source]
    broken = tmp_path / "utils.py"
    broken.write_text("WEIGHT_DECAY = none\n", encoding="utf-8")
    with pytest.raises(NameError, match="none"):
        exec(source, {"runpy": runpy, "utils": SimpleNamespace(__file__=broken)})


# shrunken runs


@pytest.fixture
def clone(tmp_path):
    """A copy of what a notebook needs, in which it may write."""
    folder = tmp_path / "clone"
    models = folder / "models_mnist"
    models.mkdir(parents=True)
    for path in (*ROOT.glob("utils.py"), *ROOT.glob("vae_mnist_*.ipynb")):
        shutil.copy(path, folder)
    for path in ROOT.glob("models_mnist/*reference*"):
        shutil.copy(path, models)
    shutil.copytree(ROOT / "images", folder / "images")
    return folder


def run(folder, *arguments):
    """Another Python's output; its failure is the test's."""
    environment = {**os.environ, "MPLBACKEND": "Agg", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, *map(str, arguments)]
    options = {"cwd": folder, "env": environment, "encoding": "utf-8", "errors": "replace"}
    done = subprocess.run(command, capture_output=True, **options)
    if done.returncode != 0:
        pytest.fail(done.stdout[-2000:] + done.stderr[-2000:], pytrace=False)
    return done.stdout + done.stderr


def run_by_papermill(folder, notebook, **parameters):
    """As the README has it; returns the finished notebook and the terminal's text."""
    arguments = []
    for name, value in parameters.items():
        arguments += ["-p", name, value]
    terminal = run(folder, "-m", "papermill", "--log-output", notebook, "out.ipynb", *arguments)
    return nbformat.read(folder / "out.ipynb", 4), terminal


CELLS = """
import json, sys
import nbformat, torch
from IPython.core.interactiveshell import InteractiveShell
import utils
data = utils.load_images("mnist5k")
sizes = (512, 100, 200)
splits = (data.train, data.val, data.test)
few = [utils.Split(split.images[:n], split.labels[:n]) for split, n in zip(splits, sizes)]
utils.load_images = lambda *_, **__: utils.Data("mnist5k", *few)
class Shell(InteractiveShell):
    def enable_gui(self, gui=None):
        pass

for name, settings in json.loads(sys.argv[1]):
    shell = Shell(colors="nocolor")
    for cell in nbformat.read(name, 4).cells:
        if cell.cell_type == "code":
            shell.run_cell(cell.source).raise_error()
            if "parameters" in cell.metadata.get("tags", []):
                shell.user_ns.update(settings)
"""


def run_cells(folder, *notebooks):
    """The code cells of notebooks with these settings, on few images, in one other process."""
    return run(folder, "-c", CELLS, json.dumps(notebooks))


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".lock"}


@pytest.mark.slow
def test_both_notebooks_as_the_readme_runs_them(clone):
    """Without a network, on real digits; what is committed stays as it was."""
    references = files(clone / "models_mnist")
    figures = files(clone / "images")
    settings = {"SOURCE": "mnist5k", "EPOCHS": 1, "LATENT_DIM": 2}
    notebook, terminal = run_by_papermill(clone, TRAINING, **settings)
    assert "epoch  1/1" in terminal
    assert "widgets" not in notebook.metadata
    made = files(clone / "models_mnist")
    assert made.keys() - references.keys() == {"vae_mnist5k_best.safetensors"}
    assert made.items() >= references.items()
    example = clone / "images/example_digit.jpg"
    notebook, terminal = run_by_papermill(clone, ANALYSIS, **SMALL, MY_DIGIT=example)
    assert "vae_mnist5k_best.safetensors: your own, 2 latent dimensions" in terminal
    assert "ae_mnist_reference.safetensors: the reference" in terminal
    pictures = 0
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            pictures += "image/png" in output.get("data", {})
            assert output.get("name") != "stderr", output
    assert pictures >= 8
    assert "widgets" not in notebook.metadata
    assert files(clone / "images") == figures
    assert files(clone / "models_mnist") == made


EDITS = {
    "width": ("384", "256"),
    "activation": ("nn.GELU()", "nn.SiLU()"),
    "loss": (
        "    return Loss(bce + beta * kl, bce, kl)\n\n\ndef bce_per_image",
        "    error = (logits.sigmoid() - x).square().sum()\n"
        "    return Loss(bce + beta * kl + error, bce, kl)\n\n\ndef bce_per_image",
    ),
}
RUNS = {
    "width": [{"LATENT_DIM": 1, "BETA": 4.0}],
    "activation": [{"LATENT_DIM": 3}, {"LATENT_DIM": 3, "VARIATIONAL": False}],
    "loss": [{"LATENT_DIM": 2, "VARIATIONAL": False, "LEAVE_OUT": 4}, {"LATENT_DIM": 2}],
}
SAVED = {
    "width": {"vae_mnist5k_best"},
    "activation": {"vae_mnist5k_best", "ae_mnist5k_best"},
    "loss": {"vae_mnist5k_best", "ae_mnist5k_without4_best"},
}


@pytest.mark.slow
@pytest.mark.parametrize("edit", EDITS)
def test_both_notebooks_survive_an_edit(clone, edit):
    """With models of other settings, too, each in a file of its own."""
    old, new = EDITS[edit]
    source = (clone / "utils.py").read_text(encoding="utf-8")
    if old not in source:
        pytest.skip(f"utils.py has been edited: it has no {old}")
    (clone / "utils.py").write_text(source.replace(old, new), encoding="utf-8")
    runs = [(TRAINING, {"SOURCE": "mnist5k", "EPOCHS": 1, **made}) for made in RUNS[edit]]
    said = run_cells(clone, *runs, (ANALYSIS, SMALL))
    assert "vae_mnist5k_best.safetensors: your own" in said
    left_out = "was trained by another network" in said
    assert left_out == (edit != "loss"), "the references are left out where they do not fit"
    own = {name for name in files(clone / "models_mnist") if "mnist5k" in name}
    assert own == {f"{name}.safetensors" for name in SAVED[edit]}
    assert ("4 x KL" in said) == ("beta 4" in said) == (edit == "width")
