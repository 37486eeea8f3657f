"""Measure every figure that README and notebooks quote, over several seeds. Not a test; hours on two cores.

    python tests/measure.py train       train VAE and autoencoder by the full recipe, seeds 1 to 3
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils

RUNS = Path("models_mnist/runs")  # ignored by git; every training there can be resumed


def train(data, kind, seed, folder, epochs=20, beta=1.0, left_out=None):
    """The model at the best epoch of one run of the recipe; a run that is there already is not trained again."""
    utils.seed_everything(seed)
    model = utils.VAE(variational=kind == "vae").to(utils.pick_device())
    if left_out is not None:
        data = data._replace(train=without(data.train, left_out), val=without(data.val, left_out))
    path = RUNS / folder / f"{kind}_{data.name}_best.pt"
    utils.fit(model, data.train.images, data.val.images, epochs=epochs, beta=beta, checkpoint=path, seed=seed,
              facts={"data": data.name, "left_out": left_out})
    return utils.load_checkpoint(path, utils.pick_device())


def without(split, digit):
    keep = split.labels != digit
    return utils.Split(split.images[keep], split.labels[keep])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train"])
    parser.add_argument("--kinds", nargs="+", default=["vae", "ae"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    args = parser.parse_args()
    data = utils.load_images("mnist")
    for seed in args.seeds:
        for kind in args.kinds:
            print(f"--- {kind}, seed {seed}", flush=True)
            train(data, kind, seed, f"seed{seed}")
