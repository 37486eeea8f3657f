"""A convolutional variational autoencoder (VAE) that learns to reconstruct MNIST.

Everything that the two notebooks share, in the order in which data flows: data, model, loss,
training, checkpoints, evaluation, robustness, figures. It follows Kingma & Welling,
"Auto-Encoding Variational Bayes" (2013, https://arxiv.org/abs/1312.6114).

    x (B, 1, 28, 28) --Encoder--> mu, logvar (B, D) --reparameterize--> z (B, D) --Decoder--> logits (B, 1, 28, 28)

One convention holds everywhere: a loss is summed over the pixels or latent dimensions of an image
and averaged over images, in nats per image. A figure named `loss` is BCE + beta * KL on a sampled
z; with beta = 1 it is the negative evidence lower bound, -ELBO. A picture shows the decoded mean.

`vae_mnist_training.ipynb` uses the first half (data to checkpoints) and `evaluate`;
`vae_mnist_analysis_visualizations.ipynb` uses data, `load_checkpoint` and the second half.
"""

import contextlib
import hashlib
import io
import math
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows has no flock: there, two runs into one checkpoint are not told apart
    fcntl = None


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch, so that a run can be repeated bit for bit on the same machine."""
    _check_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic = True


def pick_device() -> torch.device:
    """The accelerator (CUDA, then Apple's MPS) if there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


# --------------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------------

# The four raw files of MNIST: size in bytes and MD5 of the uncompressed file.
MNIST_FILES = {
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
    if it can be had within seconds, else the digits, with a warning.
    `val_size` images (of the digits at most 180) are held out of the training images by `seed`;
    the test images never change.

    Raises ValueError for a bad argument or a damaged file, FileNotFoundError where MNIST cannot be had.
    """
    if source not in ("auto", "mnist", "digits"):
        raise ValueError(f'source is {source!r}; it must be "auto", "mnist" or "digits"')
    _check_integer("val_size", val_size, 1, 59_999)
    _check_seed(seed)
    if source == "digits":
        return _load_digits(val_size, seed)
    try:
        return _load_mnist(Path(root), val_size, seed, DOWNLOAD_SECONDS[source])
    except FileNotFoundError as error:
        if source == "mnist":
            raise
        rule = "!" * 80
        warnings.warn(f"\n{rule}\nNOT MNIST: {error}\nGoing on with scikit-learn's 1,797 small digits. They show "
                      f"that everything runs;\ntheir figures cannot be set beside MNIST's.\n{rule}", stacklevel=2)
        return _load_digits(val_size, seed)


def _load_mnist(root: Path, val_size: int, seed: int, seconds: float) -> Data:
    from torchvision.datasets.mnist import read_image_file, read_label_file

    raw = root / "MNIST" / "raw"
    missing = [name for name in MNIST_FILES if not _check_mnist_file(raw / name)]
    if missing:
        _download_mnist(root, missing, seconds)
    images = {part: read_image_file(raw / f"{part}-images-idx3-ubyte") for part in ("train", "t10k")}
    images = {part: x.unsqueeze(1).float().div_(255) for part, x in images.items()}  # (N, 28, 28) -> (N, 1, 28, 28)
    labels = {part: read_label_file(raw / f"{part}-labels-idx1-ubyte") for part in ("train", "t10k")}
    return _split("mnist", Split(images["train"], labels["train"]), Split(images["t10k"], labels["t10k"]), val_size, seed)


def _check_mnist_file(path: Path) -> bool:
    """False if there is no such file; ValueError, naming it, if it is not what MNIST's authors published."""
    size, md5 = MNIST_FILES[path.name]
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise ValueError(f"{path} cannot be read as a file ({error.strerror}): put MNIST's file there") from None
    digest = hashlib.md5(content).hexdigest()
    if digest == md5:
        return True
    known = {md5: name for name, (_, md5) in MNIST_FILES.items()}
    if content[:2] == b"\x1f\x8b":
        what = "is gzip-compressed where the raw file belongs"
    elif len(content) != size:
        what = f"has {len(content):,} bytes instead of {size:,}"
    else:
        what = "has the right size but not the right content"
    if (other := known.get(digest)) is not None:
        what = f"is really {other}"
    raise ValueError(f"{path} {what}: it is damaged or foreign; delete it, and it is downloaded again")


def _download_mnist(root: Path, missing: list[str], seconds: float) -> None:
    """Bring the missing raw files: torchvision downloads into a folder of its own, whole files move over.

    It runs in a process of its own, because nothing else bounds the wait for a network that swallows packets.
    """
    raw = root / "MNIST" / "raw"
    try:
        raw.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=raw, prefix=".download-")
    except OSError as error:
        raise ValueError(f"root {str(root)!r} cannot be written ({error.strerror}): MNIST cannot be put there") from None
    command = ("import socket, sys; socket.setdefaulttimeout(10); from torchvision.datasets import MNIST; "
               "MNIST(sys.argv[1], download=True)")
    with scratch:
        print(f"Downloading MNIST (11 MB) to {raw} ...", flush=True)
        try:
            subprocess.run([sys.executable, "-c", command, scratch.name], check=True, capture_output=True, timeout=seconds)
            for name in missing:
                if not _check_mnist_file(Path(scratch.name, "MNIST", "raw", name)):
                    raise FileNotFoundError(f"{name} is missing from the download")
                os.replace(Path(scratch.name, "MNIST", "raw", name), raw / name)
        except (subprocess.SubprocessError, OSError, ValueError) as error:
            reason = f"gave up after {seconds} s" if isinstance(error, subprocess.TimeoutExpired) else "no network?"
            raise FileNotFoundError(f"MNIST is not in {raw} and could not be downloaded ({reason}): put the files "
                                    f"{', '.join(missing)} there, or load the source \"digits\"") from None


def _load_digits(val_size: int, seed: int) -> Data:
    """scikit-learn's 8x8 digits, brought to 28x28 the way MNIST was made: box, scale to 20, centre of mass."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.stack([_like_mnist(torch.tensor(x, dtype=torch.float32) / 16) for x in digits.images])
    labels = torch.tensor(digits.target, dtype=torch.int64)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    test, rest = order[:360], order[360:]
    return _split("digits", Split(images[rest], labels[rest]), Split(images[test], labels[test]), min(val_size, 180), seed)


def _like_mnist(image: Tensor) -> Tensor:
    """Scale the ink's bounding box to 20 pixels, put its centre of mass in the middle: (h, w) -> (1, 28, 28)."""
    rows, columns = image.sum(1).nonzero(), image.sum(0).nonzero()
    box = image[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    scale = 20 / max(box.shape)
    size = [max(1, round(side * scale)) for side in box.shape]
    ink = F.interpolate(box[None, None], size=size, mode="bicubic", antialias=True)[0, 0]
    ink = ((ink - 0.5) * 2 + 0.5).clamp(0, 1)  # strokes as crisp as MNIST's
    mass = ink.sum()
    top = round(13.5 - float((ink.sum(1) * torch.arange(size[0])).sum() / mass))
    left = round(13.5 - float((ink.sum(0) * torch.arange(size[1])).sum() / mass))
    top, left = min(max(top, 0), 28 - size[0]), min(max(left, 0), 28 - size[1])
    return F.pad(ink, (left, 28 - size[1] - left, top, 28 - size[0] - top))[None]


def _split(name: str, train: Split, test: Split, val_size: int, seed: int) -> Data:
    order = torch.randperm(len(train.images), generator=torch.Generator().manual_seed(seed))
    val, rest = order[:val_size], order[val_size:]
    return Data(name, Split(train.images[rest], train.labels[rest]), Split(train.images[val], train.labels[val]), test)


def _check_images(images: Tensor, name: str = "images") -> None:
    if not isinstance(images, Tensor) or images.dtype != torch.float32:
        raise ValueError(f"{name} must be a float32 tensor, not {getattr(images, 'dtype', type(images).__name__)}")
    if images.ndim != 4 or images.shape[1:] != (1, 28, 28) or len(images) == 0:
        raise ValueError(f"{name} must have the shape (N, 1, 28, 28) with N at least 1, not {tuple(images.shape)}")
    low, high = (float(value) for value in images.aminmax())
    if math.isnan(low):
        raise ValueError(f"{name} must not contain NaN")
    if low < 0 or high > 1:
        raise ValueError(f"{name} must lie in [0, 1], not in [{low:g}, {high:g}]")


def _check_integer(name: str, value: int, low: int, high: float = math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        bound = f"at least {low}" if high == math.inf else f"from {low} to {high}"
        raise ValueError(f"{name} is {value!r}; it must be an integer {bound}")


def _check_number(name: str, value: float, low: float, high: float = math.inf, above: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) \
            or not low <= value <= high or (above and value == low):
        bound = f"{'above' if above else 'at least'} {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
        raise ValueError(f"{name} is {value!r}; it must be a finite number {bound}")


def _check_seed(seed: int) -> None:
    _check_integer("seed", seed, 0, 2**32 - 1)


# --------------------------------------------------------------------------------------------------
# Model
# --------------------------------------------------------------------------------------------------

MAX_LATENT_DIM = 1024


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
    device = mu.device if generator is None else generator.device
    eps = torch.randn(mu.shape, generator=generator, device=device, dtype=mu.dtype).to(mu.device)
    return mu + (0.5 * _bounded(logvar)).exp() * eps


def _bounded(logvar: Tensor) -> Tensor:
    """Log-variances within the range in which exp() and the KL stay finite in float32."""
    return logvar.clamp(-30, 30)


class VAE(nn.Module):
    """Encoder, reparameterization and Decoder; `variational=False` is the same network as a plain autoencoder.

    The plain autoencoder decodes mu itself; its logvar is None, and with it the KL is zero.
    Raises ValueError for a latent_dim that makes no sense.
    """

    def __init__(self, latent_dim: int = 32, variational: bool = True):
        super().__init__()
        _check_integer("latent_dim", latent_dim, 1, MAX_LATENT_DIM)
        self.latent_dim, self.variational = latent_dim, bool(variational)
        self.encoder, self.decoder = Encoder(latent_dim), Decoder(latent_dim)
        self.to(memory_format=torch.channels_last)  # the faster layout for convolutions on the CPU

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, 1, 28, 28) -> mu, logvar, each (B, D)."""
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

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """Images -> the decoded mean of their posteriors, images again: no sampling, and as in eval mode."""
        with _evaluating(self):
            return self.decode(self.encode(x)[0]).sigmoid()

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n images (n, 1, 28, 28) decoded from z ~ N(0, I), the prior (which a plain autoencoder was never taught)."""
        _check_integer("n", n, 1)
        z = torch.randn(n, self.latent_dim, generator=generator, device=generator.device if generator else "cpu")
        with _evaluating(self):
            return self.decode(z.to(_device(self))).sigmoid()


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


# --------------------------------------------------------------------------------------------------
# Loss
# --------------------------------------------------------------------------------------------------


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


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


def learning_rate_at(progress: float, learning_rate: float) -> float:
    """Adam's rate once the share `progress` of a run is done: it doubles over the first tenth, then falls to zero
    in a straight line, which beats the usual cosine (Defazio et al., 2023) here, too."""
    if progress < 0.1:
        return learning_rate * (1 + progress / 0.1)
    return learning_rate * 2 * (1 - progress) / 0.9


def fit(model: VAE, train_images: Tensor, val_images: Tensor, *, epochs: int = 20, batch_size: int = 64,
        learning_rate: float = 1e-3, beta: float = 1.0, checkpoint: str | Path | None = None, resume: bool = True,
        seed: int = 0, facts: dict | None = None) -> list[dict]:
    """Train with Adam; return the history, a row per epoch; leave the averaged weights in the model, in eval mode.

    A row holds epoch, train_loss, train_bce, train_kl, val_loss, val_bce, val_kl (nats per image),
    learning_rate (at the epoch's start) and seconds. The training figures are averages over an epoch in
    which the weights move; the validation figures, on a sampled z from a fixed seed, are those after it of the
    weights' running average, which is what is kept: see `_average_of`.

    `checkpoint` is kept at the epoch with the lowest validation loss, with `facts` (plain values such as
    the name of the data) beside its own. Next to it, `<name>.resume.pt` keeps what it takes to go on: with
    `resume`, a run that was interrupted continues after its last finished epoch, bit for bit, and one that was
    finished is not trained again. `resume=False` starts afresh and replaces both files.

    Raises ValueError for a bad argument or if `checkpoint` holds a run with other settings, CheckpointError if
    a file there is damaged or another run is writing it, FloatingPointError if the loss stops being finite.
    """
    _check_images(train_images, "train_images")
    _check_images(val_images, "val_images")
    _check_integer("epochs", epochs, 1)
    _check_integer("batch_size", batch_size, 1)
    _check_number("learning_rate", learning_rate, 0, above=True)
    _check_number("beta", beta, 0)
    _check_seed(seed)
    settings = {"epochs": epochs, "batch_size": batch_size, "learning_rate": float(learning_rate), "beta": float(beta),
                "seed": seed, "latent_dim": model.latent_dim, "variational": model.variational,
                "train_images": _digest(train_images), "val_images": _digest(val_images), **(facts or {})}
    device = _device(model)
    train_images, val_images = train_images.to(device), val_images.to(device)
    steps = math.ceil(len(train_images) / batch_size)  # per epoch
    optimizer, average = _adam(model, learning_rate), _average_of(model, steps)
    with _Keeper(checkpoint, resume, settings, facts or {}) as keeper:
        keeper.restore(model, average, optimizer)
        history = keeper.history
        for row in history:
            print(format_row(row, epochs))
        if len(history) == epochs:
            print(f"{checkpoint} holds this run, finished: it is not trained again (resume=False would)")
        elif history:
            print(f"going on after epoch {len(history)} from {keeper.state_path}")
        with _progress_bar(epochs * steps) as bar:
            for epoch in range(len(history) + 1, epochs + 1):
                started = time.perf_counter()
                train = _train_epoch(model, average, optimizer, train_images, epoch, epochs, batch_size, learning_rate,
                                     beta, seed, bar)
                val = evaluate(average.module, val_images, passes=1, beta=beta)
                if not math.isfinite(val.loss):
                    raise FloatingPointError(_not_finite(f"in the validation after epoch {epoch}"))
                history.append({
                    "epoch": epoch, **{f"train_{k}": v for k, v in train._asdict().items()},
                    **{f"val_{k}": v for k, v in val._asdict().items()},
                    "learning_rate": learning_rate_at((epoch - 1) / epochs, learning_rate),
                    "seconds": time.perf_counter() - started})
                keeper.keep(model, average, optimizer)
                bar.write(format_row(history[-1], epochs))
    model.load_state_dict(average.module.state_dict())
    model.eval()
    return history


WEIGHT_DECAY = 0.1  # of the dense layers, which know training images by heart sooner than convolutions do


def _adam(model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    """Adam, with decoupled weight decay (AdamW: Loshchilov & Hutter, 2019) of the dense layers' matrices alone."""
    dense = {layer.weight for layer in model.modules() if isinstance(layer, nn.Linear)}
    groups = [{"params": [p for p in model.parameters() if p not in dense], "weight_decay": 0.0},
              {"params": [p for p in model.parameters() if p in dense], "weight_decay": WEIGHT_DECAY}]
    return torch.optim.AdamW(groups, lr=learning_rate, fused=_device(model).type in ("cpu", "cuda"))


def _average_of(model: VAE, steps: int) -> AveragedModel:
    """The exponential moving average of the weights over about a tenth of an epoch of `steps` (Polyak & Juditsky, 1992).

    It filters out the noise of the single steps: early in a run it is nats better than the weights themselves, and
    at the end, where the learning rate is zero, the same.
    """
    decay = 1 - min(1, 10 * _averaging_interval(steps) / steps)
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)


def _averaging_interval(steps: int) -> int:
    """Steps from one update of the average to the next: about a hundred updates an epoch, more would only cost time."""
    return max(1, steps // 100)


def _train_epoch(model: VAE, average: AveragedModel, optimizer: torch.optim.Optimizer, images: Tensor, epoch: int,
                 epochs: int, batch_size: int, learning_rate: float, beta: float, seed: int, bar: tqdm) -> Loss:
    """One pass over the images; everything random in it follows from (seed, epoch), so that a run can be resumed."""
    model.train()
    noise = torch.Generator(images.device).manual_seed(seed * 100_003 + epoch)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed * 100_003 + epoch))
    batches = order.to(images.device).split(batch_size)
    losses = torch.empty(len(batches), 3, device=images.device)  # stays on the device: no step waits for the host
    for step, rows in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at((epoch - 1 + step / len(batches)) / epochs, learning_rate)
        x = images[rows]
        logits, mu, logvar = model(x, noise)
        loss = vae_loss(logits, x, mu, logvar, beta)
        optimizer.zero_grad()
        loss.loss.backward()
        optimizer.step()
        if (step + 1) % _averaging_interval(len(batches)) == 0:
            average.update_parameters(model)
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


def format_row(row: dict, epochs: int) -> str:
    """One line for one row of a history."""
    return (f"epoch {row['epoch']:2d}/{epochs}   training {row['train_loss']:7.2f}   validation {row['val_loss']:7.2f} = "
            f"BCE {row['val_bce']:6.2f} + KL {row['val_kl']:5.2f} nats   {row['seconds']:5.1f} s")


def _progress_bar(total: int) -> tqdm:
    """tqdm's bar in a terminal; in a notebook the same bar in one output that is redrawn, with no widget to go stale."""
    options = {"total": total, "unit": "batch", "leave": False, "mininterval": 0.5, "dynamic_ncols": False}
    if sys.stderr.isatty():
        return tqdm(**options)
    if "ipykernel" in sys.modules:
        return tqdm(**options, ncols=90, file=_RedrawnOutput())
    return tqdm(**options, disable=True)


class _RedrawnOutput:
    """A file whose last line is what a notebook's output shows."""

    def __init__(self):
        from IPython.display import display

        self.handle = display({"text/plain": ""}, raw=True, display_id=True)

    def write(self, text: str) -> None:
        self.handle.update({"text/plain": text.strip()}, raw=True)

    def flush(self) -> None:
        pass


# --------------------------------------------------------------------------------------------------
# Checkpoints
# --------------------------------------------------------------------------------------------------

FORMAT = 1  # of the files below; raise it when an older reader could not understand a newer file
TAG = b"VAE-MNIST:"  # a file is what torch.save writes, then TAG, then the SHA-256 of all before


class CheckpointError(RuntimeError):
    """A checkpoint that is damaged, foreign, does not fit, or cannot be written."""


def save_checkpoint(path: str | Path, model: VAE, **facts) -> None:
    """Write the weights, what rebuilds the model, and `facts` (plain Python values) to `path`, whole or not at all.

    Raises ValueError for facts that are not plain, CheckpointError where `path` cannot be written.
    """
    _write(Path(path), _model_payload(model, model.state_dict(), facts))


def load_checkpoint(path: str | Path, device: str | torch.device = "cpu") -> VAE:
    """The model of a checkpoint in eval mode on `device`, with `model.facts`. Nothing in the file is executed.

    Raises FileNotFoundError where there is none, CheckpointError where the file is not one of ours, whole and sound.
    """
    payload = _read(Path(path), "model")
    facts, build = payload.get("facts"), payload.get("build")
    if not isinstance(build, dict) or not isinstance(facts, dict) or not _is_plain(facts):
        raise CheckpointError(f"{path} does not say how its model is built")
    try:
        with torch.device("meta"):  # the sizes alone, no memory
            expected = VAE(**build).state_dict()
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path} describes a model that cannot be built: {error}") from None
    weights = _check_weights(payload.get("weights"), expected, path)
    with torch.random.fork_rng(devices=[]):  # building draws random weights, which must not disturb the caller's
        model = VAE(**build)
    model.load_state_dict(weights)
    model.facts = facts
    return model.to(device).eval()


def _model_payload(model: VAE, weights: dict, facts: dict) -> dict:
    facts = {"versions": {"python": platform.python_version(), "torch": str(torch.__version__)}, **facts}
    if not _is_plain(facts):
        raise ValueError("facts must be plain values: str, int, float, bool, None, and lists and dicts of them")
    build = {"latent_dim": model.latent_dim, "variational": model.variational}
    return {"format": FORMAT, "kind": "model", "build": build, "weights": weights, "facts": facts}


def _is_plain(value) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    return all(map(_is_plain, value)) if isinstance(value, list) else type(value) in (str, int, float, bool, type(None))


def _check_weights(weights: dict, expected: dict, path: str | Path) -> dict:
    """The weights themselves, if they fit the expected ones name by name and are finite."""
    if not isinstance(weights, dict) or weights.keys() != expected.keys():
        names = sorted(map(str, set(weights or ()) ^ expected.keys())) if isinstance(weights, dict | None) else ["all"]
        raise CheckpointError(f"{path} does not fit this network: missing or superfluous tensors ({', '.join(names[:3])} ...)")
    for name, tensor in weights.items():
        wanted = expected[name]
        if not isinstance(tensor, Tensor) or (tensor.shape, tensor.dtype) != (wanted.shape, wanted.dtype):
            raise CheckpointError(f"{path} does not fit this network: {name} is not {wanted.dtype} {tuple(wanted.shape)}")
        if not tensor.isfinite().all():
            raise CheckpointError(f"{path} is of no use: {name} holds NaN or infinity")
    return weights


def _write(path: Path, payload: dict) -> None:
    """The one way to disk: a file beside `path`, flushed to disk, then moved over it in a single step."""
    buffer = io.BytesIO()
    torch.save(payload, buffer)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(part, "wb") as file:
                file.write(buffer.getbuffer())
                file.write(TAG + hashlib.sha256(buffer.getbuffer()).digest())
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"{path} could not be written ({error.strerror}); what stood there before is untouched") from None


def _read(path: Path, kind: str) -> dict:
    """The one way from disk: the digest first, then torch's loader of tensors and plain values, then the header."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no checkpoint at {path}; vae_mnist_training.ipynb makes one") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from None
    size = len(content) - len(TAG) - 32
    if size < 0 or content[size : size + len(TAG)] != TAG:
        raise CheckpointError(f"{path} is not a checkpoint of this project, or was cut short")
    if hashlib.sha256(content[:size]).digest() != content[size + len(TAG) :]:
        raise CheckpointError(f"{path} is damaged: its content does not match its digest")
    try:
        payload = torch.load(io.BytesIO(content[:size]), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the loader stumbles over, the file is at fault
        raise CheckpointError(f"{path} holds more than tensors and plain values, or is damaged: it is not loaded "
                              f"({type(error).__name__})") from None
    version = payload.get("format") if isinstance(payload, dict) else None
    if type(version) is int and version > FORMAT:
        raise CheckpointError(f"{path} has format {version}, newer than this code's {FORMAT}: update the code to read it")
    if version != FORMAT or payload.get("kind") != kind:
        raise CheckpointError(f"{path} is not a {kind} checkpoint of this project")
    return payload


class _Keeper:
    """What `fit` keeps on disk: the best checkpoint and, beside it, the state to go on from.

    Every save replaces a whole file; the best is written before the state, so that a run killed between the two
    repeats that epoch and writes the same best again.
    """

    def __init__(self, path: str | Path | None, resume: bool, settings: dict, facts: dict):
        self.path = None if path is None else Path(path)
        self.resume, self.settings, self.facts = resume, settings, facts
        self.history, self.best, self.written = [], None, None  # best: its weights; written: its epoch on disk
        if self.path is not None:
            if self.path.name.endswith("_reference.pt"):
                raise ValueError(f"{path} is a reference checkpoint, which no run writes: use a name that ends in _best.pt")
            self.state_path = self.path.with_suffix(".resume.pt")

    def __enter__(self):
        self.lock = contextlib.ExitStack()
        if self.path is not None:
            self.lock.enter_context(_only_run(self.path))
        return self

    def __exit__(self, kind, error, traceback):
        self.lock.close()
        if kind is KeyboardInterrupt and self.path is not None:
            print(f"Stopped. {len(self.history)} finished epochs are kept in {self.path.parent}: run again to go on from there")

    @property
    def best_row(self) -> dict:
        return min(self.history, key=lambda row: row["val_loss"])

    def restore(self, model: VAE, average: AveragedModel, optimizer: torch.optim.Optimizer) -> None:
        """Bring model, average and optimizer to where the run in this place stands, or prepare the place for a new one."""
        if self.path is None:
            return
        if self.path.exists():
            self._check_same_data(load_checkpoint(self.path).facts)
        if not self.resume or not (self.path.exists() or self.state_path.exists()):
            self._write_state(model, average, optimizer)
            return
        if not self.state_path.exists():
            raise ValueError(f"{self.path} holds a trained model and nothing to resume from: train under another name, "
                             "or replace it with resume=False")
        state = _read(self.state_path, "run")
        self._check_same_settings(state["settings"])
        model.load_state_dict(_check_weights(state["weights"], model.state_dict(), self.state_path))
        average.load_state_dict(_check_weights(state["average"], average.state_dict(), self.state_path))
        optimizer.load_state_dict(state["optimizer"])
        self.history, self.best = state["history"], state["best"]
        if self.history and not self.path.exists():
            self._write_best(model)

    def _check_same_data(self, facts: dict) -> None:
        there = facts.get("settings", {})
        if any(there.get(key, self.settings.get(key)) != self.settings.get(key) for key in ("data", "train_images")):
            raise ValueError(f"{self.path} was trained on other images ({there.get('data', 'unnamed')}) and is not "
                             "overwritten: move it away, or train under another name")

    def _check_same_settings(self, there: dict) -> None:
        changed = [f"{key} {there.get(key)} -> {self.settings.get(key)}" for key in {**there, **self.settings}
                   if there.get(key) != self.settings.get(key)]
        if changed:
            raise ValueError(f"{self.path} belongs to a run with other settings ({', '.join(changed)}): go back to them, "
                             "train under another name, or start afresh and replace it with resume=False")

    def keep(self, model: VAE, average: AveragedModel, optimizer: torch.optim.Optimizer) -> None:
        """Save what the epoch just finished has changed. A disk that fails costs a warning, not the training."""
        if self.path is None:
            return
        if self.best_row is self.history[-1]:
            self.best = {name: tensor.detach().cpu().clone() for name, tensor in average.module.state_dict().items()}
        finished = len(self.history) == self.settings["epochs"]
        try:
            if self.written != self.best_row["epoch"] or finished or not self.path.exists():
                self._write_best(model)
            self._write_state(model, average, optimizer)
        except CheckpointError as error:
            warnings.warn(f"{error}; training goes on, and saving is tried again after the next epoch", stacklevel=3)

    def _write_best(self, model: VAE) -> None:
        row = self.best_row
        facts = {**self.facts, **{key: row[key] for key in ("epoch", "val_loss", "val_bce", "val_kl")},
                 "settings": self.settings, "history": self.history}
        _write(self.path, _model_payload(model, self.best, facts))
        self.written = row["epoch"]

    def _write_state(self, model: VAE, average: AveragedModel, optimizer: torch.optim.Optimizer) -> None:
        _write(self.state_path, {"format": FORMAT, "kind": "run", "settings": self.settings, "history": self.history,
                                 "best": self.best, "weights": model.state_dict(), "average": average.state_dict(),
                                 "optimizer": optimizer.state_dict()})


@contextlib.contextmanager
def _only_run(path: Path):
    """Hold `path` for one run. The system frees the lock of a killed run; what that run left half-written goes."""
    lock = path.with_name(f".{path.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(lock, "a")
    except OSError as error:
        raise CheckpointError(f"{path.parent} cannot be written ({error.strerror}): choose another folder") from None
    with file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CheckpointError(f"another run is training into {path}: wait for it, or train under another name") from None
        try:
            for part in path.parent.glob(f".{path.stem}.*.part"):
                part.unlink(missing_ok=True)
            yield
        finally:
            lock.unlink(missing_ok=True)


def _digest(images: Tensor) -> str:
    return hashlib.sha256(images.cpu().contiguous().numpy()).hexdigest()[:16]


# --------------------------------------------------------------------------------------------------
# Evaluation
# --------------------------------------------------------------------------------------------------


@torch.no_grad()
def posterior(model: VAE, images: Tensor, batch_size: int = 500) -> tuple[Tensor, Tensor | None]:
    """mu and logvar (N, D) of q(z|x) for all images, on the model's device; logvar is None for a plain autoencoder."""
    with _evaluating(model):
        mu, logvar = zip(*[model.encode(x.to(_device(model))) for x in images.split(batch_size)])
    return torch.cat(mu), torch.cat(logvar) if model.variational else None


@torch.no_grad()
def loss_per_image(model: VAE, images: Tensor, passes: int = 10, seed: int = 0, batch_size: int = 500) -> Loss:
    """-ELBO, BCE and KL of every image, each (N,) on the CPU: the mean of `passes` sampled z per image."""
    _check_images(images)
    _check_integer("passes", passes, 1)
    _check_seed(seed)
    with _evaluating(model):
        mu, logvar = posterior(model, images, batch_size)
        bce = torch.zeros(len(images), dtype=torch.float64)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(passes if model.variational else 1):
            z = reparameterize(mu, logvar, generator) if model.variational else mu
            bce += torch.cat([bce_per_image(model.decode(part), x.to(part.device)).cpu()
                              for part, x in zip(z.split(batch_size), images.split(batch_size))])
        bce /= passes if model.variational else 1
        kl = kl_per_dimension(mu, logvar).sum(1).double().cpu() if model.variational else torch.zeros_like(bce)
    return Loss(bce + kl, bce, kl)


def evaluate(model: VAE, images: Tensor, passes: int = 10, seed: int = 0, beta: float = 1.0) -> Loss:
    """BCE + beta * KL, BCE and KL over a data set in nats per image, every image weighted the same.

    The noise is drawn for the whole set at once from `seed`, so that the figures do not depend on batches.
    """
    _, bce, kl = loss_per_image(model, images, passes, seed)
    return Loss(float(bce.mean() + beta * kl.mean()), float(bce.mean()), float(kl.mean()))


@torch.no_grad()
def log_likelihood(model: VAE, images: Tensor, samples: int = 500, seed: int = 0) -> Tensor:
    """log p(x) of every image in nats, (N,): importance sampling with q(z|x) as the proposal.

    log p(x) >= E[log 1/K sum_k p(x|z_k) p(z_k) / q(z_k|x)], a bound that tightens as K = `samples` grows
    (Burda et al., "Importance Weighted Autoencoders", 2015); with K = 1 it is the ELBO.
    """
    _check_images(images)
    _check_integer("samples", samples, 1)
    _check_seed(seed)
    if not model.variational:
        raise ValueError("a plain autoencoder has no likelihood: log_likelihood wants a VAE")
    generator, batch_size = torch.Generator().manual_seed(seed), 500
    total = torch.full((len(images),), -math.inf, dtype=torch.float64)
    with _evaluating(model):
        mu, logvar = posterior(model, images)
        sigma = (0.5 * _bounded(logvar)).exp()
        for _ in range(samples):
            z = reparameterize(mu, logvar, generator)
            # log p(z) - log q(z|x); the two constants -log(2 pi)/2 cancel
            log_weight = (0.5 * (((z - mu) / sigma).square() - z.square()) + sigma.log()).sum(1).cpu().double()
            for rows in torch.arange(len(images)).split(batch_size):
                log_weight[rows] -= bce_per_image(model.decode(z[rows.to(z.device)]), images[rows].to(z.device)).cpu()
            total = torch.logaddexp(total, log_weight)
    return total - math.log(samples)


def active_units(mu: Tensor, threshold: float = 0.01) -> Tensor:
    """Which latent dimensions are in use, (D,): those whose mean varies over the images (Burda et al., 2015)."""
    return mu.var(0) > threshold


def interpolate(start: Tensor, end: Tensor, steps: int) -> Tensor:
    """`steps` codes from start to end, both (D,), along the arc between them: -> (steps, D).

    Spherical interpolation (Shoemake, 1985): a straight line would cut through the middle, where the prior
    N(0, I) has next to no mass in many dimensions. Codes on one line through the origin are joined by it.
    """
    _check_integer("steps", steps, 2)
    t = torch.linspace(0, 1, steps, device=start.device)[:, None]
    angle = torch.acos(F.cosine_similarity(start, end, dim=0).clamp(-1, 1))
    if torch.sin(angle) < 1e-4:
        return (1 - t) * start + t * end
    return (torch.sin((1 - t) * angle) * start + torch.sin(t * angle) * end) / torch.sin(angle)


# --------------------------------------------------------------------------------------------------
# Robustness and anomalies
# --------------------------------------------------------------------------------------------------

# What each corruption's level means, and the largest that makes sense; at level 0 nothing happens.
CORRUPTIONS = {
    "noise": 1.0,  # standard deviation of Gaussian noise, in grey values; the result is clipped to [0, 1]
    "salt and pepper": 1.0,  # share of the pixels that turn black or white
    "occlusion": 28.0,  # side, in pixels, of a black square within the 20x20 pixels where MNIST puts the digit
    "blur": 5.0,  # standard deviation of a Gaussian, in pixels
    "contrast": 1.0,  # share of the contrast that is lost
    "rotation": 180.0,  # degrees, clockwise or anticlockwise
}


# The levels, from mild to severe, at which robustness is measured and drawn.
SEVERITIES = {"noise": (0.1, 0.2, 0.3, 0.5), "salt and pepper": (0.02, 0.05, 0.1, 0.2), "occlusion": (4, 8, 12, 16),
              "blur": (0.5, 1.0, 1.5, 2.0), "contrast": (0.2, 0.4, 0.6, 0.8), "rotation": (10, 20, 30, 45)}


def corrupt(images: Tensor, kind: str, level: float, seed: int = 0) -> Tensor:
    """Corrupted copies of images (N, 1, 28, 28) in [0, 1]; `seed` decides all that is random.

    Raises ValueError for a kind that is not in CORRUPTIONS, or a level outside 0 to the number there.
    """
    _check_images(images)
    if kind not in CORRUPTIONS:
        raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(map(repr, CORRUPTIONS))}")
    _check_number("level", level, 0, CORRUPTIONS[kind])
    _check_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    x = images.cpu()
    if kind == "noise":
        x = x + level * torch.randn(x.shape, generator=generator)
    elif kind == "salt and pepper":
        hit, white = torch.rand(x.shape, generator=generator) < level, torch.rand(x.shape, generator=generator) < 0.5
        x = torch.where(hit, white.float(), x)
    elif kind == "occlusion":
        side = round(level)
        free = max(20 - side, 0)  # how far the square can move within the middle 20x20 pixels
        corner = (28 - max(side, 20)) // 2 + torch.randint(free + 1, (2, len(x), 1), generator=generator)  # (2, N, 1)
        rows, columns = ((torch.arange(28) >= c) & (torch.arange(28) < c + side) for c in corner)  # each (N, 28)
        x = x.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0.0)
    elif kind == "blur" and level > 0:
        kernel = torch.exp(-0.5 * (torch.arange(-14.0, 15.0) / level).square())
        kernel /= kernel.sum()
        x = F.conv2d(F.conv2d(x, kernel.view(1, 1, 1, -1), padding=(0, 14)), kernel.view(1, 1, -1, 1), padding=(14, 0))
    elif kind == "contrast":
        x = (1 - level) * x
    elif kind == "rotation":
        sign = torch.randint(2, (len(x),), generator=generator) * 2 - 1
        angle = sign * math.radians(level)
        zero = torch.zeros(len(x))
        theta = torch.stack([torch.stack([angle.cos(), -angle.sin(), zero], 1),
                             torch.stack([angle.sin(), angle.cos(), zero], 1)], 1)  # (N, 2, 3)
        x = F.grid_sample(x, F.affine_grid(theta, x.shape, align_corners=False), align_corners=False)
    return x.clamp(0, 1).to(images.device)


ANOMALIES = ("mirrored", "rotated", "occluded", "noisy", "shuffled", "inverted", "black")


def make_anomalies(images: Tensor, kind: str, seed: int = 0) -> Tensor:
    """What is no digit, or no longer quite one, made from digits (N, 1, 28, 28): see ANOMALIES."""
    _check_images(images)
    if kind == "mirrored":
        return images.flip(3)
    if kind == "rotated":
        return images.rot90(1, (2, 3))
    if kind == "occluded":
        return corrupt(images, "occlusion", 8, seed)
    if kind == "noisy":
        return corrupt(images, "noise", 0.3, seed)
    if kind == "shuffled":  # one permutation of the pixels for all
        return images.flatten(1)[:, torch.randperm(784, generator=torch.Generator().manual_seed(seed))].view_as(images)
    if kind == "inverted":
        return 1 - images
    if kind == "black":
        return torch.zeros_like(images)
    raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(map(repr, ANOMALIES))}")


SCORES = ("bce", "bce - entropy", "elbo", "elbo - entropy", "likelihood", "likelihood - entropy", "ink", "misfit")


def anomaly_score(model: VAE, images: Tensor, score: str = "misfit", seed: int = 0) -> Tensor:
    """How little an image is like those the model was trained on, (N,) on the CPU: higher is more anomalous.

    "bce" is the reconstruction error of the decoded mean, "elbo" is -ELBO (10 passes), "likelihood" is -log p(x)
    (50 importance samples), all in nats; " - entropy" takes from them the entropy of the image's own grey values,
    which no model can get below. "ink" is the largest difference between the image and its reconstruction in the
    ink of any 7x7 window, in pixels: noise cancels there, a missing or superfluous stroke does not. "misfit", the
    default, was the best by measurement: the geometric mean of "bce - entropy", "ink" and "ink" once more, over the
    sixth root of all the image's ink (plus 1), because the same misfit weighs more where there is less to fit.

    Raises ValueError for an unknown score, or if a plain autoencoder is asked for "elbo" or "likelihood".
    """
    _check_images(images)
    if score not in SCORES:
        raise ValueError(f"score is {score!r}; it must be one of {', '.join(map(repr, SCORES))}")
    name, _, corrected = score.partition(" - ")
    if name in ("elbo", "likelihood") and not model.variational:
        raise ValueError(f"a plain autoencoder has no likelihood: it cannot give the score {score!r}")
    entropy = F.binary_cross_entropy(images, images, reduction="none").flatten(1).sum(1).cpu().double()
    if name == "elbo":
        value = loss_per_image(model, images, passes=10, seed=seed).loss
    elif name == "likelihood":
        value = -log_likelihood(model, images, samples=50, seed=seed)
    else:
        with _evaluating(model), torch.no_grad():
            logits = torch.cat([model.decode(mu) for mu in posterior(model, images)[0].split(500)]).cpu()
        value = bce_per_image(logits, images.cpu()).double()
        if name in ("ink", "misfit"):
            ink = 49 * F.avg_pool2d(images.cpu() - logits.sigmoid(), 7, stride=1).abs().flatten(1).amax(1).double()
            misfit = ((value - entropy).clamp(min=0) * ink.square()) ** (1 / 3)
            value = ink if name == "ink" else misfit / (1 + images.flatten(1).sum(1).cpu().double()) ** (1 / 6)
    return value - entropy if corrected else value


def posterior_mode(model: VAE, images: Tensor, steps: int = 50, learning_rate: float = 0.1) -> Tensor:
    """The codes (N, D) that explain corrupted images best, found by `steps` of Adam from the encoder's guess mu.

    The encoder knows clean digits alone. Here an image is taken as a * (decoded image) + b + Gaussian noise, with a
    contrast a, a brightness b and a noise level nobody knows. With these three at their most likely values,
    -log p(x|z) - log p(z) is 784/2 * log(1 - r^2) + |z|^2 / 2 up to a constant, r being the correlation between the
    image's pixels and the decoded ones: that is minimised. (Inference by optimisation: Cremer et al., "Inference
    Suboptimality in Variational Autoencoders", 2018.) A plain autoencoder has no p(z): its codes are fitted without.
    """
    _check_images(images)
    _check_integer("steps", steps, 1)
    _check_number("learning_rate", learning_rate, 0, above=True)
    modes = []
    with _evaluating(model), torch.enable_grad():
        for x in images.to(_device(model)).split(500):
            z = posterior(model, x)[0].clone().requires_grad_()
            optimizer = torch.optim.Adam([z], lr=learning_rate)
            for step in range(steps):
                optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / steps)
                r = _correlation(model.decode(z).sigmoid(), x).clamp(min=0)
                energy = 784 / 2 * (1 - (1 - 1e-4) * r.square()).log()  # 1e-4: no image is explained without rest
                if model.variational:
                    energy = energy + 0.5 * z.square().sum(1)
                (z.grad,) = torch.autograd.grad(energy.sum(), z)
                optimizer.step()
            modes.append(z.detach())
    return torch.cat(modes)


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's correlation over the pixels of each image, (N,); 0 for an image of one grey value."""
    a, b = (x.flatten(1) - x.flatten(1).mean(1, keepdim=True) for x in (a, b))
    return F.cosine_similarity(a, b)


def squared_error(images: Tensor, originals: Tensor) -> float:
    """Squared difference summed over the pixels of an image, averaged over images."""
    return float((images.cpu() - originals.cpu()).square().flatten(1).sum(1).mean())


# --------------------------------------------------------------------------------------------------
# Figures: each takes data, returns the Figure, and neither shows nor saves it
# --------------------------------------------------------------------------------------------------

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
    for i, row in enumerate(rows):
        cmap = cmaps[i] if cmaps else "gray"
        for j, ax in enumerate(axes[i]):
            ax.set_xticks([]), ax.set_yticks([])
            if j >= len(row):
                ax.axis("off")
                continue
            ax.imshow(row[j, 0].cpu(), cmap=cmap, vmin=0 if cmap == "gray" else -1, vmax=1, interpolation="nearest")
            if i == 0 and column_labels:
                ax.set_title(column_labels[j], fontsize=9)
        if row_labels:
            axes[i, 0].set_ylabel(row_labels[i], rotation=0, ha="right", va="center", fontsize=9)
    return figure


def plot_history(history: list[dict]) -> Figure:
    """Learning curves: -ELBO, BCE and KL per epoch, training and validation, from what `fit` returns."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3), layout="constrained")
    epochs = [row["epoch"] for row in history]
    for ax, key, title in zip(axes, ("loss", "bce", "kl"), ("loss", "BCE", "KL")):
        for part, color in (("train", COLORS[0]), ("val", COLORS[1])):
            ax.plot(epochs, [row[f"{part}_{key}"] for row in history], ".-", color=color,
                    label={"train": "training", "val": "validation"}[part])
        ax.set(title=title, xlabel="epoch", ylabel="nats per image")
        ax.grid(alpha=0.3)
    axes[0].legend()
    return figure
