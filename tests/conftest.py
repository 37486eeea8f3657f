"""What several tests share: a few digits, a place for checkpoints, and whether MNIST is at hand."""

import contextlib
import multiprocessing
import os
import tempfile
import traceback
from pathlib import Path

# Several workers share the processors: threads of their own would only hold each other up.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported

import matplotlib
import pytest
import torch

import utils

matplotlib.use("Agg")
ROOT = Path(__file__).resolve().parent.parent
# It starts processes in which torch, and what Adam would import of it, is already there.
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["utils", "torch._dynamo", "pytest"])


def in_child(function, *args):
    """What a function returns in a process of its own; its exceptions fail the test."""
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=report, args=(sender, function, args))
    child.start()
    assert receiver.poll(60), "the process did not answer"
    ok, value = receiver.recv()
    child.join()
    assert ok, value
    return value


def report(sender, function, args):
    try:
        sender.send((True, function(*args)))
    except BaseException:
        sender.send((False, traceback.format_exc()))


def pytest_collection_modifyitems(items):
    """The slow tests first, so that no worker is left with one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session")
def digits():
    return utils.load_images("digits")


@pytest.fixture(scope="session")
def mnist():
    """Real MNIST where it is linked under data/; never downloaded by a test."""
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
    return tmp_path / "models" / "vae_digits_best.safetensors"


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
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def open_folder():
    """A folder that another user can reach, which pytest's own are not."""
    with tempfile.TemporaryDirectory(prefix="vae-mnist-test-") as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@contextlib.contextmanager
def without_write_permission(folder):
    """A folder that cannot be written to, not even by a test that root runs."""
    user = os.geteuid()
    folder.chmod(0o555)
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
        folder.chmod(0o755)


class Stop(Exception):
    pass


@contextlib.contextmanager
def during_epoch(monkeypatch, epoch, action):
    """Do or raise something in the middle of a run: when the validation of an epoch begins."""
    calls = []
    evaluate = utils.evaluate

    def counted(*args, **options):
        calls.append(1)
        if len(calls) == epoch:
            if isinstance(action, type):
                raise action
            action()
        return evaluate(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(utils, "evaluate", counted)
        yield


def same_weights(a, b):
    """Whether two models hold the same tensors, bit for bit."""
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(name == other and torch.equal(x, y) for (name, x), (other, y) in pairs)
