"""How fast training is, beside a dense VAE fed the usual way. Not a test.

    python tests/benchmark.py [--threads 2] [--keep]

Three pairs of epochs, one of a dense 784-400-20 VAE and one of `utils.fit` each, on the same
55,000 images: a machine may get slower meanwhile, so the median of the three ratios counts. The
dense VAE goes on to 20 epochs, at a constant learning rate; a run of `utils.fit` then goes on
until its validation loss is as low. At last the quick run: 20 epochs of 4,000 images.
--keep enters the figures in models_mnist/reference.json.
"""

import argparse
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from measure import keep
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

import utils

ROOT = Path(__file__).resolve().parent.parent
DEVICE = utils.pick_device()
BATCH = 64


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


class Pictures(Dataset):
    """Images as torchvision's MNIST hands them out in every tutorial, one picture at a time."""

    def __init__(self, split):
        self.pixels = (255 * split.images[:, 0]).round().byte().numpy()
        self.labels = split.labels
        self.transform = transforms.ToTensor()

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.pixels[i])), int(self.labels[i])


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


class Reached(Exception):
    pass


def seconds_until(loss, data, epochs):
    """How long `utils.fit` takes to a validation loss, or None if it does not get there."""
    seconds = []

    def stop_there(model, row):
        seconds.append(row["seconds"])
        if row["val_loss"] <= loss:
            raise Reached

    model = utils.VAE().to(DEVICE)
    try:
        utils.fit(model, data.train.images, data.val.images, epochs=epochs, on_epoch=stop_there)
    except Reached:
        return sum(seconds)
    return None


def peak_memory():
    """Gigabytes: of tensors on a GPU, else of the process; None where nothing tells (Windows)."""
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB on Linux
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9


def measure(data, few, epochs=20):
    """The figures by name; `data` is MNIST, `few` a small data set for the quick run."""
    utils.seed_everything(0)
    loader = DataLoader(Pictures(data.train), batch_size=BATCH, shuffle=True)
    dense = DenseVAE().to(DEVICE)
    optimizer = torch.optim.Adam(dense.parameters(), lr=1e-3)
    pairs = []
    for _ in range(3):
        dense_seconds = train_dense_epoch(dense, optimizer, loader)
        model = utils.VAE().to(DEVICE)
        history = utils.fit(model, data.train.images, data.val.images, epochs=1)
        pairs.append((history[0]["seconds"], dense_seconds))
    for _ in range(epochs - len(pairs)):
        train_dense_epoch(dense, optimizer, loader)
    dense_loss = utils.evaluate(dense, data.val.images, num_samples=1).loss
    reached = seconds_until(dense_loss, data, epochs)

    utils.seed_everything(0)
    quick = utils.VAE().to(DEVICE)
    quick_history = utils.fit(quick, few.train.images, few.val.images, epochs=epochs)
    quick_seconds = sum(row["seconds"] for row in quick_history)

    seconds = statistics.median(own for own, _ in pairs)
    trained_on = len(few.train.images) * epochs / 1000
    figures = {
        "machine": f"{platform.machine()}, {DEVICE.type}",
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "seconds per epoch": seconds,
        "seconds per epoch of the dense VAE": statistics.median(other for _, other in pairs),
        "times the dense VAE's": statistics.median(own / other for own, other in pairs),
        "seconds per 1,000 images": 1000 * seconds / len(data.train.images),
        "last validation loss of the dense VAE, nats": dense_loss,
        "seconds until that loss": reached,
        "test loss of the dense VAE, nats": utils.evaluate(dense, data.test.images).loss,
        "4,000 images: seconds": quick_seconds,
        "4,000 images: seconds per 1,000 images": quick_seconds / trained_on,
        "4,000 images: test loss, nats": utils.evaluate(quick, data.test.images).loss,
        "peak memory, GB": peak_memory(),
    }
    return {key: round(x, 3) if isinstance(x, float) else x for key, x in figures.items()}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--keep", action="store_true", help="in models_mnist/reference.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    data = utils.load_images("mnist", ROOT / "data")
    figures = measure(data, utils.load_images("mnist5k"))
    if arguments.keep:
        threads = f"{arguments.threads} thread{'s' if arguments.threads > 1 else ''}"
        keep(figures, "benchmark", f"{DEVICE.type}, {threads}", 0)
    for name, value in figures.items():
        print(f"{name:45} {value}")


if __name__ == "__main__":
    main()
