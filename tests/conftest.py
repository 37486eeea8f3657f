"""What several tests share: a few digits, a place for checkpoints, an edited copy of utils.py."""

import functools
import importlib.util
import os
from pathlib import Path

# Several workers share the processors: threads of their own would only hold each other up.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported

import matplotlib
import pytest
import torch

import utils

matplotlib.use("Agg")
utils.mnist_data = functools.cache(utils.mnist_data)  # a text file, which takes a second
ROOT = Path(__file__).resolve().parent.parent
EDITED = (
    "This test holds the network and the loss to what the committed references and the README "
    "describe. If utils.py was edited on purpose, nothing else is wrong."
)


def pytest_collection_modifyitems(items):
    """The slow tests first, so that no worker is left with one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session")
def digits():
    return utils.load_images("mnist5k")


@pytest.fixture(scope="session")
def mnist():
    """Real MNIST where it is under data/; never downloaded by a test."""
    for name in utils.MNIST_FILES:
        if not (ROOT / "data/MNIST/raw" / name).exists():
            pytest.skip("MNIST is not under data/MNIST/raw")
    return utils.load_images("mnist", ROOT / "data")


@pytest.fixture
def few(digits):
    """48 training and 16 validation images: enough to train on, small enough for many runs."""
    return digits.train.images[:48], digits.val.images[:16]


@pytest.fixture
def best(tmp_path):
    return tmp_path / "models" / "vae_mnist5k_best.safetensors"


@pytest.fixture
def model():
    torch.manual_seed(0)
    return utils.VAE(latent_dim=4)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """A test that tries to download fails at once: nothing listens at the proxy's port."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")  # where a test may have a server of its own


@pytest.fixture
def edited(tmp_path):
    """utils.py as a module of its own, after replacing a text in it by another."""

    def load(old="", new=""):
        source = Path(utils.__file__).read_text(encoding="utf-8")
        assert old in source, f"utils.py has no {old!r} to edit. {EDITED}"
        copy = tmp_path / f"edit{len(list(tmp_path.glob('edit*')))}" / "utils.py"
        copy.parent.mkdir()
        copy.write_text(source.replace(old, new), encoding="utf-8")
        spec = importlib.util.spec_from_file_location("utils", copy)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def same_weights(a, b):
    """Whether two models hold the same tensors, bit for bit."""
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(name == other and torch.equal(x, y) for (name, x), (other, y) in pairs)


def splits_of(data):
    """Its training, validation and test images, with their labels."""
    return data.train, data.val, data.test
