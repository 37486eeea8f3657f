"""What several tests share: a few digits, a place for checkpoints, and whether real MNIST is at hand."""

import contextlib
import multiprocessing
import traceback
from pathlib import Path

import matplotlib
import pytest
import torch

import utils

matplotlib.use("Agg")
ROOT = Path(__file__).resolve().parent.parent
context = multiprocessing.get_context("forkserver")  # starts processes in which torch is already imported
context.set_forkserver_preload(["utils", "torch._dynamo"])  # which Adam would import in every child


def in_child(function, *args):
    """Run a function in a process of its own and bring back what it returns; its exceptions fail the test."""
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


@pytest.fixture(scope="session")
def digits():
    return utils.load_images("digits")


@pytest.fixture(scope="session")
def mnist():
    """Real MNIST where it is linked under data/; never downloaded by a test."""
    if not all((ROOT / "data/MNIST/raw" / name).exists() for name in utils.MNIST_FILES):
        pytest.skip("MNIST is not under data/MNIST/raw")
    return utils.load_images("mnist", ROOT / "data")


@pytest.fixture
def few(digits):
    """96 training and 32 validation images: enough to train on, small enough for dozens of runs."""
    return digits.train.images[:96], digits.val.images[:32]


@pytest.fixture
def best(tmp_path):
    return tmp_path / "models" / "vae_digits_best.pt"


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


class Stop(Exception):
    pass


@contextlib.contextmanager
def during_epoch(monkeypatch, epoch, action):
    """Do something, or raise an exception, in the middle of a run: when the validation of an epoch begins."""
    calls, evaluate = [], utils.evaluate

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
