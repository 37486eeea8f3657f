"""Data: what is read, how it is split, and that nothing damaged is ever trained on."""

import gzip
import hashlib
import os
import shutil
import socket
import struct
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import utils


def idx(array: np.ndarray) -> bytes:
    """The IDX format in which MNIST is published: magic number, sizes, bytes."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


@pytest.fixture
def tiny_mnist(tmp_path, monkeypatch):
    """A folder like MNIST's with 60 training and 20 test images, whose digests the code is made to expect."""
    raw = tmp_path / "data/MNIST/raw"
    raw.mkdir(parents=True)
    random = np.random.default_rng(0)
    for part, n in (("train", 60), ("t10k", 20)):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(idx(random.integers(0, 256, (n, 28, 28))))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx(random.integers(0, 10, n)))
    content = {path.name: path.read_bytes() for path in raw.iterdir()}
    monkeypatch.setattr(utils, "MNIST_FILES", {name: (len(b), hashlib.md5(b).hexdigest()) for name, b in content.items()})
    return tmp_path / "data"


def check_split(split):
    assert split.images.dtype == torch.float32 and split.images.shape[1:] == (1, 28, 28)
    assert split.labels.dtype == torch.int64 and split.labels.shape == split.images.shape[:1]
    assert split.images.min() == 0 and split.images.max() == 1


def as_set(images):
    return {image.numpy().tobytes() for image in images}


def test_mnist_files_are_read_pixel_by_pixel(tiny_mnist):
    data = utils.load_images("auto", tiny_mnist, val_size=10)
    raw = (tiny_mnist / "MNIST/raw/t10k-images-idx3-ubyte").read_bytes()[16:]
    assert data.name == "mnist"
    assert torch.equal(data.test.images, torch.tensor(list(raw)).view(20, 1, 28, 28) / 255)
    assert data.test.labels.tolist() == list((tiny_mnist / "MNIST/raw/t10k-labels-idx1-ubyte").read_bytes()[8:])


def test_split_is_disjoint_complete_and_stable(tiny_mnist):
    data = utils.load_images("mnist", tiny_mnist, val_size=10)
    train, val = as_set(data.train.images), as_set(data.val.images)
    assert (len(train), len(val), len(as_set(data.test.images))) == (50, 10, 20)
    assert not train & val
    again = utils.load_images("mnist", tiny_mnist, val_size=10)
    assert torch.equal(data.val.images, again.val.images) and torch.equal(data.train.images, again.train.images)
    other = utils.load_images("mnist", tiny_mnist, val_size=10, seed=1)
    assert as_set(other.val.images) != val and as_set(other.val.images) | as_set(other.train.images) == train | val
    assert torch.equal(other.test.images, data.test.images)


def test_digits_look_like_mnist(digits):
    assert digits.name == "digits"
    for split in digits[1:]:
        check_split(split)
    assert [len(split.images) for split in digits[1:]] == [1257, 180, 360]
    images = torch.cat([split.images for split in digits[1:]])
    assert len(as_set(images)) == 1797, "the splits overlap"
    ink = images.flatten(0, 1) > 0
    heights, widths = ink.any(2).sum(1), ink.any(1).sum(1)
    assert torch.maximum(heights, widths).max() <= 20 and torch.maximum(heights, widths).float().mean() > 19
    grid = torch.arange(28.0)
    mass = images.sum((1, 2, 3))
    centre = torch.stack([(images.sum(3)[:, 0] @ grid) / mass, (images.sum(2)[:, 0] @ grid) / mass])
    assert (centre - 13.5).abs().max() < 1, "the centre of mass is not in the middle"


def test_real_mnist(mnist):
    for split in mnist[1:]:
        check_split(split)
    assert [len(split.images) for split in mnist[1:]] == [55_000, 5_000, 10_000]
    assert mnist.train.labels.bincount().add(mnist.val.labels.bincount()).tolist() == [
        5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]  # as published
    assert abs(torch.cat([mnist.train.images, mnist.val.images]).mean() - 0.1307) < 1e-4
    assert not as_set(mnist.val.images) & as_set(mnist.test.images)


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def truncate(raw):
    (raw / IMAGES).write_bytes((raw / IMAGES).read_bytes()[:-1])


def flip_a_byte(raw):
    content = bytearray((raw / IMAGES).read_bytes())
    content[1000] ^= 1
    (raw / IMAGES).write_bytes(content)


def wrong_magic(raw):
    (raw / IMAGES).write_bytes(b"\0\0\x08\x01" + (raw / IMAGES).read_bytes()[4:])


def wrong_count(raw):
    (raw / IMAGES).write_bytes(struct.pack(">HBBI", 0, 8, 3, 59) + (raw / IMAGES).read_bytes()[8:])


def swap(raw):
    images, labels = (raw / IMAGES).read_bytes(), (raw / LABELS).read_bytes()
    (raw / IMAGES).write_bytes(labels), (raw / LABELS).write_bytes(images)


def compress(raw):
    (raw / IMAGES).write_bytes(gzip.compress((raw / IMAGES).read_bytes()))


def empty(raw):
    (raw / IMAGES).write_bytes(b"")


def folder(raw):
    (raw / IMAGES).unlink(), (raw / IMAGES).mkdir()


@pytest.mark.parametrize("source", ["mnist", "auto"])
@pytest.mark.parametrize("damage, says", [
    (truncate, "has .* bytes instead of"), (flip_a_byte, ".*not the right content"), (wrong_magic, ".*not the right content"),
    (wrong_count, ".*not the right content"), (swap, "is really train-"), (compress, "is gzip"), (empty, "has 0 bytes"),
    (folder, "cannot be read as a file")])
def test_a_damaged_file_is_named_and_never_trained_on(tiny_mnist, damage, says, source):
    damage(tiny_mnist / "MNIST/raw")
    with pytest.raises(ValueError, match=f"train-(images|labels)-.* {says}"):
        utils.load_images(source, tiny_mnist, val_size=10)


def test_without_network_auto_falls_back_to_digits_with_a_loud_warning(tmp_path):
    with pytest.warns(UserWarning, match="NOT MNIST") as caught:
        data = utils.load_images("auto", tmp_path)
    assert data.name == "digits" and "!" * 40 in str(caught[0].message)
    with pytest.raises(FileNotFoundError, match="could not be downloaded"):
        utils.load_images("mnist", tmp_path)
    assert not list((tmp_path / "MNIST/raw").iterdir()), "a failed download leaves nothing behind"


def test_a_network_that_swallows_packets_does_not_hang(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes connections, never answers
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setitem(utils.DOWNLOAD_SECONDS, "auto", 6)
        started = time.monotonic()
        with pytest.warns(UserWarning, match="gave up after 6 s"):
            assert utils.load_images("auto", tmp_path).name == "digits"
    assert time.monotonic() - started < 30


def test_a_download_is_taken_only_whole(tiny_mnist, monkeypatch):
    raw, away = tiny_mnist / "MNIST/raw", tiny_mnist / "away"
    shutil.move(raw, away)

    def download(command, **options):
        scratch = Path(command[-1], "MNIST/raw")
        shutil.copytree(away, scratch)
        if broken:
            truncate(scratch)

    monkeypatch.setattr(subprocess, "run", download)
    broken = True
    with pytest.raises(FileNotFoundError, match="could not be downloaded"):
        utils.load_images("mnist", tiny_mnist, val_size=10)
    assert IMAGES not in os.listdir(raw)
    broken = False
    assert utils.load_images("mnist", tiny_mnist, val_size=10).name == "mnist"
    assert sorted(os.listdir(raw)) == sorted(utils.MNIST_FILES), "only the four files are there"


def test_bad_arguments_are_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="source is 'cifar'"):
        utils.load_images("cifar")
    with pytest.raises(ValueError, match="root .*file.* cannot be written"):
        utils.load_images("mnist", tmp_path / "file")
    with pytest.raises(ValueError, match="root .*file.* cannot be written"):
        utils.load_images("auto", tmp_path / "file")
    for val_size in (0, -1, 60_000, 10.0, True, None):
        with pytest.raises(ValueError, match="val_size is"):
            utils.load_images("digits", val_size=val_size)
    for seed in (-1, 2**32, "0", None):
        with pytest.raises(ValueError, match="seed is"):
            utils.load_images("digits", seed=seed)
