"""Measure every figure that README and notebooks quote, into models_mnist/reference.json. Not a test.

    python tests/measure.py train            VAE and autoencoder by the full recipe, seeds 0 to 2 (under an hour on two cores)
    python tests/measure.py test             the test set: loss, likelihood, robustness, anomalies; mean and spread over the seeds
    python tests/measure.py rate-distortion  five epochs each at three values of beta
    python tests/measure.py left-out         five epochs each on nine digits; the tenth is the anomaly

Trainings go to models_mnist/runs, are resumed when interrupted, and not repeated when they are there.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch
from sklearn.metrics import roc_auc_score

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils

RUNS = Path("models_mnist/runs")
REFERENCE = Path("models_mnist/reference.json")
DEVICE = utils.pick_device()
SEEDS = (0, 1, 2)


def train(data, kind, seed, folder, **options):
    """The model at the best epoch of one run of the recipe."""
    utils.seed_everything(seed)
    model = utils.VAE(variational=kind == "vae").to(DEVICE)
    path = RUNS / folder / f"{kind}_{data.name}_best.pt"
    facts = {"data": data.name, "left_out": None, **options.pop("facts", {})}
    utils.fit(model, data.train.images, data.val.images, checkpoint=path, seed=seed, facts=facts, **options)
    return utils.load_checkpoint(path, DEVICE)


def auroc(normal, anomalous):
    return float(roc_auc_score([0] * len(normal) + [1] * len(anomalous), torch.cat([normal, anomalous])))


def scores_of(model, slow=()):
    """All scores that the model can give, the likelihood's only if `slow` names them."""
    without = ("likelihood",) if model.variational else ("likelihood", "elbo")
    return [score for score in utils.SCORES if score in slow or not score.startswith(without)]


def measure_model(model, test, val, seed):
    """Everything about one model, as a flat dict of numbers."""
    found = dict(zip(("test_loss", "test_bce", "test_kl"), utils.evaluate(model, test, seed=seed)))
    some = test[:1000]
    if model.variational:
        binarised = torch.bernoulli(some, generator=torch.Generator().manual_seed(seed))
        found["nll_grey"] = -float(utils.log_likelihood(model, some, 500, seed).mean())
        found["nll_binarised"] = -float(utils.log_likelihood(model, binarised, 500, seed).mean())
        found["active_units"] = int(utils.active_units(utils.posterior(model, test)[0]).sum())
    some = test[:250]  # the search for better codes is slow
    for kind, levels in {"clean": (0,), **utils.SEVERITIES}.items():
        for level in levels:
            x = (some if kind == "clean" else utils.corrupt(some, kind, level, seed)).to(DEVICE)
            with torch.no_grad():
                refined = model.decode(utils.posterior_mode(model, x)).sigmoid()
            found[f"error {kind} {level}"] = utils.squared_error(model.reconstruct(x), some)
            found[f"refined {kind} {level}"] = utils.squared_error(refined, some)
            found[f"nothing {kind} {level}"] = utils.squared_error(x, some)
    normal, other = test[1000:2000], test[2000:3000]
    for score in scores_of(model, slow=("likelihood - entropy",) if model.variational else ()):
        clean = utils.anomaly_score(model, normal, score, seed)
        usual = utils.anomaly_score(model, val[:1000], score, seed).mean() if score == "elbo" else None
        for kind in utils.ANOMALIES:
            anomalous = utils.anomaly_score(model, utils.make_anomalies(other, kind, seed), score, seed)
            found[f"auroc {score} {kind}"] = auroc(clean, anomalous)
            if usual is not None:  # typicality: a likelihood that is too good is an anomaly, too
                found[f"auroc typicality {kind}"] = auroc((clean - usual).abs(), (anomalous - usual).abs())
    return found


def over_seeds(rows):
    return {key: {"mean": round(statistics.mean(row[key] for row in rows), 4),
                  "std": round(statistics.stdev(row[key] for row in rows), 4)} for key in rows[0]}


def keep(**sections):
    there = json.loads(REFERENCE.read_text()) if REFERENCE.exists() else {}
    part = REFERENCE.with_suffix(".part")
    part.write_text(json.dumps({**there, **sections}, indent=1) + "\n")
    part.replace(REFERENCE)


def measure_test(data, kinds, seeds):
    for kind in kinds:
        rows = []
        for seed in seeds:
            rows.append(measure_model(train(data, kind, seed, f"seed{seed}"), data.test.images, data.val.images, seed))
            print(kind, seed, json.dumps(rows[-1]), flush=True)
        keep(**{f"{kind}_{data.name}": {"seeds": seeds, "command": "python tests/measure.py test", **over_seeds(rows)}})


def measure_rate_distortion(data):
    points = []
    for beta in (0.25, 1.0, 4.0):
        model = train(data, "vae", 0, f"beta{beta:g}", epochs=5, beta=beta)
        loss = utils.evaluate(model, data.test.images)
        points.append({"beta": beta, "bce": round(loss.bce, 3), "kl": round(loss.kl, 3)})
        print(points[-1], flush=True)
    keep(rate_distortion=points)


def without(split, digit):
    return utils.Split(split.images[split.labels != digit], split.labels[split.labels != digit])


def measure_left_out(data, digits):
    for digit in digits:
        nine = data._replace(train=without(data.train, digit), val=without(data.val, digit))
        known, unknown = data.test.images[data.test.labels != digit], data.test.images[data.test.labels == digit]
        for kind in ("vae", "ae"):
            model = train(nine, kind, 0, f"without{digit}", epochs=5, facts={"left_out": digit})
            found = {s: round(auroc(utils.anomaly_score(model, known, s), utils.anomaly_score(model, unknown, s)), 4)
                     for s in scores_of(model)}
            print(digit, kind, found, flush=True)
            there = json.loads(REFERENCE.read_text()).get("left_out", {}) if REFERENCE.exists() else {}
            there.setdefault(str(digit), {})[kind] = found
            keep(left_out=dict(sorted(there.items())))  # two processes may share the digits


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "test", "rate-distortion", "left-out"])
    parser.add_argument("--kinds", nargs="+", default=["vae", "ae"], choices=["vae", "ae"])
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--digits", nargs="+", type=int, default=list(range(10)))
    args = parser.parse_args()
    mnist = utils.load_images("mnist")
    if args.what == "train":
        for seed in args.seeds:
            for kind in args.kinds:
                print(f"--- {kind}, seed {seed}", flush=True)
                train(mnist, kind, seed, f"seed{seed}")
    elif args.what == "test":
        measure_test(mnist, args.kinds, args.seeds)
    elif args.what == "rate-distortion":
        measure_rate_distortion(mnist)
    else:
        measure_left_out(mnist, args.digits)
