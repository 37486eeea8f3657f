"""How fast training is, beside a dense VAE fed the usual way. Not a test.

    python tests/benchmark.py [--full]

Two trainings on the machine at hand and the same 55,000 images: `utils.fit`, timed by its own
history, and a dense 784-400-20 VAE through torchvision's Dataset, ToTensor and DataLoader at a
constant learning rate. Half of the dense one's epochs run before and half after, since a machine
may get slower meanwhile. --full runs all 20 epochs, which CUDA does anyway, and keeps the figures
in models_mnist/reference.json.
"""

import argparse
import platform
import resource
import sys
import time
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from measure import keep
from torch.utils.data import DataLoader, Subset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import datasets, transforms

import utils

FOLDER = Path(__file__).resolve().parent.parent / "data"
BATCH = 64
DEVICE = utils.pick_device()


class DenseVAE(nn.Module):
    """784-400-20-400-784: Kingma & Welling's network in the size that is usual today."""

    variational = True
    latent_dim = 20

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Flatten(),  # (B, 1, 28, 28) -> (B, 784)
            nn.Linear(784, 400),
            nn.ReLU(),
            nn.Linear(400, 40),  # -> (B, 40): mu and logvar
        )
        self.decoder = nn.Sequential(
            nn.Linear(20, 400),  # (B, 20) -> (B, 400)
            nn.ReLU(),
            nn.Linear(400, 784),
            nn.Unflatten(1, (1, 28, 28)),  # -> (B, 1, 28, 28)
        )

    def encode(self, x):
        mu, logvar = self.encoder(x).chunk(2, dim=1)
        return mu, logvar

    def decode(self, z):
        return self.decoder(z)


def dense_loader(num_images):
    """`num_images` of MNIST's training images, the way that tutorials load them."""
    mnist = datasets.MNIST(FOLDER, train=True, transform=transforms.ToTensor())
    order = torch.randperm(len(mnist), generator=torch.Generator().manual_seed(0))
    some = Subset(mnist, order[-num_images:].tolist())
    return DataLoader(some, batch_size=BATCH, shuffle=True)


def train_dense_epoch(model, optimizer, loader):
    """One epoch of the dense VAE; returns its seconds."""
    started = time.perf_counter()
    model.train()
    for x, _ in loader:
        x = x.to(DEVICE)
        mu, logvar = model.encode(x)
        z = utils.reparameterize(mu, logvar)
        loss = utils.vae_loss(model.decode(z), x, mu, logvar).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def matmul_rate():
    """Operations per second of a large matrix product: what this machine can do."""
    a = torch.rand(2048, 2048, device=DEVICE)
    best = 0.0
    for _ in range(10):
        started = time.perf_counter()
        product = a @ a
        float(product[0, 0])  # waits until it is computed
        seconds = time.perf_counter() - started
        best = max(best, 2 * 2048**3 / seconds)
    return best


def operations_per_image():
    """Multiplications and additions of forward and backward pass, counted by torch."""
    model = utils.VAE().to(DEVICE)
    x = torch.rand(BATCH, 1, 28, 28, device=DEVICE)
    with FlopCounterMode(display=False) as counter:
        logits, mu, logvar = model(x)
        utils.vae_loss(logits, x, mu, logvar).loss.backward()
    return counter.get_total_flops() / BATCH


def peak_memory():
    """What the peak memory is called on this device, and its gigabytes."""
    if DEVICE.type == "cuda":
        name = "peak memory of tensors on the GPU (torch.cuda.max_memory_allocated), GB"
        return name, torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB on Linux
    peak = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return "peak memory of the process, GB", peak / 1e9


def seconds_until(history, loss):
    """How long a run took to a validation loss; None if it did not get there."""
    seconds = 0.0
    for row in history:
        seconds += row["seconds"]
        if row["val_loss"] <= loss:
            return seconds
    return None


def measure(epochs):
    """The figures of both trainings, by name."""
    utils.seed_everything(0)
    data = utils.load_images("mnist", FOLDER)
    num_images = len(data.train.images)
    loader = dense_loader(num_images)
    dense = DenseVAE().to(DEVICE)
    optimizer = torch.optim.Adam(dense.parameters(), lr=1e-3)

    dense_seconds = 0.0
    for _ in range(epochs // 2):
        dense_seconds += train_dense_epoch(dense, optimizer, loader)
    model = utils.VAE().to(DEVICE)
    history = utils.fit(model, data.train.images, data.val.images, epochs=epochs)
    memory_name, memory = peak_memory()
    for _ in range(epochs - epochs // 2):
        dense_seconds += train_dense_epoch(dense, optimizer, loader)
    dense_loss = utils.evaluate(dense, data.val.images, num_samples=1).loss

    seconds = sum(row["seconds"] for row in history)
    reached = seconds_until(history, dense_loss)
    operations = operations_per_image()
    rate = operations * num_images * epochs / seconds
    threads = torch.get_num_threads()
    figures = {
        "machine": f"{platform.machine()} {DEVICE}, {threads} threads, torch {torch.__version__}",
        "epochs": epochs,
        "seconds per epoch": seconds / epochs,
        "dense: seconds per epoch": dense_seconds / epochs,
        "times the dense one's": seconds / dense_seconds,
        "images per second": num_images * epochs / seconds,
        "validation loss, nats": history[-1]["val_loss"],
        "dense: validation loss, nats": dense_loss,
        "seconds to the dense one's last loss": reached,
        "million operations per image": operations / 1e6,
        "share of the matrix-product rate": rate / matmul_rate(),
        memory_name: memory,
    }
    if reached is not None:
        figures["share of the dense one's time"] = reached / dense_seconds
    return {key: round(x, 3) if isinstance(x, float) else x for key, x in figures.items()}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="20 epochs instead of 4, and keep it")
    full = parser.parse_args().full or DEVICE.type == "cuda"
    figures = measure(epochs=20 if full else 4)
    if full:
        keep(figures, "benchmark", DEVICE.type, 0)
    for name, value in figures.items():
        print(f"{name:40} {value}")


if __name__ == "__main__":
    main()
