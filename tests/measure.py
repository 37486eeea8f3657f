"""Measure every number that the pages quote, into models_mnist/reference.json. Not a test.

    python tests/measure.py train       the models below by the full recipe (7 minutes each)
    python tests/measure.py left-out    five epochs on nine digits; the tenth is the anomaly
    python tests/measure.py edits       utils.py with one line changed, trained like the VAE, and
                                        by the run of under a minute
    python tests/measure.py scores      anomaly scores and mixtures, compared on validation images
    python tests/measure.py test        the test set: loss, robustness, anomalies
    python tests/measure.py likelihood  importance-sampled log-likelihood of the VAE
    python tests/measure.py compare     differences between models, image by image (needs `test`)
    python tests/measure.py samples     how good samples are, by a classifier
    python tests/measure.py references  saves three runs of seed 0 as the reference checkpoints
    python tests/measure.py card        writes tables and verdict of the pages from all this

The first three train, into models_mnist/runs. An interrupted training is resumed, a finished one
is never repeated: to repeat it, delete its file. All other commands load what was trained.
Figures are kept seed by seed, so that two processes can share the work by --models and --seeds.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import filelock
import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from scipy.stats import rankdata
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "models_mnist"
RUNS = FOLDER / "runs"
DEVICE = utils.pick_device()


# ---------------------------------------- Models ----------------------------------------


class NoisyCode(utils.VAE):
    """An autoencoder whose code carries Gaussian noise of a fixed standard deviation, 0.3.

    Its KL is 0.5 mu^2 plus a constant: the constant-variance VAE of Ghosh et al. (2020).
    """

    def encode(self, x):
        mu, logvar = super().encode(x)
        return mu, torch.full_like(logvar, 2 * math.log(0.3))


def denoising(model, x, generator, beta, progress):
    """The objective of a training step that gives back the clean image from one with noise.

    The noise is Gaussian; its standard deviation is drawn for each image, uniformly from 0 to 0.3.
    """
    level = 0.3 * torch.rand((len(x), 1, 1, 1), generator=generator, device=x.device)
    noise = torch.randn(x.shape, generator=generator, device=x.device)
    noisy = (x + level * noise).clamp(0, 1)
    logits, mu, logvar = model(noisy, generator)
    return utils.vae_loss(logits, x, mu, logvar, beta)


class Recipe(NamedTuple):
    """What differs from the README's recipe: arguments of the class and of `utils.fit`."""

    arguments: dict = {}
    training: dict = {}
    model_class: type[utils.VAE] = utils.VAE
    seeds: tuple = (0, 1, 2)


MODELS = {
    "vae": Recipe(),
    "ae12": Recipe({"variational": False, "latent_dim": 12}),
    "ae32": Recipe({"variational": False}),
    "ae32 noisy code": Recipe(model_class=NoisyCode),
    "ae32 denoising": Recipe({"variational": False}, {"objective": denoising}),
    "vae denoising": Recipe({}, {"objective": denoising}),
    "vae 2d": Recipe({"latent_dim": 2}, seeds=(0,)),
    "ae8": Recipe({"variational": False, "latent_dim": 8}, seeds=(0,)),
    "ae16": Recipe({"variational": False, "latent_dim": 16}, seeds=(0,)),
    "vae beta 0.25": Recipe({}, {"beta": 0.25}, seeds=(0,)),
    "vae beta 4": Recipe({}, {"beta": 4.0}, seeds=(0,)),
}
THREE_SEEDS = list(MODELS)[:6]
SMALL = ["vae", "ae12", "ae32"]


def run_path(name, seed, left_out=None):
    stem = f"{name.replace(' ', '_')}_seed{seed}"
    if left_out is not None:
        stem = f"without{left_out}_{stem}"
    return RUNS / f"{stem}_best.safetensors"


def is_finished(path):
    """Whether a run is there and has all its epochs, whatever code made it."""
    if not path.exists():
        return False
    known = utils.read_metadata(path)
    return len(known["history"]) == known["settings"]["epochs"]


def train(data, name, seed, left_out=None, **training):
    """Train a model, unless its run is finished."""
    path = run_path(name, seed, left_out)
    if is_finished(path):
        print(f"{path.name} is finished, and not trained again", flush=True)
        return
    print(f"training {path.name}", flush=True)
    recipe = MODELS[name]
    utils.seed_everything(seed)
    model = recipe.model_class(**recipe.arguments).to(DEVICE)
    utils.fit(
        model,
        data.train.images,
        data.val.images,
        checkpoint=path,
        seed=seed,
        metadata={"data": data.name, "left_out": left_out},
        **recipe.training,
        **training,
    )


def load(name, seed, left_out=None):
    """The model at the best epoch of a finished run; the program ends if there is none."""
    path = run_path(name, seed, left_out)
    if not is_finished(path):
        sys.exit(missing(name, seed, left_out))
    return utils.load_checkpoint(path, DEVICE, MODELS[name].model_class)


def missing(name, seed, left_out=None):
    """The sentence that says that a run is missing, and what trains it."""
    command = "train" if left_out is None else "left-out"
    return (
        f"{run_path(name, seed, left_out)} is missing or not finished: "
        f'python tests/measure.py {command} --models "{name}" --seeds {seed}'
    )


REFERENCES = {
    "vae_mnist_reference": "vae",
    "ae_mnist_reference": "ae32",
    "vae_mnist_2d_reference": "vae 2d",
}


def save_references():
    for stem, name in REFERENCES.items():
        path = FOLDER / f"{stem}.safetensors"
        beside = FOLDER / f"{stem}_new.safetensors"  # no run may write to a reference
        utils.save_checkpoint(beside, load(name, 0))
        beside.replace(path)
        print(f"{run_path(name, 0).name} is now {path.name}")


# ---------------------------------------- Edits ----------------------------------------


class Edit(NamedTuple):
    """What the README invites to change: as it says so, and as replacements in utils.py."""

    text: str
    replacements: list


EDITS = {
    "none": Edit("none", []),
    "relu": Edit("`nn.GELU()` → `nn.ReLU()`", [("nn.GELU()", "nn.ReLU()")]),
    "no batch normalisation": Edit(
        "no batch normalisation: `nn.BatchNorm2d(` → `nn.Identity(`",
        [("nn.BatchNorm2d(", "nn.Identity(")],
    ),
    "constant rate": Edit(
        "a constant rate: `learning_rate_at` returns `learning_rate`",
        [
            ("return learning_rate * (1 + 10 * progress)", "return learning_rate"),
            ("return learning_rate * (2 * (1 - progress) / 0.9)", "return learning_rate"),
        ],
    ),
    "no running average": Edit(
        "no running average: in `_running_average`, `weight = 1.0`",
        [("weight = min(1.0, 10 * _averaging_interval(steps) / steps)", "weight = 1.0")],
    ),
    "no weight decay": Edit(
        "no weight decay: `WEIGHT_DECAY = 0.0`", [("WEIGHT_DECAY = 0.1", "WEIGHT_DECAY = 0.0")]
    ),
    "half the width": Edit("dense layers of half the width: `384` → `192`", [("384", "192")]),
    "latent 16": Edit(
        "16 latent dimensions: `-p LATENT_DIM 16`, no edit",
        [("latent_dim=32", "latent_dim=16")],
    ),
    "warm-up": Edit(
        "KL warm-up: in the last line of `elbo`, `beta` → `beta * min(1, 5 * progress)`",
        [
            (
                "return vae_loss(logits, x, mu, logvar, beta)",
                "return vae_loss(logits, x, mu, logvar, beta * min(1, 5 * progress))",
            )
        ],
    ),
}
TRAIN_EDITED = """
import sys
import torch
import utils

checkpoint, data_name, data_folder, seed, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
data = utils.load_images(data_name, data_folder)
utils.seed_everything(int(seed))
model = utils.VAE().to(utils.pick_device())
parameters = sum(weights.numel() for weights in model.parameters())
metadata = {"data": data.name, "left_out": None, "parameters": parameters}
images = (data.train.images, data.val.images)
utils.fit(model, *images, checkpoint=checkpoint, seed=int(seed), metadata=metadata)
"""


def edited(edit):
    """The text of utils.py after an edit; ValueError if the edit does not fit it."""
    text = (ROOT / "utils.py").read_text(encoding="utf-8")
    for old, new in edit.replacements:
        if old not in text:
            raise ValueError(f"utils.py does not contain {old!r}")
        text = text.replace(old, new)
    return text


def measure_edit(name, data_name, seed):
    """Train an edited copy of utils.py in a process of its own; keep its validation loss."""
    path = run_path(f"edit {name} {data_name}", seed)
    if is_finished(path):
        print(f"{path.name} is finished, and not trained again", flush=True)
    else:
        print(f"training {path.name}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "utils.py").write_text(edited(EDITS[name]), encoding="utf-8")
            arguments = [path, data_name, ROOT / "data", seed, torch.get_num_threads()]
            command = [sys.executable, "-c", TRAIN_EDITED, *map(str, arguments)]
            subprocess.run(command, cwd=folder, check=True)
    known = utils.read_metadata(path)
    figures = {
        "edit": EDITS[name].text,
        "validation loss": known["val_loss"],
        "parameters": known["parameters"],
        "seconds": sum(row["seconds"] for row in known["history"]),
    }
    keep(figures, f"edits, {data_name}", name, seed)


# ---------------------------------------- Records ----------------------------------------


def read_reference():
    path = FOLDER / "reference.json"
    if not path.exists():
        return {}
    return json.loads(path.read_text(encoding="utf-8"))


def keep(figures, section, name, key):
    """Enter figures at section / name / key of reference.json; two processes may do so at a time.

    `key` is a seed, or what else the rows of a section are told apart by.
    """
    path = FOLDER / "reference.json"
    with filelock.FileLock(FOLDER / ".reference.lock"):
        reference = read_reference()
        rows = reference.setdefault(section, {}).setdefault(name, {})
        rows[str(key)] = rounded(figures)
        reference[section][name] = dict(sorted(rows.items()))
        part = path.with_suffix(".part")
        part.write_text(json.dumps(reference, indent=1) + "\n", encoding="utf-8")
        part.replace(path)
    print(f"{section}, {name}, {key}: kept", flush=True)


def rounded(figures):
    """Numbers to five decimals, in dictionaries and lists, too; text and None stay."""
    if isinstance(figures, dict):
        return {key: rounded(value) for key, value in figures.items()}
    if isinstance(figures, list):
        return [rounded(value) for value in figures]
    if figures is None or isinstance(figures, str | int):
        return figures
    return round(float(figures), 5)


# What `test` finds out about every single image: arrays by quantity and by kind of image, such as
# arrays["error"]["noise 0.3"], (10,000,). `compare` pairs those of two models.


def arrays_path(name, seed):
    return RUNS / f"{name.replace(' ', '_')}_seed{seed}_test.npz"


def save_arrays(arrays, path):
    flat = {}
    for quantity, kinds in arrays.items():
        for kind, values in kinds.items():
            flat[f"{quantity}/{kind}"] = values
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **flat)


def load_arrays(path):
    arrays = {}
    with np.load(path) as file:
        for key in file.files:
            quantity, kind = key.split("/")
            arrays.setdefault(quantity, {})[kind] = file[key]
    return arrays


# ---------------------------------------- Statistics ----------------------------------------


def auroc(normal, anomalous):
    """The probability that an anomaly scores higher than a normal image; a tie counts half."""
    is_anomalous = np.repeat([0, 1], [len(normal), len(anomalous)])
    return float(roc_auc_score(is_anomalous, np.concatenate([normal, anomalous])))


def placements(normal, anomalous):
    """Placement values (DeLong et al., 1988); the mean of either array is the AUROC.

    (M,): for each anomaly, the share of the normal images that score lower.
    (N,): for each normal image, the share of the anomalies that score higher.
    """
    ranks = rankdata(np.concatenate([normal, anomalous]))
    normal_below = ranks[len(normal) :] - rankdata(anomalous)
    anomalous_below = ranks[: len(normal)] - rankdata(normal)
    of_anomalous = normal_below / len(normal)
    of_normal = 1 - anomalous_below / len(anomalous)
    return of_anomalous, of_normal


def standard_error(values):
    return float(np.std(values, ddof=1) / math.sqrt(len(values)))


def mean_difference(a, b):
    """The mean of a - b, paired image by image, and its standard error over images."""
    return float(np.mean(a - b)), standard_error(a - b)


def auroc_difference(normal_a, anomalous_a, normal_b, anomalous_b, same_images):
    """The AUROC of scores a less that of scores b on the same images, and its standard error.

    `same_images`: every anomaly was made of the normal image in the same place. The two are one
    cluster then, and their placement values are added before the variance is taken (Obuchowski,
    1997). Otherwise normal images and anomalies are independent, and their variances are added.
    """
    of_anomalous_a, of_normal_a = placements(normal_a, anomalous_a)
    of_anomalous_b, of_normal_b = placements(normal_b, anomalous_b)
    of_anomalous = of_anomalous_a - of_anomalous_b
    of_normal = of_normal_a - of_normal_b
    if same_images:
        error = standard_error(of_anomalous + of_normal)
    else:
        error = math.hypot(standard_error(of_anomalous), standard_error(of_normal))
    return float(of_anomalous.mean()), error


def standing(differences, errors, higher_is_better):
    """Where the first of two models stands, by their differences and standard errors per seed.

    "ahead" or "behind": in every seed, by more than two standard errors. Else "undecided".
    """
    pairs = list(zip(differences, errors, strict=True))
    better = all(difference > 2 * error for difference, error in pairs)
    worse = all(difference < -2 * error for difference, error in pairs)
    if not higher_is_better:
        better, worse = worse, better
    if better:
        return "ahead"
    return "behind" if worse else "undecided"


def frechet_distance(a, b):
    """Between two sets of features (N, D) taken as Gaussians (Heusel et al., 2017).

    |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^1/2), A and B being the covariances.
    """
    mean_term = (a.mean(0) - b.mean(0)).square().sum()
    cov_a = a.T.cov()
    cov_b = b.T.cov()
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp(min=0).sqrt().sum()
    return float(mean_term + cov_a.trace() + cov_b.trace() - 2 * cross)


# ------------------------------------- What is chosen -------------------------------------
# On validation images alone.

TUNED = list(utils.ANOMALIES)[:7]  # kinds on which the score is chosen; all others are reported
COSTS = ("thicker", "two overlaid", "scikit-learn's digits")  # reported beside them
COMPONENTS = (1, 5, 10, 20, 50, 100)
NUM_COMPONENTS = 50  # of the mixture
TUNING_IMAGES = 1000  # validation images on which scores are chosen, and as many anomalous
MIXTURE_IMAGES = 20_000  # training images it is fitted to: fewer than all, for speed


def mixture_of(model, data, seed, num_components):
    return utils.fit_mixture(model, data.train.images[:MIXTURE_IMAGES], num_components, seed)


def density_score(mixture, codes):
    """How improbable codes (N, D) are under a mixture of `utils.fit_mixture`: -log p, (N,), nats.

    Higher is more anomalous.
    """
    return -torch.from_numpy(mixture.score_samples(codes.cpu().double().numpy()))


def candidate_scores(model, mixture, images):
    """The anomaly scores to choose from, by name, each (N,)."""
    codes, rebuilt = encode_and_decode(model, images)
    bce = F.binary_cross_entropy(rebuilt, images, reduction="none").flatten(1).sum(1).double()
    entropy = F.binary_cross_entropy(images, images, reduction="none").flatten(1).sum(1).double()
    chosen = utils.reconstruction_score(rebuilt, images)
    ink = images.flatten(1).sum(1).double()
    window = chosen * (1 + ink).sqrt()
    scores = {
        "squared error": utils.squared_error(rebuilt, images),
        "BCE of the decoded mean": bce,
        "the same less the image's entropy": bce - entropy,
        "largest window error": window,
        "largest window error / (1 + ink)": window / (1 + ink),
        "largest window error / √(1 + ink): `anomaly_score`": chosen,
        "density of the codes": density_score(mixture, codes),
    }
    if model.variational:
        loss = utils.loss_per_image(model, images).loss
        scores["-ELBO"] = loss
        scores["-ELBO less entropy"] = loss - entropy
    return {name: values.numpy() for name, values in scores.items()}


def measure_scores(data, name, seed):
    """How well each score tells the tuned kinds of anomaly, and each mixture describes codes."""
    model = load(name, seed)
    codes = utils.posterior(model, data.val.images)[0].cpu().double().numpy()
    log_density = {}
    for count in COMPONENTS:
        fitted = mixture_of(model, data, seed, count)
        log_density[str(count)] = fitted.score(codes)  # nats per validation image
        if count == NUM_COMPONENTS:
            mixture = fitted
    normal = data.val.images[:TUNING_IMAGES]
    others = data.val.images[TUNING_IMAGES : 2 * TUNING_IMAGES]
    of_normal = candidate_scores(model, mixture, normal)

    def areas(kinds):
        """{score: {kind: AUROC}}"""
        found = {score: {} for score in of_normal}
        for kind in kinds:
            anomalous = candidate_scores(model, mixture, ANOMALIES[kind](others, seed))
            for score, values in anomalous.items():
                found[score][kind] = auroc(of_normal[score], values)
        return found

    tuned = areas(TUNED)
    for of_kinds in tuned.values():
        of_kinds["mean"] = statistics.mean(of_kinds.values())
    figures = {"mixture": log_density, "auroc": tuned, "costs": areas(COSTS)}
    keep(figures, "scores", name, seed)


# ------------------------------------- Foreign images -------------------------------------
# Nothing was chosen on them. Each function returns (N, 1, 28, 28), brought to MNIST's size.

TWINS = set("OoQIlZzSsbGBgq")  # letters that are digits, too: 0 0 0 1 1 2 2 5 5 6 6 8 9 9
LETTERS = sorted(set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz") - TWINS)
FONTS = (  # they come with Matplotlib
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSans-BoldOblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSansMono-Oblique",
    "DejaVuSansMono-BoldOblique",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-Italic",
    "DejaVuSerif-BoldItalic",
)


def letters():
    """38 letters in each of 12 fonts."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    images = []
    for name in FONTS:
        font = ImageFont.truetype(folder / f"{name}.ttf", 80)
        for letter in LETTERS:
            canvas = Image.new("L", (160, 160))
            ImageDraw.Draw(canvas).text((40, 30), letter, fill=255, font=font)
            images.append(to_mnist(canvas))
    return torch.stack(images)


def strokes(n=1000, seed=0):
    """Random smooth strokes: sums of five slow waves in x and y, drawn with a pen."""
    rng = np.random.default_rng(seed)
    time_along = np.linspace(0, 1, 200)
    frequency = np.arange(1, 6)[:, None]
    images = []
    for _ in range(n):
        phase = rng.uniform(0, 2 * np.pi, (2, 5, 1))
        amplitude = rng.normal(size=(2, 5, 1)) / frequency
        waves = amplitude * np.sin(np.pi * frequency * time_along + phase)  # (2, 5, 200)
        points = waves.sum(1)  # (2, 200): x and y
        points -= points.min(1, keepdims=True)
        points *= 100 / points.max()
        canvas = Image.new("L", (160, 160))
        pen = int(rng.integers(10, 17))
        path = [tuple(point) for point in (points.T + 25).tolist()]
        ImageDraw.Draw(canvas).line(path, fill=255, width=pen, joint="curve")
        images.append(to_mnist(canvas))
    return torch.stack(images)


def sklearn_digits():
    """The 1,797 digits of 8x8 pixels that come with scikit-learn."""
    pictures = torch.tensor(load_digits().images, dtype=torch.float32) / 16
    return torch.stack([utils._like_mnist(ink, contrast=2) for ink in pictures])


def to_mnist(canvas):
    ink = torch.from_numpy(np.asarray(canvas, dtype=np.float32)) / 255
    return utils._like_mnist(ink, contrast=1)


def line_through(images, seed=0):
    """A straight line through the middle of each digit, at a random angle, as thick as a pen."""
    generator = torch.Generator().manual_seed(seed)
    angle = math.pi * torch.rand((len(images), 1, 1, 1), generator=generator)
    row, column = torch.meshgrid(torch.arange(28) - 13.5, torch.arange(28) - 13.5, indexing="ij")
    across = (row * angle.cos() - column * angle.sin()).abs()  # distance from the line
    along = (row * angle.sin() + column * angle.cos()).abs()
    line = (1.8 - across).clamp(0, 1) * (along < 11)
    return torch.maximum(images, line)


def thinner(images):
    ground = 1 - F.pad(images, (0, 1, 0, 1))
    return 1 - F.max_pool2d(ground, 2, stride=1)


INDEPENDENT = {  # functions of the test digits and a seed that do not look at the digits
    "scikit-learn's digits": lambda x, seed: sklearn_digits(),
    "letters": lambda x, seed: letters(),
    "random strokes": lambda x, seed: strokes(seed=seed),
}
ANOMALIES = {
    **utils.ANOMALIES,
    "transposed": lambda x, seed: x.transpose(2, 3),
    "thinner": lambda x, seed: thinner(x),
    "half": lambda x, seed: F.pad(x[..., :14], (0, 14)),
    "shifted": lambda x, seed: F.pad(x, (2, -2, 2, -2)),
    **INDEPENDENT,
    "line through": line_through,
}


# ------------------------------------ What is reported ------------------------------------
# On all 10,000 test images, except where many samples make that too slow.

SCORES = ("reconstruction", "density")
LEVELS = {"clean": ("noise", 0.0)}  # a kind and its level by their common name
for _kind, _corruption in utils.CORRUPTIONS.items():
    for _level in _corruption.levels:
        LEVELS[f"{_kind} {_level:g}"] = (_kind, _level)

SCORED = {"clean": "clean", "noise 0.3": "noisy", "occlusion 8": "occluded"}  # also as anomalies


def spread_evenly(images, n):
    """n of the images, spread evenly over them: the first ones of MNIST's test set are easier."""
    return images[:: max(1, len(images) // n)]


def measure_images(data, model, seed):
    """Errors and anomaly scores of every image, from one reconstruction of each."""
    mixture = mixture_of(model, data, seed, NUM_COMPONENTS)
    test = data.test.images
    arrays = {"input": {}, "error": {}, "reconstruction": {}, "density": {}}

    def enter_scores(name, images, codes, rebuilt):
        arrays["reconstruction"][name] = utils.reconstruction_score(rebuilt, images).numpy()
        arrays["density"][name] = density_score(mixture, codes).numpy()

    for name, (kind, level) in LEVELS.items():
        images = utils.corrupt(test, kind, level, seed)
        codes, rebuilt = encode_and_decode(model, images)
        arrays["input"][name] = utils.squared_error(images, test).numpy()
        arrays["error"][name] = utils.squared_error(rebuilt, test).numpy()
        if name in SCORED:
            enter_scores(SCORED[name], images, codes, rebuilt)

    for name, make in ANOMALIES.items():
        if name not in SCORED.values():
            images = make(test, seed)
            enter_scores(name, images, *encode_and_decode(model, images))

    codes, rebuilt = encode_and_decode(model, data.val.images)
    enter_scores("validation", data.val.images, codes, rebuilt)
    errors = utils.squared_error(rebuilt, data.val.images)
    arrays["error"]["validation"] = errors.numpy()
    return arrays


def encode_and_decode(model, images):
    """The codes mu (N, D) and the reconstructions (N, 1, 28, 28), on the CPU."""
    codes, _ = utils.posterior(model, images)
    return codes.cpu(), model.decode_images(codes).cpu()


def means(kinds):
    return {kind: values.mean() for kind, values in kinds.items()}


def summarise(arrays):
    """The means over images, AUROCs, and shares flagged at a threshold chosen on validation."""
    figures = {"error": means(arrays["error"])}
    for score in SCORES:
        threshold = np.quantile(arrays[score]["validation"], 0.99)
        areas = {}
        flagged = {}
        normal = arrays[score]["clean"]
        flagged["clean"] = np.mean(normal > threshold)
        for kind in ANOMALIES:
            anomalous = arrays[score][kind]
            flagged[kind] = np.mean(anomalous > threshold)
            areas[kind] = auroc(normal, anomalous)
        figures[f"auroc {score}"] = areas
        figures[f"flagged {score}"] = flagged
    return figures


def labels_by_neighbours(train_features, train_labels, test_features, test_labels):
    """The share of test images with the label of most of their 5 nearest training images."""
    neighbours = KNeighborsClassifier(5).fit(train_features, train_labels)
    return neighbours.score(test_features, test_labels)


def active_units(codes):
    """How many dimensions of codes (N, D) vary by more than 0.01 (Burda et al., 2015)."""
    return int((codes.var(0) > 0.01).sum())


def measure_test(data, name, seed):
    """The figures of a model; those under corruptions and of anomalies if it has three seeds."""
    model = load(name, seed)
    test = data.test
    loss = utils.loss_per_image(model, test.images, seed=seed)
    codes, _ = utils.posterior(model, test.images)
    some = data.train.images[:10_000]
    labels = data.train.labels[:10_000]
    some_codes, _ = utils.posterior(model, some)
    figures = {
        "validation loss": model.metadata["val_loss"],
        "loss": loss.loss.mean(),
        "loss, standard error": standard_error(loss.loss.numpy()),
        "bce": loss.bce.mean(),
        "kl": loss.kl.mean(),
        "active units": active_units(codes),
        "labels by 5 nearest codes": labels_by_neighbours(
            some_codes.cpu(), labels, codes.cpu(), test.labels
        ),
    }
    if name not in THREE_SEEDS:
        errors = utils.squared_error(model.reconstruct(test.images), test.images)
        keep({**figures, "error": {"clean": errors.mean()}}, "test", name, seed)
        return
    arrays = measure_images(data, model, seed)
    save_arrays(arrays, arrays_path(name, seed))
    keep({**figures, **summarise(arrays)}, "test", name, seed)
    keep({"error": means(arrays["input"])}, "test", "nothing", seed)


def measure_likelihood(data, name, seed):
    """-ELBO and -log p(x) of 1,000 test images, grey and binarised, with standard errors."""
    model = load(name, seed)
    grey = spread_evenly(data.test.images, 1000)
    binarised = torch.bernoulli(grey, generator=torch.Generator().manual_seed(seed))
    figures = {}
    for kind, images in (("grey", grey), ("binarised", binarised)):
        loss = utils.loss_per_image(model, images, seed=seed).loss
        nll = -utils.log_likelihood(model, images, 500, seed)
        for key, values in ((f"loss {kind}", loss), (f"nll {kind}", nll)):
            figures[key] = values.mean()
            figures[f"{key}, standard error"] = standard_error(values.numpy())
    keep(figures, "likelihood", name, seed)


def measure_left_out(data, name, seed):
    """Five epochs without one digit; its test images against all others, by reconstruction."""
    for digit in range(10):
        train(utils.leave_out(data, digit), name, seed, digit, epochs=5)
        scores = utils.anomaly_score(load(name, seed, digit), data.test.images).numpy()
        unknown = (data.test.labels == digit).numpy()
        keep(auroc(scores[~unknown], scores[unknown]), f"left out, seed {seed}", name, digit)


# ------------------------------------- Comparisons -------------------------------------


def compare(jobs):
    """The VAE less each other model and less doing nothing, image by image, seed by seed.

    A model is compared on the seeds of `jobs`, (name, seed) each, of which it and the VAE have been
    measured.
    """
    arrays = {}
    for name, seed in jobs:
        path = arrays_path(name, seed)
        if path.exists():
            arrays.setdefault(name, {})[seed] = load_arrays(path)
        else:
            print(f"{name}, seed {seed}, is left out: python tests/measure.py test measures it")
    vae = arrays.pop("vae")
    # Doing nothing is a model that gives back its input: its errors are those of the input.
    nothing = {seed: {"error": of_seed["input"]} for seed, of_seed in vae.items()}
    for name, other in {**arrays, "nothing": nothing}.items():
        common = [seed for seed in vae if seed in other]
        pairs = [(vae[seed], other[seed]) for seed in common]
        keep(compare_errors(pairs), "compare", name, "error")
        if name != "nothing":
            for score in SCORES:
                keep(compare_scores(pairs, score), "compare", name, f"auroc {score}")


def compare_errors(pairs):
    """For each corruption: differences of the squared errors, as `comparison` returns them.

    `pairs` holds, for each seed, the arrays of the two models.
    """
    found = {}
    for level in LEVELS:
        differences = [mean_difference(a["error"][level], b["error"][level]) for a, b in pairs]
        found[level] = comparison(differences, higher_is_better=False)
    return found


def compare_scores(pairs, score):
    """For each kind of anomaly: differences of the AUROCs, as `comparison` returns them."""
    found = {}
    for kind in ANOMALIES:
        same_images = kind not in INDEPENDENT
        differences = []
        for a, b in pairs:
            scores = (a[score]["clean"], a[score][kind], b[score]["clean"], b[score][kind])
            differences.append(auroc_difference(*scores, same_images))
        found[kind] = comparison(differences, higher_is_better=True)
    return found


def comparison(differences, higher_is_better):
    """One seed's difference and standard error over images after the other, and the verdict."""
    values = [difference for difference, _ in differences]
    errors = [error for _, error in differences]
    return {
        "difference": values,
        "standard error": errors,
        "standing": standing(values, errors, higher_is_better),
    }


# --------------------------------------- Samples ---------------------------------------


class Classifier(nn.Module):
    """A small convolutional network that names digits, and the 64 features it does it by."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),  # (B, 1, 28, 28) -> (B, 16, 28, 28)
            nn.ReLU(),
            nn.MaxPool2d(2),  # -> (B, 16, 14, 14)
            nn.Conv2d(16, 32, 3, padding=1),  # -> (B, 32, 14, 14)
            nn.ReLU(),
            nn.MaxPool2d(2),  # -> (B, 32, 7, 7)
            nn.Flatten(),
            nn.Linear(32 * 49, 64),  # -> (B, 64)
            nn.ReLU(),
        )
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        return self.head(self.features(x))

    @torch.no_grad()
    def look_at(self, images):
        """Features (N, 64) and probabilities (N, 10), on the CPU."""
        features = torch.cat([self.features(part.to(DEVICE)) for part in images.split(1000)])
        probabilities = self.head(features).softmax(1)
        return features.cpu().double(), probabilities.cpu()


def train_classifier(data, epochs=4):
    utils.seed_everything(0)
    classifier = Classifier().to(DEVICE)
    optimizer = torch.optim.Adam(classifier.parameters(), 2e-3)
    images = data.train.images.to(DEVICE)
    labels = data.train.labels.to(DEVICE)
    for epoch in range(epochs):
        order = torch.randperm(len(images)).to(DEVICE)
        for step, rows in enumerate(order.split(128)):
            done = (epoch + 128 * step / len(images)) / epochs
            optimizer.param_groups[0]["lr"] = 2e-3 * (1 - done)
            loss = F.cross_entropy(classifier(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return classifier


def quality(images, classifier, test_features, library):
    """Share named with more than 0.9 confidence, Fréchet distance, distance to training images."""
    features, probabilities = classifier.look_at(images)
    confident = probabilities.amax(1) > 0.9
    distances, _ = library.kneighbors(images[:500].flatten(1))
    return {
        "recognised": confident.double().mean(),
        "frechet": frechet_distance(features, test_features),
        "nearest": distances.mean(),
    }


def draw_from(mixture, model, n, seed):
    """n images decoded from codes of a mixture, in random order: its codes come sorted."""
    codes, _ = mixture.sample(n)
    order = np.random.default_rng(seed).permutation(n)
    return model.decode_images(codes[order]).cpu()


def digits_on_demand(data, model, classifier, seed, n=1000, num_components=10):
    """For each digit: a mixture fitted to the codes of its training images alone draws n of it.

    The share of them that the classifier takes for the digit asked for.
    """
    shares = {}
    for digit in range(10):
        images = data.train.images[data.train.labels == digit]
        mixture = utils.fit_mixture(model, images, num_components, seed)
        _, probabilities = classifier.look_at(draw_from(mixture, model, n, seed))
        named = probabilities.argmax(1)
        shares[str(digit)] = (named == digit).double().mean()
    shares["mean"] = statistics.mean(float(share) for share in shares.values())
    return shares


def measure_samples(data, jobs):
    classifier = train_classifier(data)
    test = data.test.images
    test_features, probabilities = classifier.look_at(test)
    library = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(data.train.images.flatten(1))

    def judge(images):
        return quality(images, classifier, test_features, library)

    pixels = labels_by_neighbours(
        data.train.images[:10_000].flatten(1),
        data.train.labels[:10_000],
        test.flatten(1),
        data.test.labels,
    )
    right = probabilities.argmax(1) == data.test.labels
    figures = {
        "accuracy": right.double().mean(),
        "labels by 5 nearest images": pixels,
        "test": judge(test),
        "validation": judge(data.val.images),
    }
    keep(figures, "samples", "images", 0)
    for name, seed in jobs:
        model = load(name, seed)
        figures = {"reconstructions": judge(model.reconstruct(test).cpu())}
        if model.variational:
            generator = torch.Generator().manual_seed(seed)
            figures["prior"] = judge(model.sample(len(test), generator).cpu())
        for count in (10, NUM_COMPONENTS):
            mixture = mixture_of(model, data, seed, count)
            figures[f"mixture of {count}"] = judge(draw_from(mixture, model, len(test), seed))
        keep(figures, "samples", name, seed)
        on_demand = digits_on_demand(data, model, classifier, seed)
        keep(on_demand, "digits on demand", name, seed)


# --------------------------------------- Commands ---------------------------------------

DEFAULT_MODELS = {  # of each command; those of one seed are trained and measured once
    "train": list(MODELS),
    "left-out": SMALL,
    "scores": SMALL,
    "test": list(MODELS),
    "likelihood": ["vae"],
    "compare": THREE_SEEDS,
    "samples": SMALL,
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = [*DEFAULT_MODELS, "edits", "references", "card"]
    parser.add_argument("command", choices=commands)
    parser.add_argument("--models", nargs="+", choices=MODELS, help="instead of the usual ones")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--edits", nargs="+", choices=EDITS, default=list(EDITS))
    parser.add_argument("--threads", type=int, default=1, help="the committed figures: one")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    run(arguments.command, arguments.models, arguments.seeds, arguments.edits)


def is_there(name, seed):
    """Whether a run is finished; if not, a line says so, and the others go on."""
    if is_finished(run_path(name, seed)):
        return True
    print(f"left out: {missing(name, seed)}", flush=True)
    return False


def run(command, names, seeds, edits):
    if command == "card":
        import card

        card.write()
        return
    if command == "references":
        save_references()
        return
    if command == "edits":
        for name in edits:
            for seed in seeds:
                measure_edit(name, "mnist5k", seed)
            if name != "none":  # that is the VAE of `train`
                measure_edit(name, "mnist", seeds[0])  # one seed: it takes as long as the VAE
        return
    if command == "left-out":
        seeds = seeds[:1]  # ten trainings each
    jobs = []
    for name in names or DEFAULT_MODELS[command]:
        jobs += [(name, seed) for seed in seeds if seed in MODELS[name].seeds]
    if command == "compare":
        compare(jobs)
        return
    if command not in ("train", "left-out"):
        jobs = [job for job in jobs if is_there(*job)]
    data = utils.load_images("mnist", ROOT / "data")
    if command == "samples":
        measure_samples(data, jobs)
        return
    measure = {
        "train": train,
        "left-out": measure_left_out,
        "scores": measure_scores,
        "test": measure_test,
        "likelihood": measure_likelihood,
    }[command]
    for name, seed in jobs:
        measure(data, name, seed)


if __name__ == "__main__":
    main()
