"""Training: it does what it says, repeats bit for bit, keeps the best epoch, and loses nothing."""

import functools
import inspect
import io
import math
import os
import random
import re
import subprocess
import sys
import time
import types
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import EDITED, ROOT, same_weights
from torch import nn
from torch.distributions import Normal, kl_divergence

import utils

KEPT = "vae_mnist5k_best.safetensors"
UNFINISHED = f"{KEPT}.unfinished"
ASIDE = "vae_mnist5k_best.1.safetensors"
UNFINISHED_ASIDE = f"{ASIDE}.unfinished"


def fresh(latent_dim=2, variational=True, kind=None):
    torch.manual_seed(0)
    return (kind or utils.VAE)(latent_dim, variational)


def train(images, checkpoint=None, *, model=None, module=utils, epochs=2, **options):
    """A model, a fresh one unless it is given, and its history."""
    if model is None:
        model = fresh(kind=module.VAE)
    options = {"batch_size": 16, "metadata": {"data": "mnist5k"}, **options}
    return model, module.fit(model, *images, epochs=epochs, checkpoint=checkpoint, **options)


def weights_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def holds(model, weights):
    """Whether a model holds these weights, bit for bit."""
    state = model.state_dict()
    return state.keys() == weights.keys() and all(torch.equal(state[k], weights[k]) for k in state)


def without_seconds(history):
    return [{**row, "seconds": 0} for row in history]


def files(folder):
    """Their names, without locks; litter is among them."""
    return sorted(name for name in os.listdir(folder) if not name.endswith(".lock"))


def stop_after(epoch, error=KeyboardInterrupt):
    """An `on_epoch` that ends the run."""

    def stop(model, row):
        if row["epoch"] == epoch:
            raise error

    return stop


def stoppable(model, x, generator, beta, progress):
    """The usual objective, which can be stopped in the middle of an epoch."""
    if progress >= float(os.environ.get("STOP_AT", 1)):
        raise KeyboardInterrupt
    return utils.elbo(model, x, generator, beta, progress)


def untouched(model, x, generator, beta, progress):
    """An objective for what has to be refused before any work."""
    raise AssertionError("training has begun")


# one loop, written out


def through(h, layers):
    """Layer by layer; a residual adds to h what its layers make of it."""
    for layer in layers:
        h = h + through(h, layer) if isinstance(layer, utils.Residual) else layer(h)
    return h


def plain_training(model, images, *, epochs, batch_size, learning_rate, beta, seed):
    """What `fit` should do: yields the averaged weights and the mean loss of every epoch."""
    steps = math.ceil(len(images) / batch_size)
    decay = max(0.0, 1 - 10 / steps)
    dense = [layer.weight for layer in model.modules() if isinstance(layer, nn.Linear)]
    others = [p for p in model.parameters() if all(p is not weight for weight in dense)]
    groups = [{"params": dense, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)
    average = None
    for epoch in range(1, epochs + 1):
        noise = torch.Generator().manual_seed(100_003 * seed + epoch)
        shuffle = torch.Generator().manual_seed(100_003 * seed + epoch)
        order = torch.randperm(len(images), generator=shuffle)
        total = 0.0
        for step, rows in enumerate(order.split(batch_size)):
            progress = (epoch - 1 + step / steps) / epochs
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * min(1 + 10 * progress, (1 - progress) / 0.45)
            x = images[rows]
            h = through(through(x, model.encoder.conv), model.encoder.dense)
            mu, logvar = h.chunk(2, dim=1)
            sigma = logvar.exp().sqrt()
            z = mu + sigma * torch.randn(mu.shape, generator=noise)
            if not model.variational:
                z = mu
            logits = through(through(z, model.decoder.dense), model.decoder.conv)
            loss = -(x * F.logsigmoid(logits) + (1 - x) * F.logsigmoid(-logits)).sum()
            if model.variational:
                loss = loss + beta * kl_divergence(Normal(mu, sigma), Normal(0.0, 1.0)).sum()
            optimizer.zero_grad()
            (loss / len(x)).backward()
            optimizer.step()
            total += loss.item()
            weights = weights_of(model)
            if average is None:
                average = weights
            for name, tensor in weights.items():
                average[name] = decay * average[name] + (1 - decay) * tensor
        yield dict(average), total / len(images)


def biases_of_no_effect(model):
    """Batch normalisation takes away what a bias before it adds: its gradient is rounding alone."""
    names = set()
    previous = None
    for name, layer in model.named_modules():
        if isinstance(layer, nn.BatchNorm2d):
            names.add(f"{previous}.bias")
        previous = name
    return names


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 8},  # 6 steps an epoch, whose running average is the weights themselves
        {"batch_size": 8, "beta": 4.0, "seed": 3},
        {"batch_size": 8, "variational": False, "learning_rate": 3e-3},
        {"batch_size": 2, "epochs": 1},  # 23 steps
    ],
    ids=["6 steps", "beta", "autoencoder", "average"],
)
def test_training_is_that_of_a_plain_loop(few, options):
    """Distances as shares of the way that the weights went."""
    images = few[0][:46]  # so that the last batch is a short one
    settings = {"epochs": 2, "learning_rate": 1e-3, "beta": 1.0, "seed": 0, **options}
    variational = settings.pop("variational", True)
    found = []

    def remember(averaged, row):
        found.append((weights_of(averaged), row["train_loss"]))

    utils.fit(fresh(4, variational), images, few[1], on_epoch=remember, **settings)
    model = fresh(4, variational)
    names = {name for name, _ in model.named_parameters()} - biases_of_no_effect(model)
    start = weights_of(model)
    expected = list(plain_training(model.train(), images, **settings))
    assert len(found) == len(expected) == settings["epochs"]
    for (weights, loss), (right, right_loss) in zip(found, expected, strict=True):
        assert loss == pytest.approx(right_loss, rel=1e-4), EDITED
        wrong = sum((weights[name] - right[name]).square().sum() for name in names)
        path = sum((right[name] - start[name]).square().sum() for name in names)
        assert (wrong / path).sqrt() < 1e-3, EDITED
        for name in right:  # what batch normalisation has seen; the means hold those biases
            if name.endswith("running_var"):
                assert torch.allclose(weights[name], right[name], rtol=1e-3), EDITED


def test_of_many_steps_every_hundredth_of_an_epoch_is_averaged(few):
    """200 steps: the weights after every second one, with a decay of 0.9."""
    seen = []  # before each step
    averaged = []

    def watched(model, x, generator, beta, progress):
        seen.append(model.decoder.conv[0].weight.detach().clone())
        return utils.elbo(model, x, generator, beta, progress)

    def remember(model, row):
        averaged.append(model.decoder.conv[0].weight.detach())

    images = few[0][torch.arange(200) % 48]
    options = {"epochs": 1, "batch_size": 1, "objective": watched, "on_epoch": remember}
    train((images, few[1]), **options)
    seen.append(seen[-1])  # the last step is next to none
    expected = seen[2]
    for step in range(4, 202, 2):
        expected = 0.9 * expected + 0.1 * seen[step]
    assert len(seen) == 201
    assert (averaged[0] - expected).norm() < 0.01 * (averaged[0] - seen[200]).norm()


def test_the_learning_rate_doubles_and_falls_to_zero():
    rates = [utils.learning_rate_at(i / 1000, 1e-3) for i in range(1001)]
    assert rates[0] == 1e-3
    assert rates.index(max(rates)) == 100
    assert max(rates) == pytest.approx(2e-3)
    assert rates[325] == pytest.approx(1.5e-3), "not a straight line"
    assert rates[-1] == pytest.approx(0, abs=1e-12)


def test_history_and_the_printed_lines(few, capsys):
    """Validation is on all images, by the averaged model; the seconds are those of an epoch."""
    val = torch.cat([few[1], few[0], few[1]]).repeat(14, 1, 1, 1)  # more than a thousand
    evaluated = []

    def remember(averaged, row):
        evaluated.append(utils.evaluate(averaged, val, num_samples=1, beta=3.0))

    started = time.perf_counter()
    _, history = train((few[0], val), epochs=3, beta=3.0, on_epoch=remember)
    assert sum(row["seconds"] for row in history) < time.perf_counter() - started
    assert [row["epoch"] for row in history] == [1, 2, 3]
    rates = [utils.learning_rate_at(epoch / 3, 1e-3) for epoch in range(3)]
    assert [row["learning_rate"] for row in history] == pytest.approx(rates)
    lines = capsys.readouterr().out.splitlines()
    for row, val_loss, line in zip(history, evaluated, lines, strict=True):
        assert [row["val_loss"], row["val_bce"], row["val_kl"]] == pytest.approx(list(val_loss))
        whole = row["train_bce"] + 3 * row["train_kl"]
        assert row["train_loss"] == pytest.approx(whole, rel=1e-5), EDITED
        assert row["seconds"] > 0
        number = r" *(\d+\.\d+) *"
        shape = rf"training{number}validation{number}= BCE{number}\+ 3 x KL{number}nats{number}s"
        printed = [float(text) for text in re.search(shape, line).groups()]
        said = ("train_loss", "val_loss", "val_bce", "val_kl", "seconds")
        assert printed == pytest.approx([row[name] for name in said], abs=0.06)
    capsys.readouterr()
    train(few, epochs=1)
    assert re.search(r"= BCE +\S+ \+ KL", capsys.readouterr().out)


# what is kept


def only_bce(model, x, generator, beta, progress):
    return utils.elbo(model, x, generator, 0.0, progress)


def test_the_best_epoch_is_that_of_bce_and_beta_times_kl_whatever_the_objective(few, best):
    start = weights_of(fresh())
    averages = []
    model, history = train(
        few,
        best,
        epochs=5,
        beta=1000.0,
        learning_rate=3e-3,
        objective=only_bce,
        on_epoch=lambda averaged, row: averages.append(weights_of(averaged)),
    )
    losses = [row["val_bce"] + 1000 * row["val_kl"] for row in history]
    lowest = losses.index(min(losses))
    for other in ("val_bce", "train_loss"):
        assert min(history, key=lambda row: row[other]) != history[lowest], "it shows nothing"
    assert min(history, key=lambda row: row["val_bce"] + row["val_kl"]) != history[lowest]
    assert holds(model, averages[lowest])
    assert not holds(model, start)
    assert not model.training
    loaded = utils.load_checkpoint(best)
    assert same_weights(loaded, model)
    for known in (model.metadata, loaded.metadata):
        assert known["epoch"] == lowest + 1
        assert known["val_loss"] == history[lowest]["val_loss"]
        assert known["history"] == history
        assert known["data"] == "mnist5k"
    assert files(best.parent) == [KEPT]


class Still(utils.VAE):
    """It gives the same validation loss in every epoch."""

    def encode(self, x):
        mu, logvar = super().encode(x)
        return (mu, logvar) if self.training else (torch.zeros_like(mu), torch.zeros_like(mu))

    def decode(self, z):
        return super().decode(z) if self.training else torch.zeros(len(z), 1, 28, 28)


def test_of_two_epochs_with_the_same_loss_the_first_is_kept(few):
    averages = []
    options = {"on_epoch": lambda averaged, row: averages.append(weights_of(averaged))}
    model, history = train(few, model=fresh(kind=Still), epochs=3, **options)
    assert len({row["val_loss"] for row in history}) == 1
    assert model.metadata["epoch"] == 1
    assert holds(model, averages[0])


# repeating


def test_same_seed_same_weights_bit_for_bit_and_nothing_of_the_callers(few, best):
    a, first = train(few)
    b, second = train(few, best, model=fresh().eval())  # a loaded model is in eval mode, too
    assert same_weights(a, b)
    assert without_seconds(first) == without_seconds(second)
    assert not same_weights(a, train(few, seed=2)[0])
    model = fresh()
    before = torch.get_rng_state()
    train(few, model=model)
    assert torch.equal(torch.get_rng_state(), before)


class Dropout(utils.VAE):
    """Noise that no generator of ours draws."""

    def __init__(self, latent_dim, variational):
        super().__init__(latent_dim, variational)
        self.further = nn.Sequential(nn.Dropout(0.3), nn.Linear(latent_dim, latent_dim))

    def decode(self, z):
        return super().decode(self.further(z))


def restless(model, row):
    """What a curious reader does after an epoch."""
    assert not model.training
    torch.manual_seed(row["epoch"])
    model.sample(2)
    for p in model.parameters():
        p.data.zero_()
    row.clear()
    torch.optim.SGD(model.parameters(), 1.0).step()


def test_a_subclass_with_dropout_repeats_and_on_epoch_cannot_disturb_it(few, best):
    images = few[0][:30], few[1]
    options = {"epochs": 3, "batch_size": 2}  # 15 steps, so that the average outlives an epoch
    whole, history = train(images, model=fresh(kind=Dropout), **options)
    again, same = train(images, model=fresh(kind=Dropout), on_epoch=restless, **options)
    assert same_weights(whole, again)
    assert without_seconds(history) == without_seconds(same)
    with pytest.raises(KeyboardInterrupt):
        train(images, best, model=fresh(kind=Dropout), on_epoch=stop_after(1), **options)
    resumed, _ = train(images, best, model=fresh(kind=Dropout), on_epoch=restless, **options)
    assert same_weights(whole, resumed)
    assert same_weights(whole, utils.load_checkpoint(best, model_class=Dropout))


# objectives and other models


def test_an_objective_sees_every_batch_and_the_progress_of_the_run(few):
    seen = []

    def brightened(model, x, generator, beta, progress):
        seen.append((progress, beta, len(x), torch.rand(1, generator=generator).item()))
        x = (2 * x).clamp(max=1)
        return utils.elbo(model, x, generator, beta * min(1, 5 * progress), progress)

    model, _ = train((few[0][:40], few[1]), objective=brightened, epochs=3, beta=2.0)
    progress, beta, sizes, noises = zip(*seen, strict=True)
    assert progress == pytest.approx([step / 9 for step in range(9)])
    assert set(beta) == {2.0}
    assert sizes == (16, 16, 8) * 3
    assert len(set(noises)) == 9
    assert not same_weights(model, train((few[0][:40], few[1]), epochs=3, beta=2.0)[0])


class Plain(nn.Module):
    """Somebody's own network, which knows nothing of this project."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(784, 6)
        self.decoder = nn.Linear(3, 784)

    def encode(self, x):
        return self.encoder(x.flatten(1)).chunk(2, dim=1)

    def decode(self, z):
        return self.decoder(z).view(-1, 1, 28, 28)


def test_any_network_with_encode_and_decode_trains_without_a_checkpoint(few, best):
    model = Plain()
    history = utils.fit(model, *few, epochs=3, batch_size=8)
    assert history[-1]["val_loss"] < history[0]["val_loss"]
    with pytest.raises(utils.CheckpointError):
        utils.fit(Plain(), *few, epochs=1, checkpoint=best, objective=untouched)
    assert not best.exists()


def test_a_default_dtype_of_doubles_makes_no_difference(few):
    expected, _ = train(few, epochs=1)
    model = fresh()
    torch.set_default_dtype(torch.float64)
    try:
        train(few, model=model, epochs=1)
        assert utils.corrupt(few[1], "noise", 0.3).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
    assert same_weights(model, expected)


def test_a_network_of_ones_own_is_trained_by_its_elbo(model, few):
    own = SimpleNamespace(encode=model.encode, decode=model.decode)
    losses = []
    for kind in (model, own):
        generator = torch.Generator().manual_seed(5)
        losses.append(torch.stack(utils.elbo(kind, few[1], generator, 2.0, 0.5)))
    assert torch.equal(*losses)


def test_a_class_typed_before_utils_was_loaded_anew_keeps_its_forward(few, edited):
    """As in a notebook, after an edit."""
    calls = []

    class Own(utils.VAE):
        def forward(self, x, generator=None):
            calls.append(len(x))
            return super().forward(x, generator)

    train(few, module=edited(), model=fresh(kind=Own), epochs=1)
    assert sum(calls) == len(few[0])


def test_the_defaults_are_the_recipe_of_the_readme():
    names = ("epochs", "batch_size", "learning_rate", "beta", "objective")
    defaults = inspect.signature(utils.fit).parameters
    assert [defaults[name].default for name in names] == [20, 64, 1e-3, 1.0, utils.elbo], EDITED


def test_another_optimizer_trains_and_goes_on(few, tmp_path, edited, monkeypatch):
    source = "optimizer = make_optimizer(model)"
    sgd = edited(source, "optimizer = torch.optim.SGD(model.parameters(), 0.0, momentum=0.9)")
    options = {"module": sgd, "learning_rate": 1e-5, "epochs": 3}
    whole, history = train(few, **options)
    assert history[-1]["val_loss"] < history[0]["val_loss"]
    with pytest.raises(KeyboardInterrupt):
        train(few, tmp_path / "sgd_best", on_epoch=stop_after(2), **options)
    assert same_weights(whole, train(few, tmp_path / "sgd_best", **options)[0])
    replaced = lambda model: torch.optim.SGD(model.parameters(), 0.0, momentum=0.9)  # noqa: E731
    monkeypatch.setattr(utils, "make_optimizer", replaced)  # as in a notebook's cell
    assert same_weights(whole, train(few, epochs=3, learning_rate=1e-5)[0])


def test_a_model_that_cannot_be_trained_is_told_so(few):
    options = {"objective": untouched}
    with pytest.raises(ValueError, match="frozen"):
        train(few, model=fresh().requires_grad_(False), **options)
    for dtype, says in ((torch.float16, "Half"), (torch.float64, "double")):
        with pytest.raises(RuntimeError, match=f"Input type .float. and bias type .*{says}"):
            train(few, model=fresh().to(dtype))
    with pytest.raises(AttributeError, match="'Linear' object has no attribute 'encode'"):
        train(few, model=nn.Linear(2, 2))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_training_works_where_gradients_are_switched_off(few, mode):
    model = fresh()
    with mode():
        train((few[0] * 1, few[1] * 1), model=model)
    assert same_weights(model, train(few)[0])


# stopping


class Stop(Exception):
    pass


@pytest.mark.parametrize("error", [KeyboardInterrupt, Stop])
def test_a_run_that_stops_gives_back_the_weights_that_the_model_came_with(few, best, capsys, error):
    model = fresh()
    start = weights_of(model)
    with pytest.raises(error) as caught:
        train(few, best, model=model, epochs=3, on_epoch=stop_after(2, error))
    said = str(caught.value) + capsys.readouterr().out
    assert f"{best} keeps the best of epochs 1 to 2; the same call goes on" in said
    assert holds(model, start)
    assert all(p.grad is None for p in model.parameters())
    kept = utils.load_checkpoint(best)
    assert [row["epoch"] for row in kept.metadata["history"]] == [1, 2]
    assert files(best.parent) == [KEPT, UNFINISHED]
    train(few, best, model=model, epochs=3)
    assert "holds epochs 1 to 2 of this run" in capsys.readouterr().out
    assert same_weights(model, train(few, epochs=3)[0])
    assert files(best.parent) == [KEPT]


@pytest.mark.parametrize("stop_at", [0.1, 0.4, 0.95])
def test_a_run_stopped_within_an_epoch_ends_as_the_uninterrupted_one(
    few, best, monkeypatch, stop_at
):
    options = {"epochs": 3, "batch_size": 4, "objective": stoppable}  # the average lags behind
    whole, history = train(few, **options)
    monkeypatch.setenv("STOP_AT", str(stop_at))
    says = "Nothing of this run is kept" if stop_at < 1 / 3 else "keeps the best of"
    with pytest.raises(KeyboardInterrupt, match=says):
        train(few, best, **options)
    monkeypatch.delenv("STOP_AT")
    resumed, same = train(few, best, **options)
    assert same_weights(whole, resumed)
    assert without_seconds(history) == without_seconds(same)
    kept = utils.load_checkpoint(best)
    assert same_weights(whole, kept)
    assert without_seconds(kept.metadata["history"]) == without_seconds(history)


def test_a_run_with_numbers_of_numpy_goes_on(few, best):
    options = {"beta": np.float64(2), "learning_rate": np.float64(0.002), "seed": np.int64(3)}
    with pytest.raises(KeyboardInterrupt):
        train(few, best, on_epoch=stop_after(1), **options)
    resumed, history = train(few, best, **options)
    assert len(history) == 2
    assert same_weights(resumed, train(few, **options)[0])


def test_a_run_with_a_learning_rate_of_numpy_goes_on(few, best, edited):
    module = edited("return learning_rate * (1 +", "return np.float64(learning_rate) * (1 +")
    with pytest.raises(KeyboardInterrupt):
        train(few, best, module=module, on_epoch=stop_after(1))
    _, history = train(few, best, module=module)
    assert len(history) == 2


def spoiling(model, x, generator, beta, progress):
    """From the second epoch of four on the loss is driven up."""
    loss = utils.elbo(model, x, generator, beta, progress)
    return loss if progress < 0.25 else loss._replace(loss=-loss.loss)


def test_a_resumed_run_in_which_no_later_epoch_is_better_ends_with_the_best_weights(few, best):
    options = {"epochs": 4, "batch_size": 4, "objective": spoiling}
    whole, history = train(few, **options)
    losses = [row["val_loss"] for row in history]
    assert losses.index(min(losses)) < 2, "the run did not get worse"
    for stop in (2, 3):
        with pytest.raises(KeyboardInterrupt):
            train(few, best, on_epoch=stop_after(stop), **options)
    resumed, _ = train(few, best, **options)
    assert same_weights(whole, resumed)
    assert resumed.metadata["epoch"] == losses.index(min(losses)) + 1
    assert same_weights(whole, utils.load_checkpoint(best))


def diverging(model, x, generator, beta, progress):
    loss = utils.elbo(model, x, generator, beta, progress)
    return loss if progress < 0.6 else loss._replace(loss=loss.loss * math.inf)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_best(few, best):
    model = fresh()
    start = weights_of(model)
    with pytest.raises(FloatingPointError, match="not finite at epoch 1: .* lower learning rate"):
        train(few, best, model=model, learning_rate=1e20)
    assert holds(model, start)
    assert not best.exists()
    with pytest.raises(FloatingPointError, match="(?s)at epoch 2: .*the best of epochs 1 to 1"):
        train(few, best, model=model, objective=diverging)
    assert holds(model, start)
    assert utils.load_checkpoint(best).metadata["epoch"] == 1


@pytest.mark.parametrize("place", range(3))
def test_a_validation_loss_that_is_not_finite_stops_the_run(few, monkeypatch, place):
    losses = [1.0, 1.0, 1.0]
    losses[place] = math.nan
    monkeypatch.setattr(utils, "evaluate", lambda *_, **__: utils.Loss(*losses))
    with pytest.raises(FloatingPointError, match="not finite"):
        train(few)


CHILD = """
import sys
import torch
import utils
torch.set_num_threads(1)
images = torch.load(sys.argv[1])
torch.manual_seed(0)
options = {"epochs": 30, "batch_size": 16, "metadata": {"data": "mnist5k"}}
utils.fit(utils.VAE(2), *images, checkpoint=sys.argv[2], **options)
"""


@pytest.mark.slow
def test_killed_at_any_moment_and_resumed(few, best, tmp_path, request):
    """Three processes; then the same weights as without any."""
    images = few[0][:32], few[1][:8]
    torch.save(images, tmp_path / "images")
    threads = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    torch.set_num_threads(1)  # as in the children: another number rounds differently
    rng = random.Random(0)
    unfinished = best.with_name(UNFINISHED)
    for _ in range(3):
        before = unfinished.stat().st_mtime_ns if unfinished.exists() else 0
        arguments = [sys.executable, "-c", CHILD, str(tmp_path / "images"), str(best)]
        with subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL) as child:
            while child.poll() is None:
                if unfinished.exists() and unfinished.stat().st_mtime_ns != before:
                    time.sleep(rng.uniform(0, 0.1))
                    child.kill()
                time.sleep(0.002)
        assert child.returncode != 0, "it came to its end before it was killed"
        if best.exists():
            utils.load_checkpoint(best)  # raises if it is half-written
    assert unfinished.exists()
    resumed, _ = train(images, best, epochs=30)
    whole, _ = train(images, epochs=30)
    assert same_weights(resumed, whole)
    assert same_weights(utils.load_checkpoint(best), whole)
    assert KEPT in files(best.parent) and UNFINISHED not in files(best.parent)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA here")
def test_on_cuda_a_resumed_run_ends_like_the_uninterrupted_one(few, best):
    whole, _ = train(few, model=fresh().to("cuda"), epochs=3)
    with pytest.raises(KeyboardInterrupt):
        train(few, best, model=fresh().to("cuda"), epochs=3, on_epoch=stop_after(2))
    resumed, _ = train(few, best, model=fresh().to("cuda"), epochs=3)
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], tensor)
    assert utils.load_checkpoint(best, "cuda").decoder.conv[0].bias.is_cuda


# which run it is


def test_a_finished_run_is_not_trained_again(few, best, capsys):
    model, history = train(few, best)
    before = best.read_bytes()
    capsys.readouterr()
    for started in ("now", "later"):
        again, same = train(few, best, metadata={"data": "mnist5k", "started": started})
        assert same == history
        assert same_weights(model, again)
        assert not again.training
        assert again.metadata["history"] == history
        assert again.metadata["epoch"] == model.metadata["epoch"]
        says = "vae_mnist5k_best.safetensors holds epochs 1 to 2 of this run: they are not trained"
        assert capsys.readouterr().out == f"{says} again\n"
    assert best.read_bytes() == before
    assert files(best.parent) == [KEPT]
    train(few, best, resume=False)
    train(few, best, resume=False)
    assert files(best.parent) == [ASIDE, "vae_mnist5k_best.2.safetensors", KEPT]
    assert best.with_name(ASIDE).read_bytes() == before


@pytest.mark.parametrize(
    "change, says",
    [
        ({"epochs": 3}, "(epochs changed)"),
        ({"model": lambda: fresh(3)}, "(the model changed)"),
        ({"model": lambda: fresh(2, False)}, "the model changed"),
        ({"seed": 2}, "seed"),
        ({"beta": 2.0}, "(beta changed)"),
        ({"learning_rate": 0.01}, "(learning_rate changed)"),
        ({"batch_size": 24}, "(batch_size changed)"),
        ({"objective": stoppable}, "the objective changed"),
        ({"resume": False}, "(nothing changed)"),
    ],
    ids=["epochs", "size", "kind", "seed", "beta", "rate", "batch", "objective", "resume"],
)
def test_a_changed_setting_starts_a_new_run_and_keeps_the_old_one(few, best, capsys, change, says):
    """An unfinished one with what it takes to go on, under a counter."""
    with pytest.raises(KeyboardInterrupt):
        train(few, best, on_epoch=stop_after(1))
    before = {name: (best.parent / name).read_bytes() for name in (KEPT, UNFINISHED)}
    made = {name: value() if name == "model" else value for name, value in change.items()}
    _, history = train(few, best, **made)
    said = capsys.readouterr().out
    assert "of this run" not in said
    (line,) = [line for line in said.splitlines() if "held another run" in line]
    assert line.startswith(f"{KEPT} held another run (")
    assert says in line
    assert ASIDE in line
    assert files(best.parent) == [ASIDE, UNFINISHED_ASIDE, KEPT]
    assert (best.parent / ASIDE).read_bytes() == before[KEPT]
    assert (best.parent / UNFINISHED_ASIDE).read_bytes() == before[UNFINISHED]
    assert utils.load_checkpoint(best).metadata["history"] == history
    if change == {"seed": 2}:  # what was set aside can go on under its new name
        resumed, _ = train(few, best.with_name(ASIDE))
        assert "holds epochs 1 to 1 of this run" in capsys.readouterr().out
        assert same_weights(resumed, train(few)[0])
        assert files(best.parent) == [ASIDE, KEPT]


def test_other_images_or_initial_weights_are_another_run(few, best):
    train_images, val_images = few
    train((train_images, val_images), best, epochs=1)
    train((train_images, val_images[1:]), best, epochs=1)
    assert len(files(best.parent)) == 2
    other = train_images[1:], val_images[1:]
    train(other, best, epochs=1)
    assert len(files(best.parent)) == 3
    start = fresh()
    start.decoder.conv[0].bias.data[0] += 1e-6
    model, _ = train(other, best, model=start, epochs=1)
    assert len(files(best.parent)) == 4
    train(other, best, model=model, epochs=1)  # fine-tuning is a run of its own
    assert len(files(best.parent)) == 5


def test_a_run_stopped_in_its_first_epoch_leaves_what_stood_there(few, best, monkeypatch):
    train(few, best)
    before = best.read_bytes()
    monkeypatch.setenv("STOP_AT", "0.2")
    with pytest.raises(KeyboardInterrupt, match="Nothing of this run is kept"):
        train(few, best, objective=stoppable)
    assert best.read_bytes() == before
    assert files(best.parent) == [KEPT]


def test_without_what_it_takes_to_go_on_a_run_starts_anew(few, best):
    with pytest.raises(KeyboardInterrupt):
        train(few, best, on_epoch=stop_after(1))
    best.with_name(UNFINISHED).unlink()
    again, history = train(few, best)
    assert [row["epoch"] for row in history] == [1, 2]
    assert same_weights(again, train(few)[0])
    assert files(best.parent) == [ASIDE, KEPT]


def test_metadata_are_those_of_the_call(few, best):
    """Whatever happens to them, or to the history, meanwhile and later."""
    metadata = {"notes": ["before"]}
    note = lambda *_: metadata["notes"].append("after")  # noqa: E731
    model, history = train(few, best, metadata=metadata, on_epoch=note)
    assert utils.read_metadata(best)["notes"] == ["before"]
    history.clear()
    assert len(model.metadata["history"]) == 2


def test_what_is_known_of_a_run_counts_before_metadata_of_the_same_name(few, best):
    model, history = train(few, best, metadata={"epoch": 99, "history": [], "mine": 1}, epochs=1)
    assert model.metadata["history"] == history
    assert (model.metadata["epoch"], model.metadata["mine"]) == (1, 1)


def test_a_model_saved_in_the_place_of_an_unfinished_run_is_kept(few, best, capsys):
    with pytest.raises(KeyboardInterrupt):
        train(few, best, on_epoch=stop_after(1))
    unfinished = best.with_name(UNFINISHED).read_bytes()
    utils.save_checkpoint(best, utils.VAE(7), note="precious")
    train(few, best)
    said = capsys.readouterr().out
    assert f"{KEPT} held another run" in said
    assert "of this run" not in said
    assert files(best.parent) == [ASIDE, UNFINISHED_ASIDE, KEPT]
    assert utils.read_metadata(best.with_name(ASIDE))["note"] == "precious"
    assert best.with_name(UNFINISHED_ASIDE).read_bytes() == unfinished


def test_a_model_moved_to_the_place_of_an_unfinished_run_is_kept(few, best):
    train(few, best, seed=1)
    finished = best.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        train(few, best, seed=2, on_epoch=stop_after(1))
    unfinished = best.with_name(UNFINISHED).read_bytes()
    best.with_name(ASIDE).replace(best)
    train(few, best, seed=2)
    assert files(best.parent) == [ASIDE, UNFINISHED_ASIDE, KEPT]
    assert best.with_name(ASIDE).read_bytes() == finished
    assert best.with_name(UNFINISHED_ASIDE).read_bytes() == unfinished


def test_a_finished_run_moved_to_the_place_of_its_repetition_is_kept(few, best):
    """Two runs of the same settings."""
    train(few, best)
    finished = best.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        train(few, best, resume=False, on_epoch=stop_after(1))
    best.with_name(ASIDE).replace(best)
    train(few, best)
    assert best.read_bytes() == finished


@pytest.mark.parametrize("epochs_before", [1, 2])
def test_what_was_changed_and_saved_is_no_longer_the_run(few, best, capsys, epochs_before):
    """In the place of an unfinished run, and of a finished one."""
    if epochs_before == 1:
        with pytest.raises(KeyboardInterrupt):
            train(few, best, on_epoch=stop_after(1))
    else:
        train(few, best)
    model = utils.load_checkpoint(best)
    model.decoder.conv[0].bias.data += 1
    utils.save_checkpoint(best, model)
    saved = best.read_bytes()
    capsys.readouterr()
    again, _ = train(few, best)
    assert "of this run" not in capsys.readouterr().out
    assert best.with_name(ASIDE).read_bytes() == saved
    assert same_weights(again, train(few)[0])


def test_a_model_of_another_unfinished_run_is_no_part_of_this_one(few, best):
    for seed in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            train(few, best, seed=seed, on_epoch=stop_after(1))
    best.with_name(ASIDE).replace(best)
    resumed, _ = train(few, best, seed=1)
    assert same_weights(resumed, train(few, seed=1)[0])


def test_an_unfinished_run_whose_model_is_gone_goes_on_and_is_not_overwritten(few, best):
    with pytest.raises(KeyboardInterrupt):
        train(few, best, on_epoch=stop_after(1))
    best.with_name(UNFINISHED).replace(best.with_name(UNFINISHED_ASIDE))
    unfinished = best.with_name(UNFINISHED_ASIDE).read_bytes()
    train(few, best, epochs=1)
    assert files(best.parent) == [UNFINISHED_ASIDE, "vae_mnist5k_best.2.safetensors", KEPT]
    assert best.with_name(UNFINISHED_ASIDE).read_bytes() == unfinished
    resumed, history = train(few, best.with_name(ASIDE))
    assert len(history) == 2
    assert same_weights(resumed, train(few)[0])


# the code of a run


def is_same_run(capsys):
    """Whether the last call found its run finished, else all that it says has changed."""
    said = capsys.readouterr().out
    if "of this run: they are not trained again" in said:
        return True
    return re.search(r"held another run \((.*)\)", said)[1]


@pytest.mark.parametrize(
    "old, new, changed",
    [
        ("nn.GELU()", "nn.SiLU()", "the model changed"),
        (
            ".flatten(1).sum(1)\n\n\ndef kl",
            ".flatten(1).sum(1) + logits.square().mean()\n\n\ndef kl",
            "utils.py, the objective changed",
        ),
        ("return h + super().forward(h)", "return super().forward(h)", "the model changed"),
        ("WEIGHT_DECAY = 0.1", "WEIGHT_DECAY = 0.2", "utils.py changed"),
        ("return learning_rate * (1 + 10 * progress)", "return learning_rate", "utils.py changed"),
        ("mu + sigma * eps", "mu + 2 * sigma * eps", "utils.py, the model, the objective changed"),
        ("optimizer.zero_grad()", "optimizer.zero_grad(); progress = 0", "utils.py changed"),
    ],
    ids=["network", "loss", "residual", "constant", "schedule", "noise", "step"],
)
def test_an_edit_of_utils_starts_a_new_run(few, best, edited, capsys, old, new, changed):
    train(few, best, module=edited(), epochs=1)
    capsys.readouterr()
    train(few, best, module=edited(old, new), epochs=1)
    assert is_same_run(capsys) == changed
    assert files(best.parent) == [ASIDE, KEPT]


def test_what_a_line_moved_from_if_to_if_does_is_an_edit(few, best, capsys):
    code = """
def mine(model, x, generator, beta, progress):
    if beta:
        if progress > 2:
            if model.training:
                x = x.flip(3)
            beta = 4 * beta
    return utils.elbo(model, x, generator, beta, progress)
"""
    for spaces in (16, 12, 8, 4):
        capsys.readouterr()
        moved = code.replace(12 * " " + "beta", spaces * " " + "beta")
        train(few, best, objective=typed(moved)["mine"], epochs=1)
        assert spaces == 16 or is_same_run(capsys) == "the objective changed"


def test_frozen_weights_are_another_run(few, best, capsys):
    train(few, best, epochs=1)
    frozen = fresh()
    frozen.encoder.requires_grad_(False)
    capsys.readouterr()
    train(few, best, model=frozen, epochs=1)
    assert is_same_run(capsys) == "the model changed"
    assert same_weights(frozen.encoder.dense, fresh().encoder.dense)


def test_the_weights_and_arrays_that_an_objective_uses_belong_to_it():
    teacher = nn.Linear(2, 2)
    table = np.array(["a", "b"])[::-1]
    objective = lambda model, x: (teacher(x), table)  # noqa: E731
    codes = {utils._code_of(objective)}
    teacher.bias.data[0] += 1
    codes.add(utils._code_of(objective))
    table[0] = "c"
    codes.add(utils._code_of(objective))
    assert len(codes) == 3


def test_comments_docstrings_and_layout_are_no_edit(few, best, edited, capsys):
    train(few, best, epochs=1)
    for old, new in (
        ("", ""),
        ('def vae_loss(logits, x, mu, logvar, beta=1.0):\n    """', "\\g<0>Mine. "),
        ("WEIGHT_DECAY = 0.1", "# mine\n\n\n\nWEIGHT_DECAY = 0.1"),
        ("    optimizer.zero_grad()", "    # mine\n\n    optimizer.zero_grad(\n    )"),
        ('class Residual(nn.Sequential):\n    """', "\\g<0>Mine. "),
    ):
        capsys.readouterr()
        train(few, best, module=edited(old, new.replace("\\g<0>", old)), epochs=1)
        assert is_same_run(capsys) is True, new
    assert files(best.parent) == [KEPT]


def test_a_function_in_the_place_of_one_of_ours_starts_a_new_run(few, best, edited, capsys):
    module = edited()
    train(few, best, module=module, epochs=1)
    ours = module.bce_per_image
    module.bce_per_image = lambda logits, x: ours(logits, x) + logits.square().mean((1, 2, 3))
    capsys.readouterr()
    train(few, best, module=module, epochs=1)
    assert str(is_same_run(capsys)).startswith("utils.py")
    module.bce_per_image = ours
    train(few, best.with_name(ASIDE), module=module, epochs=1)
    assert is_same_run(capsys) is True


def typed(code, **names):
    """What a notebook's cell defines, of which no file tells the source."""
    scope = {"__name__": "__main__", "utils": utils, "torch": torch, **names}
    exec(code, scope)
    return scope


MINE = """
class Mine(utils.VAE):
    def forward(self, x, generator=None):
        logits, mu, logvar = super().forward(x, generator)
        return {factor} * logits, mu, logvar
"""
OBJECTIVE = """
def make(share):
    def mine(model, x, generator, beta, progress, top=TOP, *, least=LEAST):
        largest = lambda x: x.clamp(least, top)
        x = largest(share * brighter(x))
        return utils.elbo(model, x, generator, FACTOR * beta, progress)

    return mine

def brighter(x):
    return GAIN * x
"""


def test_a_class_typed_anew_starts_a_new_run(few, best, capsys):
    for factor, same in (("1.5", None), ("1.5 ", True), ("1.25", "the model changed")):
        kind = typed(MINE.format(factor=factor))["Mine"]
        train(few, best, model=fresh(kind=kind), epochs=1)
        if same:
            assert is_same_run(capsys) == same
        capsys.readouterr()
        assert utils.load_checkpoint(best, model_class=kind).metadata["model_class"] == "Mine"


def test_an_objective_is_known_by_all_that_it_uses(few, best, capsys):
    """Numbers, functions, defaults and variables of outer functions, in inner functions, too."""
    numbers = {"GAIN": 2, "FACTOR": 1.0, "TOP": 1.0, "LEAST": 0.0, "share": 1.0, "inner": "x"}

    def said():
        code = OBJECTIVE.replace("lambda x: x", f"lambda x: {numbers['inner']}")
        code = code.replace("GAIN", str(numbers["GAIN"]))
        scope = typed(code, **{name: numbers[name] for name in ("FACTOR", "TOP", "LEAST")})
        capsys.readouterr()
        objective = functools.partial(scope["make"](numbers["share"]))
        train(few, best, objective=objective, epochs=1)
        return is_same_run(capsys)

    changes = [{"GAIN": 3}, {"FACTOR": 0.5}, {"TOP": 0.9}, {"LEAST": 0.1}, {"share": 0.9}]
    changes.append({"inner": "x in {'a', 'b', 'c'} or x"})
    train(few, best, epochs=1)
    assert said() == "the objective changed"
    for change in changes:
        numbers.update(change)
        assert said() == "the objective changed", change
    assert said() is True


def mine(**members):
    return type("Mine", (), {**members, "__module__": "__main__"})


class One:
    def __init__(self, level):
        self.level = level

    def of(self, x):
        return x


class Other:
    pass


class Tuple(NamedTuple):
    level: int

    def of(self, x):
        return x


class OtherTuple(NamedTuple):
    level: int

    def of(self, x):
        return -x


class Slots:
    __slots__ = ()

    def of(self, x):
        return x


class OtherSlots:
    __slots__ = ()

    def of(self, x):
        return -x


OtherTuple.__name__ = OtherTuple.__qualname__ = "Tuple"
OtherSlots.__name__ = OtherSlots.__qualname__ = "Slots"


def noted(level):
    def function():
        return function.level

    function.level = level
    return function


def times(factor):
    """A decorator."""

    def decorate(function):
        @functools.wraps(function)
        def wrapped(*args):
            return factor * function(*args)

        return wrapped

    return decorate


@pytest.mark.parametrize(
    "one, other",
    [
        (lambda x: F.gelu(x, approximate="tanh"), lambda x: F.gelu(x, other="tanh")),
        (lambda x, y: x - y, lambda y, x: x - y),
        (lambda x: x in {0, 1}, lambda x: x in {0, 2}),
        (np.arange(2000), np.append(np.arange(1000), np.arange(1000))),
        (functools.partial(max, 1), functools.partial(max, 2)),
        (mine(level=1), mine(level=2)),
        (mine(level=property(lambda self: 1)), mine(level=property(lambda self: 2))),
        (mine(level=staticmethod(lambda: 1)), mine(level=staticmethod(lambda: 2))),
        (mine(level=classmethod(lambda kind: 1)), mine(level=classmethod(lambda kind: 2))),
        (type("Mine", (One,), {}), type("Mine", (Other,), {})),
        (One("a").of, One("b").of),
        (times(2)(lambda x: x), times(3)(lambda x: x)),
        (torch.no_grad()(lambda x: x), torch.no_grad()(lambda x: -x)),
        ("a from 'b'", "a from 'c'"),
        (Tuple(1), OtherTuple(1)),
        (Slots(), OtherSlots()),
        (noted(1), noted(2)),
        (torch.zeros(2, 3), torch.zeros(3, 2)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.int32)),
    ],
    ids=[
        "keyword",
        "order",
        "set",
        "array",
        "partial",
        "class",
        "property",
        "static",
        "of the class",
        "base",
        "method",
        "decorator",
        "decorated",
        "text",
        "named tuple",
        "slots",
        "attribute",
        "shape",
        "dtype",
    ],
)
def test_what_differs_in_little_is_not_the_same(one, other):
    assert utils._code_of(one) == utils._code_of(one)
    assert utils._code_of(one) != utils._code_of(other)


def test_layout_that_moves_jumps_is_no_edit():
    code = """
def mine(x):
    while x:
        try:
            x = next(x)
        except StopIteration:
            x = None
"""
    codes = []
    for layout in (code, code.replace("try:\n            x", "try: x")):
        codes.append(typed(layout)["mine"])
    assert utils._code_of(codes[0]) == utils._code_of(codes[1])


@pytest.mark.parametrize("kind", [set, frozenset])
def test_the_order_of_a_set_makes_no_difference(kind):
    """It differs from process to process."""
    one, other = kind([0, 8]), kind([8, 0])
    assert list(one) != list(other)
    assert utils._code_of(one) == utils._code_of(other)


@pytest.mark.parametrize("kind", [tuple, frozenset])
def test_whether_constants_are_one_object_makes_no_difference(kind):
    """A function alone has its own, where those of a file share them."""
    one, other = kind([1, 2]), kind([1, 2])
    assert one is not other
    assert utils._code_of([one, other]) == utils._code_of([one, one])


def test_neither_the_mode_of_the_model_nor_what_is_known_of_it_counts(few, best, capsys):
    train(few, best, epochs=1)
    capsys.readouterr()
    train(few, best, model=fresh().eval(), epochs=1)
    assert is_same_run(capsys) is True
    model = fresh()
    model.metadata = {"epoch": 1}
    train(few, best, model=model, epochs=1)
    assert is_same_run(capsys) is True


def test_the_mode_of_a_network_that_an_objective_uses_counts_and_what_is_known_of_it_does_not():
    teacher = utils.VAE(2)
    codes = {utils._code_of(lambda: teacher)}
    teacher.metadata = {"seconds": 1}
    codes.add(utils._code_of(lambda: teacher))
    assert len(codes) == 1
    teacher.eval()
    codes.add(utils._code_of(lambda: teacher))
    assert len(codes) == 2


def test_code_in_a_folder_whose_name_is_like_that_of_packages_counts(monkeypatch):
    own, installed = types.ModuleType("own"), types.ModuleType("installed")
    own.__file__ = "/home/me/my-packages/own.py"
    installed.__file__ = "/usr/lib/python3/dist-packages/installed.py"
    for module in (own, installed):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    changed = {}
    for module in (own, installed):
        codes = set()
        for module.level in (1, 2):
            codes.add(utils._code_of(module))
        changed[module.__name__] = len(codes) == 2
    assert changed == {"own": True, "installed": False}


def test_an_objective_is_known_by_what_it_uses_of_utils(few, best, edited, capsys):
    """Of which training itself makes no use."""
    denoising = """
def denoising(model, x, generator, beta, progress):
    mu, logvar = model.encode(utils.corrupt(x, "noise", 0.3))
    return utils.vae_loss(model.decode(mu), x, mu, logvar, beta)
"""
    for new, same in (
        ("x + level * _standard_normal", None),
        ("x - level * _standard_normal", "the objective changed"),
    ):
        module = edited("x + level * _standard_normal", new)
        objective = typed(denoising, utils=module)["denoising"]
        train(few, best, module=module, objective=objective, epochs=1)
        if same:
            assert is_same_run(capsys) == same
        capsys.readouterr()


# places that fail


def test_a_training_holds_its_file_to_its_end(few, best):
    model = utils.VAE(2)

    def save_into_it(averaged, row):
        with pytest.raises(TimeoutError, match="could not be acquired"):
            utils.save_checkpoint(best, model)
        with pytest.raises(TimeoutError, match="could not be acquired"):
            train(few, best)
        train(few, best.with_name("ae_mnist5k_best.safetensors"), epochs=1)  # beside it is fine

    train(few, best, epochs=1, on_epoch=save_into_it)
    utils.save_checkpoint(best, model)


@pytest.mark.parametrize(
    "full, epoch",
    [
        (".unfinished", 1),
        (".unfinished", 2),
        (".safetensors", 1),
        (".safetensors", 2),
        (".safetensors", 3),
    ],
)
def test_a_disk_that_fills_stops_the_run_and_keeps_what_was_saved(
    few, best, monkeypatch, capsys, full, epoch
):
    train(few, best)
    before = best.read_bytes()
    replace = os.replace
    saves = []

    def replaced(source, target):
        saves.append(target)
        is_full = len(saves) > 2 * (epoch - 1) and os.path.splitext(target)[1] == full
        if is_full:
            raise OSError(28, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as disk:
        disk.setattr(os, "replace", replaced)
        model = fresh(2)
        came_with = weights_of(model)
        with pytest.raises(utils.CheckpointError, match="No space left on device") as caught:
            train(few, best, epochs=3, seed=2, model=model)
    kept = "Nothing of this run" if epoch == 1 else f"keeps the best of epochs 1 to {epoch - 1}"
    assert kept in str(caught.value)
    assert holds(model, came_with)
    assert before in [path.read_bytes() for path in best.parent.glob("vae*.safetensors")]
    capsys.readouterr()
    resumed, _ = train(few, best, epochs=3, seed=2)
    assert same_weights(resumed, train(few, epochs=3, seed=2)[0])
    done = epoch - 1 if full == ".unfinished" else min(epoch, 2)  # it is written before the model
    assert (f"holds epochs 1 to {done} of" in capsys.readouterr().out) == (done > 0)


def notes(path):
    path.write_text("my notes", encoding="utf-8")


def a_folder(path):
    path.mkdir()
    notes(path / "inside")


def an_old_checkpoint(path):
    torch.save(utils.VAE(2).state_dict(), path)


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("name", [KEPT, UNFINISHED])
@pytest.mark.parametrize("make", [notes, a_folder, an_old_checkpoint])
def test_what_this_project_did_not_write_is_never_moved(few, best, make, name, resume):
    """Whatever it is, and before any work; with a run of ours beside it or not."""
    for beside in (False, True):
        if beside:
            train(few, best.with_name("other"), epochs=1)
            if name == UNFINISHED:
                os.replace(best.with_name("other"), best)
        else:
            best.parent.mkdir()
            make(best.with_name(name))
        before = files(best.parent)
        with pytest.raises((utils.CheckpointError, OSError), match="is damaged|Is a directory"):
            train(few, best, resume=resume, objective=untouched)
        assert files(best.parent) == before


def test_a_reference_is_not_written(few, tmp_path):
    with pytest.raises(ValueError, match="reference checkpoint"):
        train(few, tmp_path / "mine_reference.safetensors", objective=untouched)
    assert files(tmp_path) == []


def test_a_link_to_nothing_becomes_a_file(few, tmp_path):
    link = tmp_path / "link"
    try:
        link.symlink_to(tmp_path / "nothing")
    except OSError:
        pytest.skip("this user may not make links")
    train(few, link)
    assert utils.load_checkpoint(link).metadata["epoch"] > 0
    assert files(tmp_path) == ["link"]


def test_folders_are_made(few, tmp_path, monkeypatch):
    """Also in the user's home, by its short name."""
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    model, _ = train(few, "~/a/b/c", epochs=1)
    utils.save_checkpoint("~/a/d", model)
    assert files(tmp_path / "a/b") == ["c"]
    assert utils.read_metadata("~/a/d")["epoch"] == utils.load_checkpoint("~/a/d").metadata["epoch"]


@pytest.mark.parametrize("name", ["a[1]_best.safetensors", "v.v2.safetensors", "no_ending"])
def test_odd_file_names_are_names(few, tmp_path, name):
    for epochs in (2, 1):
        with pytest.raises(KeyboardInterrupt):
            train(few, tmp_path / name, epochs=epochs, seed=epochs, on_epoch=stop_after(1))
    train(few, tmp_path / name, epochs=1, seed=1)
    assert utils.load_checkpoint(tmp_path / name).metadata["settings"]["seed"] == 1
    assert len(files(tmp_path)) == 3


# where it is told


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_terminal_shows_the_progress_and_a_log_does_not(few, monkeypatch, is_terminal):
    stream = io.StringIO()
    stream.isatty = lambda: is_terminal
    monkeypatch.setattr(sys, "stderr", stream)
    train(few)
    shown = stream.getvalue()
    assert ("epoch 1/2 |" in shown) == is_terminal
    half_way = re.search(r"epoch 2/2 \|.{20}\| 50 %", shown)  # of the whole run
    assert (half_way is not None) == is_terminal


@pytest.mark.parametrize("stream", ["no stderr", "ASCII"])
def test_training_needs_no_terminal_that_shows_everything(few, tmp_path, monkeypatch, stream):
    """pythonw has no standard error, and some terminals show ASCII alone."""
    name = "Müller" if sys.getfilesystemencoding() == "utf-8" else "Mueller"
    path = tmp_path / name / "vae_best.safetensors"
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    if stream == "no stderr":
        monkeypatch.setattr(sys, "stderr", None)
    else:
        monkeypatch.setattr(sys, "stdout", terminal)
    for _ in range(2):
        train(few, path, epochs=1)
    if stream == "ASCII":
        terminal.flush()
        assert b"vae_best.safetensors" in terminal.buffer.getvalue()
    assert utils.load_checkpoint(path).metadata["epoch"] == 1


# arguments


@pytest.mark.parametrize(
    "name, values",
    [
        ("epochs", [0, 2.5]),
        ("batch_size", [0, "64"]),
        ("learning_rate", [0, -1e-3, math.nan, "fast"]),
        ("beta", [-1, math.inf, None]),
        ("seed", [-1, "0"]),
    ],
)
def test_bad_arguments_are_named(few, name, values):
    for value in values:
        with pytest.raises((TypeError, ValueError), match=f"^{name} "):
            train(few, objective=untouched, **{"epochs": 1, name: value})


BAD_IMAGES = [
    (torch.rand(4, 28, 28), ValueError, "the shape"),
    (torch.rand(4, 1, 32, 32), ValueError, "the shape"),
    (torch.rand(0, 1, 28, 28), ValueError, "the shape"),
    (torch.zeros(4, 1, 28, 28, dtype=torch.uint8), TypeError, "not torch.uint8"),
    (torch.rand(4, 1, 28, 28).numpy(), TypeError, "not <class 'numpy.ndarray'>"),
    (255 * torch.ones(4, 1, 28, 28), ValueError, r"\[0, 1\], not from 255 to 255"),
    (torch.full((4, 1, 28, 28), math.nan), ValueError, r"\[0, 1\], not from nan"),
]


@pytest.mark.parametrize("images, error, says", BAD_IMAGES, ids=range(len(BAD_IMAGES)))
def test_bad_images_are_named(few, images, error, says):
    with pytest.raises(error, match=f"^train_images must .*{says}"):
        train((images, few[1]), objective=untouched)
    with pytest.raises(error, match=f"^val_images must .*{says}"):
        train((few[0], images), objective=untouched)
