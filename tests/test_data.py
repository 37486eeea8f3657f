"""Data: what is read, how it is split, and that nothing damaged is ever trained on."""

import contextlib
import gzip
import hashlib
import http.client
import io
import math
import os
import shutil
import socket
import ssl
import struct
import threading
import time
import urllib.error
import urllib.request
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageOps
from torchvision.datasets import MNIST

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
    assert (centre - 14).abs().max() < 1, "the centre of mass is not in the middle"


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


def fifo(raw):
    (raw / IMAGES).unlink(), os.mkfifo(raw / IMAGES)


def folder(raw):
    (raw / IMAGES).unlink(), (raw / IMAGES).mkdir()


@pytest.mark.parametrize("source", ["mnist", "auto"])
@pytest.mark.parametrize("damage, found", [
    (truncate, r"[\d,]+ bytes"), (flip_a_byte, r"[\d,]+ bytes"), (wrong_magic, r"[\d,]+ bytes"), (wrong_count, r"[\d,]+ bytes"),
    (swap, r"[\d,]+ bytes"), (compress, r"[\d,]+ bytes"), (empty, "0 bytes"), (folder, "not a file"), (fifo, "not a file")])
def test_a_damaged_file_is_named_and_never_trained_on(tiny_mnist, damage, found, source):
    damage(tiny_mnist / "MNIST/raw")
    with pytest.raises(ValueError, match=rf"train-(images|labels)-.* is not MNIST's file \({found}; MNIST's has .* delete it"):
        utils.load_images(source, tiny_mnist, val_size=10)


def test_without_network_auto_falls_back_to_digits_with_a_loud_warning(tmp_path):
    with pytest.warns(UserWarning, match="NOT MNIST") as caught:
        data = utils.load_images("auto", tmp_path / "data")
    assert data.name == "digits" and "!" * 40 in str(caught[0].message)
    with pytest.raises(FileNotFoundError, match="could not be brought there .*[Rr]efused"):
        utils.load_images("mnist", tmp_path / "data")
    assert not list(tmp_path.iterdir()), "a failed download leaves nothing behind"


@pytest.mark.parametrize("error, says", [
    (urllib.error.URLError(socket.gaierror(-2, "Name or service not known")), "Name or service not known"),
    (urllib.error.URLError(ssl.SSLCertVerificationError(1, "certificate verify failed")), "certificate verify failed"),
    (TimeoutError("timed out"), "timed out"), (http.client.IncompleteRead(b""), "IncompleteRead")])
def test_why_a_download_failed_is_told(tmp_path, monkeypatch, error, says):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(urllib.request, "urlopen", fail)
    with pytest.raises(FileNotFoundError, match=says):
        utils.load_images("mnist", tmp_path)


@pytest.mark.parametrize("trickle", [True, False])
def test_a_network_that_swallows_packets_or_trickles_does_not_hang(tmp_path, monkeypatch, trickle):
    def serve(connection):
        with contextlib.suppress(OSError), connection:
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
            while True:
                connection.sendall(b"x")
                time.sleep(0.2)

    def accept(server):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = server.accept()
                if trickle:
                    threading.Thread(target=serve, args=(connection,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=accept, args=(server,), daemon=True).start()
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(urllib.request, "_opener", None)  # which would remember an earlier proxy
        monkeypatch.setattr(MNIST, "mirrors", ["http://mirror.invalid/"])
        monkeypatch.setitem(utils.DOWNLOAD_SECONDS, "auto", 2)
        started = time.monotonic()
        with pytest.warns(UserWarning, match="gave up after 2 s" if trickle else "timed out"):
            assert utils.load_images("auto", tmp_path).name == "digits"
    assert time.monotonic() - started < 15


def test_a_download_is_taken_only_whole(tiny_mnist, monkeypatch):
    raw = tiny_mnist / "MNIST/raw"
    packed = {path.name: gzip.compress(path.read_bytes()) for path in raw.iterdir()}
    shutil.rmtree(raw)
    asked, damage = [], None

    def cut(content):
        return content[:-20]

    def changed(content):
        return gzip.compress(gzip.decompress(content)[:-1] + b"x")

    def urlopen(url, timeout):
        asked.append(url)
        return io.BytesIO(damage(packed[url.rpartition("/")[2].removesuffix(".gz")]))

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    for broken in (cut, changed):
        damage = broken
        asked.clear()
        with pytest.raises(FileNotFoundError, match="could not be brought there"):
            utils.load_images("mnist", tiny_mnist, val_size=10)
        assert not raw.exists() and len(asked) == len(MNIST.mirrors), "every mirror is tried"

    damage = bytes
    assert utils.load_images("mnist", tiny_mnist, val_size=10).name == "mnist"
    assert sorted(os.listdir(raw)) == sorted(utils.MNIST_FILES), "only the four files are there"
    (raw / LABELS).unlink()
    asked.clear()
    utils.load_images("mnist", tiny_mnist, val_size=10)
    assert [url.rpartition("/")[2] for url in asked] == [f"{LABELS}.gz"], "what is there is not fetched again"
    shutil.rmtree(tiny_mnist)
    tiny_mnist.touch()  # a root that cannot be written
    with pytest.raises(FileNotFoundError, match="could not be written"):
        utils.load_images("mnist", tiny_mnist, val_size=10)
    with pytest.warns(UserWarning, match="NOT MNIST"):
        assert utils.load_images("auto", tiny_mnist, val_size=10).name == "digits"


def test_a_digit_is_left_out_of_every_split(digits):
    nine = utils.leave_out(digits, 4)
    for whole, part in zip(digits[1:], nine[1:]):
        assert 4 not in part.labels and len(part.labels) == len(part.images) == (whole.labels != 4).sum()
        assert torch.equal(part.images, whole.images[whole.labels != 4])
    assert utils.leave_out(digits, None) is digits
    for digit in (False, True, 4.0, -1, 10, "4"):
        with pytest.raises(ValueError, match="digit to leave out is"):
            utils.leave_out(digits, digit)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="source is 'cifar'"):
        utils.load_images("cifar")
    for root in (None, 3, "", "a\0b"):
        with pytest.raises(ValueError, match="root is"):
            utils.load_images("mnist", root)
    for val_size in (0, -1, 60_000, 10.0, True, None):
        with pytest.raises(ValueError, match="val_size is"):
            utils.load_images("digits", val_size=val_size)
    for seed in (-1, 2**32, "0", None):
        with pytest.raises(ValueError, match="seed is"):
            utils.load_images("digits", seed=seed)


# one's own digit


def photograph(digit, style, rng):
    """A picture that somebody might have taken of a digit (28, 28): large, off-centre, in uneven light, with noise."""
    side = int(28 * rng.uniform(5, 16))
    ink = np.asarray(Image.fromarray((255 * digit).astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)) / 255
    height, width = (int(side * rng.uniform(1.1, 2)) for _ in range(2))
    page = np.zeros((height, width))
    top, left = rng.integers(height - side + 1), rng.integers(width - side + 1)
    page[top : top + side, left : left + side] = ink
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    angle = rng.uniform(0, 2 * math.pi)
    light = 1 - rng.uniform(0.1, 0.4) * (1 + np.cos(angle) * x + np.sin(angle) * y) / 2
    if style == "pen":
        page = light * (0.9 - 0.75 * page) + 0.03 * rng.standard_normal(page.shape)
    elif style == "pencil":
        page = light * (0.85 - 0.4 * page) + 0.04 * rng.standard_normal(page.shape)
    elif style == "on white":
        page = 1 - page
    return Image.fromarray((255 * page.clip(0, 1)).astype(np.uint8))


STYLES = {"pen": "JPEG", "pencil": "JPEG", "on white": "PNG", "on black": "PNG"}


@pytest.mark.parametrize("style", STYLES)
def test_a_digit_in_a_photograph_comes_back_as_it_was(mnist, tmp_path, style):
    rng, found = np.random.default_rng(0), []
    for digit in mnist.test.images[:24, 0].numpy():
        photograph(digit, style, rng).save(tmp_path / "digit", STYLES[style], quality=80)
        mine = utils.read_digit(tmp_path / "digit")
        assert mine.shape == (1, 1, 28, 28) and mine.dtype == torch.float32 and 0 <= mine.min() < mine.max() <= 1
        found.append(np.corrcoef(mine.flatten(), digit.ravel())[0, 1])
    assert np.median(found) > 0.95 and np.quantile(found, 0.1) > 0.8, (np.median(found), np.quantile(found, 0.1))


@pytest.fixture
def seven():
    """A black stroke like a 7 on white, 200x150."""
    picture = Image.new("L", (150, 200), 255)
    ImageDraw.Draw(picture).line([(30, 40), (110, 40), (60, 160)], fill=0, width=14)
    return picture


@pytest.mark.parametrize("turn", [
    lambda p: p.convert("RGB"), lambda p: p.convert("1"), lambda p: p.convert("P"), lambda p: p.convert("CMYK"), ImageOps.invert,
    lambda p: p.convert("F"), lambda p: Image.fromarray(np.asarray(p).astype(np.uint16) * 200), lambda p: p.resize((1500, 2000)),
    lambda p: Image.merge("LA", (Image.new("L", p.size, 0), ImageOps.invert(p))),
    lambda p: Image.merge("LA", (Image.new("L", p.size, 255), ImageOps.invert(p)))])
def test_size_mode_and_ground_do_not_matter(seven, tmp_path, turn):
    seven.save(tmp_path / "plain.png")
    turned = turn(seven)
    name = tmp_path / ("turned.tiff" if turned.mode in ("F", "CMYK") else "turned.png")
    turned.save(name)
    plain, other = (utils.read_digit(path).flatten() for path in (tmp_path / "plain.png", name))
    assert np.corrcoef(plain, other)[0, 1] > 0.97


def test_a_photograph_held_sideways_is_turned_by_its_exif(seven, tmp_path):
    seven.save(tmp_path / "upright.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    seven.rotate(90, expand=True).save(tmp_path / "sideways.jpg", exif=exif)
    upright, sideways = (utils.read_digit(tmp_path / name).flatten() for name in ("upright.png", "sideways.jpg"))
    assert np.corrcoef(upright, sideways)[0, 1] > 0.97


def test_a_digit_is_placed_as_mnist_places_it(seven, tmp_path):
    seven.save(tmp_path / "seven.png")
    mine = utils.read_digit(tmp_path / "seven.png")[0, 0]
    rows, columns = (mine > 0).any(1), (mine > 0).any(0)
    assert max(rows.sum(), columns.sum()) == 20
    grid = torch.arange(28.0)
    for mass in (mine.sum(0), mine.sum(1)):
        assert abs(float(mass @ grid / mass.sum()) - 14) <= 0.51


def write_bytes(content):
    return lambda path: path.write_bytes(content)


def page_of_writing(path):
    picture = Image.new("L", (600, 400), 255)
    draw = ImageDraw.Draw(picture)
    for row in range(10):
        draw.text((20, 20 + 35 * row), "the quick brown fox jumps over the lazy dog " * 2, fill=0)
    picture.save(path, "PNG")


def one_dot(path):
    picture = Image.new("L", (200, 200), 255)
    picture.putpixel((100, 100), 0)
    picture.save(path, "PNG")


def blot(path):
    picture = Image.new("L", (200, 200), 255)
    ImageDraw.Draw(picture).rectangle((60, 60, 130, 130), fill=0)
    picture.save(path, "PNG")


def bomb(path):
    """A PNG of 900 megapixels in a few bytes: what it says in its header."""
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks))


def cut_short(path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (100, 100), dtype=np.uint8)).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:2000])


@pytest.mark.parametrize("make, says", [
    (lambda path: None, "there is no picture at"), (lambda path: path.mkdir(), "cannot be read as a picture: it is not a file"),
    (os.mkfifo, "not a file"), (write_bytes(b""), "cannot be read"), (write_bytes(b"my notes"), "cannot be read"),
    (cut_short, "cannot be read"), (bomb, "cannot be read .*exceeds limit"),
    (lambda path: Image.new("L", (300, 200), 255).save(path, "PNG"), "no ink"),
    (lambda path: Image.new("L", (300, 200), 0).save(path, "PNG"), "no ink"),
    (lambda path: Image.new("L", (1, 1), 0).save(path, "PNG"), "no ink"),
    (one_dot, "not show one digit"), (blot, "not show one digit"), (page_of_writing, "not show one digit")])
def test_what_is_no_picture_of_a_digit_is_told_in_one_sentence(tmp_path, make, says):
    make(tmp_path / "mine")
    with pytest.raises((ValueError, FileNotFoundError), match=says) as caught:
        utils.read_digit(tmp_path / "mine")
    assert "\n" not in str(caught.value) and caught.value.__cause__ is None


def test_an_empty_page_with_noise_and_uneven_light_has_no_digit_on_it(tmp_path):
    page = photograph(np.zeros((28, 28)), "pen", np.random.default_rng(0))
    page.save(tmp_path / "page.png")
    with pytest.raises(ValueError, match="no digit|not show one digit"):
        utils.read_digit(tmp_path / "page.png")
