"""Data: what is read, how it is split, and that nothing damaged is ever trained on."""

import functools
import gzip
import hashlib
import http.client
import http.server
import os
import shutil
import socket
import ssl
import struct
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
import torchvision.datasets.mnist
from conftest import without_write_permission
from sklearn.neighbors import KNeighborsClassifier
from torchvision.datasets import MNIST

import utils

IMAGES = "train-images-idx3-ubyte"
LABELS = "train-labels-idx1-ubyte"
LAST = "t10k-labels-idx1-ubyte"


def idx(array):
    """The IDX format in which MNIST is published: magic number, sizes, bytes."""
    head = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return head + array.astype(np.uint8).tobytes()


@pytest.fixture
def tiny_mnist(tmp_path, monkeypatch):
    """A folder like MNIST's with 60 training and 20 test images, whose digests are expected."""
    raw = tmp_path / "data/MNIST/raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, n in (("train", 60), ("t10k", 20)):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(idx(rng.integers(0, 256, (n, 28, 28))))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx(rng.integers(0, 10, n)))
    digests = {}
    for path in raw.iterdir():
        digests[path.name] = hashlib.md5(path.read_bytes()).hexdigest()
    assert digests.keys() == utils.MNIST_FILES.keys()
    monkeypatch.setattr(utils, "MNIST_FILES", digests)
    return tmp_path / "data"


@pytest.fixture
def mirror(tiny_mnist, tmp_path, monkeypatch):
    """A mirror of the tiny MNIST, whose files are gone, for torchvision to download from."""
    raw = tiny_mnist / "MNIST/raw"
    folder = tmp_path / "mirror"
    folder.mkdir()
    resources = []
    for name in utils.MNIST_FILES:
        packed = gzip.compress((raw / name).read_bytes())
        (folder / f"{name}.gz").write_bytes(packed)
        resources.append((f"{name}.gz", hashlib.md5(packed).hexdigest()))
    shutil.rmtree(tiny_mnist)
    monkeypatch.setattr(MNIST, "resources", resources)
    monkeypatch.delenv("http_proxy")
    monkeypatch.delenv("HTTP_PROXY")
    monkeypatch.setattr(urllib.request, "_opener", None)  # it may remember the proxy
    handler = functools.partial(QuietHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
        yield folder
        server.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def check_split(split):
    assert split.images.dtype == torch.float32
    assert split.images.shape[1:] == (1, 28, 28)
    assert split.labels.dtype == torch.int64
    assert split.labels.shape == split.images.shape[:1]
    assert split.images.min() == 0
    assert split.images.max() == 1


def as_set(images):
    return {image.numpy().tobytes() for image in images}


# MNIST


def test_mnist_files_are_read_pixel_by_pixel(tiny_mnist):
    data = utils.load_images("auto", tiny_mnist, val_size=10)
    raw = (tiny_mnist / "MNIST/raw/t10k-images-idx3-ubyte").read_bytes()[16:]
    assert data.name == "mnist"
    assert torch.equal(data.test.images, torch.tensor(list(raw)).view(20, 1, 28, 28) / 255)
    labels = (tiny_mnist / "MNIST/raw/t10k-labels-idx1-ubyte").read_bytes()[8:]
    assert data.test.labels.tolist() == list(labels)


def test_split_is_disjoint_complete_and_stable(tiny_mnist):
    data = utils.load_images("mnist", tiny_mnist, val_size=10)
    train = as_set(data.train.images)
    val = as_set(data.val.images)
    assert (len(train), len(val), len(as_set(data.test.images))) == (50, 10, 20)
    assert not train & val
    again = utils.load_images("mnist", tiny_mnist, val_size=10)
    assert torch.equal(data.val.images, again.val.images)
    assert torch.equal(data.train.images, again.train.images)
    others = []
    for seed in (1, 2, 3):
        other = utils.load_images("mnist", tiny_mnist, val_size=10, seed=seed)
        others.append(as_set(other.val.images))
        assert others[-1] | as_set(other.train.images) == train | val
        assert torch.equal(other.test.images, data.test.images)
    assert val not in others
    assert others[0] != others[2], "of the seed, more than the parity counts"


def places(images, all_images):
    """Where every image stands among all."""
    order = {image.numpy().tobytes(): i for i, image in enumerate(all_images)}
    return [order[image.numpy().tobytes()] for image in images]


def test_validation_is_drawn_at_random_and_labels_stay_with_their_images(tiny_mnist):
    """MNIST's files are in an order of their own: who wrote the digits, school or office."""
    raw = tiny_mnist / "MNIST/raw"
    pixels = torch.tensor(list((raw / IMAGES).read_bytes()[16:]))
    images = pixels.view(60, 1, 28, 28) / 255
    labels = torch.tensor(list((raw / LABELS).read_bytes()[8:]))
    data = utils.load_images("mnist", tiny_mnist, val_size=10)
    for split in (data.train, data.val):
        found = places(split.images, images)
        assert torch.equal(split.labels, labels[found])
        assert max(found) - min(found) > 40, "it is a block of the file"
        assert found != sorted(found)


def test_real_mnist(mnist):
    for split in mnist[1:]:
        check_split(split)
    assert [len(split.images) for split in mnist[1:]] == [55_000, 5_000, 10_000]
    labels = torch.cat([mnist.train.labels, mnist.val.labels])
    published = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert labels.bincount().tolist() == published
    total = mnist.train.images.sum(dtype=float) + mnist.val.images.sum(dtype=float)
    assert total / (60_000 * 784) == pytest.approx(0.1307, abs=1e-4)
    assert not as_set(mnist.val.images) & as_set(mnist.test.images)
    for digit in range(10):
        assert (mnist.val.labels == digit).float().mean() == pytest.approx(0.1, abs=0.02)


def test_the_users_folder_is_found(tiny_mnist, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path / "data")
    assert utils.load_images("mnist", "~/data", val_size=10).name == "mnist"
    assert os.listdir(".") == ["MNIST"]


def test_files_in_a_folder_that_can_only_be_read_are_read(tiny_mnist, open_folder):
    """As on a shared drive, where nobody can hold a lock."""
    shutil.copytree(tiny_mnist, open_folder, dirs_exist_ok=True)
    with without_write_permission(open_folder / "MNIST"):
        assert utils.load_images("mnist", open_folder, val_size=10).name == "mnist"


@pytest.fixture
def processed(tiny_mnist):
    """What torchvision made of MNIST years ago, here of something else; it would still be taken."""
    folder = tiny_mnist / "MNIST/processed"
    folder.mkdir()
    for name, n in (("training.pt", 60), ("test.pt", 20)):
        other = torch.zeros(n, 28, 28, dtype=torch.uint8), torch.zeros(n, dtype=torch.int64)
        torch.save(other, folder / name)
    assert MNIST(tiny_mnist, train=False).data.eq(0).all(), "torchvision no longer takes it"


def test_what_nobody_checks_is_not_taken(tiny_mnist, processed):
    assert utils.load_images("mnist", tiny_mnist, val_size=10).test.images.max() == 1


def test_what_nobody_checks_is_no_reason_not_to_download(tiny_mnist, processed):
    shutil.rmtree(tiny_mnist / "MNIST/raw")
    with pytest.raises(FileNotFoundError, match="could not be downloaded .*refused"):
        utils.load_images("mnist", tiny_mnist, val_size=10)


# damage


def truncate(raw):
    (raw / IMAGES).write_bytes((raw / IMAGES).read_bytes()[:-1])


def flip_a_byte(raw):
    content = bytearray((raw / IMAGES).read_bytes())
    content[1000] ^= 1
    (raw / IMAGES).write_bytes(content)


def wrong_magic(raw):
    (raw / IMAGES).write_bytes(b"\0\0\x08\x01" + (raw / IMAGES).read_bytes()[4:])


def wrong_count(raw):
    content = (raw / IMAGES).read_bytes()
    (raw / IMAGES).write_bytes(struct.pack(">HBBI", 0, 8, 3, 59) + content[8:])


def swap(raw):
    images = (raw / IMAGES).read_bytes()
    (raw / IMAGES).write_bytes((raw / LABELS).read_bytes())
    (raw / LABELS).write_bytes(images)


def compress(raw):
    (raw / IMAGES).write_bytes(gzip.compress((raw / IMAGES).read_bytes()))


def empty(raw):
    (raw / IMAGES).write_bytes(b"")


def fifo(raw):
    (raw / IMAGES).unlink()
    os.mkfifo(raw / IMAGES)


def folder(raw):
    (raw / IMAGES).unlink()
    (raw / IMAGES).mkdir()


DAMAGES = [truncate, flip_a_byte, wrong_magic, wrong_count, swap, compress, empty, folder, fifo]


@pytest.mark.parametrize("source", ["mnist", "auto"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_and_never_trained_on(tiny_mnist, damage, source):
    damage(tiny_mnist / "MNIST/raw")
    says = r"train-(images|labels)-idx\d-ubyte is not MNIST's file, whose MD5 is \w{32}: delete it"
    with pytest.raises(ValueError, match=says):
        utils.load_images(source, tiny_mnist, val_size=10)


# download


def names_in(folder):
    """The names of files, whether they are packed or not."""
    return {name.removesuffix(".gz") for name in os.listdir(folder)}


def test_a_download_leaves_the_four_files(tiny_mnist, mirror):
    assert utils.load_images("auto", tiny_mnist, val_size=10).name == "mnist"
    assert os.listdir(tiny_mnist / "MNIST") == ["raw"]
    assert names_in(tiny_mnist / "MNIST/raw") == utils.MNIST_FILES.keys()
    shutil.rmtree(mirror)
    assert utils.load_images("mnist", tiny_mnist, val_size=10).name == "mnist"


@pytest.mark.parametrize("damage", [lambda b: b[:-20], lambda b: b"", lambda b: b[:-1] + b"x"])
@pytest.mark.parametrize("name", [IMAGES, LAST])
def test_a_download_that_is_not_whole_is_not_taken(tiny_mnist, mirror, damage, name):
    """Neither at once nor later, when what it left behind is found."""
    packed = mirror / f"{name}.gz"
    whole = packed.read_bytes()
    packed.write_bytes(damage(whole))
    with pytest.raises(FileNotFoundError, match="could not be downloaded"):
        utils.load_images("mnist", tiny_mnist, val_size=10)
    packed.write_bytes(whole)
    assert utils.load_images("mnist", tiny_mnist, val_size=10).name == "mnist"
    assert names_in(tiny_mnist / "MNIST/raw") == utils.MNIST_FILES.keys()


def test_a_download_killed_while_unpacking_is_made_up_for(tiny_mnist, mirror):
    raw = tiny_mnist / "MNIST/raw"
    raw.mkdir(parents=True)
    shutil.copy(mirror / f"{IMAGES}.gz", raw)
    (raw / IMAGES).write_bytes(gzip.decompress((mirror / f"{IMAGES}.gz").read_bytes())[:1000])
    assert utils.load_images("mnist", tiny_mnist, val_size=10).name == "mnist"


def test_packed_files_are_taken_without_a_network(tiny_mnist, mirror, monkeypatch):
    """As a browser saves them."""
    raw = tiny_mnist / "MNIST/raw"
    shutil.copytree(mirror, raw)
    monkeypatch.setattr(MNIST, "mirrors", ["http://mirror.invalid/"])
    assert utils.load_images("mnist", tiny_mnist, val_size=10).name == "mnist"


def test_files_of_other_names_are_told_the_right_ones(tiny_mnist):
    """Some archives have a dot in them where MNIST's own have a hyphen."""
    raw = tiny_mnist / "MNIST/raw"
    for name in utils.MNIST_FILES:
        (raw / name).rename(raw / name.replace("-idx", ".idx"))
    with pytest.raises(FileNotFoundError) as caught:
        utils.load_images("mnist", tiny_mnist, val_size=10)
    for name in [str(raw), *utils.MNIST_FILES, "exactly these names", ".gz"]:
        assert name in str(caught.value)
    assert len(os.listdir(raw)) == 4, "they are the user's"


def test_of_two_first_downloads_the_second_waits(tiny_mnist, mirror, monkeypatch):
    """Else one of them finds half a file and goes on with the digits."""
    fetch = torchvision.datasets.mnist.download_and_extract_archive
    fetched = []

    def slowly(url, **options):
        fetched.append(url)
        time.sleep(0.1)
        fetch(url, **options)

    monkeypatch.setattr(torchvision.datasets.mnist, "download_and_extract_archive", slowly)
    names = []

    def load():
        names.append(utils.load_images("auto", tiny_mnist, val_size=10).name)

    threads = [threading.Thread(target=load) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert names == ["mnist", "mnist"]
    assert len(fetched) == 4


def test_without_network_auto_falls_back_to_digits_with_a_loud_warning(tmp_path):
    with pytest.warns(UserWarning, match="NOT MNIST") as caught:
        data = utils.load_images("auto", tmp_path / "data")
    assert data.name == "digits"
    assert "!" * 40 in str(caught[0].message)
    assert caught[0].filename == __file__
    with pytest.raises(FileNotFoundError, match="could not be downloaded .*refused") as error:
        utils.load_images("mnist", tmp_path / "data")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir()), "a failed download leaves nothing behind"


@pytest.mark.parametrize(
    "error, says",
    [
        (socket.gaierror(-2, "Name or service not known"), "Name or service not known"),
        (ssl.SSLCertVerificationError(1, "certificate verify failed"), "certificate verify failed"),
        (TimeoutError("timed out"), "timed out"),
        (http.client.IncompleteRead(b""), "IncompleteRead"),
    ],
    ids=["name", "certificate", "timeout", "cut"],
)
@pytest.mark.parametrize("wrap", [urllib.error.URLError, lambda error: error])
def test_why_a_download_failed_is_told(tmp_path, monkeypatch, error, says, wrap):
    def fail(*args, **options):
        raise wrap(error)

    monkeypatch.setattr(urllib.request, "urlopen", fail)
    with pytest.raises(FileNotFoundError, match=says):
        utils.load_images("mnist", tmp_path / "data")


def test_a_network_that_swallows_packets_does_not_hang(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:  # which accepts and never answers
        proxy = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("http_proxy", proxy)
        monkeypatch.setenv("https_proxy", proxy)
        monkeypatch.setattr(urllib.request, "_opener", None)  # it may remember another proxy
        assert len(MNIST.mirrors) * utils.NETWORK_TIMEOUT < 15, "it would take too long"
        monkeypatch.setattr(utils, "NETWORK_TIMEOUT", 0.3)
        before = socket.getdefaulttimeout()
        started = time.monotonic()
        with pytest.warns(UserWarning, match="timed out"):
            assert utils.load_images("auto", tmp_path / "data").name == "digits"
    assert time.monotonic() - started < 5
    assert socket.getdefaulttimeout() == before


def test_a_place_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError, match="could not be written"):
        utils.load_images("mnist", tmp_path / "file")
    with pytest.warns(UserWarning, match="NOT MNIST"):
        assert utils.load_images("auto", tmp_path / "file").name == "digits"


# scikit-learn's digits


def test_digits_look_like_mnist(digits):
    assert digits.name == "digits"
    for split in digits[1:]:
        check_split(split)
    assert [len(split.images) for split in digits[1:]] == [1257, 180, 360]
    images = torch.cat([split.images for split in digits[1:]])
    assert len(as_set(images)) == 1797, "the splits overlap"
    ink = images[:, 0] > 0
    size = torch.maximum(ink.any(2).sum(1), ink.any(1).sum(1))
    assert size.max() <= 20
    assert size.float().mean() > 19
    grid = torch.arange(28.0)
    mass = images.sum((1, 2, 3))
    row = images.sum(3)[:, 0] @ grid / mass
    column = images.sum(2)[:, 0] @ grid / mass
    for centre in (row, column):
        assert (centre - 14).abs().max() < 1, "the centre of mass is not in the middle"


def test_labels_of_the_digits_stay_with_their_images(digits):
    """A classifier by nearest neighbours would know nothing of shuffled labels."""
    classifier = KNeighborsClassifier(1)
    classifier.fit(digits.train.images.flatten(1), digits.train.labels)
    for split in (digits.val, digits.test):
        assert classifier.score(split.images.flatten(1), split.labels) > 0.95


def test_of_the_digits_a_tenth_at_most_is_held_out(digits):
    small = utils.load_images("digits", val_size=20, seed=3)
    assert [len(split.images) for split in small[1:]] == [1417, 20, 360]
    assert torch.equal(small.test.images, digits.test.images)
    assert not as_set(small.val.images) <= as_set(digits.val.images)


# what both have in common


def test_a_digit_is_left_out_of_every_split(digits):
    nine = utils.leave_out(digits, 0)
    assert nine.name == "digits"
    for whole, part in zip(digits[1:], nine[1:], strict=True):
        keep = whole.labels != 0
        assert 0 not in part.labels
        assert torch.equal(part.labels, whole.labels[keep])
        assert torch.equal(part.images, whole.images[keep])
    assert utils.leave_out(digits, None) is digits


@pytest.mark.parametrize("digit", [False, True, 4.0, -1, 10, "4"])
def test_a_bad_digit_to_leave_out_is_named(digits, digit):
    """False would drop the zeros."""
    with pytest.raises((TypeError, ValueError), match="^the digit to leave out "):
        utils.leave_out(digits, digit)


@pytest.mark.parametrize(
    "name, values",
    [
        ("source", ["cifar", None, 3]),
        ("root", [None, 3, "", "a\0b"]),
        ("val_size", [0, -1, 60_000, 10.0, True, None]),
        ("seed", [-1, 2**32, "0", None]),
    ],
)
def test_bad_arguments_are_named(name, values):
    for value in values:
        with pytest.raises((TypeError, ValueError), match=f"^{name} "):
            utils.load_images(**{"source": "digits", name: value})


@pytest.mark.parametrize("name", utils.MNIST_FILES)
def test_each_of_the_four_files_is_checked(tiny_mnist, name):
    path = tiny_mnist / "MNIST/raw" / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} is not MNIST's file"):
        utils.load_images("mnist", tiny_mnist, val_size=10)
