"""A convolutional variational autoencoder (VAE) that learns to reconstruct MNIST.

Everything that the two notebooks share, in the order in which data flows: data, model, loss,
training, checkpoints, evaluation, robustness, figures. It follows Kingma & Welling,
"Auto-Encoding Variational Bayes" (2013, https://arxiv.org/abs/1312.6114).

    x (B, 1, 28, 28) --Encoder--> mu, logvar (B, D) --reparameterize--> z (B, D) --Decoder--> logits (B, 1, 28, 28)

One convention holds everywhere: a loss is summed over the pixels or latent dimensions of an image
and averaged over images, in nats per image. A figure named `loss` is BCE + beta * KL on a sampled
z; with beta = 1 it is the negative evidence lower bound, -ELBO. A picture shows the decoded mean.

`vae_mnist_training.ipynb` uses the first half (data to checkpoints) and `evaluate`;
`vae_mnist_analysis_visualizations.ipynb` uses data, `load_best` and the second half.
"""

import contextlib
import copy
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import pickletools
import platform
import random
import re
import sys
import time
import types
import urllib.request
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import filelock
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from scipy import ndimage
from sklearn.datasets import load_digits
from sklearn.mixture import GaussianMixture
from torch import Tensor, nn
from torchvision.datasets import MNIST
from torchvision.transforms.functional import InterpolationMode, rotate
from tqdm import tqdm

MAX_SEED = 2**32 - 1


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch: on a CPU, a run with the same number of threads then repeats bit for bit; on CUDA
    and MPS the weights, the order of the images and the noise repeat, while sums may round differently."""
    _check("seed", seed, 0, MAX_SEED)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic = True


def pick_device() -> torch.device:
    """The accelerator (CUDA, then Apple's MPS) if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")


def _check(name: str, value, low: float = 0, high: float = math.inf, kind: type = int) -> None:
    """ValueError, by name, unless a value is an integer, a finite number (float) or a truth value (bool) in its range."""
    fits = isinstance(value, (int, float) if kind is float else kind) and isinstance(value, bool) == (kind is bool)
    if not fits or not low <= value <= high or value == math.inf:
        what = {int: "an integer", float: "a finite number", bool: "True or False"}[kind]
        bounds = "" if kind is bool else f" of at least {low:g}" if high == math.inf else f" from {low:g} to {high:.10g}"
        raise ValueError(f"{name} is {value!r}; it must be {what}{bounds}")


def _check_images(images: Tensor, name: str = "images", values: bool = True) -> None:
    if not isinstance(images, Tensor) or images.dtype != torch.float32:
        raise ValueError(f"{name} must be a float32 tensor, not {getattr(images, 'dtype', type(images).__name__)}")
    if images.ndim != 4 or images.shape[1:] != (1, 28, 28) or len(images) == 0:
        raise ValueError(f"{name} must have the shape (N, 1, 28, 28) with N at least 1, not {tuple(images.shape)}")
    low, high = map(float, images.aminmax()) if values else (0, 1)
    if not (low >= 0 and high <= 1):
        raise ValueError(f"{name} must lie in [0, 1], " + ("without NaN" if math.isnan(low) else f"not from {low:g} to {high:g}"))


def _path(name: str, value: str | Path) -> Path:
    if not isinstance(value, (str, os.PathLike)) or not str(value) or "\0" in str(value):
        raise ValueError(f"{name} is {value!r}; it must be the name of a file or folder")
    return Path(value)


# ---------------------------------------- Data ----------------------------------------

MNIST_FILES = {  # size in bytes and MD5 of the uncompressed files
    "train-images-idx3-ubyte": (47040016, "6bbc9ace898e44ae57da46a324031adb"),
    "train-labels-idx1-ubyte": (60008, "a25bea736e30d166cdddb491f175f624"),
    "t10k-images-idx3-ubyte": (7840016, "2646ac647ad5339dbf082846283269ea"),
    "t10k-labels-idx1-ubyte": (10008, "27ae3e4e09519cfbb04c329615203637"),
}
DOWNLOAD_SECONDS = {"auto": 60, "mnist": 600}  # a download that takes longer is given up


class Split(NamedTuple):
    """images (N, 1, 28, 28) float32 in [0, 1], labels (N,) int64."""

    images: Tensor
    labels: Tensor


class Data(NamedTuple):
    """A data set by name ("mnist" or "digits") in three disjoint splits."""

    name: str
    train: Split
    val: Split
    test: Split


def load_images(source: str = "auto", root: str | Path = "data", val_size: int = 5000, seed: int = 0) -> Data:
    """Load handwritten digits, 28x28 greyscale, split into training, validation and test images.

    source: "mnist" takes the files under `root`/MNIST/raw, or downloads them there; "digits" takes the
    1,797 digits that come with scikit-learn, so that everything runs with no network; "auto" is MNIST
    if it can be had within seconds, else the digits, with a warning. `val_size` images (of the digits
    at most 180) are held out of the training images by `seed`; the test images never change.
    Raises ValueError for a bad argument or a damaged file, FileNotFoundError where MNIST cannot be had.
    """
    if source not in ("auto", "mnist", "digits"):
        raise ValueError(f'source is {source!r}; it must be "auto", "mnist" or "digits"')
    _check("val_size", val_size, 1, 59_999)
    _check("seed", seed, 0, MAX_SEED)
    raw, name = _path("root", root) / "MNIST" / "raw", "digits" if source == "digits" else "mnist"
    try:
        train, test = _digits() if name == "digits" else _mnist(raw, DOWNLOAD_SECONDS[source])
    except FileNotFoundError as error:
        if source == "mnist":
            raise
        rule = "!" * 80
        warnings.warn(f"\n{rule}\nNOT MNIST: {error}\nGoing on with scikit-learn's 1,797 small digits. They show that "
                      f"everything runs;\ntheir figures cannot be set beside MNIST's.\n{rule}", stacklevel=2)
        name, (train, test) = "digits", _digits()
    order = torch.randperm(len(train.images), generator=torch.Generator().manual_seed(seed))
    val, rest = order.tensor_split([min(val_size, 180) if name == "digits" else val_size])
    return Data(name, Split(*(x[rest] for x in train)), Split(*(x[val] for x in train)), test)


def leave_out(data: Data, digit: int | None) -> Data:
    """The data without one digit, 0 to 9, in any of the splits; all of it for None."""
    if digit is None:
        return data
    _check("the digit to leave out", digit, 0, 9)
    return Data(data.name, *(Split(*(x[split.labels != digit] for x in split)) for split in data[1:]))


def _mnist(raw: Path, seconds: float) -> tuple[Split, Split]:
    """MNIST's training and test images from the four files in `raw`; those that are missing are first downloaded."""
    missing, started = [name for name in MNIST_FILES if not os.path.lexists(raw / name)], time.monotonic()
    try:
        for name, content in {name: _download(name, seconds, started) for name in missing}.items():
            _write(raw / name, content)
    except (OSError, CheckpointError) as error:
        raise FileNotFoundError(f"MNIST is not in {raw} and could not be brought there ({error}): put the files "
                                f"{', '.join(missing)} there, or load the source \"digits\"") from None
    return tuple(Split(_read_mnist_file(raw / f"{part}-images-idx3-ubyte")[16:].view(-1, 1, 28, 28) / 255,
                       _read_mnist_file(raw / f"{part}-labels-idx1-ubyte")[8:].long()) for part in ("train", "t10k"))


def _read_mnist_file(path: Path) -> Tensor:
    """The bytes of a raw file; ValueError, naming it, if it is not what MNIST's authors published."""
    size, md5 = MNIST_FILES[path.name]
    try:
        found = f"{path.stat().st_size:,} bytes" if path.is_file() else "not a file"
        content = path.read_bytes() if found == f"{size:,} bytes" else b""
    except OSError as error:
        found, content = error.strerror, b""
    if hashlib.md5(content).hexdigest() != md5:
        raise ValueError(f"{path} is not MNIST's file ({found}; MNIST's has {size:,} bytes and the MD5 {md5}): "
                         "delete it, and it is downloaded again")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _download(name: str, seconds: float, started: float) -> bytes:
    """A raw file, unpacked and checked, from the first of torchvision's mirrors that has it; OSError, saying why, if none."""
    size, md5 = MNIST_FILES[name]
    for url in [f"{mirror}{name}.gz" for mirror in MNIST.mirrors]:
        print(f"Downloading {url} ...", flush=True)
        try:
            packed = b""
            with urllib.request.urlopen(url, timeout=min(10, seconds)) as reply:
                while chunk := reply.read1():
                    packed += chunk
                    if time.monotonic() - started > seconds:
                        raise TimeoutError(f"gave up after {seconds} s")
            content = gzip.GzipFile(fileobj=io.BytesIO(packed)).read(size + 1)
            if hashlib.md5(content).hexdigest() == md5:
                return content
            reason = "it did not arrive whole"
        except Exception as error:  # whatever the network does, the reason is told
            reason = str(getattr(error, "reason", error)) or type(error).__name__
        if time.monotonic() - started > seconds:
            break
    raise OSError(f"{url}: {reason}")


def _digits() -> tuple[Split, Split]:
    """scikit-learn's 8x8 digits, brought to 28x28 the way MNIST was made."""
    digits = load_digits()
    images = torch.stack([_like_mnist(torch.tensor(x, dtype=torch.float32) / 16, contrast=2) for x in digits.images])
    labels = torch.tensor(digits.target, dtype=torch.int64)
    test, train = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).tensor_split([360])
    return Split(images[train], labels[train]), Split(images[test], labels[test])


def read_digit(path: str | Path) -> Tensor:
    """One's own picture of one handwritten digit -> (1, 1, 28, 28) float32 in [0, 1], made the way MNIST was made.

    A photograph of pen on paper, a scan or a drawing, dark on light or light on dark, on a transparent ground, too: paper
    becomes black, ink white, the ink is scaled to 20 pixels, and its centre of mass moved to the middle.
    Raises FileNotFoundError where there is no file, ValueError for what is no picture, or not of one digit.
    """
    path = _path("path", path)
    if not path.exists():
        raise FileNotFoundError(f"there is no picture at {path}")
    try:
        if not path.is_file():
            raise ValueError("it is not a file")
        with warnings.catch_warnings(), Image.open(path) as picture:
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            grey = _grey(ImageOps.exif_transpose(picture))
    except Exception as error:  # whatever Pillow stumbles over
        raise ValueError(f"{path} cannot be read as a picture: {error or type(error).__name__}") from None
    paper = _paper(grey)
    ink = grey - paper
    if (ndimage.gaussian_filter(ink, 1) ** 3).sum() < 0:  # dark on light: what shines back is paper and ink multiplied
        ink = -ink / paper.clip(0.1)
    soft = ndimage.gaussian_filter(ink, 1)
    full = ink[soft >= 0.6 * soft.max()].mean()  # the level of a stroke's inside
    if full < 0.1:
        raise ValueError(f"{path} shows no digit: there is no ink on it")
    pieces = ndimage.label(soft > 0.25 * full, np.ones((3, 3)))[0]
    sizes = np.bincount(pieces.ravel())[1:]
    large = 1 + np.flatnonzero(sizes > 0.05 * sizes.max())  # the rest are specks
    stroke = np.isin(pieces, large)
    side = max(np.ptp(where) + 1 for where in stroke.nonzero())
    if side < 8 or len(large) > 3 or stroke.sum() > 0.7 * side**2:
        raise ValueError(f"{path} does not show one digit: {len(large)} pieces of ink, the whole {side} pixels large, "
                         f"{stroke.sum() / side**2:.0%} of it covered")
    return _like_mnist(torch.tensor(np.where(stroke, (ink / full).clip(0.01, 1), 0), dtype=torch.float32), contrast=1)[None]


def _grey(picture: Image.Image) -> np.ndarray:
    """The grey values of a picture, (h, w) in [0, 1], at most 400 pixels large; a transparent ground is what the ink is not."""
    if picture.mode[0] in "IF":  # 16 or 32 bits
        values = np.asarray(picture, dtype=float)
        picture = Image.fromarray((255 * (values - values.min()) / max(np.ptp(values), 1e-9)).astype(np.uint8))
    picture.thumbnail((400, 400), Image.Resampling.BOX)
    grey, alpha = np.moveaxis(np.asarray(picture.convert("LA"), dtype=float), 2, 0) / 255
    ground = 1.0 if (grey * alpha).sum() < 0.5 * alpha.sum() else 0.0
    return alpha * grey + (1 - alpha) * ground


def _paper(grey: np.ndarray) -> np.ndarray:
    """The paper under the ink, (h, w): a smooth surface of second degree through all pixels that are near it."""
    y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in grey.shape), indexing="ij")
    surface = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], -1).reshape(-1, 6)
    rest = grey.ravel() - np.median(grey)
    for _ in range(10):
        near = np.abs(rest) <= max(3 * np.median(np.abs(rest)), 0.02)
        paper = surface @ np.linalg.lstsq(surface[near], grey.ravel()[near], rcond=None)[0]
        rest = grey.ravel() - paper
    return paper.reshape(grey.shape)


def _like_mnist(ink: Tensor, contrast: float) -> Tensor:
    """Scale the ink's bounding box to 20 pixels, put its centre of mass in the middle: (h, w) -> (1, 28, 28)."""
    box = ink[ndimage.find_objects((ink != 0).int().numpy())[0]]
    scale = 20 / max(box.shape)
    size = [max(1, round(side * scale)) for side in box.shape]
    ink = F.interpolate(box[None, None], size=size, mode="bicubic", antialias=True)[0, 0]
    ink = ((ink - 0.5) * contrast + 0.5).clamp(0, 1)  # strokes as crisp as MNIST's
    centre = ndimage.center_of_mass(ink.numpy())
    top, left = (min(max(round(14 - middle), 0), 28 - side) for middle, side in zip(centre, size))
    return F.pad(ink, (left, 28 - size[1] - left, top, 28 - size[0] - top))[None]


# ---------------------------------------- Model ----------------------------------------

MAX_LATENT_DIM = 1024
BATCH = 500  # images at a time where nothing is trained


class Residual(nn.Sequential):
    """h + f(h), f being the layers in turn; the shape stays."""

    def forward(self, h: Tensor) -> Tensor:
        return h + super().forward(h)


class Encoder(nn.Module):
    """Images (B, 1, 28, 28) in [0, 1] -> mean and log-variance (B, latent_dim) of q(z|x)."""

    def __init__(self, latent_dim: int):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(1, 16, 4, stride=2, padding=1), nn.BatchNorm2d(16), nn.GELU(),  # (B, 1, 28, 28) -> (B, 16, 14, 14)
            nn.Conv2d(16, 64, 2, stride=2), nn.BatchNorm2d(64), nn.GELU(),  # -> (B, 64, 7, 7)
            nn.Conv2d(64, 16, 3, padding=1), nn.GELU(),  # -> (B, 16, 7, 7)
        )
        self.dense = nn.Sequential(
            nn.Flatten(), nn.Linear(16 * 7 * 7, 384), nn.GELU(),  # -> (B, 384)
            Residual(nn.Linear(384, 384), nn.GELU()),  # -> (B, 384)
            nn.Linear(384, 2 * latent_dim),  # -> (B, 2D)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.dense(self.conv(x)).chunk(2, dim=1)  # (B, 2D) -> (B, D), (B, D)


class Decoder(nn.Module):
    """Latent codes (B, latent_dim) -> logits (B, 1, 28, 28) of p(x|z); a sigmoid makes them grey values."""

    def __init__(self, latent_dim: int):
        super().__init__()
        self.dense = nn.Sequential(
            nn.Linear(latent_dim, 384), nn.GELU(),  # (B, D) -> (B, 384)
            Residual(nn.Linear(384, 384), nn.GELU()),  # -> (B, 384)
            nn.Linear(384, 16 * 7 * 7), nn.GELU(), nn.Unflatten(1, (16, 7, 7)),  # -> (B, 16, 7, 7)
        )
        self.conv = nn.Sequential(
            nn.Conv2d(16, 64, 3, padding=1), nn.BatchNorm2d(64), nn.GELU(),  # -> (B, 64, 7, 7)
            Residual(nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.GELU()),  # -> (B, 64, 7, 7)
            nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1), nn.GELU(),  # -> (B, 32, 14, 14)
            nn.ConvTranspose2d(32, 1, 4, stride=2, padding=1),  # -> (B, 1, 28, 28)
        )

    def forward(self, z: Tensor) -> Tensor:
        return self.conv(self.dense(z).contiguous(memory_format=torch.channels_last))


def reparameterize(mu: Tensor, logvar: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """z = mu + sigma * eps with eps ~ N(0, I), so that gradients reach mu and logvar: (B, D), (B, D) -> (B, D)."""
    eps = torch.randn(mu.shape, generator=generator, device=generator.device if generator else mu.device).to(mu.device)
    return mu + (0.5 * _bounded(logvar)).exp() * eps


def _bounded(logvar: Tensor) -> Tensor:
    """Log-variances within the range in which exp() and the KL stay finite in float32."""
    return logvar.clamp(-30, 30)


class VAE(nn.Module):
    """Encoder, reparameterization and Decoder; `variational=False` is the same network as a plain autoencoder.

    The plain autoencoder decodes mu itself; its logvar is None, and with it the KL is zero.
    Images must be float32 of shape (N, 1, 28, 28): anything else, or a latent_dim that makes no sense, is a ValueError.
    """

    def __init__(self, latent_dim: int = 32, variational: bool = True):
        super().__init__()
        _check("latent_dim", latent_dim, 1, MAX_LATENT_DIM)
        _check("variational", variational, kind=bool)
        self.latent_dim, self.variational = latent_dim, variational
        self.encoder, self.decoder = Encoder(latent_dim), Decoder(latent_dim)
        self.to(memory_format=torch.channels_last)  # the faster layout for convolutions on the CPU

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, 1, 28, 28) on the model's device -> mu, logvar, each (B, D)."""
        _check_images(x, values=False)
        if x.device != _device(self):
            raise ValueError(f"images are on {x.device}, the model is on {_device(self)}: move one to the other's device")
        mu, logvar = self.encoder(x)
        return mu, logvar if self.variational else None

    def decode(self, z: Tensor) -> Tensor:
        """(B, D) -> logits (B, 1, 28, 28)."""
        return self.decoder(z)

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """(B, 1, 28, 28) -> logits of one sampled z, mu, logvar."""
        mu, logvar = self.encode(x)
        z = reparameterize(mu, logvar, generator) if self.variational else mu
        return self.decode(z), mu, logvar

    def reconstruct(self, x: Tensor) -> Tensor:
        """Images -> the decoded mean of their posteriors, images again: no sampling, and as in eval mode."""
        return self.draw(posterior(self, x)[0])

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n images (n, 1, 28, 28) decoded from z ~ N(0, I), the prior (which a plain autoencoder was never taught)."""
        _check("n", n, 1)
        return self.draw(torch.randn(n, self.latent_dim, generator=generator, device=generator.device if generator else "cpu"))

    @torch.no_grad()
    def draw(self, z: Tensor) -> Tensor:
        """Codes (N, D) -> the images that they stand for, (N, 1, 28, 28) in [0, 1]; in batches, as in eval mode."""
        with _evaluating(self):
            return torch.cat([self.decode(part.to(_device(self))).sigmoid() for part in z.split(BATCH)])


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@contextlib.contextmanager
def _evaluating(model: nn.Module):
    """Eval mode for a while: batch normalisation neither looks at the batch nor learns from it."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


# ---------------------------------------- Loss ----------------------------------------


class Loss(NamedTuple):
    """loss = bce + beta * kl, in nats per image; with beta = 1 it is -ELBO."""

    loss: Tensor | float
    bce: Tensor | float
    kl: Tensor | float


def vae_loss(logits: Tensor, x: Tensor, mu: Tensor, logvar: Tensor | None, beta: float = 1.0) -> Loss:
    """Binary cross-entropy plus beta times KL(q(z|x) || N(0, I)), averaged over the images of a batch.

    Sums over pixels and over latent dimensions (Kingma & Welling, equation 10 and appendix B);
    beta other than 1 is the beta-VAE (Higgins et al., 2017). `logvar=None`, a plain autoencoder, has no KL.
    """
    _check_images(x, "x", values=False)
    if (logits.shape, logits.device) != (x.shape, x.device) or (logvar is not None and logvar.shape != mu.shape):
        raise ValueError(f"logits {tuple(logits.shape)} on {logits.device} and x {tuple(x.shape)} on {x.device}, mu and logvar "
                         "must have the same shape and device")
    bce = bce_per_image(logits, x).mean()
    kl = mu.new_zeros(()) if logvar is None else kl_per_dimension(mu, logvar).sum(1).mean()
    return Loss(bce + beta * kl, bce, kl)


def bce_per_image(logits: Tensor, x: Tensor) -> Tensor:
    """-log p(x|z) of independent Bernoulli pixels, grey values taken as probabilities: (B, 1, 28, 28) -> (B,)."""
    return F.binary_cross_entropy_with_logits(logits, x, reduction="none").flatten(1).sum(1)


def kl_per_dimension(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mu, sigma^2) || N(0, 1)) = (mu^2 + sigma^2 - 1 - log sigma^2) / 2 in nats: (B, D) -> (B, D)."""
    logvar = _bounded(logvar)
    return 0.5 * (mu.square() + logvar.exp() - 1 - logvar)


# ---------------------------------------- Training ----------------------------------------

WEIGHT_DECAY = 0.1  # of the dense layers, which narrows the gap between training and validation


def learning_rate_at(progress: float, learning_rate: float) -> float:
    """Adam's rate once the share `progress` of a run is done: it doubles over the first tenth, then falls to zero
    in a straight line, which beats the usual cosine (Defazio et al., 2023) here, too."""
    return learning_rate * (1 + 10 * progress if progress < 0.1 else 2 * (1 - progress) / 0.9)


def fit(model: VAE, train_images: Tensor, val_images: Tensor, *, epochs: int = 20, batch_size: int = 64,
        learning_rate: float = 1e-3, beta: float = 1.0, checkpoint: str | Path | None = None, resume: bool = True,
        seed: int = 0, metadata: dict | None = None) -> list[dict]:
    """Train with Adam; return the history, a row per epoch; leave the best epoch's weights and metadata in the model.

    `learning_rate` is the initial rate, which doubles before it falls: see `learning_rate_at`. A row holds epoch, train_loss,
    train_bce, train_kl, val_loss, val_bce, val_kl (nats per image), learning_rate (at the epoch's start) and seconds: in
    training averages over an epoch in which the weights move, in validation those of the weights' running average after it.

    `checkpoint` holds the epoch with the lowest validation loss, `metadata` (plain values such as the name of the data),
    and, until the run is finished, what it takes to go on: an interrupted run continues after its last finished epoch (bit
    for bit on the same machine, device and number of threads), a finished one is not trained again. With any other setting
    a new run starts, and what stood there is kept beside it under another name; so it is with `resume=False`, which after
    an interrupt goes on with the run that it began itself.

    Raises ValueError for a bad argument, CheckpointError if the folder cannot be written or another run is writing there,
    FloatingPointError if the loss stops being finite. A disk that fails later costs a warning, not the training.
    """
    _check_images(train_images, "train_images")
    _check_images(val_images, "val_images")
    _check("epochs", epochs, 1)
    _check("batch_size", batch_size, 1)
    _check("learning_rate", learning_rate, 1e-12, kind=float)
    _check("beta", beta, kind=float)
    _check("seed", seed, 0, MAX_SEED)
    _check("resume", resume, kind=bool)
    digests = [hashlib.sha256(x.cpu().contiguous().numpy()).hexdigest()[:16] for x in (train_images, val_images)]
    settings = {"epochs": epochs, "batch_size": batch_size, "learning_rate": float(learning_rate), "beta": float(beta),
                "seed": seed, "latent_dim": model.latent_dim, "variational": model.variational,
                "train_images": digests[0], "val_images": digests[1]}
    run = _Run(model, settings, metadata or {}, checkpoint, resume)
    train_images, val_images = train_images.to(_device(model)), val_images.to(_device(model))
    steps = math.ceil(len(train_images) / batch_size)
    with _lock(run.path):
        run.restore()
        try:
            with _progress_bar(epochs * steps, len(run.history) * steps) as bar:
                for epoch in range(len(run.history) + 1, epochs + 1):
                    started = time.perf_counter()
                    train = _train_epoch(run, train_images, epoch, bar)
                    val = evaluate(run.average, val_images, num_samples=1, beta=beta)
                    if not math.isfinite(val.loss):
                        raise FloatingPointError(_not_finite(f"in the validation after epoch {epoch}"))
                    run.add({"epoch": epoch, **{f"train_{key}": value for key, value in train._asdict().items()},
                             **{f"val_{key}": value for key, value in val._asdict().items()},
                             "learning_rate": learning_rate_at((epoch - 1) / epochs, learning_rate),
                             "seconds": time.perf_counter() - started})
                    bar.write(_format_row(run.history[-1], epochs))
        except KeyboardInterrupt:
            where = f"in {run.path}: {run.kept}; run again to go on" if run.path else "on disk: none, for no checkpoint was named"
            raise KeyboardInterrupt(f"Stopped; finished epochs kept {where}") from None
        run.save("the trained weights are in memory alone: utils.save_checkpoint(PATH, model) saves them in another place")
    model.load_state_dict(run.best.state_dict())
    model.eval().metadata = run.about()
    return run.history


def _train_epoch(run: "_Run", images: Tensor, epoch: int, bar: tqdm) -> Loss:
    """One pass over the images; everything random in it follows from (seed, epoch), so that a run can be resumed.

    `run.average` follows the weights as an exponential moving average over about a tenth of an epoch (Polyak &
    Juditsky, 1992). It filters out the noise of the single steps: early in a run it is nats better than the weights
    themselves, and at the end, where the learning rate is zero, the same.
    """
    model, optimizer, settings = run.model.train(), run.optimizer, run.settings
    seed = settings["seed"] * 100_003 + epoch
    noise = torch.Generator(images.device).manual_seed(seed)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).to(images.device)
    batches = order.split(settings["batch_size"])
    interval = max(1, len(batches) // 100)  # steps between updates of the average: more of them would only cost time
    averaged, current = ([t for t in m.state_dict().values() if t.is_floating_point()] for m in (run.average, model))
    losses = torch.empty(len(batches), 3, device=images.device)  # stays on the device: no step waits for the host
    for step, rows in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at((epoch - 1 + step / len(batches)) / settings["epochs"], settings["learning_rate"])
        x = images[rows]
        logits, mu, logvar = model(x, noise)
        loss = vae_loss(logits, x, mu, logvar, settings["beta"])
        optimizer.zero_grad()
        loss.loss.backward()
        optimizer.step()
        if (step + 1) % interval == 0:
            first = epoch == 1 and step + 1 == interval
            torch._foreach_lerp_(averaged, current, 1.0 if first else min(1.0, 10 * interval / len(batches)))
        losses[step] = torch.stack(loss).detach()
        bar.update()
    losses = losses.cpu().double()
    if not losses.isfinite().all():
        step = int((~losses.isfinite()).any(1).nonzero()[0])
        raise FloatingPointError(_not_finite(f"at epoch {epoch}, step {step + 1}"))
    sizes = torch.tensor([len(rows) for rows in batches]).double()
    return Loss(*(sizes @ losses / sizes.sum()).tolist())  # every image weighted the same, the short last batch too


def _not_finite(where: str) -> str:
    return f"the loss is not finite {where}: training stops, what earlier epochs saved is kept; try a lower learning rate"


def _adam(model: nn.Module) -> torch.optim.Optimizer:
    """Adam, with decoupled weight decay (AdamW: Loshchilov & Hutter, 2019) of the dense layers' matrices alone."""
    dense = {layer.weight for layer in model.modules() if isinstance(layer, nn.Linear)}
    groups = [{"params": [p for p in model.parameters() if p not in dense], "weight_decay": 0.0},
              {"params": [p for p in model.parameters() if p in dense], "weight_decay": WEIGHT_DECAY}]
    optimizer = torch.optim.AdamW(groups, fused=_device(model).type in ("cpu", "cuda"))
    for p in model.parameters():  # as Adam itself would at its first step; here they are there to be restored before it
        optimizer.state[p] = {"step": torch.zeros((), device=p.device if p.is_cuda else "cpu"),
                              "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return optimizer


def _format_row(row: dict, epochs: int) -> str:
    return (f"epoch {row['epoch']:2d}/{epochs}   training {row['train_loss']:7.2f}   validation {row['val_loss']:7.2f} = "
            f"BCE {row['val_bce']:6.2f} + KL {row['val_kl']:5.2f} nats   {row['seconds']:5.1f} s")


def _progress_bar(total: int, initial: int) -> tqdm:
    """tqdm's bar in a terminal; in a notebook the same bar in one output that is redrawn, with no widget to go stale."""
    options = {"total": total, "initial": initial, "unit": "batch", "leave": False, "mininterval": 0.5, "ascii": False}
    if "ipykernel" not in sys.modules or sys.stderr.isatty():
        return tqdm(**options, disable=not sys.stderr.isatty())
    from IPython.display import display

    output = display({"text/plain": ""}, raw=True, display_id=True)
    redraw = types.SimpleNamespace(write=lambda text: output.update({"text/plain": text.strip()}, raw=True), flush=lambda: None)
    return tqdm(**options, ncols=90, file=redraw)


# ---------------------------------------- Checkpoints ----------------------------------------

# A file is what torch.save writes: a zip archive of tensors, a number and one JSON text. Nothing else is read.
FORMAT = 2  # raise it when an older file can no longer be read
MAX_BYTES = 2**26  # an unfinished run of the largest model has 45 MB
MAX_OPCODES = 20_000  # of its pickle; that run's has 6,000
GLOBALS = {"torch._utils _rebuild_tensor_v2", "collections OrderedDict", "torch FloatStorage", "torch LongStorage"}


class CheckpointError(RuntimeError):
    """A checkpoint that is damaged, foreign, does not fit, or cannot be written."""


def save_checkpoint(path: str | Path, model: VAE, **metadata) -> None:
    """Write the weights, what rebuilds the model, and `metadata` (plain Python values) to `path`, whole or not at all.

    Raises ValueError for metadata that are not plain, CheckpointError where `path` cannot be written or the model could
    not be loaded again (NaN, another dtype): then what stood there before is untouched.
    """
    path, content = _path("path", path), _pack(model, metadata)
    _unpack(content, path)
    with _lock(path):
        _write(path, content)


def load_checkpoint(path: str | Path, device: str | torch.device = "cpu") -> VAE:
    """The model of a checkpoint in eval mode on `device`, with `model.metadata`. Nothing in the file is executed.

    Raises FileNotFoundError where there is none, CheckpointError where the file is not one of ours, whole and sound.
    """
    path = _path("path", path)
    return _unpack(_read(path), path)[0].to(device).eval()


def checkpoint_path(folder: str | Path, data: str, autoencoder: bool = False, left_out: int | None = None,
                    which: str = "best") -> Path:
    """Where the notebooks keep a model: "best" is one's own, "reference" comes with the repository and is never written."""
    _check("autoencoder", autoencoder, kind=bool)
    without = "" if left_out is None else f"_without{left_out}"
    return _path("folder", folder) / f"{'ae' if autoencoder else 'vae'}_{data}{without}_{which}.pt"


def load_best(folder: str | Path, data: str, autoencoder: bool = False, device: str | torch.device = "cpu") -> VAE:
    """One's own best model of these data where there is one, else the reference; says which. FileNotFoundError if none."""
    best, reference = (checkpoint_path(folder, data, autoencoder, which=which) for which in ("best", "reference"))
    path = best if os.path.lexists(best) or not os.path.lexists(reference) else reference
    model = load_checkpoint(path, device)
    if (there := model.metadata.get("data")) != data:
        raise CheckpointError(f"{path} was trained on {there}, but {data} is loaded: move one of them away")
    epoch, loss = (model.metadata.get(key, math.nan) for key in ("epoch", "val_loss"))
    print(f"{path}: {'your own' if path == best else 'the reference'}, epoch {epoch}, validation loss {loss:.2f} nats")
    return model


def compare_with_reference(model: VAE, test_loss: float) -> str:
    """One sentence: whether a test loss is what the same recipe gave over several seeds (models_mnist/reference.json)."""
    recipe = {"data": "mnist", "left_out": None, "epochs": 20, "batch_size": 64, "learning_rate": 1e-3, "beta": 1.0,
              "latent_dim": 32}
    if not recipe.items() <= model.metadata["settings"].items():
        return "No reference was measured for these settings."
    file = Path(__file__).parent / "models_mnist" / "reference.json"
    try:
        runs = json.loads(file.read_text())["test"]["vae" if model.variational else "ae32"]
        losses = np.array([run["loss"] for run in runs.values()], dtype=float)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return f"There is nothing to compare with in {file}."
    mean, spread = losses.mean(), losses.std(ddof=1)
    as_expected = abs(test_loss - mean) <= max(4 * spread, 0.005 * mean)
    return f"expected {mean:.1f} +- {spread:.1f}, yours {test_loss:.1f}: {'as expected' if as_expected else 'check this'}"


def _pack(model: VAE, metadata: dict, run: dict | None = None, state: dict[str, Tensor] | None = None) -> bytes:
    """A file of a model, and, of an unfinished run, what it takes to go on: plain values `run` and tensors `state`."""
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    header = {"latent_dim": model.latent_dim, "variational": model.variational, "run": run or {},
              "metadata": {"versions": versions, **metadata}}
    try:
        text = json.dumps(header, allow_nan=False)
        if json.loads(text) != header:
            raise TypeError
    except (TypeError, ValueError, RecursionError):
        raise ValueError("metadata must be plain values: text, finite numbers, bool, None, and lists and dicts of them, with "
                         "text as keys, not nested without end") from None
    tensors, state = ({name: x.detach().cpu() for name, x in named.items()} for named in (model.state_dict(), state or {}))
    torch.save({"format": FORMAT, "header": text, "tensors": tensors, "run": state}, buffer := io.BytesIO())
    return buffer.getvalue()


def _unpack(content: bytes, path: Path) -> tuple[VAE, dict, dict[str, Tensor]]:
    """What `_pack` put together. The archive is looked at before torch's loader is let near it: no entry is compressed
    or overlaps another, all are whole by their CRC, and the pickle names tensors and dicts alone."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = archive.infolist()
            stored = not any(entry.compress_type for entry in entries) and sum(e.file_size for e in entries) <= len(content)
            if not stored or archive.testzip():
                raise ValueError("an entry is compressed, overlaps another, or is damaged")
            pickled = archive.read(next(entry for entry in entries if entry.filename.endswith("/data.pkl")))
        for i, (opcode, argument, _) in enumerate(pickletools.genops(pickled)):
            if i >= MAX_OPCODES or "GLOBAL" in opcode.name and argument not in GLOBALS:
                raise ValueError("more than tensors and plain values")
        payload = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if type(payload["format"]) is not int or payload["format"] != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        header = json.loads(payload["header"])
        with torch.random.fork_rng(devices=[]):  # building draws random weights, which must not disturb the caller's
            model = VAE(header["latent_dim"], header["variational"])
        _copy_tensors(payload["tensors"], model.state_dict())
        model.metadata, run, state = header["metadata"], header.get("run", {}), payload.get("run", {})
        if not all(isinstance(part, dict) for part in (model.metadata, run, state)):
            raise ValueError("no metadata")
        return model, run, state
    except Exception as error:  # whatever a reader stumbles over, the file is at fault
        raise CheckpointError(f"{path} is not a checkpoint of this project, or is damaged or was cut short "
                              f"({str(error)[:150] or type(error).__name__})") from None


def _copy_tensors(tensors: dict, into: dict[str, Tensor]) -> None:
    """Copy what was loaded into the tensors of a model or a run; ValueError unless all fit and make sense."""
    if names := ", ".join(sorted(map(str, tensors.keys() ^ into.keys()))[:3]):
        raise ValueError(f"missing or superfluous tensors: {names} ...")
    for name, own in into.items():
        tensor = tensors[name]
        if type(tensor) is not Tensor or (tensor.shape, tensor.dtype) != (own.shape, own.dtype):
            raise ValueError(f"{name} is not {own.dtype} {tuple(own.shape)}")
        if not tensor.isfinite().all() or ("running_var" in name or "exp_avg_sq" in name) and tensor.min() < 0:
            raise ValueError(f"{name} holds NaN, infinity or a negative variance")
    with torch.no_grad():
        for name, own in into.items():
            own.copy_(tensors[name])


@contextlib.contextmanager
def _disk(path: Path, done: str):
    """CheckpointError, in one sentence, for whatever the system refuses to do with a file ("read", "written")."""
    try:
        yield
    except filelock.Timeout:
        raise CheckpointError(f"another run is training into {path}: wait for it, or use another name") from None
    except OSError as error:
        raise CheckpointError(f"{path} could not be {done} ({error.strerror}); what stands there is untouched") from None


def _read(path: Path) -> bytes:
    """The one way from disk: a regular file of a size that a checkpoint can have."""
    if not os.path.lexists(path):
        raise FileNotFoundError(f"there is no checkpoint at {path}; vae_mnist_training.ipynb makes one")
    with _disk(path, "read"):
        if (size := path.stat().st_size) > MAX_BYTES or not path.is_file():
            raise CheckpointError(f"{path} is not a checkpoint of this project: {size:,} bytes, or no file at all")
        return path.read_bytes()


def _write(path: Path, content: bytes) -> None:
    """The one way to disk: a file beside `path`, flushed to disk, then moved over it in a single step."""
    part = path.with_name(f".{path.name}.part")
    with _disk(path, "written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(part, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def _lock(path: Path | None):
    """Hold `path` for one writer, as a context; the system frees the lock of a killed one."""
    if path is None:
        return contextlib.nullcontext()
    with _disk(path, "written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        return filelock.FileLock(path.with_name(f".{path.name}.lock"), timeout=0).acquire()


class _Run:
    """One training: all that its epochs change, and the file that keeps it, which every save replaces as a whole."""

    def __init__(self, model: VAE, settings: dict, metadata: dict, checkpoint: str | Path | None, resume: bool):
        self.model, self.average, self.best = model, copy.deepcopy(model), copy.deepcopy(model)
        self.optimizer, self.history, self.kept = _adam(model), [], 0  # kept: how many epochs are on disk
        self.metadata, self.settings, self.resume = metadata, {**metadata, **settings}, resume
        self.machine = f"{_device(model).type} with {torch.get_num_threads()} threads, torch {torch.__version__}"
        self.path = None if checkpoint is None else _path("checkpoint", checkpoint)
        if self.path is not None and self.path.name.endswith("_reference.pt"):
            raise ValueError(f"{self.path} is a reference checkpoint, which no run writes: use a name that ends in _best.pt")
        _pack(model, {"settings": [self.settings]})  # what cannot be saved is refused now, not after an epoch

    def tensors(self) -> dict[str, Tensor]:
        """What it takes to go on, beside the best weights, by name."""
        groups = {"model": self.model.state_dict(), "average": self.average.state_dict()}
        groups |= {key: {name: self.optimizer.state[p][key] for name, p in self.model.named_parameters()}
                   for key in ("step", "exp_avg", "exp_avg_sq")}
        return {f"{group}/{name}": tensor for group, named in groups.items() for name, tensor in named.items()}

    def about(self) -> dict:
        """The metadata of the checkpoint."""
        best = min(self.history, key=lambda row: row["val_loss"])
        return {**self.metadata, **{key: best[key] for key in ("epoch", "val_loss", "val_bce", "val_kl")},
                "settings": self.settings, "history": self.history}

    def restore(self) -> None:
        """Go on from the file that stands there, if it is whole, of this run, and to be gone on with."""
        if self.path is None:
            return
        try:
            best, run, state = _unpack(_read(self.path), self.path)
            history, epochs = best.metadata["history"], self.settings["epochs"]
            rows = [_format_row(row, epochs) for row in history]
            if best.metadata["settings"] != self.settings or not (self.resume or run["resume"] is False):
                return
            if not rows or [row["epoch"] for row in history] != list(range(1, len(rows) + 1))[:epochs]:
                return
            if len(rows) < epochs:
                _copy_tensors(state, self.tensors())
        except (FileNotFoundError, CheckpointError, LookupError, TypeError, ValueError):
            return  # nothing there, or nothing of use
        self.best.load_state_dict(best.state_dict())
        self.history, self.kept = history, len(rows)
        print("\n".join(rows))
        if self.kept == epochs:
            print(f"{self.path} holds this run, finished: it is not trained again")
        else:
            print(f"going on after epoch {self.kept} from {self.path}")
            if (begun := run.get("machine")) != self.machine:
                print(f"begun on {begun}, going on on {self.machine}: the same up to rounding, not bit for bit")

    def add(self, row: dict) -> None:
        """A finished epoch."""
        self.history.append(row)
        if row["val_loss"] == min(row["val_loss"] for row in self.history):
            self.best.load_state_dict(self.average.state_dict())
        self.save("training goes on, and saving is tried again after the next epoch")

    def save(self, otherwise: str) -> None:
        """A disk that fails costs a warning, not the training; another run's file is moved aside before the first save."""
        if self.path is None or self.kept == len(self.history):
            return
        finished = len(self.history) == self.settings["epochs"]
        run = {} if finished else {"resume": self.resume, "machine": self.machine}
        try:
            if self.kept == 0:
                _move_aside(self.path, self.settings)
            _write(self.path, _pack(self.best, self.about(), run, {} if finished else self.tensors()))
            self.kept = len(self.history)
        except CheckpointError as error:
            warnings.warn(f"{error}; {otherwise}", stacklevel=3)


def _move_aside(path: Path, settings: dict) -> None:
    """Give what stands at `path` a name that tells what was different about its run."""
    try:
        there = load_checkpoint(path).metadata["settings"].items()
    except FileNotFoundError:
        return
    except (CheckpointError, LookupError, AttributeError):
        there = ()
    label = re.sub(r"[^\w.-]", "", "-".join(f"{key}{value}" for key, value in there if settings.get(key) != value))[:80]
    names = (path.with_name(f"{path.stem}.{label or 'before'}{n or ''}{path.suffix}") for n in itertools.count())
    new = next(name for name in names if not os.path.lexists(name))
    with _disk(path, "moved aside"):
        os.rename(path, new)
    print(f"{path} is not of this run: it is kept as {new.name}")


# ---------------------------------------- Evaluation ----------------------------------------


@torch.no_grad()
def posterior(model: VAE, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """mu and logvar (N, D) of q(z|x) for all images, on the model's device; logvar is None for a plain autoencoder."""
    _check_images(images)
    with _evaluating(model):
        mu, logvar = zip(*[model.encode(x.to(_device(model))) for x in images.split(BATCH)])
    return torch.cat(mu), torch.cat(logvar) if model.variational else None


@torch.no_grad()
def _bce_of_codes(model: VAE, z: Tensor, images: Tensor) -> Tensor:
    """-log p(x|z) of one code per image, (N,) in double precision on the CPU (some accelerators have none)."""
    with _evaluating(model):
        bce = [bce_per_image(model.decode(part), x.to(z.device)) for part, x in zip(z.split(BATCH), images.split(BATCH))]
    return torch.cat(bce).cpu().double()


def loss_per_image(model: VAE, images: Tensor, num_samples: int = 10, seed: int = 0) -> Loss:
    """-ELBO, BCE and KL of every image, each (N,) on the CPU: the mean over `num_samples` sampled z per image.

    The noise is drawn for all images at once from `seed`, so that the figures do not depend on batches.
    """
    _check("num_samples", num_samples, 1)
    _check("seed", seed, 0, MAX_SEED)
    mu, logvar = posterior(model, images)
    generator = torch.Generator().manual_seed(seed)
    codes = (reparameterize(mu, logvar, generator) for _ in range(num_samples)) if model.variational else (mu,)
    bce = torch.stack([_bce_of_codes(model, z, images) for z in codes]).mean(0)
    kl = kl_per_dimension(mu, logvar).sum(1).cpu().double() if model.variational else torch.zeros_like(bce)
    return Loss(bce + kl, bce, kl)


def evaluate(model: VAE, images: Tensor, num_samples: int = 10, seed: int = 0, beta: float = 1.0) -> Loss:
    """BCE + beta * KL, BCE and KL over a data set in nats per image, every image weighted the same: see `loss_per_image`."""
    bce, kl = (float(values.mean()) for values in loss_per_image(model, images, num_samples, seed)[1:])
    return Loss(bce + beta * kl, bce, kl)


@torch.no_grad()
def log_likelihood(model: VAE, images: Tensor, num_samples: int = 500, seed: int = 0) -> Tensor:
    """log p(x) of every image in nats, (N,): importance sampling with q(z|x) as the proposal.

    log p(x) >= E[log 1/K sum_k p(x|z_k) p(z_k) / q(z_k|x)], a bound that tightens as K = `num_samples` grows
    (Burda et al., "Importance Weighted Autoencoders", 2015); with K = 1 it is the ELBO. The noise of an image
    depends on its place among `images`: with few samples its estimate may differ by some nats from place to place.
    """
    _check("num_samples", num_samples, 1)
    _check("seed", seed, 0, MAX_SEED)
    if not model.variational:
        raise ValueError("a plain autoencoder has no likelihood: log_likelihood wants a VAE")
    mu, logvar = posterior(model, images)
    sigma, generator = (0.5 * _bounded(logvar)).exp(), torch.Generator().manual_seed(seed)
    total = torch.full((len(images),), -math.inf, dtype=torch.float64)
    for _ in range(num_samples):
        eps = torch.randn(mu.shape, generator=generator).to(mu.device)
        z = mu + sigma * eps
        # log p(z) - log q(z|x); the two constants -log(2 pi)/2 cancel
        log_weight = (0.5 * (eps.square() - z.square()) + sigma.log()).sum(1).cpu().double()
        total = torch.logaddexp(total, log_weight - _bce_of_codes(model, z, images))
    return total - math.log(num_samples)


def active_units(mu: Tensor, threshold: float = 0.01) -> Tensor:
    """Which latent dimensions are in use, (D,): those whose mean varies over the images (Burda et al., 2015)."""
    return mu.var(0) > threshold


def interpolate(start: Tensor, end: Tensor, steps: int) -> Tensor:
    """`steps` codes from start to end, both (D,), along the arc between them: -> (steps, D).

    Spherical interpolation (Shoemake, 1985): a straight line would cut through the middle, where the prior
    N(0, I) has next to no mass in many dimensions. Codes on one line through the origin are joined by it.
    """
    _check("steps", steps, 2)
    t = torch.linspace(0, 1, steps, device=start.device)[:, None]
    angle = torch.acos(F.cosine_similarity(start, end, dim=0).clamp(-1, 1))
    if torch.sin(angle) < 1e-4:
        return (1 - t) * start + t * end
    return (torch.sin((1 - t) * angle) * start + torch.sin(t * angle) * end) / torch.sin(angle)


def fit_mixture(model: VAE, images: Tensor, num_components: int = 50, seed: int = 0) -> GaussianMixture:
    """A mixture of Gaussians with full covariances over the codes mu of images: a density on codes, fitted after training.

    Its samples, decoded, look better than those of the prior, and it gives a plain autoencoder a density, too (Ghosh et
    al., "From Variational to Deterministic Autoencoders", 2020). scikit-learn's `sample` and `score_samples` do the rest.
    """
    _check("num_components", num_components, 1, len(images))
    _check("seed", seed, 0, MAX_SEED)
    mixture = GaussianMixture(num_components, reg_covar=1e-4, tol=1e-2, random_state=seed)
    return mixture.fit(posterior(model, images)[0].cpu().numpy())


# ---------------------------------------- Robustness and anomalies ----------------------------------------


def _salt_and_pepper(x: Tensor, share: float, generator: torch.Generator) -> Tensor:
    hit, white = (torch.rand(x.shape, generator=generator) < probability for probability in (share, 0.5))
    return torch.where(hit, white.float(), x)


def _occlusion(x: Tensor, side: float, generator: torch.Generator) -> Tensor:
    side = round(side)
    free = max(20 - side, 0)  # how far the square can move within the middle 20x20 pixels
    corner = (28 - max(side, 20)) // 2 + torch.randint(free + 1, (2, len(x), 1), generator=generator)  # (2, N, 1)
    rows, columns = ((torch.arange(28) >= c) & (torch.arange(28) < c + side) for c in corner)  # each (N, 28)
    return x.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0.0)


def _blur(x: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    return torch.from_numpy(ndimage.gaussian_filter(x.numpy(), (0, 0, sigma, sigma), mode="constant", radius=14))


def _rotation(x: Tensor, degrees: float, generator: torch.Generator) -> Tensor:
    left = torch.randint(2, (len(x), 1, 1, 1), generator=generator).bool()
    return torch.where(left, *(rotate(x, angle, InterpolationMode.BILINEAR) for angle in (degrees, -degrees)))


class Corruption(NamedTuple):
    """apply(images, level, generator); `unit` of the level, the largest that makes sense, and four from mild to severe."""

    apply: Callable[[Tensor, float, torch.Generator], Tensor]
    unit: str
    largest: float
    levels: tuple[float, ...]


CORRUPTIONS = {
    "noise": Corruption(lambda x, level, generator: x + level * torch.randn(x.shape, generator=generator),
                        "standard deviation, grey values", 1.0, (0.1, 0.2, 0.3, 0.5)),
    "salt and pepper": Corruption(_salt_and_pepper, "share of the pixels turned black or white", 1.0, (0.02, 0.05, 0.1, 0.2)),
    "occlusion": Corruption(_occlusion, "side of a black square over the digit, pixels", 28.0, (4, 8, 12, 16)),
    "blur": Corruption(_blur, "standard deviation, pixels", 5.0, (0.5, 1.0, 1.5, 2.0)),
    "dimming": Corruption(lambda x, level, generator: (1 - level) * x, "share of the brightness lost", 1.0, (0.2, 0.4, 0.6, 0.8)),
    "rotation": Corruption(_rotation, "degrees, to either side", 180.0, (10, 20, 30, 45)),
}


def corrupt(images: Tensor, kind: str, level: float, seed: int = 0) -> Tensor:
    """Corrupted copies of images (N, 1, 28, 28), clipped to [0, 1]; `seed` decides all that is random; level 0 does nothing.

    Raises ValueError for a kind that is not in CORRUPTIONS, or a level outside 0 to the largest there.
    """
    _check_images(images)
    if kind not in CORRUPTIONS:
        raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(map(repr, CORRUPTIONS))}")
    _check("level", level, 0, CORRUPTIONS[kind].largest, kind=float)
    _check("seed", seed, 0, MAX_SEED)
    return CORRUPTIONS[kind].apply(images.cpu(), level, torch.Generator().manual_seed(seed)).clamp(0, 1).to(images.device)


# What is no digit, or no longer quite one, by a function of digits (N, 1, 28, 28) and a seed. The anomaly score was
# chosen on the first seven alone.
ANOMALIES = {
    "mirrored": lambda x, seed: x.flip(3),
    "rotated": lambda x, seed: x.rot90(1, (2, 3)),
    "occluded": lambda x, seed: corrupt(x, "occlusion", 8, seed),
    "noisy": lambda x, seed: corrupt(x, "noise", 0.3, seed),
    "shuffled": lambda x, seed: x.flatten(1)[:, torch.randperm(784, generator=torch.Generator().manual_seed(seed))].view_as(x),
    "inverted": lambda x, seed: 1 - x,
    "black": lambda x, seed: torch.zeros_like(x),
    "upside down": lambda x, seed: x.flip(2),
    "transposed": lambda x, seed: x.transpose(2, 3),
    "thicker": lambda x, seed: F.max_pool2d(x, 3, stride=1, padding=1),
    "thinner": lambda x, seed: 1 - F.max_pool2d(1 - F.pad(x, (0, 1, 0, 1)), 2, stride=1),
    "two overlaid": lambda x, seed: torch.maximum(x, x.roll(1, 0)),
    "half": lambda x, seed: torch.cat([x[..., :14], torch.zeros_like(x[..., 14:])], 3),
    "shifted": lambda x, seed: F.pad(x, (2, -2, 2, -2)),
}


def anomaly_score(model: VAE, images: Tensor) -> Tensor:
    """How little an image is like those the model was trained on, (N,) on the CPU: higher is more anomalous.

    The geometric mean of `excess_per_image`, `ink_per_image` and `ink_per_image` once more, over the sixth root of all
    the image's ink (plus 1), because the same misfit weighs more where there is less to fit. It was the best of those
    that `python tests/measure.py scores` compares on validation images.
    """
    rebuilt, x = model.reconstruct(images).cpu(), images.cpu()
    misfit = excess_per_image(rebuilt, x).clamp(min=0) * ink_per_image(rebuilt, x).square()
    return misfit ** (1 / 3) / (1 + x.flatten(1).sum(1).double()) ** (1 / 6)


def excess_per_image(rebuilt: Tensor, x: Tensor) -> Tensor:
    """BCE of grey values (N, 1, 28, 28) under a reconstruction, less the entropy of the values themselves, which no model
    can get below: (N,), nats."""
    bce, entropy = (F.binary_cross_entropy(p, x, reduction="none").flatten(1).sum(1).cpu().double() for p in (rebuilt, x))
    return bce - entropy


def ink_per_image(rebuilt: Tensor, x: Tensor) -> Tensor:
    """The largest difference in the ink of any 7x7 window, (N,), in pixels: noise cancels there, a stroke does not."""
    return 49 * F.avg_pool2d(x - rebuilt, 7, stride=1).abs().flatten(1).amax(1).cpu().double()


def density_score(mixture: GaussianMixture, model: VAE, images: Tensor) -> Tensor:
    """How improbable the codes mu of images are under a mixture, -log p(mu) in nats, (N,): higher is more anomalous."""
    return -torch.from_numpy(mixture.score_samples(posterior(model, images)[0].cpu().numpy()))


def optimize_codes(model: VAE, images: Tensor, steps: int = 50, learning_rate: float = 0.1) -> Tensor:
    """The codes (N, D) that explain corrupted images best, found by `steps` of Adam from the encoder's guess mu.

    The encoder knows clean digits alone. Here an image is taken as a * (decoded image) + b + Gaussian noise, with a
    contrast a, a brightness b and a noise level nobody knows. With these three at their most likely values,
    -log p(x|z) - log p(z) is 784/2 * log(1 - r^2) + |z|^2 / 2 up to a constant, r being the correlation between the
    image's pixels and the decoded ones: that is minimised. (Inference by optimisation: Cremer et al., "Inference
    Suboptimality in Variational Autoencoders", 2018.) A plain autoencoder has no p(z): its codes are fitted without.
    """
    _check("steps", steps, 1)
    _check("learning_rate", learning_rate, 1e-12, kind=float)
    guess, codes = posterior(model, images)[0], []
    with _evaluating(model), torch.enable_grad():
        for x, z in zip(images.to(guess.device).split(BATCH), guess.split(BATCH)):
            z = z.clone().requires_grad_()
            optimizer = torch.optim.Adam([z], lr=learning_rate)
            for step in range(steps):
                optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / steps)
                centred = (a.flatten(1) - a.flatten(1).mean(1, keepdim=True) for a in (model.decode(z).sigmoid(), x))
                r = F.cosine_similarity(*centred).clamp(min=0)  # 0 for an image of one grey value
                energy = 784 / 2 * (1 - (1 - 1e-4) * r.square()).log()  # 1e-4: no image is explained without rest
                if model.variational:
                    energy = energy + 0.5 * z.square().sum(1)
                (z.grad,) = torch.autograd.grad(energy.sum(), z)
                optimizer.step()
            codes.append(z.detach())
    return torch.cat(codes)


def squared_error(images: Tensor, originals: Tensor) -> float:
    """Squared difference summed over the pixels of an image, averaged over images."""
    return float((images.cpu() - originals.cpu()).square().flatten(1).sum(1).mean())


# ---------------------------------------- Figures ----------------------------------------
# Each takes data, returns the Figure, and neither shows nor saves it.

COLORS = plt.color_sequences["petroff10"]  # ten colours that colour-blind readers can tell apart (Petroff, 2021)


def digits_grid(rows: list[Tensor], row_labels: list[str] | None = None, column_labels: list[str] | None = None,
                cmaps: list[str] | None = None, size: float = 0.75) -> Figure:
    """A labelled grid of digits: each row a tensor (N, 1, 28, 28), grey from 0 to 1, rows may differ in length.

    `cmaps` names a row's colour map; a row in anything but "gray" is drawn from -1 to 1.
    """
    if not rows or any(row.ndim != 4 or len(row) == 0 for row in rows):
        raise ValueError("a grid wants at least one row, and every row at least one image of shape (1, 28, 28)")
    columns = max(map(len, rows))
    figure, axes = plt.subplots(len(rows), columns, figsize=(size * columns + 1, size * len(rows) + 0.3), squeeze=False,
                                layout="constrained")
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.01, wspace=0, hspace=0)
    font = max(9, 0.9 * size * columns)  # readable when a wide grid is shrunk to a page
    for i, row in enumerate(rows):
        cmap = cmaps[i] if cmaps else "gray"
        for j, ax in enumerate(axes[i]):
            ax.set_xticks([]), ax.set_yticks([])
            if j >= len(row):
                ax.axis("off")
                continue
            ax.imshow(row[j, 0].cpu(), cmap=cmap, vmin=0 if cmap == "gray" else -1, vmax=1, interpolation="nearest")
            if i == 0 and column_labels:
                ax.set_title(column_labels[j], fontsize=font)
        if row_labels:
            axes[i, 0].set_ylabel(row_labels[i], rotation=0, ha="right", va="center", fontsize=font)
    return figure


def plot_history(history: list[dict]) -> Figure:
    """Learning curves: -ELBO, BCE and KL per epoch, training and validation, from what `fit` returns.

    The axes show the validation curve whole; training's first epoch, of a network that knows nothing yet, may start above.
    """
    figure, axes = plt.subplots(1, 3, figsize=(11, 3), layout="constrained")
    epochs = [row["epoch"] for row in history]
    for ax, key, title in zip(axes, ("loss", "bce", "kl"), ("loss", "BCE", "KL")):
        for part, color in (("train", COLORS[0]), ("val", COLORS[1])):
            ax.plot(epochs, [row[f"{part}_{key}"] for row in history], ".-", color=color,
                    label={"train": "training", "val": "validation"}[part])
        shown = [row[f"{part}_{key}"] for row in history for part in ("train", "val") if part == "val" or row["epoch"] > 1]
        margin = 0.08 * (max(shown) - min(shown)) or 1
        ax.set(title=title, xlabel="epoch", ylabel="nats per image", ylim=(min(shown) - margin, max(shown) + margin))
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(alpha=0.3)
    axes[0].legend()
    return figure
