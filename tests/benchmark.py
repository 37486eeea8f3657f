"""How fast training is, beside a dense VAE fed the usual way. Not a test: `python tests/benchmark.py [--full]`.

Two trainings on the machine at hand and the same 55,000 images: `utils.fit` as it is, timed by its own history, and, half
before and half after it, a dense 784-400-20 VAE through torchvision's Dataset, ToTensor and DataLoader at a constant
learning rate. --full runs all 20 epochs, as it does on CUDA, and keeps the figures in models_mnist/reference.json.
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
from torch.utils.flop_counter import FlopCounterMode
from torchvision import datasets, transforms

import utils

BATCH, DEVICE = 64, utils.pick_device()


class DenseVAE(nn.Module):
    """784-400-20-400-784, the network of Kingma & Welling's paper in the size that is usual today."""

    variational, latent_dim = True, 20

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(784, 400), nn.ReLU(), nn.Linear(400, 40))
        self.decoder = nn.Sequential(nn.Linear(20, 400), nn.ReLU(), nn.Linear(400, 784), nn.Unflatten(1, (1, 28, 28)))

    def encode(self, x):
        return self.encoder(x).chunk(2, dim=1)

    def decode(self, z):
        return self.decoder(z)


def dense_epochs(loader, val_images):
    """Train the dense VAE, one epoch a turn: seconds and validation loss."""
    model = DenseVAE().to(DEVICE)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    while True:
        started = time.perf_counter()
        model.train()
        for x, _ in loader:
            x = x.to(DEVICE)
            optimizer.zero_grad()
            mu, logvar = model.encode(x)
            utils.vae_loss(model.decode(utils.reparameterize(mu, logvar)), x, mu, logvar).loss.backward()
            optimizer.step()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        yield seconds, utils.evaluate(model, val_images, num_samples=1).loss


def matmul_rate():
    """Floating-point operations per second of a large matrix product: what this machine can do."""
    a, best = torch.rand(2048, 2048, device=DEVICE), 0.0
    for _ in range(10):
        started = time.perf_counter()
        float((a @ a)[0, 0])
        best = max(best, 2 * 2048**3 / (time.perf_counter() - started))
    return best


def operations_per_image():
    """Multiplications and additions of forward and backward pass, counted by torch."""
    model, x = utils.VAE().to(DEVICE), torch.rand(BATCH, 1, 28, 28, device=DEVICE)
    with FlopCounterMode(display=False) as counter:
        logits, mu, logvar = model(x)
        utils.vae_loss(logits, x, mu, logvar).loss.backward()
    return counter.get_total_flops() / BATCH


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="all 20 epochs instead of 4; the figures are kept")
    args = parser.parse_args()
    full = args.full or DEVICE.type == "cuda"
    folder = Path(__file__).resolve().parent.parent / "data"
    utils.seed_everything(0)
    data = utils.load_images("mnist", folder)
    n = len(data.train.images)
    usual = datasets.MNIST(folder, train=True, transform=transforms.ToTensor())
    order = torch.randperm(len(usual), generator=torch.Generator().manual_seed(0))[-n:].tolist()
    loader = torch.utils.data.DataLoader(torch.utils.data.Subset(usual, order), batch_size=BATCH, shuffle=True)
    epochs, turns = 20 if full else 4, dense_epochs(loader, data.val.images)
    dense = [next(turns) for _ in range(epochs // 2)]  # one half before, one after: a machine may get slower meanwhile
    history = utils.fit(utils.VAE().to(DEVICE), data.train.images, data.val.images, epochs=epochs)
    dense += [next(turns) for _ in range(epochs - len(dense))]
    seconds, dense_seconds = sum(row["seconds"] for row in history), sum(s for s, _ in dense)
    clock = torch.tensor([row["seconds"] for row in history]).cumsum(0).tolist()
    reached = next((t for t, row in zip(clock, history) if row["val_loss"] <= dense[-1][1]), float("nan"))
    rate, operations = matmul_rate(), operations_per_image()
    found = {
        "machine": f"{platform.machine()} {DEVICE}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "epochs": epochs, "seconds per epoch": seconds / epochs, "dense: seconds per epoch": dense_seconds / epochs,
        "times the dense one's": seconds / dense_seconds, "images per second": n * epochs / seconds,
        "validation loss": history[-1]["val_loss"], "dense: validation loss": dense[-1][1],
        "seconds to the dense one's last loss": reached, "share of the dense one's time": reached / dense_seconds,
        "million operations per image": operations / 1e6,
        "share of the matrix-product rate": operations * n * epochs / seconds / rate,
        "peak memory, GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)}
    found = {key: value if isinstance(value, (str, int)) else round(value, 3) for key, value in found.items()}
    if full:
        keep("benchmark", DEVICE.type, 0, found)
    print("\n".join(f"{key:38} {value}" for key, value in found.items()))


if __name__ == "__main__":
    main()
