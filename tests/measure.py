"""Measure every figure that the pages and the notebooks quote, into models_mnist/reference.json. Not a test.

    python tests/measure.py train      the models below by the full recipe (nine minutes each on one thread)
    python tests/measure.py scores     anomaly scores and sizes of the mixture, compared on validation images
    python tests/measure.py test       the test set: loss, likelihood, robustness, anomalies
    python tests/measure.py left-out   five epochs each on nine digits; the tenth is the anomaly (an hour)
    python tests/measure.py samples    how good samples are, by a classifier
    python tests/measure.py card       writes the tables of the model card from all this (seconds)

Trainings go to models_mnist/runs, are resumed when interrupted, and not repeated when they are there. Figures are kept
seed by seed; with --models and --seeds, two processes can share the work.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import filelock
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils

FOLDER = Path(__file__).resolve().parent.parent / "models_mnist"
DEVICE = utils.pick_device()
MODELS = {  # what differs from the recipe
    "vae": {}, "ae32": {"variational": False}, "ae12": {"variational": False, "latent_dim": 12},
    "ae16": {"variational": False, "latent_dim": 16}, "ae8": {"variational": False, "latent_dim": 8},
    "vae beta 0.25": {"beta": 0.25}, "vae beta 4": {"beta": 4.0}}
TUNED = list(utils.ANOMALIES)[:7]  # kinds on which scores are chosen; the others are only reported
COMPONENTS = (1, 5, 10, 20, 50, 100)
NUM_COMPONENTS = 50  # of the mixture: see `scores`
MIXTURE_IMAGES = 20_000  # training images it is fitted to, for speed


def train(data, name, seed, path, **options):
    """The model at the best epoch of one run of the recipe."""
    different = dict(MODELS[name])
    model_options = {key: different.pop(key) for key in ("variational", "latent_dim") if key in different}
    utils.seed_everything(seed)
    model = utils.VAE(**model_options).to(DEVICE)
    utils.fit(model, data.train.images, data.val.images, checkpoint=FOLDER / "runs" / path, seed=seed, **different, **options)
    return model


def trained(data, name, seed):
    return train(data, name, seed, f"{name.replace(' ', '_')}_seed{seed}_best.pt", metadata={"data": data.name, "left_out": None})


def read():
    file = FOLDER / "reference.json"
    return json.loads(file.read_text()) if file.exists() else {}


def keep(section, name, seed, figures):
    """Enter one seed's figures beside those of the others; two processes may do so at a time."""
    file = FOLDER / "reference.json"
    with filelock.FileLock(FOLDER / ".reference.lock"):
        there = read()
        rows = there.setdefault(section, {}).setdefault(name, {})
        rows[str(seed)] = figures
        there[section][name] = dict(sorted(rows.items()))
        part = file.with_suffix(".part")
        part.write_text(json.dumps(there, indent=1) + "\n")
        part.replace(file)
    print(section, name, seed, json.dumps(figures), flush=True)


def rounded(figures):
    return {key: rounded(value) if isinstance(value, dict) else round(float(value), 4) for key, value in figures.items()}


def auroc(normal, anomalous):
    """The area under the ROC curve: the probability that an anomaly scores higher than a normal image."""
    return float(roc_auc_score([0] * len(normal) + [1] * len(anomalous), torch.cat([normal, anomalous])))


# what is chosen, on validation images


def candidates(model, mixture):
    """Anomaly scores by name; the density of the codes is that of the mixture."""
    def entropy(x):
        return F.binary_cross_entropy(x, x, reduction="none").flatten(1).sum(1).double()

    scores = {"BCE of the decoded mean": lambda x: utils.excess_per_image(model.reconstruct(x).cpu(), x) + entropy(x),
              "excess: the same less the image's entropy": lambda x: utils.excess_per_image(model.reconstruct(x).cpu(), x),
              "ink": lambda x: utils.ink_per_image(model.reconstruct(x).cpu(), x),
              "density of the codes": lambda x: utils.density_score(mixture, model, x),
              "misfit: `anomaly_score`": lambda x: utils.anomaly_score(model, x)}
    if model.variational:
        scores |= {"-ELBO": lambda x: utils.loss_per_image(model, x).loss,
                   "-ELBO less entropy": lambda x: utils.loss_per_image(model, x).loss - entropy(x),
                   "-log p(x), 50 samples, less entropy": lambda x: -utils.log_likelihood(model, x, 50) - entropy(x)}
    return scores


def measure_scores(data, name, seed):
    model, found = trained(data, name, seed), {"mixture": {}, "seconds": {}, "auroc": {}}
    normal, other = data.val.images[:1000], data.val.images[1000:2000]
    for components in COMPONENTS:
        started = time.perf_counter()
        mixture = utils.fit_mixture(model, data.train.images[:MIXTURE_IMAGES], components, seed)
        found["seconds"][str(components)] = time.perf_counter() - started
        codes = utils.posterior(model, data.val.images)[0].cpu().numpy()
        found["mixture"][str(components)] = mixture.score(codes)  # nats per validation image
        if components == NUM_COMPONENTS:
            chosen = mixture
    for score, function in candidates(model, chosen).items():
        clean = function(normal)
        found["auroc"][score] = {kind: auroc(clean, function(utils.ANOMALIES[kind](other, seed))) for kind in TUNED}
        found["auroc"][score]["mean"] = statistics.mean(found["auroc"][score].values())
    keep("scores", name, seed, rounded(found))


# what is reported, on test images


def measure_test(data, name, seed):
    model, test = trained(data, name, seed), data.test.images
    found = dict(zip(("loss", "bce", "kl"), utils.evaluate(model, test, seed=seed)))
    if model.variational:
        some = test[:1000]
        binarised = torch.bernoulli(some, generator=torch.Generator().manual_seed(seed))
        found["loss of the first 1,000"] = utils.evaluate(model, some, seed=seed).loss
        found["nll grey"] = -utils.log_likelihood(model, some, 500, seed).mean()
        found["nll binarised"] = -utils.log_likelihood(model, binarised, 500, seed).mean()
    found["active units"] = utils.active_units(utils.posterior(model, test)[0]).sum()
    found |= {"error": {}, "optimised": {}, "input": {}}
    some = test[:250]  # the search for better codes is slow
    levels = [(kind, level) for kind, corruption in utils.CORRUPTIONS.items() for level in corruption.levels]
    for kind, level in [("clean", 0), *levels]:
        x = some if kind == "clean" else utils.corrupt(some, kind, level, seed)
        key = f"{kind} {level:g}" if kind != "clean" else kind
        found["error"][key] = utils.squared_error(model.reconstruct(x), some)
        found["optimised"][key] = utils.squared_error(model.draw(utils.optimize_codes(model, x)), some)
        found["input"][key] = utils.squared_error(x, some)
    mixture = utils.fit_mixture(model, data.train.images[:MIXTURE_IMAGES], NUM_COMPONENTS, seed)
    normal, other = test[1000:2000], test[2000:3000]
    scores = {"misfit": lambda x: utils.anomaly_score(model, x), "density": lambda x: utils.density_score(mixture, model, x)}
    for score, function in scores.items():
        clean, threshold = function(normal), function(data.val.images).quantile(0.99)
        found[f"auroc {score}"], found[f"flagged {score}"] = {}, {"clean": (function(test) > threshold).double().mean()}
        for kind in utils.ANOMALIES:
            anomalous = function(utils.ANOMALIES[kind](other, seed))
            found[f"auroc {score}"][kind] = auroc(clean, anomalous)
            found[f"flagged {score}"][kind] = (anomalous > threshold).double().mean()
    keep("test", name, seed, rounded(found))


def measure_left_out(data, name, seed):
    for digit in range(10):
        model = train(utils.leave_out(data, digit), name, seed, f"without{digit}_{name}_seed{seed}_best.pt", epochs=5,
                      metadata={"data": data.name, "left_out": digit})
        scores = utils.anomaly_score(model, data.test.images)
        unknown = data.test.labels == digit
        keep(f"left out, seed {seed}", name, digit, round(auroc(scores[~unknown], scores[unknown]), 4))


# how good samples are


def classifier(data):
    """A small convolutional network that names digits, and the 64 features that it does it by."""
    utils.seed_everything(0)
    features = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * 49, 64), nn.ReLU()).to(DEVICE)
    head, epochs = nn.Linear(64, 10).to(DEVICE), 4
    optimizer = torch.optim.Adam([*features.parameters(), *head.parameters()], 2e-3)
    images, labels = data.train.images.to(DEVICE), data.train.labels.to(DEVICE)
    for epoch in range(epochs):
        for step, rows in enumerate(torch.randperm(len(images)).to(DEVICE).split(128)):
            optimizer.param_groups[0]["lr"] = 2e-3 * (1 - (epoch + 128 * step / len(images)) / epochs)
            optimizer.zero_grad()
            F.cross_entropy(head(features(images[rows])), labels[rows]).backward()
            optimizer.step()

    @torch.no_grad()
    def look(x):
        h = torch.cat([features(part.to(DEVICE)) for part in x.split(1000)])
        return h.cpu().double(), head(h).softmax(1).cpu()

    accuracy = float((look(data.test.images)[1].argmax(1) == data.test.labels).double().mean())
    return look, accuracy


def frechet(a, b):
    """Distance of two sets of features as Gaussians: |m - n|^2 + tr(A + B - 2 (A B)^1/2) (Heusel et al., 2017)."""
    values, vectors = torch.linalg.eigh(a.T.cov())
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b.T.cov() @ root).clamp(min=0).sqrt().sum()
    return (a.mean(0) - b.mean(0)).square().sum() + a.T.cov().trace() + b.T.cov().trace() - 2 * cross


def measure_samples(data, names, seeds):
    look, accuracy = classifier(data)
    test, n = data.test.images, len(data.test.images)
    library = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(data.train.images.flatten(1))

    def judge(images):
        h, p = look(images)
        return {"recognised": (p.amax(1) > 0.9).double().mean(), "frechet": frechet(h, look(test)[0]),
                "nearest": library.kneighbors(images[:500].flatten(1))[0].mean()}

    keep("samples", "images", 0, rounded({"accuracy": accuracy, "test": judge(test), "validation": judge(data.val.images)}))
    for name in names:
        for seed in seeds:
            model = trained(data, name, seed)
            found = {"reconstructions": judge(model.reconstruct(test).cpu())}
            if model.variational:
                found["prior"] = judge(model.sample(n, torch.Generator().manual_seed(seed)).cpu())
            for components in (10, NUM_COMPONENTS):
                codes = utils.fit_mixture(model, data.train.images[:MIXTURE_IMAGES], components, seed).sample(n)[0]
                codes = codes[torch.randperm(n, generator=torch.Generator().manual_seed(seed))]  # they come sorted
                found[f"mixture of {components}"] = judge(model.draw(torch.tensor(codes, dtype=torch.float32)).cpu())
            keep("samples", name, seed, rounded(found))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "scores", "test", "left-out", "samples", "card"])
    parser.add_argument("--models", nargs="+", choices=MODELS, help="all that the table is about, unless some are named")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1, help="of the CPU; the committed figures were made with one")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.what == "card":
        import card

        card.write()
        sys.exit()
    compared = ["vae", "ae12", "ae32"]  # where all the others would cost more than they say
    names = args.models or (list(MODELS) if args.what in ("train", "test") else compared)
    mnist = utils.load_images("mnist", FOLDER.parent / "data")
    if args.what == "samples":
        measure_samples(mnist, names, args.seeds)
        sys.exit()
    do = {"train": trained, "scores": measure_scores, "test": measure_test, "left-out": measure_left_out}[args.what]
    for name in names:
        for seed in args.seeds[:1] if args.what == "left-out" else args.seeds:
            do(mnist, name, seed)
