"""A convolutional variational autoencoder (VAE) that learns to reconstruct MNIST.

Everything that the two notebooks share, in the order in which data flows: data, model, loss,
training, checkpoints, evaluation, robustness and anomalies, one's own digit, figures. The checks
of arguments stand at the end.
The model follows Kingma & Welling, "Auto-Encoding Variational Bayes" (2013,
https://arxiv.org/abs/1312.6114).

    x (B, 1, 28, 28) --Encoder--> mu, logvar (B, D) --reparameterize--> z (B, D)
    z (B, D) --Decoder--> logits (B, 1, 28, 28)

One convention holds everywhere: a loss is summed over the pixels or latent dimensions of an image
and averaged over images, in nats per image. `loss` is BCE + beta * KL on a sampled z; with
beta = 1 it is the negative evidence lower bound, -ELBO. Figures show the decoded mean.

`vae_mnist_training.ipynb` needs the data, the model, the training, the checkpoints, `evaluate`
and the figures. `vae_mnist_analysis_visualizations.ipynb` needs all but the training.
"""

import contextlib
import copy
import hashlib
import itertools
import json
import math
import os
import platform
import random
import socket
import time
import warnings
from collections.abc import Callable
from numbers import Integral, Real
from pathlib import Path
from typing import NamedTuple

import filelock
import matplotlib.pyplot as plt
import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from scipy import ndimage
from skimage.filters import difference_of_gaussians, gaussian
from skimage.measure import label, regionprops
from skimage.morphology import reconstruction
from sklearn.datasets import load_digits
from sklearn.mixture import GaussianMixture
from sklearn.utils import check_scalar
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision import datasets
from torchvision.datasets.utils import check_integrity
from torchvision.transforms.functional import InterpolationMode, crop, rotate
from tqdm import tqdm

MAX_SEED = 2**32 - 1


def seed_everything(seed):
    """Seed Python, NumPy and torch, and let cuDNN take deterministic algorithms in full float32.

    On one machine with one number of threads a run on the CPU then repeats bit for bit. On CUDA
    and MPS the weights, the order of the images and the noise repeat; sums may round differently.
    """
    _integer(seed, "seed", 0, MAX_SEED)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False  # 10 bits of precision would move the third decimal


def pick_device():
    """The accelerator (CUDA, then Apple's MPS) if there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


# ---------------------------------------- Data ----------------------------------------

MNIST_FILES = {  # MD5 of the unpacked files
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
NETWORK_TIMEOUT = 5  # seconds of silence after which the next mirror is tried


class MNIST(datasets.MNIST):
    """torchvision's, without the unchecked copy in MNIST/processed that its old versions made."""

    def _check_legacy_exist(self):
        return False


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


def load_images(source="auto", root="data", val_size=5000, seed=0):
    """Load handwritten digits, split into training, validation and test images.

    source: "mnist" takes the files under `root`/MNIST/raw, or downloads them there. "digits" takes
    the 1,797 digits that come with scikit-learn, so that everything runs with no network. "auto"
    is MNIST if it is there or can be downloaded, else the digits, with a warning.
    `val_size` of the training images (at most 180 of the digits) are held out, chosen by `seed`;
    the test images never change.
    Raises TypeError or ValueError for a bad argument, ValueError for a damaged file, and
    FileNotFoundError if `source` is "mnist" and MNIST cannot be had.
    """
    if source not in ("auto", "mnist", "digits"):
        raise ValueError(f'source must be "auto", "mnist" or "digits", not {source!r}')
    root = _as_path(root, "root")
    _integer(val_size, "val_size", 1, 59_999)
    _integer(seed, "seed", 0, MAX_SEED)
    if source != "digits":
        try:
            return _mnist(root, val_size, seed)
        except FileNotFoundError as error:
            if source == "mnist":
                raise
            warnings.warn(
                f"\n!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!\nNOT MNIST: {error}\n"
                "Going on with scikit-learn's 1,797 small digits. They show that everything runs;\n"
                "their results cannot be compared with MNIST's.\n"
                "!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!",
                stacklevel=2,
            )
    return _digits(val_size, seed)


def leave_out(data, digit):
    """The data without one digit, 0 to 9, in any of the splits; all of it for None."""
    if digit is None:
        return data
    _integer(digit, "the digit to leave out", 0, 9)
    splits = []
    for images, labels in data[1:]:
        keep = labels != digit
        splits.append(Split(images[keep], labels[keep]))
    return Data(data.name, *splits)


def _split(images, labels, size, seed):
    """Two splits: `size` images chosen by `seed`, and all others."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    chosen, others = order.tensor_split([size])
    return Split(images[chosen], labels[chosen]), Split(images[others], labels[others])


def _mnist(root, val_size, seed):
    raw = root / "MNIST" / "raw"
    if not all(os.path.lexists(raw / name) for name in MNIST_FILES):
        _download_mnist(root, raw)
    for name, md5 in MNIST_FILES.items():
        if not check_integrity(raw / name, md5):
            raise ValueError(
                f"{raw / name} is not MNIST's file, whose MD5 is {md5}: delete it, and it is "
                "downloaded again"
            )
    train = MNIST(root, train=True)
    test = MNIST(root, train=False)
    val, train = _split(train.data[:, None] / 255, train.targets, val_size, seed)
    return Data("mnist", train, val, Split(test.data[:, None] / 255, test.targets))


def _download_mnist(root, raw):
    """Let torchvision download what is missing; of two processes the second waits and finds it.

    FileNotFoundError, saying why, if MNIST cannot be had.
    """
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(NETWORK_TIMEOUT)
    try:
        with _lock(raw, timeout=-1):
            MNIST(root, download=True)
    except Exception as error:  # whatever the network does, the reason is told
        for folder in (raw, raw.parent, root):
            with contextlib.suppress(OSError):  # a folder with content stays
                folder.rmdir()
        reason = " ".join(str(error).split())
        raise FileNotFoundError(
            f"MNIST is not in {raw} and could not be downloaded ({reason}): put the files "
            f"{', '.join(MNIST_FILES)} there, with exactly these names or as .gz, or load the "
            'source "digits"'
        ) from None
    finally:
        socket.setdefaulttimeout(timeout)


def _digits(val_size, seed):
    """scikit-learn's 8x8 digits, brought to 28x28 the way MNIST was made."""
    digits = load_digits()
    pictures = torch.tensor(digits.images, dtype=torch.float32) / 16
    images = torch.stack([_like_mnist(ink, contrast=2) for ink in pictures])
    labels = torch.tensor(digits.target).long()
    test, others = _split(images, labels, 360, seed=0)
    val, train = _split(*others, min(val_size, 180), seed)
    return Data("digits", train, val, test)


def _like_mnist(ink, contrast):
    """Scale the ink's longer side to 20 pixels, its centre of mass in the middle.

    (h, w) in [0, 1] -> (1, 28, 28). `contrast` 1 keeps the greys; more makes edges steeper.
    """
    cropped = ink[ndimage.find_objects((ink != 0).int().numpy())[0]]
    scale = 20 / max(cropped.shape)
    size = [max(1, round(side * scale)) for side in cropped.shape]
    ink = F.interpolate(cropped[None, None], size=size, mode="bicubic", antialias=True)[0]
    ink = ((ink - 0.5) * contrast + 0.5).clamp(0, 1)
    row, column = ndimage.center_of_mass(ink[0].numpy())
    top = min(max(round(14 - row), 0), 28 - size[0])
    left = min(max(round(14 - column), 0), 28 - size[1])
    return crop(ink, -top, -left, 28, 28)  # beyond its edges a crop is black


# ---------------------------------------- Model ----------------------------------------

MAX_LATENT_DIM = 1024
BATCH = 500  # images at a time where nothing is trained


class Residual(nn.Sequential):
    """h + f(h), f being the layers in turn; the shape stays."""

    def forward(self, h):
        return h + super().forward(h)


class Encoder(nn.Module):
    """Images (B, 1, 28, 28) in [0, 1] -> mean and log-variance (B, latent_dim) of q(z|x)."""

    def __init__(self, latent_dim):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(1, 16, 4, stride=2, padding=1),  # (B, 1, 28, 28) -> (B, 16, 14, 14)
            nn.BatchNorm2d(16),
            nn.GELU(),
            nn.Conv2d(16, 64, 2, stride=2),  # -> (B, 64, 7, 7)
            nn.BatchNorm2d(64),
            nn.GELU(),
            nn.Conv2d(64, 16, 3, padding=1),  # -> (B, 16, 7, 7)
            nn.GELU(),
        )
        self.dense = nn.Sequential(
            nn.Flatten(),  # -> (B, 784)
            nn.Linear(16 * 7 * 7, 384),  # -> (B, 384)
            nn.GELU(),
            Residual(nn.Linear(384, 384), nn.GELU()),  # -> (B, 384)
            nn.Linear(384, 2 * latent_dim),  # -> (B, 2D)
        )

    def forward(self, x):
        mu, logvar = self.dense(self.conv(x)).chunk(2, dim=1)  # (B, 2D) -> (B, D), (B, D)
        return mu, logvar


class Decoder(nn.Module):
    """Latent codes (B, latent_dim) -> logits (B, 1, 28, 28) of p(x|z); a sigmoid gives greys."""

    def __init__(self, latent_dim):
        super().__init__()
        self.dense = nn.Sequential(
            nn.Linear(latent_dim, 384),  # (B, D) -> (B, 384)
            nn.GELU(),
            Residual(nn.Linear(384, 384), nn.GELU()),  # -> (B, 384)
            nn.Linear(384, 16 * 7 * 7),  # -> (B, 784)
            nn.GELU(),
            nn.Unflatten(1, (16, 7, 7)),  # -> (B, 16, 7, 7)
        )
        self.conv = nn.Sequential(
            nn.Conv2d(16, 64, 3, padding=1),  # -> (B, 64, 7, 7)
            nn.BatchNorm2d(64),
            nn.GELU(),
            Residual(nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.GELU()),
            nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1),  # -> (B, 32, 14, 14)
            nn.GELU(),
            nn.ConvTranspose2d(32, 1, 4, stride=2, padding=1),  # -> (B, 1, 28, 28)
        )

    def forward(self, z):
        return self.conv(self.dense(z))


def reparameterize(mu, logvar, generator=None):
    """z = mu + sigma * eps with eps ~ N(0, I): gradients reach mu and logvar. All are (B, D)."""
    eps = _standard_normal(mu.shape, generator, mu.device)
    sigma = (0.5 * _bounded(logvar)).exp()
    return mu + sigma * eps


def _standard_normal(shape, generator, device):
    """Noise drawn where the generator lives, so that a CPU generator repeats on any device."""
    drawn_on = device if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=drawn_on).to(device)


def _bounded(logvar):
    """Log-variances within the range in which exp() and the KL stay finite in float32."""
    return logvar.clamp(-30, 30)


class VAE(nn.Module):
    """Encoder, reparameterization and Decoder.

    `variational=False` is the same network as a plain autoencoder: it decodes mu itself, its
    logvar is None, and its KL is zero.
    """

    def __init__(self, latent_dim=32, variational=True):
        super().__init__()
        check_scalar(variational, "variational", bool)
        self.latent_dim = _integer(latent_dim, "latent_dim", 1, MAX_LATENT_DIM)
        self.variational = variational
        self.metadata = {}  # what is known of the model: see `fit` and `load_checkpoint`
        self.encoder = Encoder(self.latent_dim)
        self.decoder = Decoder(self.latent_dim)
        self.to("cpu")  # lays out the convolutions

    def to(self, *args, **kwargs):
        """Move or cast as nn.Module does, and lay the convolutions out for the device.

        Channels last is the faster layout on the CPU and CUDA. On Apple's MPS, many versions of
        torch compute the gradient of batch normalisation wrongly in it (pytorch issue 175189).
        """
        super().to(*args, **kwargs)
        on_mps = _device(self).type == "mps"
        layout = torch.contiguous_format if on_mps else torch.channels_last
        return super().to(memory_format=layout)

    def encode(self, x):
        """Images (B, 1, 28, 28) on the model's device -> mu, logvar, each (B, D).

        logvar is None for a plain autoencoder.
        """
        _check_images(x, check_values=False)  # callers check values once, not in every batch
        mu, logvar = self.encoder(x)
        return mu, (logvar if self.variational else None)

    def decode(self, z):
        """Codes (B, D) -> logits (B, 1, 28, 28)."""
        return self.decoder(z)

    def forward(self, x, generator=None):
        """Images (B, 1, 28, 28) -> logits (B, 1, 28, 28) of one sampled z, mu, logvar.

        `generator`, a torch.Generator or None, draws the noise.
        """
        mu, logvar = self.encode(x)
        z = reparameterize(mu, logvar, generator) if self.variational else mu
        return self.decode(z), mu, logvar

    def reconstruct(self, x):
        """Images (N, 1, 28, 28) -> the decoded means of their posteriors, of the same shape.

        Nothing is sampled; in batches, as in eval mode, on the model's device.
        """
        mu, _ = posterior(self, x)
        return self.draw(mu)

    def sample(self, n, generator=None):
        """n images (n, 1, 28, 28) decoded from z ~ N(0, I), the prior.

        A plain autoencoder was never taught that prior: its samples are seldom digits.
        """
        _integer(n, "n", 1)
        return self.draw(_standard_normal((n, self.latent_dim), generator, "cpu"))

    @torch.no_grad()
    def draw(self, z):
        """Codes (N, D), a tensor or NumPy array -> images (N, 1, 28, 28) in [0, 1].

        In batches, as in eval mode, on the model's device.
        """
        z = torch.as_tensor(z, dtype=torch.float32, device=_device(self))
        shape = tuple(z.shape)
        if shape[1:] != (self.latent_dim,) or shape[0] == 0:
            raise ValueError(f"codes must have the shape (N, {self.latent_dim}), not {shape}")
        with _evaluating(self):
            return torch.cat([self.decode(part).sigmoid() for part in z.split(BATCH)])


def _device(model):
    return next(model.parameters()).device


@contextlib.contextmanager
def _evaluating(model):
    """Eval mode for a while: batch normalisation neither looks at the batch nor learns from it."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


# ---------------------------------------- Loss ----------------------------------------


class Loss(NamedTuple):
    """loss = bce + beta * kl, in nats per image; with beta = 1 it is -ELBO.

    Scalar tensors, or one value per image (N,), or plain numbers: see who returns it.
    """

    loss: Tensor
    bce: Tensor
    kl: Tensor


def vae_loss(logits, x, mu, logvar, beta=1.0):
    """Binary cross-entropy plus beta times KL(q(z|x) || N(0, I)), averaged over a batch.

    logits and x are (B, 1, 28, 28), mu and logvar (B, D); returns a `Loss` of tensors.
    Both are summed, over pixels and over latent dimensions (Kingma & Welling, equation 10 and
    appendix B). beta other than 1 is the beta-VAE (Higgins et al., 2017). `logvar=None`, a plain
    autoencoder, has no KL. Raises ValueError for tensors that do not go together and for images
    outside [0, 1].
    """
    _check_images(x, "x")
    _number(beta, "beta", 0)
    if logits.shape != x.shape:
        raise ValueError(f"logits {tuple(logits.shape)} and x {tuple(x.shape)} differ in shape")
    if logvar is not None and logvar.shape != mu.shape:
        raise ValueError(f"mu {tuple(mu.shape)} and logvar {tuple(logvar.shape)} differ in shape")
    return _loss(logits, x, mu, logvar, beta)


def _loss(logits, x, mu, logvar, beta):
    """`vae_loss` without its checks: for the training loop, whose images `fit` has checked."""
    bce = bce_per_image(logits, x).mean()
    if logvar is None:
        kl = mu.new_zeros(())
    else:
        kl = kl_per_dimension(mu, logvar).sum(1).mean()
    return Loss(bce + beta * kl, bce, kl)


def bce_per_image(logits, x):
    """-log p(x|z) of Bernoulli pixels, grey values as probabilities: (B, 1, 28, 28) -> (B,)."""
    bce = F.binary_cross_entropy_with_logits(logits, x, reduction="none")
    return bce.flatten(1).sum(1)


def kl_per_dimension(mu, logvar):
    """KL(N(mu, sigma^2) || N(0, 1)) = (mu^2 + sigma^2 - 1 - log sigma^2) / 2: (B, D) -> (B, D)."""
    logvar = _bounded(logvar)
    return 0.5 * (mu.square() + logvar.exp() - 1 - logvar)


# ---------------------------------------- Training ----------------------------------------

WEIGHT_DECAY = 0.1  # of the dense layers, which narrows the gap between training and validation
MAX_EPOCHS = 4000  # the history of more would not fit into a checkpoint


def learning_rate_at(progress, learning_rate):
    """Adam's rate once the share `progress`, 0 to 1, of a run is done.

    It doubles over the first tenth and then falls to zero in a straight line, which beats the
    usual cosine (Defazio et al., 2023) here, too.
    """
    if progress < 0.1:
        return learning_rate * (1 + 10 * progress)
    return learning_rate * (2 * (1 - progress) / 0.9)


def fit(
    model,
    train_images,
    val_images,
    *,
    epochs=20,
    batch_size=64,
    learning_rate=1e-3,
    beta=1.0,
    checkpoint=None,
    resume=True,
    seed=0,
    metadata=None,
):
    """Train with Adam and return the history, a list with one dict per epoch.

    Images are float32 tensors (N, 1, 28, 28) with values in [0, 1].
    A row holds epoch, train_loss, train_bce, train_kl, val_loss, val_bce, val_kl (nats per image),
    learning_rate (at the epoch's start) and seconds. The training losses are averages over an
    epoch in which the weights move; the validation losses are those of the weights' running average
    after it. `learning_rate` is the initial rate: see `learning_rate_at`.

    At the end the model holds the epoch with the lowest validation loss, and `model.metadata` says
    how it was trained. If training stops early, by an interrupt or an error, the model holds the
    best epoch that was saved or, if none was, the weights it came with.

    `checkpoint` is the file of the run: the best epoch, `metadata` (plain values such as the name
    of the data) and, until the run is finished, what it takes to go on. The same call continues an
    interrupted run after its last finished epoch; on the CPU of the same machine, with the same
    number of threads, it ends with the same weights bit for bit. A run is known by its settings,
    its images and its initial weights. The file of another run is renamed, not overwritten; so is
    the file of this run with `resume=False`, which always starts anew.

    Raises TypeError or ValueError for a bad argument; CheckpointError for a file that cannot be
    read or written, that this project did not write, or that another process is training into;
    FloatingPointError if the loss stops being finite. A disk that fails during training costs a
    warning, not the training.
    """
    network = getattr(model, "_orig_mod", model)  # the model that torch.compile has wrapped
    check_scalar(network, "model", VAE)
    _check_images(train_images, "train_images")
    _check_images(val_images, "val_images")
    check_scalar(resume, "resume", bool)
    metadata = metadata or {}
    settings = {
        **metadata,
        "epochs": _integer(epochs, "epochs", 1, MAX_EPOCHS),
        "batch_size": _integer(batch_size, "batch_size", 1),
        "learning_rate": _number(learning_rate, "learning_rate", 1e-12),
        "beta": _number(beta, "beta", 0),
        "seed": _integer(seed, "seed", 0, MAX_SEED),
        "latent_dim": network.latent_dim,
        "variational": network.variational,
        "train_images": _digest({"images": train_images}),
        "val_images": _digest({"images": val_images}),
        "initial_weights": _digest(network.state_dict()),
    }
    # What cannot be saved is refused before any work, with room for a row of history per epoch.
    _pack(network, {**metadata, "settings": settings, "history": epochs * ["0" * 400]})
    path = None if checkpoint is None else _path_to_write(checkpoint, "checkpoint")

    images = train_images.to(_device(network))
    steps = math.ceil(len(images) / batch_size)  # in an epoch
    optimizer = _adam(network)
    average = _running_average(network, steps)
    state = _training_state(network, optimizer, average)
    best = copy.deepcopy(network)
    with _lock(path) if path else contextlib.nullcontext():
        history = _restore(path, resume, settings, best, state) if path else []
        saved = len(history)  # epochs that are on disk
        kept = copy.deepcopy(best)  # what the model will hold if training stops early
        try:
            with _progress_bar(epochs * steps, saved * steps) as bar:
                for epoch in range(saved + 1, epochs + 1):
                    started = time.perf_counter()
                    train = _train_epoch(model, optimizer, average, images, settings, epoch, bar)
                    val = evaluate(average.module, val_images, num_samples=1, beta=beta)
                    _check_finite(val.loss, f"in the validation after epoch {epoch}")
                    rate = learning_rate_at((epoch - 1) / epochs, learning_rate)
                    history.append(_history_row(epoch, train, val, rate, started))
                    bar.write(_format_row(history[-1], epochs))
                    best.metadata = _describe(history, metadata, settings)
                    if best.metadata["epoch"] == epoch:
                        best.load_state_dict(average.module.state_dict())
                    unfinished = state if epoch < epochs else None
                    if path and _save_run(path, best, unfinished, keep_previous=saved == 0):
                        saved = epoch
                        _copy_model(best, kept)
        except BaseException as error:
            _copy_model(kept, network)
            network.zero_grad()
            if not isinstance(error, KeyboardInterrupt):
                raise
            message = "Stopped. Nothing of this run is kept: none of its epochs was saved."
            if saved:
                message = f"Stopped. {path} keeps the run up to epoch {saved}; run again to go on."
            raise KeyboardInterrupt(message) from None
    _copy_model(best, network)
    network.eval()
    return history


def _copy_model(source, target):
    target.load_state_dict(source.state_dict())
    target.metadata = source.metadata


def _train_epoch(model, optimizer, average, images, settings, epoch, bar):
    """One pass over the images; its randomness follows from (seed, epoch), so that it repeats."""
    seed = settings["seed"] * 100_003 + epoch  # another one for every seed and epoch
    noise = torch.Generator(images.device).manual_seed(seed)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    batches = order.to(images.device).split(settings["batch_size"])
    losses = []  # moved to the CPU once, after the last step
    model.train()
    for step, rows in enumerate(batches):
        progress = (epoch - 1 + step / len(batches)) / settings["epochs"]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(progress, settings["learning_rate"])
        x = images[rows]
        logits, mu, logvar = model(x, noise)
        loss = _loss(logits, x, mu, logvar, settings["beta"])
        optimizer.zero_grad()
        loss.loss.backward()
        optimizer.step()
        if (step + 1) % _averaging_interval(len(batches)) == 0:
            average.update_parameters(model)
        losses.append(torch.stack(loss).detach())
        bar.update()
    losses = torch.stack(losses).cpu().double()
    for step, values in enumerate(losses, start=1):
        _check_finite(values.sum(), f"at epoch {epoch}, step {step}")
    sizes = torch.tensor([len(rows) for rows in batches]).double()
    means = sizes @ losses / sizes.sum()  # every image weighted the same, in the last batch, too
    return Loss(*means.tolist())


def _running_average(model, steps):
    """An exponential moving average of the weights over about a tenth of an epoch of `steps`.

    It filters out the noise of single steps (Polyak & Juditsky, 1992). Early in a run its loss is
    nats lower than that of the weights; at the end, where the rate is zero, the two agree.
    """
    weight = min(1.0, 10 * _averaging_interval(steps) / steps)
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(1 - weight), use_buffers=True)


def _averaging_interval(steps):
    return max(1, steps // 100)


def _check_finite(loss, where):
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"the loss is not finite {where}, and training stopped: try a lower learning rate"
        )


def _adam(model):
    """Adam with decoupled weight decay (AdamW: Loshchilov & Hutter, 2019) of the dense weights."""
    dense = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]  # convolutions, biases, normalisation
    groups = [
        {"params": others, "weight_decay": 0.0},
        {"params": dense, "weight_decay": WEIGHT_DECAY},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, fused=_device(model).type in ("cpu", "cuda"))
    # A step that moves nothing makes Adam's moments and counters, so that they can be restored.
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
    for moments in optimizer.state.values():
        moments["step"].zero_()
    return optimizer


def _history_row(epoch, train, val, learning_rate, started):
    return {
        "epoch": epoch,
        "train_loss": train.loss,
        "train_bce": train.bce,
        "train_kl": train.kl,
        "val_loss": val.loss,
        "val_bce": val.bce,
        "val_kl": val.kl,
        "learning_rate": learning_rate,
        "seconds": time.perf_counter() - started,
    }


def _format_row(row, epochs):
    text = (
        "epoch {epoch:2d}/{epochs}   training {train_loss:7.2f}   validation {val_loss:7.2f} = "
        "BCE {val_bce:6.2f} + KL {val_kl:5.2f} nats   {seconds:5.1f} s"
    )
    return text.format(epochs=epochs, **row)


def _describe(history, metadata, settings):
    """What is known of a run: above all its best epoch, the first with the lowest loss."""
    best = min(history, key=lambda row: row["val_loss"])
    return {**metadata, **best, "settings": settings, "history": history.copy()}


def _progress_bar(steps, steps_done):
    """tqdm's bar in a terminal. Elsewhere, in a notebook or a log, the line per epoch is enough."""
    return tqdm(total=steps, initial=steps_done, unit="batch", leave=False, disable=None)


def _training_state(model, optimizer, average):
    """The live tensors that it takes to go on, by name: saved, and overwritten on a restart."""
    modules = nn.ModuleDict({"weights": model, "average": average})
    state = modules.state_dict(prefix=TRAINING_STATE)
    for name, p in model.named_parameters():
        for key, tensor in optimizer.state[p].items():
            state[f"{TRAINING_STATE}{key}.{name}"] = tensor
    return state


def _restore(path, resume, settings, best, state):
    """Continue the run stored at `path`: fill settings, best and state, and return its history.

    Return [] and change nothing if there is no file, or that of another run. CheckpointError for a
    file that this project did not write, or whose training state does not fit.
    """
    if not os.path.lexists(path):
        return []
    found, found_state = _unpack(_read(path), path)
    sought = dict(settings)
    if found_state and _digest(found.state_dict()) == settings["initial_weights"]:
        # After an interrupt the model holds the weights of this file; the same call continues.
        sought["initial_weights"] = found.metadata["settings"]["initial_weights"]
    if not resume or found.metadata.get("settings") != sought:
        return []
    history = found.metadata["history"]
    finished = len(history) == settings["epochs"]
    if not finished and not found_state:  # a copy of the model without what it takes to go on
        return []
    settings.update(sought)
    for row in history:
        print(_format_row(row, settings["epochs"]))
    if finished:
        print(f"{path} holds this run, finished: it is not trained again")
    else:
        try:
            _check_tensors(found_state, state)
        except ValueError as error:
            raise CheckpointError(f"{path} holds no run that can go on ({error})") from None
        for name, tensor in state.items():
            tensor.detach().copy_(found_state[name])
        print(f"going on after epoch {len(history)} from {path}")
    _copy_model(found, best)
    return history.copy()


def _save_run(path, best, state, keep_previous):
    """Save a run after an epoch and return whether that worked; a failure costs a warning."""
    try:
        _write(path, _pack(best, best.metadata, state), keep_previous)
        return True
    except CheckpointError as error:
        warnings.warn(
            f"{error}. Training goes on; if the last epoch cannot be saved either, "
            "utils.save_checkpoint(PATH, model) saves the trained model elsewhere.",
            stacklevel=3,
        )
        return False


# ---------------------------------------- Checkpoints ----------------------------------------

# A checkpoint is a safetensors file. Its metadata hold one JSON text, which tells how to rebuild
# the model and what is known of it, and the SHA-256 of that text and of all tensors.
FORMAT = 3  # raise it when an older file can no longer be read
MAX_FILE_BYTES = 2**26  # an unfinished run of the largest model has 45 MB
MAX_HEADER_BYTES = 2**21  # an unfinished run of 4,000 epochs has 1.6 MB
TRAINING_STATE = "training."  # what the names of an unfinished run's further tensors begin with


class CheckpointError(RuntimeError):
    """A checkpoint that is damaged, foreign, does not fit, or cannot be read or written."""


def save_checkpoint(path, model, *, allow_reference=False, **metadata):
    """Write the weights, what rebuilds the model, and what is known of it, whole or not at all.

    `metadata` (plain Python values) are added to the model's own. A file named `*_reference` is
    written only with `allow_reference=True`.
    Raises TypeError or ValueError for a bad path or metadata that are not plain, and
    CheckpointError where `path` cannot be written or the model could not be loaded again (NaN,
    another dtype, other layers); the previous file is then unchanged.
    """
    path = _path_to_write(path, "path", allow_reference)
    network = getattr(model, "_orig_mod", model)  # the model that torch.compile has wrapped
    content = _pack(network, {**network.metadata, **metadata})
    with _lock(path):
        _write(path, content)


def load_checkpoint(path, device="cpu"):
    """The model of a checkpoint in eval mode on `device`, with `model.metadata`.

    Nothing in the file is executed. Raises FileNotFoundError where there is none, CheckpointError
    where the file is not one of ours, whole and sound.
    """
    path = _as_path(path, "path")
    model, _ = _unpack(_read(path), path)
    return model.to(device).eval()


def checkpoint_path(folder, data_name, autoencoder=False, left_out=None, which="best"):
    """Where the notebooks keep a model of the data of that name, "mnist" or "digits".

    `left_out` is a digit that the model never saw, or None. `which` is "best" for one's own, or
    "reference" for what comes with the clone.
    """
    check_scalar(autoencoder, "autoencoder", bool)
    kind = "ae" if autoencoder else "vae"
    without = "" if left_out is None else f"_without{left_out}"
    return _as_path(folder, "folder") / f"{kind}_{data_name}{without}_{which}.safetensors"


def load_best(folder, data_name, autoencoder=False, device="cpu"):
    """One's own best model of the data of that name, else the reference; says which.

    Raises FileNotFoundError if there is neither, CheckpointError for an unfit file.
    """
    own = checkpoint_path(folder, data_name, autoencoder)
    reference = checkpoint_path(folder, data_name, autoencoder, which="reference")
    path = reference if reference.exists() and not os.path.lexists(own) else own
    model = load_checkpoint(path, device)
    known = model.metadata
    if known.get("data") != data_name:
        raise CheckpointError(
            f"{path} is not a model of {data_name}, which is loaded: move it away"
        )
    whose = "your own" if path == own else "the reference"
    loss = known.get("val_loss", math.nan)
    print(f"{path}: {whose}, epoch {known.get('epoch')}, validation loss {loss:.2f} nats")
    return model


def _path_to_write(value, name, allow_reference=False):
    path = _as_path(value, name)
    if path.stem.endswith("_reference") and not allow_reference:
        raise ValueError(f"{path} is a reference checkpoint, which no run writes: use another name")
    return path


def _check_tensors(tensors, expected):
    """ValueError unless names, shapes and dtypes are as expected and the values make sense."""
    names = tensors.keys() ^ expected.keys()
    if names:
        raise ValueError(f"tensors are missing or superfluous: {sorted(names)[:3]}")
    for name, like in expected.items():
        tensor = tensors[name]
        if (tensor.dtype, tensor.shape) != (like.dtype, like.shape):
            raise ValueError(f"{name} is not {like.dtype} of the shape {tuple(like.shape)}")
        lowest = 0 if "running_var" in name or "exp_avg_sq" in name else -math.inf
        if not tensor.isfinite().all() or tensor.min() < lowest:
            raise ValueError(f"{name} holds NaN, infinity or a negative variance")


def _digest(tensors, text=""):
    """The SHA-256 of a text and of the names, dtypes, shapes and bytes of tensors."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy())  # as bytes: NumPy has no bfloat16
    return digest.hexdigest()


def _pack(model, metadata, state=None):
    """The content of a checkpoint: a model and, of an unfinished run, its training state.

    ValueError for metadata that do not come back from JSON as they were, CheckpointError for a
    model that could not be loaded again.
    """
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    header = {
        "format": FORMAT,
        "latent_dim": model.latent_dim,
        "variational": model.variational,
        "metadata": {"versions": versions, **metadata},
    }
    try:
        text = json.dumps(header, allow_nan=False)
        plain = json.loads(text) == header and len(text) < 0.9 * MAX_HEADER_BYTES
    except (TypeError, ValueError, RecursionError):
        plain = False
    if not plain:
        raise ValueError(
            "metadata must be plain values: text, finite numbers, bool, None, and lists and dicts "
            "of them, with text as keys, neither long nor nested without end"
        )
    live = {**model.state_dict(), **(state or {})}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in live.items()}
    written = {"json": text, "sha256": _digest(tensors, text)}
    content = safetensors.torch.save(tensors, written)
    _unpack(content, "what would be saved")
    return content


def _unpack(content, source):
    """The model that `_pack` put into a file and the training state, empty for a finished run."""
    try:
        if content.startswith(b"PK"):
            raise ValueError("it is a .pt file of torch.save, a format that is no longer read")
        header_bytes = int.from_bytes(content[:8], "little")
        if header_bytes > MAX_HEADER_BYTES:
            raise ValueError("its header is too long")
        tensors = safetensors.torch.load(content)
        written = json.loads(content[8 : 8 + header_bytes])["__metadata__"]
        if written["sha256"] != _digest(tensors, written["json"]):
            raise ValueError("its content is not what was written")
        header = json.loads(written["json"])
        if header["format"] != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        with torch.random.fork_rng(devices=[]):  # spare the caller's random state
            model = VAE(header["latent_dim"], header["variational"])
        model.metadata = dict(header["metadata"])
        further = [name for name in tensors if name.startswith(TRAINING_STATE)]
        state = {name: tensors.pop(name) for name in further}
        _check_tensors(tensors, model.state_dict())
    except Exception as error:  # whatever a reader stumbles over, the file is at fault
        reason = str(error)[:150] or type(error).__name__
        raise CheckpointError(
            f"{source} is no sound checkpoint of this project ({reason})"
        ) from None
    model.load_state_dict(tensors)
    return model, state


def _read(path):
    """The content of a regular file of a size that a checkpoint can have."""
    try:
        size = path.stat().st_size
        if not path.is_file() or size > MAX_FILE_BYTES:
            raise CheckpointError(
                f"{path} is not a checkpoint of this project: it is no file, or too large "
                f"({size:,} bytes)"
            )
        return path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(
            f"there is no checkpoint at {path}; vae_mnist_training.ipynb makes one"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path} could not be read ({error.strerror})") from None


def _write(path, content, keep_previous=False):
    """Write a file beside `path`, flush it to disk, then move it over `path` in a single step.

    `keep_previous` renames what stands at `path`, with a counter.
    """
    part = path.with_name(f".{path.name}.part")
    previous = _free_name(path) if keep_previous and path.exists() else None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if previous:
            os.rename(path, previous)
        os.replace(part, path)
    except BaseException as error:
        if previous and previous.exists():
            os.replace(previous, path)
        part.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise CheckpointError(f"{path} could not be written ({error.strerror})") from None
        raise
    if previous:
        print(f"{path} held another run, which is now {previous.name}")


def _free_name(path):
    """vae_mnist_best.safetensors -> vae_mnist_best.1.safetensors, or the next number."""
    for number in itertools.count(1):
        free = path.with_name(f"{path.stem}.{number}{path.suffix}")
        if not os.path.lexists(free):
            return free


@contextlib.contextmanager
def _lock(path, timeout=0):
    """Let one process at a time use `path`; the system frees the lock of a killed one.

    Waits for `timeout` seconds, without end for -1. CheckpointError if another process still holds
    it, or if its folder is not writable.
    """
    lock = filelock.FileLock(path.with_name(f".{path.name}.lock"), timeout=timeout)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout:
        raise CheckpointError(
            f"another process is training into {path}: wait for it, or use another name"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path} could not be written ({error.strerror})") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows deletes no open file
            os.unlink(lock.lock_file)
        lock.release()


# ---------------------------------------- Evaluation ----------------------------------------


@torch.no_grad()
def posterior(model, images):
    """mu and logvar (N, D) of q(z|x) for images (N, 1, 28, 28), on the model's device.

    logvar is None for a plain autoencoder.
    """
    _check_images(images)
    with _evaluating(model):
        parts = [model.encode(x.to(_device(model))) for x in images.split(BATCH)]
    mus, logvars = zip(*parts, strict=True)
    return torch.cat(mus), (torch.cat(logvars) if model.variational else None)


@torch.no_grad()
def _bce_of_codes(model, z, images):
    """-log p(x|z) of one code per image, (N,) in double precision on the CPU (MPS has none)."""
    bces = []
    with _evaluating(model):
        for part, x in zip(z.split(BATCH), images.split(BATCH), strict=True):
            bces.append(bce_per_image(model.decode(part), x.to(z.device)))
    return torch.cat(bces).cpu().double()


def loss_per_image(model, images, num_samples=10, seed=0):
    """A `Loss` of every image in nats, each (N,) float64: means over `num_samples` sampled z.

    `loss` is bce + kl, the -ELBO, whatever beta the model was trained with.
    The noise is drawn for all images at once from `seed`, so that batches make no difference.
    """
    _integer(num_samples, "num_samples", 1)
    _integer(seed, "seed", 0, MAX_SEED)
    mu, logvar = posterior(model, images)
    if not model.variational:
        bce = _bce_of_codes(model, mu, images)
        return Loss(bce, bce, torch.zeros_like(bce))
    generator = torch.Generator().manual_seed(seed)
    bces = []
    for _ in range(num_samples):
        z = reparameterize(mu, logvar, generator)
        bces.append(_bce_of_codes(model, z, images))
    bce = torch.stack(bces).mean(0)
    kl = kl_per_dimension(mu, logvar).sum(1).cpu().double()
    return Loss(bce + kl, bce, kl)


def evaluate(model, images, num_samples=10, seed=0, beta=1.0):
    """The `Loss` over a data set, plain numbers in nats per image; every image weighs the same.

    See `loss_per_image`.
    """
    _number(beta, "beta", 0)
    per_image = loss_per_image(model, images, num_samples, seed)
    bce = float(per_image.bce.mean())
    kl = float(per_image.kl.mean())
    return Loss(bce + beta * kl, bce, kl)


@torch.no_grad()
def log_likelihood(model, images, num_samples=500, seed=0):
    """log p(x) of every image in nats, (N,) float64: importance sampling from q(z|x).

    log p(x) >= E[log 1/K sum_k p(x|z_k) p(z_k) / q(z_k|x)], a lower bound that tightens as
    K = `num_samples` grows (Burda et al., "Importance Weighted Autoencoders", 2015); with K = 1 it
    is the ELBO. The noise of an image depends on its place among `images`: with few samples its
    estimate may differ by some nats from place to place.
    """
    _integer(num_samples, "num_samples", 1)
    _integer(seed, "seed", 0, MAX_SEED)
    if not model.variational:
        raise ValueError("a plain autoencoder has no likelihood: log_likelihood needs a VAE")
    mu, logvar = posterior(model, images)
    sigma = (0.5 * _bounded(logvar)).exp()
    generator = torch.Generator().manual_seed(seed)
    log_weights = []
    for _ in range(num_samples):
        eps = _standard_normal(mu.shape, generator, mu.device)
        z = mu + sigma * eps
        # log p(z) - log q(z|x); the two constants -log(2 pi)/2 cancel
        log_ratio = (0.5 * (eps.square() - z.square()) + sigma.log()).sum(1).cpu().double()
        log_weights.append(log_ratio - _bce_of_codes(model, z, images))
    return torch.stack(log_weights).logsumexp(0) - math.log(num_samples)


def active_units(mu, threshold=0.01):
    """Which latent dimensions are in use, (N, D) -> (D,) bool: those whose mean varies.

    The definition and the threshold are those of Burda et al. (2015).
    """
    return mu.var(0) > threshold


def interpolate(start, end, steps):
    """`steps` codes from start to end, both (D,), along the arc between them: -> (steps, D).

    Spherical interpolation (Shoemake, 1985): a straight line would cut through the middle, where
    the prior N(0, I) has next to no mass in many dimensions. Codes on one line through the origin
    are joined by that line.
    """
    _integer(steps, "steps", 2)
    if start.ndim != 1 or start.shape != end.shape:
        raise ValueError(f"start and end must be (D,), not {start.shape} and {end.shape}")
    t = torch.linspace(0, 1, steps, device=start.device)
    weights = torch.stack([1 - t, t], dim=1)  # (steps, 2)
    angle = F.cosine_similarity(start, end, dim=0).clamp(-1, 1).acos()
    if angle.sin() > 1e-3:  # float32 resolves an angle near 0 or pi no better
        weights = (weights * angle).sin() / angle.sin()
    return weights @ torch.stack([start, end])


def fit_mixture(model, images, num_components=50, seed=0):
    """A GaussianMixture fitted to the codes mu of images (N, 1, 28, 28), after training.

    It is a density on codes: scikit-learn's `sample` and `density_score` use it. Its samples,
    decoded, look better than those of the prior, and it gives a plain autoencoder a density, too
    (Ghosh et al., "From Variational to Deterministic Autoencoders", 2020).
    """
    _check_images(images)
    _integer(num_components, "num_components", 1, len(images))
    _integer(seed, "seed", 0, MAX_SEED)
    mixture = GaussianMixture(num_components, reg_covar=1e-4, tol=1e-2, random_state=seed)
    mu, _ = posterior(model, images)
    return mixture.fit(mu.cpu().double().numpy())  # in float32 covariances lose their symmetry


# ------------------------------- Robustness and anomalies -------------------------------


def _noise(x, level, generator):
    return x + level * torch.randn(x.shape, generator=generator)


def _salt_and_pepper(x, share, generator):
    hit = torch.rand(x.shape, generator=generator) < share
    white = torch.rand(x.shape, generator=generator) < 0.5
    return torch.where(hit, white.float(), x)


def _occlusion(x, side, generator):
    side = round(side)
    free = max(20 - side, 0)  # how far the square can move within the middle 20x20 pixels
    first = min(4, (28 - side) // 2)
    tops, lefts = first + torch.randint(free + 1, (2, len(x)), generator=generator)
    x = x.clone()
    for image, top, left in zip(x, tops, lefts, strict=True):
        image[:, top : top + side, left : left + side] = 0
    return x


def _blur(x, sigma, generator):
    blurred = ndimage.gaussian_filter(x, (0, 0, sigma, sigma), mode="constant", radius=14)
    return torch.from_numpy(blurred)


def _dimming(x, share, generator):
    return (1 - share) * x


def _rotation(x, degrees, generator):
    left = torch.randint(2, (len(x), 1, 1, 1), generator=generator).bool()
    turned_left = rotate(x, degrees, InterpolationMode.BILINEAR)
    turned_right = rotate(x, -degrees, InterpolationMode.BILINEAR)
    return torch.where(left, turned_left, turned_right)


class Corruption(NamedTuple):
    """`apply(images, level, generator)` returns corrupted images.

    `unit` and `largest` describe the level; `levels` are four, from mild to severe.
    """

    apply: Callable
    unit: str
    largest: float
    levels: tuple


CORRUPTIONS = {
    "noise": Corruption(_noise, "standard deviation, grey values", 1.0, (0.1, 0.2, 0.3, 0.5)),
    "salt and pepper": Corruption(
        _salt_and_pepper,
        "share of the pixels turned black or white",
        1.0,
        (0.02, 0.05, 0.1, 0.2),
    ),
    "occlusion": Corruption(
        _occlusion, "side of a black square over the digit, pixels", 28.0, (4, 8, 12, 16)
    ),
    "blur": Corruption(_blur, "standard deviation, pixels", 5.0, (0.5, 1.0, 1.5, 2.0)),
    "dimming": Corruption(_dimming, "share of the brightness lost", 1.0, (0.2, 0.4, 0.6, 0.8)),
    "rotation": Corruption(_rotation, "degrees, to either side", 180.0, (10, 20, 30, 45)),
}


def corrupt(images, kind, level, seed=0):
    """Corrupted copies of images (N, 1, 28, 28), clipped to [0, 1]; level 0 does nothing.

    `seed` decides all that is random. Raises ValueError for a kind that is not in CORRUPTIONS, or
    for a level outside 0 to the largest there.
    """
    _check_images(images)
    if kind not in CORRUPTIONS:
        raise ValueError(f"kind must be one of {list(CORRUPTIONS)}, not {kind!r}")
    corruption = CORRUPTIONS[kind]
    _number(level, "level", 0, corruption.largest)
    _integer(seed, "seed", 0, MAX_SEED)
    generator = torch.Generator().manual_seed(seed)
    corrupted = corruption.apply(images.cpu(), level, generator)
    return corrupted.clamp(0, 1).to(images.device)


def _shuffled(x, seed):
    order = torch.randperm(784, generator=torch.Generator().manual_seed(seed))
    return x.flatten(1)[:, order].view_as(x)


def _thinner(x, seed):
    ground = 1 - F.pad(x, (0, 1, 0, 1))
    return 1 - F.max_pool2d(ground, 2, stride=1)


# Functions of digits (N, 1, 28, 28) and a seed that return what is no digit, or a spoiled one. The
# anomaly score was chosen on the first seven alone.
ANOMALIES = {
    "mirrored": lambda x, seed: x.flip(3),
    "rotated": lambda x, seed: x.rot90(1, (2, 3)),
    "occluded": lambda x, seed: corrupt(x, "occlusion", 8, seed),
    "noisy": lambda x, seed: corrupt(x, "noise", 0.3, seed),
    "shuffled": _shuffled,
    "inverted": lambda x, seed: 1 - x,
    "black": lambda x, seed: torch.zeros_like(x),
    "upside down": lambda x, seed: x.flip(2),
    "transposed": lambda x, seed: x.transpose(2, 3),
    "thicker": lambda x, seed: F.max_pool2d(x, 3, stride=1, padding=1),
    "thinner": _thinner,
    "two overlaid": lambda x, seed: torch.maximum(x, x.roll(1, 0)),
    "half": lambda x, seed: F.pad(x[..., :14], (0, 14)),
    "shifted": lambda x, seed: F.pad(x, (2, -2, 2, -2)),
}


def anomaly_score(model, images):
    """How badly the model reconstructs images (N, 1, 28, 28): (N,) on the CPU.

    Higher is more anomalous.
    """
    return reconstruction_score(model.reconstruct(images), images)


def reconstruction_score(rebuilt, images):
    """`anomaly_score` of images for given reconstructions, both (N, 1, 28, 28).

    (excess_bce * window_error^2)^(1/3) / (1 + ink)^(1/6), ink being the sum of the image's pixels:
    the same error weighs more where there is less to reconstruct. It was the best of the scores
    that `python tests/measure.py scores` compares on validation images.
    """
    rebuilt = rebuilt.cpu()
    images = images.cpu()
    excess = excess_bce(rebuilt, images).clamp(min=0)
    error = (excess * window_error(rebuilt, images).square()) ** (1 / 3)
    ink = images.flatten(1).sum(1).double()
    return error / (1 + ink) ** (1 / 6)


def excess_bce(rebuilt, images):
    """BCE of grey values above their own entropy, which no model can get below: (N,), nats."""
    _check_pair(rebuilt, images)
    bce = F.binary_cross_entropy(rebuilt, images, reduction="none").flatten(1).sum(1)
    entropy = F.binary_cross_entropy(images, images, reduction="none").flatten(1).sum(1)
    return bce.cpu().double() - entropy.cpu().double()


def window_error(rebuilt, images):
    """The largest difference in the ink of any 7x7 window, (N,), in pixels.

    Noise cancels there; a stroke does not.
    """
    _check_pair(rebuilt, images)
    mean = F.avg_pool2d(images - rebuilt, 7, stride=1)  # (N, 1, 22, 22)
    return 49 * mean.abs().flatten(1).amax(1).cpu().double()


def density_score(mixture, codes):
    """How improbable codes (N, D) are under a mixture of `fit_mixture`: -log p, (N,), nats.

    Higher is more anomalous.
    """
    return -torch.from_numpy(mixture.score_samples(codes.cpu().double().numpy()))


@torch.inference_mode(False)
@torch.enable_grad()
def optimize_codes(model, images, steps=50, learning_rate=0.1):
    """The codes (N, D) that explain corrupted images best, by `steps` steps of Adam from mu.

    The encoder has seen clean digits only. Here an image is taken as a * (decoded image) + b +
    Gaussian noise, with a contrast a, a brightness b and a noise level that nobody knows. With
    these three at their most likely values, -log p(x|z) - log p(z) is
    784/2 * log(1 - r^2) + |z|^2 / 2 up to a constant, r being the correlation between the pixels
    of the image and of the decoded one: that is minimised. (Inference by optimisation: Cremer et
    al., "Inference Suboptimality in Variational Autoencoders", 2018.) A plain autoencoder has no
    p(z): its codes are fitted without.
    """
    _integer(steps, "steps", 1)
    _number(learning_rate, "learning_rate", 1e-12)
    guess, _ = posterior(model, images)
    codes = []
    with _evaluating(model):
        for x, z in zip(images.split(BATCH), guess.split(BATCH), strict=True):
            x = x.to(z.device).clone()  # a clone is no tensor of inference mode
            z = z.clone().requires_grad_()
            optimizer = torch.optim.Adam([z], lr=learning_rate)
            for step in range(steps):
                optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / steps)
                energy = _energy(model, z, x)
                z.grad = torch.autograd.grad(energy.sum(), z)[0]  # none for the weights
                optimizer.step()
            codes.append(z.detach())
    return torch.cat(codes)


def _energy(model, z, x):
    """-log p(x|z) - log p(z) of `optimize_codes`, (B,)."""
    decoded = model.decode(z).sigmoid().flatten(1)
    x = x.flatten(1)
    decoded = decoded - decoded.mean(1, keepdim=True)
    x = x - x.mean(1, keepdim=True)
    r = F.cosine_similarity(decoded, x).clamp(min=0)  # 0 for an image of one grey value
    energy = 784 / 2 * (1 - (1 - 1e-4) * r.square()).log()  # 1e-4: no image is explained fully
    if model.variational:
        energy = energy + 0.5 * z.square().sum(1)
    return energy


def squared_error(images, originals):
    """Squared difference summed over the pixels of an image: (N,) float32 on the CPU."""
    _check_pair(images, originals)
    return (images.cpu() - originals.cpu()).square().flatten(1).sum(1)


# ---------------------------------------- Own digit ----------------------------------------


def read_digit(path):
    """Read a picture of one handwritten digit and make it an image like MNIST's.

    The picture may be a photograph of pen on paper, a scan or a drawing, dark on light or light
    on dark. Returns (1, 1, 28, 28) float32 in [0, 1]: black paper, white ink, the digit scaled to
    20 pixels, its centre of mass in the middle. Strokes thinner than MNIST's are thickened.
    Raises TypeError if `path` is not a path, FileNotFoundError if there is no file, and
    ValueError if the file is not a picture or does not show exactly one digit.
    """
    path = _as_path(path, "path")
    page = _even_light(_greys(_open_picture(path)))
    page, ink = _first_look(page)
    if ink.max() <= 0.1:  # what is fainter is noise
        raise _no_digit(path.name, "there is no ink on it")
    # The second look knows the width of the strokes. A closing removes what is dark and narrower
    # than three strokes. What remains is the paper with its shadows, even hard-edged ones.
    paper = ndimage.grey_closing(page, round(3 * _stroke_width(ink > 0)))
    ink = _dark_ink(page - paper)
    _check_one_digit(ink > 0, path.name)
    ink = _thicken(_even_ink(ink))
    return _like_mnist(torch.tensor(ink).float(), contrast=1)[None]


def _open_picture(path):
    """The picture in a file, upright: grey and alpha ("LA"), its longer side 280 pixels."""
    if not os.path.isfile(path):  # False, too, in a folder that may not be read
        raise FileNotFoundError(f"there is no picture at {path}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings of large pictures and of odd EXIF data
            with Image.open(path) as file:
                picture = ImageOps.exif_transpose(file)
        if max(picture.size) > 280 * min(picture.size):
            raise ValueError("it is too narrow")
        if picture.mode[0] in "IF":  # 16 or 32 bits
            values = np.asarray(picture, float)
            picture = Image.fromarray(255 * values / values.max().clip(1e-9))
        return ImageOps.contain(picture.convert("LA"), (280, 280))
    except Exception as error:  # whatever Pillow stumbles over
        reason = str(error).replace(str(path), path.name)
        raise ValueError(f"{path.name} cannot be read; save it as JPEG or PNG ({reason})") from None


def _greys(picture):
    """The greys of an "LA" picture, (h, w) in [0, 1], without transparency."""
    grey, alpha = np.moveaxis(np.asarray(picture), 2, 0) / 255  # (h, w, 2) -> (h, w) each
    # What is transparent becomes white if the ink is dark, else black.
    ground = 1.0 if (alpha * (grey - 0.5)).sum() < 0 else 0.0
    return alpha * grey + (1 - alpha) * ground


def _even_light(grey):
    """Greys as a page in even light, both (h, w): about 0 on paper, below 0 on dark ink."""
    # A band-pass: 1 pixel takes away noise, 80 pixels slow changes of light.
    return difference_of_gaussians(grey, 1, 80, mode="reflect")


def _first_look(page):
    """The page, negated if its ink was light, and the ink, both (h, w)."""
    page, ink = _dark_on_light(page)
    # A tight crop cuts strokes, and what reaches the border looks like a shadow. A margin of paper
    # keeps them off it. The paper is the median of the left and right edge: few strokes end there.
    padded = np.pad(page, 4, constant_values=np.median(page[:, [0, -1]]))
    padded, padded_ink = _dark_on_light(padded)
    is_cut = _is_cut(np.pad(ink, 4), padded_ink)
    return (padded, padded_ink) if is_cut else (page, ink)


def _is_cut(ink, padded_ink):
    """Whether the border cuts the digit, from its ink without and with a margin, both (h, w)."""
    # With the margin, cut strokes are far darker than the ink without it, and they span most of
    # the height. Shadows and tables do not.
    is_dark = padded_ink.max() > max(0.35, 2.2 * ink.max())
    is_tall = padded_ink.any(1).mean() > 0.7  # the share of rows with ink
    return (is_dark and is_tall) or _fills_holes(ink > 0, padded_ink > 0)


def _fills_holes(mask, strokes):
    """Whether a mask is what the strokes enclose, such as a 4's triangle; both (h, w) bool."""
    enclosed = mask & ndimage.binary_fill_holes(strokes)
    shared = mask & strokes
    return enclosed.sum() > 0.95 * mask.sum() and shared.sum() < 0.5 * mask.sum()


def _dark_on_light(page):
    """The page or its negative, whichever shows more of a digit's ink, and its ink, both (h, w)."""
    dark = _dark_ink(page)
    light = _dark_ink(-page)
    return (page, dark) if _strength(dark) >= _strength(light) else (-page, light)


def _strength(ink):
    """Height times squared contrast over the stroke's width: large for the ink of a digit."""
    return (ink.max(1) ** 2).sum() / _stroke_width(ink > 0)


def _dark_ink(page):
    """How much darker strokes are than what surrounds them, (h, w); 0 elsewhere.

    The page is a landscape in which dark is low. Rain fills its hollows until they overflow at the
    border (morphological reconstruction); ink is how deep the water is. Shadows, tables, lines on
    the paper and fading light reach the border, and the water runs off.
    """
    flood = page.copy()
    flood[1:-1, 1:-1] = 9  # higher than any page
    water_level = reconstruction(flood, page, method="erosion")
    depth = water_level - page
    return depth * _strokes(depth > 0.3 * depth.max())


def _strokes(mask):
    """The pieces of a mask, (h, w) bool, without specks, blobs and frames."""
    pieces = label(mask)
    smallest = 0.05 * mask.sum()
    for piece in regionprops(pieces, ndimage.distance_transform_edt(mask)):
        distance_to_edge = piece.intensity_mean  # about a quarter of the piece's width
        is_speck = piece.area < smallest
        is_blob = distance_to_edge > 0.09 * max(piece.image.shape)
        is_frame = piece.area_filled - piece.area > 0.8 * piece.area_bbox
        if is_speck or is_blob or is_frame:
            pieces[piece.slice][piece.image] = 0
    return pieces > 0


def _stroke_width(mask):
    """The mean width of the strokes of a mask, (h, w) bool, in pixels; 1 if there are none."""
    distance_to_edge = ndimage.distance_transform_edt(mask).sum() / max(1, mask.sum())
    # A quarter of the width, plus half a pixel because the outermost pixels count as 1.
    return max(1, 4 * distance_to_edge - 2)


def _check_one_digit(strokes, name):
    """ValueError unless the strokes, (h, w) bool, can be one digit's."""
    if not strokes.any():
        raise _no_digit(name, "there is no ink on it")
    pieces = label(strokes).max()
    columns = label(strokes.any(0)) * strokes  # pieces above each other are one digit's
    heights = [piece.image.shape[0] for piece in regionprops(columns)]
    digits = sum(height > 0.6 * max(heights) for height in heights)  # shorter ones are parts
    if digits > 1:
        raise _no_digit(name, f"there are {digits} digits side by side")
    if pieces > 4:
        raise _no_digit(name, f"the ink is in {pieces} pieces")


def _no_digit(name, problem):
    """The error that says why a picture is refused, and what would help."""
    return ValueError(
        f"{name} does not show one digit: {problem}. "
        "Write one, large and bold, on paper without lines or squares."
    )


def _even_ink(ink):
    """The ink, (h, w), divided by its mean nearby: faint strokes become as bright as dark ones."""
    return ink * gaussian(ink > 0, 40) / (gaussian(ink, 40) + 1e-9)


def _thicken(ink):
    """The ink, (h, w) in [0, 1], with strokes at least as wide as MNIST's thin ones."""
    missing = 0.09 * ink.any(1).sum() - _stroke_width(ink > 0)  # 9 % of the height is MNIST's thin
    return ndimage.maximum_filter(ink, max(1, round(1 + missing))).clip(0, 1)


# ---------------------------------------- Figures ----------------------------------------

COLORS = plt.color_sequences["petroff10"]  # for colour-blind readers, too (Petroff, 2021)


def digits_grid(rows, row_labels=None, column_labels=None, size=0.75):
    """A labelled grid of digits: a list of rows (N, 1, 28, 28), which may differ in length.

    Images are drawn in grey from 0 to 1. A row with negative values, a difference, is drawn from -1
    in red to 1 in blue. NaN is drawn as nothing. `size` is that of a digit, in inches.
    """
    if not rows or any(row.ndim != 4 or len(row) == 0 for row in rows):
        raise ValueError("a grid needs at least one row, and a row at least one (1, 28, 28) image")
    columns = max(len(row) for row in rows)
    figsize = (size * columns + 1, size * len(rows) + 0.3)
    figure, ax = plt.subplots(figsize=figsize, layout="constrained")
    for i, row in enumerate(rows):
        framed = F.pad(row[:, 0].cpu(), (1, 1, 1, 1), value=math.nan)
        strip = torch.hstack(list(framed))  # (N, 30, 30) -> (30, 30 N)
        cmap, lowest = ("RdBu", -1) if (row < 0).any() else ("gray", 0)
        place = (0, len(row), i + 1, i)  # left, right, bottom, top
        ax.imshow(strip, cmap, vmin=lowest, vmax=1, extent=place, interpolation="nearest")
    font = max(9, 0.9 * size * columns)  # readable when a wide grid is shrunk to a page
    ax.set_xticks(np.arange(columns) + 0.5, column_labels or [""] * columns, fontsize=font)
    ax.set_yticks(np.arange(len(rows)) + 0.5, row_labels or [""] * len(rows), fontsize=font)
    ax.tick_params(length=0, labeltop=True, labelbottom=False)
    ax.set(xlim=(0, columns), ylim=(len(rows), 0), frame_on=False)
    return figure


# ---------------------------------- Checks of arguments ----------------------------------


def _integer(value, name, low, high=None):
    """The value as a plain int; TypeError or ValueError unless it is an integer in [low, high]."""
    check_scalar(value, name, Integral, min_val=low, max_val=high)
    if isinstance(value, bool):  # which Python counts among the integers
        raise TypeError(f"{name} must be an integer, not {value}")
    return int(value)


def _number(value, name, low, high=1e300):  # which keeps infinity out
    """The value as a plain float; TypeError or ValueError unless it is a number in [low, high]."""
    check_scalar(value, name, Real, min_val=low, max_val=high)
    if isinstance(value, bool) or math.isnan(value):  # NaN compares with nothing
        raise ValueError(f"{name} must be a number, not {value}")
    return float(value)


def _check_images(images, name="images", check_values=True):
    dtype = images.dtype if isinstance(images, Tensor) else type(images)
    if dtype != torch.float32:
        raise TypeError(f"{name} must be a torch.Tensor of float32, not of {dtype}")
    shape = tuple(images.shape)
    if shape[1:] != (1, 28, 28) or shape[0] == 0:
        raise ValueError(f"{name} must have the shape (N, 1, 28, 28), N at least 1, not {shape}")
    if not check_values:
        return
    low, high = images.aminmax()
    if not (low >= 0 and high <= 1):  # false for NaN, too
        raise ValueError(f"{name} must lie in [0, 1], not from {low:g} to {high:g}")


def _check_pair(images, originals):
    _check_images(images)
    _check_images(originals)
    if images.shape != originals.shape:
        raise ValueError(f"{len(images)} images cannot be compared with {len(originals)}")


def _as_path(value, name):
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{name} must be the name of a file or folder, not {type(value).__name__}")
    if not str(value) or "\0" in str(value):
        raise ValueError(f"{name} must be the name of a file or folder, not {value!r}")
    return Path(os.path.expanduser(value))
