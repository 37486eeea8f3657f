"""The README's blocks of Python do what they say."""

import re

import torch
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks():
    return re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def block_with(text):
    found = [block for block in blocks() if text in block]
    assert len(found) == 1, f"{len(found)} blocks of the README hold {text!r}"
    return found[0]


def test_a_loop_of_ones_own_trains(capsys):
    loop = block_with("zero_grad")
    assert "range(20)" in loop
    torch.manual_seed(0)
    exec(loop.replace("range(20)", "range(1)"), {})
    epoch, loss = re.search(r"(\d+) Loss\(loss=([\d.]+)", capsys.readouterr().out).groups()
    assert epoch == "0"
    assert float(loss) < 230  # nats; untrained it has 550


def test_the_augmenting_objective_trains(digits):
    import utils

    names = {"torch": torch, "utils": utils, "train_images": digits.train.images[:64]}
    names["val_images"] = digits.val.images[:16]
    names["model"] = utils.VAE(4)
    exec(block_with("def augmented"), names)
    assert names["model"].metadata["epoch"] >= 1


def test_every_block_compiles():
    for block in blocks():
        compile(block, "README.md", "exec")
