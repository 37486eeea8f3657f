"""How fast training is, beside a dense VAE fed the usual way. Not a test: `python tests/benchmark.py [--full]`.

Three trainings take turns, epoch by epoch, on the machine at hand and the same 55,000 images:
(a) a dense 784-400-20 VAE through torchvision's Dataset, ToTensor and DataLoader, at a constant learning rate;
(b) our network through that pipeline; (c) our network through ours, one tensor indexed per batch.
The validation loss is measured outside the clock, in the first two epochs eight times each, to tell when (c) reaches
(a)'s final loss.
"""

import argparse
import resource
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils

BATCH = 64


class DenseVAE(nn.Module):
    """784-400-20-400-784, the network of Kingma & Welling's paper in the size that is usual today."""

    def __init__(self):
        super().__init__()
        self.latent_dim, self.variational = 20, True
        self.hidden, self.head = nn.Linear(784, 400), nn.Linear(400, 40)
        self.decoder = nn.Sequential(nn.Linear(20, 400), nn.ReLU(), nn.Linear(400, 784), nn.Unflatten(1, (1, 28, 28)))

    def encode(self, x):
        return self.head(F.relu(self.hidden(x.flatten(1)))).chunk(2, dim=1)

    def decode(self, z):
        return self.decoder(z)

    def forward(self, x):
        mu, logvar = self.encode(x)
        return self.decode(utils.reparameterize(mu, logvar)), mu, logvar


class Training:
    """One network, one pipeline, one clock that runs only while training does."""

    def __init__(self, name, model, batches, epochs, ours):
        self.name, self.model, self.batches, self.epochs, self.schedule = name, model.to(DEVICE), batches, epochs, ours
        self.optimizer = utils._adam(model, 1e-3) if ours else torch.optim.Adam(model.parameters(), lr=1e-3)
        self.average = utils._average_of(model, STEPS) if ours else None
        self.seconds, self.steps, self.curve = [], 0, []

    def epoch(self, val_images):
        clock = 0.0
        self.model.train()
        started = time.perf_counter()
        for x in self.batches():
            x = x.to(DEVICE)
            if self.schedule:
                for group in self.optimizer.param_groups:
                    group["lr"] = utils.learning_rate_at(self.steps / STEPS / self.epochs, 1e-3)
            self.optimizer.zero_grad()
            logits, mu, logvar = self.model(x)
            utils.vae_loss(logits, x, mu, logvar).loss.backward()
            self.optimizer.step()
            self.steps += 1
            if self.average and self.steps % utils._averaging_interval(STEPS) == 0:
                self.average.update_parameters(self.model)
            if self.steps % STEPS == 0 or (self.steps < 2 * STEPS and self.steps % (STEPS // 8) == 0):
                synchronize()
                clock += time.perf_counter() - started
                loss = utils.evaluate(self.average.module if self.average else self.model, val_images, passes=1).loss
                self.curve.append((sum(self.seconds) + clock, loss))
                self.model.train()
                started = time.perf_counter()
        self.seconds.append(clock)


def synchronize():
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def matmul_rate():
    """Floating-point operations per second of a large matrix product: what this machine can do."""
    a = torch.rand(2048, 2048, device=DEVICE)
    best = 0.0
    for _ in range(10):
        synchronize()
        started = time.perf_counter()
        a @ a
        synchronize()
        best = max(best, 2 * 2048**3 / (time.perf_counter() - started))
    return best


def flops_per_image(model):
    """Multiplications and additions of forward and backward pass, counted by torch."""
    from torch.utils.flop_counter import FlopCounterMode

    x = torch.rand(BATCH, 1, 28, 28, device=DEVICE)
    with FlopCounterMode(display=False) as counter:
        logits, mu, logvar = model(x)
        utils.vae_loss(logits, x, mu, logvar).loss.backward()
    return counter.get_total_flops() / BATCH


def peak_memory():
    """Of this process, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)


def scaling(images):
    """Seconds for one epoch of (c) on growing sets: cost is linear in images."""
    for n in (10_000, 20_000, 40_000):
        started = time.perf_counter()
        bar = utils.tqdm(disable=True)
        model = utils.VAE().to(DEVICE)
        average = utils._average_of(model, -(-n // BATCH))
        utils._train_epoch(model, average, utils._adam(model, 1e-3), images[:n], 1, 20, BATCH, 1e-3, 1.0, 0, bar)
        print(f"one epoch on {n:6,} images: {time.perf_counter() - started:5.1f} s")


def main():
    global DEVICE, STEPS
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="all 20 epochs, of (a) and (c), instead of 3 of all")
    parser.add_argument("--data", default="data", help="where MNIST is, or is downloaded to")
    args = parser.parse_args()
    epochs = 20 if args.full else 3
    DEVICE = utils.pick_device()
    utils.seed_everything(0)

    data = utils.load_images("mnist", args.data)
    images, val_images = data.train.images.to(DEVICE), data.val.images
    n = len(images)
    STEPS = -(-n // BATCH)  # per epoch
    print(f"torch {torch.__version__} on {DEVICE}, {torch.get_num_threads()} threads, {n:,} images, {epochs} epochs")
    print(f"peak memory with the data loaded: {peak_memory():.2f} GB")

    from torchvision import datasets, transforms

    usual = datasets.MNIST(args.data, train=True, transform=transforms.ToTensor())
    order = torch.randperm(len(usual), generator=torch.Generator().manual_seed(0))[-n:].tolist()
    loader = torch.utils.data.DataLoader(torch.utils.data.Subset(usual, order), batch_size=BATCH, shuffle=True)

    def through_loader():
        return (x for x, _ in loader)

    def through_tensor():
        return (images[rows] for rows in torch.randperm(n).to(DEVICE).split(BATCH))

    trainings = [
        Training("(c) ours, our pipeline", utils.VAE(), through_tensor, epochs, ours=True),
        Training("(a) dense, usual pipeline", DenseVAE(), through_loader, epochs, ours=False),
        Training("(b) ours, usual pipeline", utils.VAE(), through_loader, epochs, ours=True),
    ]
    rate, work = matmul_rate(), flops_per_image(utils.VAE().to(DEVICE))
    for epoch in range(epochs):
        for training in trainings[: 2 if args.full else 3]:
            training.epoch(val_images)
            print(f"epoch {epoch + 1:2d}  {training.name:26} {training.seconds[-1]:5.1f} s   "
                  f"validation {training.curve[-1][1]:7.2f} nats", flush=True)
        if epoch == 0:
            print(f"peak memory of training: {peak_memory():.2f} GB")

    c, a, *_ = trainings
    print()
    for training in trainings[: 2 if args.full else 3]:
        seconds = sum(training.seconds) / epochs
        print(f"{training.name:26} {seconds:5.1f} s per epoch, {n / seconds:6,.0f} images/s, "
              f"{seconds * epochs / sum(a.seconds):.2f} times (a)")
    reached = next((clock for clock, loss in c.curve if loss <= a.curve[-1][1]), float("nan"))
    print(f"(a) ends at {a.curve[-1][1]:.2f} nats after {sum(a.seconds):.0f} s; (c) is there after {reached:.0f} s, "
          f"{reached / sum(a.seconds):.2f} of that time")
    print(f"(c) does {work / 1e6:.1f} million operations per image, {work * n * epochs / sum(c.seconds) / rate:.0%} of "
          f"this machine's matrix-product rate of {rate / 1e9:.0f} GFLOP/s")
    scaling(images)


if __name__ == "__main__":
    main()
