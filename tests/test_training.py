"""Training: it learns, repeats bit for bit, keeps the best epoch, goes on, and loses nothing."""

import contextlib
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import Stop, context, during_epoch, same_weights, without_write_permission
from torch.optim.optimizer import register_optimizer_step_post_hook

import utils


def fresh(latent_dim=2, seed=0, variational=True):
    torch.manual_seed(seed)
    return utils.VAE(latent_dim, variational)


def train(images, checkpoint=None, *, model=None, epochs=2, **options):
    """A model, a fresh one unless it is given, and its history."""
    if model is None:
        model = fresh(options.pop("latent_dim", 2), 0, options.pop("variational", True))
    options = {"batch_size": 16, "metadata": {"data": "digits"}, **options}
    return model, utils.fit(model, *images, epochs=epochs, checkpoint=checkpoint, **options)


def weights_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def holds(model, weights):
    """Whether a model holds these weights, bit for bit."""
    state = model.state_dict()
    return state.keys() == weights.keys() and all(torch.equal(state[k], weights[k]) for k in state)


def without_seconds(history):
    rows = []
    for row in history:
        rows.append({key: value for key, value in row.items() if key != "seconds"})
    return rows


def files(folder):
    return sorted(name for name in os.listdir(folder) if not name.endswith(".lock"))


KEPT = "vae_digits_best.safetensors"
ASIDE = "vae_digits_best.1.safetensors"

# learning


def test_history_has_a_row_per_epoch(few):
    _, history = train(few, epochs=3)
    assert [row["epoch"] for row in history] == [1, 2, 3]
    for row in history:
        assert row["val_loss"] == pytest.approx(row["val_bce"] + row["val_kl"])
        assert row["train_loss"] == pytest.approx(row["train_bce"] + row["train_kl"], rel=1e-5)
        assert row["seconds"] > 0
    assert history[0]["learning_rate"] == 1e-3
    assert history[1]["learning_rate"] == utils.learning_rate_at(1 / 3, 1e-3)
    assert history[-1]["val_loss"] < history[0]["val_loss"]


def test_the_learning_rate_doubles_and_falls_to_zero():
    rates = [utils.learning_rate_at(i / 1000, 1e-3) for i in range(1001)]
    assert rates[0] == 1e-3
    assert max(rates) == pytest.approx(2e-3)
    assert rates.index(max(rates)) == 100
    assert rates[-1] == pytest.approx(0, abs=1e-12)
    assert rates[325] == pytest.approx(1.5e-3), "not a straight line"
    jumps = [abs(a - b) for a, b in zip(rates, rates[1:], strict=False)]
    assert max(jumps) < 2e-5, "the schedule has a jump"


def test_only_the_dense_layers_matrices_decay(few, monkeypatch):
    """With no gradient at all, what moves is what decays: by 1 - 0.1 * rate at every step."""

    def nothing(logits, x, mu, logvar, beta):
        zero = 0 * (logits.sum() + mu.sum() + logvar.sum())
        return utils.Loss(zero, zero.detach(), zero.detach())

    monkeypatch.setattr(utils, "_loss", nothing)
    model = utils.VAE(2)
    before = weights_of(model)
    utils.fit(model, *few, epochs=2, batch_size=24)
    left = math.prod(1 - utils.learning_rate_at(i / 4, 1e-3) * 0.1 for i in range(4))
    dense = set()
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear):
            dense.add(f"{name}.weight")
    assert len(dense) == 6
    for name, p in model.named_parameters():
        expected = before[name] * left if name in dense else before[name]
        torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("steps, every, decay", [(24, 1, 1 - 10 / 24), (200, 2, 0.9)])
def test_what_is_kept_is_the_running_average_of_the_weights(
    digits, best, monkeypatch, steps, every, decay
):
    model = utils.VAE(2)
    count = 0
    expected = {}
    last = {}

    def follow(optimizer, *_):
        nonlocal count
        if optimizer.param_groups[0]["lr"] == 0:  # the step that only makes Adam's moments
            return
        count += 1
        if count == every:
            expected.update(weights_of(model))
        elif count % every == 0:
            for name, tensor in model.state_dict().items():
                expected[name] = decay * expected[name] + (1 - decay) * tensor

    hook = register_optimizer_step_post_hook(follow)
    images = digits.train.images[:steps]
    with during_epoch(monkeypatch, 1, lambda: last.update(weights_of(model))):
        utils.fit(model, images, digits.val.images[:8], epochs=1, batch_size=1, checkpoint=best)
    hook.remove()
    assert count == steps
    for kept in (model.state_dict(), utils.load_checkpoint(best).state_dict()):
        for name, tensor in kept.items():
            if tensor.is_floating_point():
                torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-6)
                assert not torch.equal(tensor, last[name])


@pytest.mark.parametrize("variational", [True, False])
def test_the_network_overfits_few_images(digits, variational):
    images = digits.train.images[:32]
    model = fresh(16, variational=variational)
    before = utils.evaluate(model, images)
    utils.fit(model, images, images[:8], epochs=40, batch_size=32, learning_rate=2e-3, beta=0.1)
    after = utils.evaluate(model, images)
    floor = utils.bce_per_image(images.logit(1e-6), images).mean()  # the entropy of the greys
    assert after.bce - floor < 0.2 * (before.bce - floor)


def test_beta_weighs_the_kl_in_training_and_in_validation(few):
    """Else a beta-VAE is trained, or its best epoch chosen, as the usual VAE."""

    def trained(beta):
        model = fresh()
        model.encoder.dense[-1].bias.data.fill_(2.0)  # far from the prior, in mu and in logvar
        return train(few, model=model, beta=beta)[1]

    for row in trained(beta=30.0):
        assert row["train_kl"] > 1
        assert row["train_loss"] == pytest.approx(row["train_bce"] + 30 * row["train_kl"], rel=1e-5)
        assert row["val_loss"] == pytest.approx(row["val_bce"] + 30 * row["val_kl"], rel=1e-5)
    assert trained(beta=1000.0)[-1]["val_kl"] < 0.9 * trained(beta=0.0)[-1]["val_kl"]


def test_training_figures_weight_every_image_the_same(few, monkeypatch):
    """With the mean grey as the loss, an epoch's figure is the mean grey of all images."""

    def grey(logits, x, mu, logvar, beta):
        value = x.mean() + 0 * logits.sum() + 0 * logvar.sum()
        return utils.Loss(value, value, 0 * value)

    images = torch.cat([few[0][:42], torch.ones(6, 1, 28, 28)])
    monkeypatch.setattr(utils, "_loss", grey)
    _, history = train((images, few[1]), epochs=1, batch_size=18)
    assert history[0]["train_bce"] == pytest.approx(float(images.mean()), rel=1e-5)


def test_evaluate_does_not_depend_on_batches_or_mode(model, digits, monkeypatch):
    images = digits.val.images[:50]
    whole = utils.evaluate(model, images, num_samples=2)
    monkeypatch.setattr(utils, "BATCH", 7)
    small = utils.loss_per_image(model, images, num_samples=2)
    monkeypatch.undo()
    assert whole.bce == pytest.approx(float(small.bce.mean()), rel=1e-5)
    assert model.training
    assert utils.evaluate(model.eval(), images, num_samples=2) == whole
    assert not model.training
    assert utils.evaluate(model, images, num_samples=2, seed=2) != whole


def test_evaluate_is_the_loss_of_the_definition(model, digits):
    images = digits.val.images[:20]
    logits, mu, logvar = model.eval()(images, torch.Generator().manual_seed(3))
    expected = utils.vae_loss(logits, images, mu, logvar, beta=2.0)
    measured = utils.evaluate(model, images, num_samples=1, seed=3, beta=2.0)
    for name in ("loss", "bce", "kl"):
        assert getattr(measured, name) == pytest.approx(getattr(expected, name).item(), rel=1e-5)


@pytest.mark.slow
def test_two_epochs_on_real_mnist(mnist):
    """A third of the images, two seeds: 108.4 and 109.5 nats."""
    model = fresh(32)
    history = utils.fit(model, mnist.train.images[:20_000], mnist.val.images[:1000], epochs=2)
    assert history[-1]["val_loss"] < 110.5


# repeating


def test_same_seed_same_weights_bit_for_bit(few):
    a, first = train(few)
    b, second = train(few)
    assert same_weights(a, b)
    assert without_seconds(first) == without_seconds(second)
    assert not same_weights(a, train(few, seed=2)[0])


def test_every_epoch_of_every_seed_has_noise_and_an_order_of_its_own(few, monkeypatch):
    seen = []
    forward = utils.VAE.forward

    def watched(self, x, generator=None):
        seen.append((generator.initial_seed(), x[0].sum().item()))
        return forward(self, x, generator)

    monkeypatch.setattr(utils.VAE, "forward", watched)
    for seed in (0, 1, 2, 3):
        train(few, batch_size=48, seed=seed)
    noises, firsts = zip(*seen, strict=True)
    assert len(set(noises)) == len(seen) == 8
    assert len(set(firsts)) >= 7, "two orders may begin with the same image by chance, not more"


def test_training_leaves_the_global_random_state_alone(few, best):
    model = utils.VAE(2)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    utils.fit(model, *few, epochs=1, checkpoint=best)
    assert torch.equal(torch.rand(1), expected)


# a run's file


def test_the_best_checkpoint_is_the_minimum_of_validation(few, best, monkeypatch):
    """A run that gets worse: from its middle on the learning rate wrecks the weights."""
    calm = utils.learning_rate_at

    def wild(progress, rate):
        return calm(progress, rate) if progress < 0.5 else 0.1

    monkeypatch.setattr(utils, "learning_rate_at", wild)
    model, history = train(few, best, epochs=6, batch_size=8)
    losses = [row["val_loss"] for row in history]
    lowest = losses.index(min(losses))
    assert lowest < 5, "the run did not get worse"
    loaded = utils.load_checkpoint(best)
    assert same_weights(loaded, model)
    assert loaded.metadata["epoch"] == model.metadata["epoch"] == lowest + 1
    assert loaded.metadata["val_loss"] == losses[lowest]
    loss = utils.evaluate(loaded, few[1], num_samples=1).loss
    assert loss == pytest.approx(losses[lowest], rel=1e-6)
    assert loaded.metadata["history"] == history
    assert files(best.parent) == [KEPT]


def test_of_two_epochs_with_the_same_loss_the_first_is_kept(few, best, monkeypatch):
    """Its weights and its description are of the same epoch."""
    averages = []
    with monkeypatch.context() as patch:
        loss = utils.Loss(7.0, 7.0, 0.0)
        patch.setattr(utils, "evaluate", lambda m, *_, **__: averages.append(weights_of(m)) or loss)
        model, _ = train(few, best, epochs=3)
    assert model.metadata["epoch"] == 1
    assert holds(model, averages[0])
    assert holds(utils.load_checkpoint(best), averages[0])


def test_a_finished_run_is_not_trained_again(few, best, capsys):
    model, history = train(few, best)
    before = best.read_bytes()
    capsys.readouterr()
    again, same = train(few, best)
    assert same == history
    assert same_weights(model, again)
    assert best.read_bytes() == before
    printed = capsys.readouterr().out
    assert "finished" in printed
    assert "epoch  2/2" in printed


def test_without_resume_a_finished_run_is_trained_again_and_kept(few, best):
    for _ in range(3):
        train(few, best, epochs=1, resume=False)
    assert files(best.parent) == [ASIDE, "vae_digits_best.2.safetensors", KEPT]


def test_without_resume_an_unfinished_run_starts_anew(few, best, monkeypatch, capsys):
    with during_epoch(monkeypatch, 2, Stop), pytest.raises(Stop):
        train(few, best)
    unfinished = best.read_bytes()
    train(few, best, resume=False)
    assert "going on" not in capsys.readouterr().out
    assert best.with_name(ASIDE).read_bytes() == unfinished


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 2},
        {"latent_dim": 3},
        {"seed": 2},
        {"beta": 2.0},
        {"variational": False},
        {"learning_rate": 0.01},
        {"batch_size": 24},
        {"metadata": {"data": "mnist"}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_changed_setting_starts_a_new_run_and_keeps_the_old_one(few, best, capsys, change):
    train(few, best, epochs=1)
    before = best.read_bytes()
    _, history = train(few, best, **{"epochs": 1, **change})
    assert f"{best} held another run, which is now {ASIDE}" in capsys.readouterr().out
    assert files(best.parent) == [ASIDE, KEPT]
    assert best.with_name(ASIDE).read_bytes() == before
    assert utils.load_checkpoint(best).metadata["history"] == history


def test_a_run_that_was_renamed_is_still_known(few, best, capsys):
    model, _ = train(few, best, epochs=1)
    train(few, best, epochs=1, seed=2)
    again, _ = train(few, best.with_name(ASIDE), epochs=1)
    assert same_weights(again, model)
    assert "finished" in capsys.readouterr().out
    assert len(files(best.parent)) == 2


def test_other_images_never_replace_a_model(few, best):
    train(few, best)
    before = best.read_bytes()
    settings = utils.load_checkpoint(best).metadata["settings"]
    other = few[0][1:], few[1]
    # which metadata cannot pass off as the same images
    train(other, best, metadata={"data": "digits", "train_images": settings["train_images"]})
    assert best.with_name(ASIDE).read_bytes() == before
    train((other[0], few[1][1:]), best)
    assert len(files(best.parent)) == 3


def test_a_run_stopped_in_its_first_epoch_leaves_what_stood_there(few, best, monkeypatch):
    train(few, best)
    before = best.read_bytes()
    with during_epoch(monkeypatch, 1, Stop), pytest.raises(Stop):
        train(few, best, seed=2)
    assert best.read_bytes() == before
    assert files(best.parent) == [KEPT]


@pytest.mark.parametrize("name", ["a[1]_best.safetensors", "a**b", "v.v2.safetensors", "no_ending"])
def test_odd_file_names_are_names(few, tmp_path, name):
    train(few, tmp_path / name, epochs=2)
    train(few, tmp_path / name, epochs=1)
    assert utils.load_checkpoint(tmp_path / name).metadata["epoch"] == 1
    assert len(files(tmp_path)) == 2


@pytest.mark.parametrize("name", ["vae_digits_reference.safetensors", "my_reference"])
def test_no_run_writes_a_reference(few, tmp_path, name):
    with pytest.raises(ValueError, match="reference checkpoint"):
        train(few, tmp_path / name)
    assert files(tmp_path) == []


def test_the_users_folder_is_found(few, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    train(few, "~/models/x_best.safetensors", epochs=1)
    assert files(tmp_path) == ["models"]
    assert files(tmp_path / "models") == ["x_best.safetensors"]


def test_the_longest_run_fits_into_a_file(few, best, monkeypatch):
    """A run must not find out in its 4,000th epoch that its history can no longer be saved."""
    row = train(few, epochs=1)[1][0]
    long = {key: -1.2345678901234567e-05 for key in row} | {"epoch": utils.MAX_EPOCHS}
    utils.save_checkpoint(best, utils.VAE(2), history=[long] * utils.MAX_EPOCHS)
    assert len(utils.load_checkpoint(best).metadata["history"]) == utils.MAX_EPOCHS
    monkeypatch.setattr(utils, "_train_epoch", None)  # which would fail
    with pytest.raises(ValueError, match="neither long"):
        train(few, epochs=utils.MAX_EPOCHS, metadata={"notes": "x" * 400_000})


# what a run starts from


def test_a_run_interrupted_in_its_first_epoch_starts_again_from_the_same_weights(
    few, best, monkeypatch
):
    """Else it goes on, unnoticed, from half-trained weights."""
    whole, history = train(few)
    model = fresh()
    start = weights_of(model)
    with during_epoch(monkeypatch, 1, KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt, match="^Stopped. Nothing of this run is kept") as e:
            train(few, best, model=model)
    assert str(best) not in str(e.value), "that file is not this run's"
    assert holds(model, start)
    assert all(p.grad is None for p in model.parameters())
    _, again = train(few, best, model=model)
    assert same_weights(model, whole)
    assert without_seconds(again) == without_seconds(history)


def test_without_a_checkpoint_an_interrupt_leaves_the_model_as_it_came(few, monkeypatch):
    model = fresh()
    start = weights_of(model)
    with during_epoch(monkeypatch, 2, KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt, match="Nothing of this run is kept"):
            train(few, model=model)
    assert holds(model, start)


def test_a_run_that_diverged_leaves_the_weights_it_came_with(few, best):
    """Else the model holds NaN, and no lower learning rate ever helps."""
    model = fresh()
    start = weights_of(model)
    with pytest.raises(FloatingPointError, match="not finite at epoch 1, .* lower learning rate"):
        train(few, best, model=model, learning_rate=1e20)
    assert holds(model, start)
    assert not best.exists()
    train(few, best, model=model)
    assert same_weights(model, train(few)[0])


@pytest.mark.parametrize("stop", [KeyboardInterrupt, Stop])
def test_a_run_that_stops_leaves_the_best_epoch_that_was_saved(few, best, monkeypatch, stop):
    model = fresh()
    with during_epoch(monkeypatch, 3, stop), pytest.raises(stop):
        train(few, best, model=model, epochs=4)
    kept = utils.load_checkpoint(best)
    assert same_weights(model, kept)
    metadata = {**kept.metadata}
    metadata.pop("versions")
    assert model.metadata == metadata
    assert [row["epoch"] for row in metadata["history"]] == [1, 2]


def test_the_model_that_an_interrupt_left_goes_on_as_a_fresh_one_does(few, best, monkeypatch):
    whole, _ = train(few, epochs=3)
    model = fresh()
    with during_epoch(monkeypatch, 2, Stop), pytest.raises(Stop):
        train(few, best, model=model, epochs=3)
    train(few, best, model=model, epochs=3)
    assert same_weights(model, whole)
    assert files(best.parent) == [KEPT]
    train(few, best, epochs=3)  # a fresh model finds its run: the file tells the first weights
    assert files(best.parent) == [KEPT]


def test_other_initial_weights_are_another_run(few, best):
    """A fine-tuned model and a fresh one with the same settings do not share a file."""
    tuned, _ = train(few)
    train(few, best, model=tuned)
    before = best.read_bytes()
    model, _ = train(few, best)
    assert same_weights(model, train(few)[0])
    assert best.with_name(ASIDE).read_bytes() == before
    start = fresh()
    start.decoder.conv[0].bias.data[0] += 1e-6
    train(few, best, model=start)
    assert len(files(best.parent)) == 3


@pytest.mark.parametrize("change", [{"resume": False}, {"seed": 2}])
def test_a_run_that_starts_from_what_an_interrupt_left_is_known_by_that(
    few, best, monkeypatch, change
):
    """Else a fresh model of the same settings is later handed its weights."""
    model = fresh()
    with during_epoch(monkeypatch, 2, Stop), pytest.raises(Stop):
        train(few, best, model=model)
    train(few, best, model=model, **change)
    change.pop("resume", None)
    again, _ = train(few, best, **change)
    assert same_weights(again, train(few, **change)[0])


# interruption


def during_write(monkeypatch, number, error):
    """Raise an error where the file of that number, counted from one, would get its name."""
    calls = []
    replace = os.replace

    def counted(source, target):
        if str(source).endswith(".part"):
            calls.append(source)
            if len(calls) == number:
                raise error
        return replace(source, target)

    monkeypatch.setattr(os, "replace", counted)


def test_a_resumed_run_ends_as_the_uninterrupted_one(few, tmp_path, monkeypatch):
    options = {"epochs": 3, "batch_size": 4}  # 12 steps, so that the average lags behind
    whole, history = train(few, tmp_path / "whole", **options)
    for epoch in (1, 2, 3):
        path = tmp_path / f"stopped_in_{epoch}"
        with during_epoch(monkeypatch, epoch, Stop), pytest.raises(Stop):
            train(few, path, **options)
        resumed, same = train(few, path, **options)
        assert same_weights(whole, resumed)
        assert without_seconds(history) == without_seconds(same)
        kept = utils.load_checkpoint(path)
        assert same_weights(utils.load_checkpoint(tmp_path / "whole"), kept)
        assert without_seconds(kept.metadata["history"]) == without_seconds(history)


@pytest.mark.parametrize("epoch", [2, 3])
def test_an_interrupt_says_what_is_kept_and_the_next_call_goes_on(
    few, best, monkeypatch, capsys, epoch
):
    says = re.escape(f"{best} keeps the run up to epoch {epoch - 1}; run again to go on")
    with during_epoch(monkeypatch, epoch, KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt, match=says):
            train(few, best, epochs=3)
    train(few, best, epochs=3)
    assert f"going on after epoch {epoch - 1}" in capsys.readouterr().out


def test_an_interrupt_during_a_save_counts_only_what_is_on_disk(few, best, monkeypatch):
    """The model, too, holds what the file holds: else the next call would start a new run."""
    model = fresh()
    with monkeypatch.context() as patch:
        during_write(patch, 2, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt, match="up to epoch 1;"):
            train(few, best, model=model, epochs=3)
    assert files(best.parent) == [KEPT], "half-written files are left"
    kept = utils.load_checkpoint(best)
    assert len(kept.metadata["history"]) == len(model.metadata["history"]) == 1
    assert same_weights(model, kept)
    train(few, best, model=model, epochs=3)
    assert same_weights(model, train(few, epochs=3)[0])
    assert files(best.parent) == [KEPT]


def test_a_run_stopped_in_its_first_save_leaves_no_litter(few, best, monkeypatch):
    with monkeypatch.context() as patch:
        during_write(patch, 1, Stop)
        with pytest.raises(Stop):
            train(few, best)
    assert files(best.parent) == []


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_where_a_write_fails_after_a_rename_the_old_name_comes_back(
    few, best, monkeypatch, capsys, error
):
    train(few, best)
    before = best.read_bytes()
    during_write(monkeypatch, 1, error)
    raises = pytest.raises(KeyboardInterrupt)
    warns = pytest.warns(UserWarning, match="No space left on device")
    with warns if isinstance(error, OSError) else raises:
        train(few, best, seed=2, epochs=1)
    assert best.read_bytes() == before
    assert files(best.parent) == [KEPT]
    assert "is now" not in capsys.readouterr().out


def test_an_unfinished_run_is_a_checkpoint_too(few, best, monkeypatch):
    with during_epoch(monkeypatch, 2, Stop), pytest.raises(Stop):
        train(few, best)
    loaded = utils.load_checkpoint(best)
    loss = utils.evaluate(loaded, few[1], num_samples=1).loss
    assert loss == pytest.approx(loaded.metadata["history"][0]["val_loss"], rel=1e-6)
    size = best.stat().st_size
    train(few, best)
    assert best.stat().st_size < size / 4, "what it takes to go on is still there"


def test_what_an_interrupt_left_can_be_saved_over_the_run(few, best, monkeypatch):
    """What it takes to go on is gone then: the next call starts anew and keeps the file."""
    model = fresh()
    with during_epoch(monkeypatch, 2, Stop), pytest.raises(Stop):
        train(few, best, model=model)
    utils.save_checkpoint(best, model)
    before = best.read_bytes()
    again, _ = train(few, best)
    assert same_weights(again, train(few)[0])
    assert best.with_name(ASIDE).read_bytes() == before


@pytest.mark.parametrize(
    "part, change",
    [
        ("weights", "shape"),
        ("average", "missing"),
        ("step", "shape"),
        ("exp_avg", "shape"),
        ("exp_avg", "dtype"),
        ("exp_avg_sq", "shape"),
        ("exp_avg_sq", "nan"),
    ],
)
def test_a_state_that_does_not_fit_is_not_loaded(few, best, monkeypatch, part, change):
    """Above all Adam's moments, which its fused kernel writes to without a look at their size."""
    pack = utils._pack

    def changed(model, metadata, state=None):
        for name in list(state or {}):
            if name.startswith(f"training.{part}.") and state[name].is_floating_point():
                tensor = state.pop(name)
                if change == "shape":
                    state[name] = tensor.new_zeros(3, 3)
                elif change == "dtype":
                    state[name] = tensor.half()
                elif change == "nan":
                    state[name] = torch.full_like(tensor, math.nan)
                break
        return pack(model, metadata, state)

    with monkeypatch.context() as patch:
        patch.setattr(utils, "_pack", changed)
        with during_epoch(patch, 2, Stop), pytest.raises(Stop):
            train(few, best)
    before = best.read_bytes()
    model = fresh()
    start = weights_of(model)
    with pytest.raises(utils.CheckpointError, match="holds no run that can go on"):
        train(few, best, model=model)
    assert holds(model, start)
    assert best.read_bytes() == before


EPOCHS = 40


def train_until_killed(images, best, where, number):
    """In a process of its own: it kills itself at that place, when it gets there for that time."""
    torch.set_num_threads(1)
    calls = []

    def kill_here(*args):
        calls.append(1)
        if len(calls) == number:
            if where == "half-written":
                os.ftruncate(args[0], os.fstat(args[0]).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def before(function):
        return lambda *args, **options: (kill_here(*args), function(*args, **options))[1]

    def after(function):
        return lambda *args, **options: (function(*args, **options), kill_here())[0]

    if where == "step":
        register_optimizer_step_post_hook(kill_here)
    elif where == "validation":
        utils.evaluate = before(utils.evaluate)
    elif where in ("half-written", "unflushed"):
        os.fsync = before(os.fsync)
    elif where == "written":
        os.replace = before(os.replace)
    elif where == "saved":
        os.replace = after(os.replace)
    train(images, best, epochs=EPOCHS)


IN_A_SAVE = ["half-written", "unflushed", "written", "saved"]


@pytest.mark.slow
def test_killed_at_any_moment_and_resumed(few, best, tmp_path, request):
    """21 kills, twelve of them in a save; then the same weights as without any."""
    images = few[0][:32], few[1][:8]
    threads = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    torch.set_num_threads(1)  # as in the children: another number rounds differently
    rng = random.Random(0)
    plan = []
    for where in [*IN_A_SAVE, "step", "validation"]:
        plan += [(where, 1), (where, 2), (where, 3)]
    plan += [("anywhere", 0)] * 3
    rng.shuffle(plan)
    for where, number in plan:
        child = context.Process(target=train_until_killed, args=(images, best, where, number))
        before = best.stat().st_mtime_ns if best.exists() else 0
        child.start()
        if where == "anywhere":
            while child.is_alive() and (not best.exists() or best.stat().st_mtime_ns == before):
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.05))
            os.kill(child.pid, signal.SIGKILL)
        child.join(60)
        assert child.exitcode == -signal.SIGKILL, (where, number)
        if best.exists():
            utils.load_checkpoint(best)  # raises if it is half-written
    assert 5 < len(utils.load_checkpoint(best).metadata["history"]) < EPOCHS
    resumed, _ = train(images, best, epochs=EPOCHS)
    assert files(best.parent) == [KEPT], "litter"
    whole, _ = train(images, tmp_path / "whole", epochs=EPOCHS)
    assert same_weights(resumed, whole)
    assert same_weights(utils.load_checkpoint(best), utils.load_checkpoint(tmp_path / "whole"))


# places that fail


def test_a_file_is_on_disk_before_it_gets_its_name(few, best, monkeypatch):
    """Else a power cut leaves an empty file under the name of the best checkpoint."""
    events = []
    fsync = os.fsync
    replace = os.replace

    def watched_fsync(fd):
        events.append(("flushed", os.fstat(fd).st_ino, os.fstat(fd).st_size))
        fsync(fd)

    def watched_replace(source, target):
        status = os.stat(source)
        events.append(("named", status.st_ino, status.st_size))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    train(few, best)
    assert [event[0] for event in events] == ["flushed", "named"] * 2
    assert events[0][1:] == events[1][1:]
    assert events[2][1:] == events[3][1:]


def test_a_folder_without_write_permission(few, open_folder):
    path = open_folder / KEPT
    train(few, path, epochs=1)
    before = path.read_bytes()
    with without_write_permission(open_folder):
        says = r"could not be written \(Permission denied\)"
        with pytest.raises(utils.CheckpointError, match=says):
            train(few, path, epochs=1, seed=2)
        with pytest.raises(utils.CheckpointError, match=says):
            utils.save_checkpoint(path, utils.VAE(2))
    assert path.read_bytes() == before
    assert files(open_folder) == [KEPT]


@contextlib.contextmanager
def full_disk():
    """No file may grow beyond a size that no checkpoint stays within."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_disk_that_fills_costs_no_checkpoint_and_no_training(few, best, monkeypatch, epoch):
    train(few, best)
    before = best.read_bytes()
    with full_disk() as fill, during_epoch(monkeypatch, epoch, fill):
        with pytest.warns(UserWarning) as caught:
            model, history = train(few, best, epochs=3, resume=False)
    texts = [str(warning.message) for warning in caught]
    assert len(texts) == 4 - epoch
    assert "could not be written (File too large). Training goes on" in texts[0]
    assert "save_checkpoint" in texts[-1]
    loss = utils.evaluate(model, few[1], num_samples=1).loss
    assert loss == pytest.approx(min(row["val_loss"] for row in history), rel=1e-5)
    kept = [path.read_bytes() for path in best.parent.glob("vae*")]
    assert before in kept
    assert len(kept) == epoch
    elsewhere = utils.checkpoint_path(best.parent / "elsewhere", "digits")
    utils.save_checkpoint(elsewhere, model)  # as the warning advises
    assert utils.load_best(elsewhere.parent, "digits").metadata["history"] == history
    train(few, best, resume=False)  # the disk has room again
    assert utils.load_checkpoint(best).metadata["epoch"] == 2


def test_a_save_that_failed_once_is_made_up_for(few, best, monkeypatch):
    during_write(monkeypatch, 1, OSError(28, "No space left on device"))
    with pytest.warns(UserWarning, match="No space left on device"):
        model, _ = train(few, best)
    assert same_weights(model, utils.load_checkpoint(best))
    assert utils.load_checkpoint(best).metadata["epoch"] == 2


def test_a_folder_that_vanishes_is_made_again(few, best, monkeypatch):
    with during_epoch(monkeypatch, 2, lambda: shutil.rmtree(best.parent)):
        train(few, best)
    assert files(best.parent) == [KEPT]
    assert len(utils.load_checkpoint(best).metadata["history"]) == 2


@contextlib.contextmanager
def another_process_trains_into(path):
    """It holds the file's lock, as a training would."""
    lock = path.with_name(f".{path.name}.lock")
    hold = f"""
import filelock
lock = filelock.FileLock({str(lock)!r})
lock.acquire()
print("held", flush=True)
input()
"""
    command = [sys.executable, "-c", hold]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as child:
        child.stdout.readline()
        yield
        child.communicate("\n")


def test_two_processes_do_not_share_a_checkpoint(few, best):
    train(few, best, epochs=1)
    before = best.read_bytes()
    with another_process_trains_into(best):
        with pytest.raises(utils.CheckpointError, match="another process is training into"):
            train(few, best)
        with pytest.raises(utils.CheckpointError, match="another process is training into"):
            utils.save_checkpoint(best, utils.VAE(2))
        train(few, best.with_name("ae_digits_best.safetensors"), epochs=1)  # beside it is fine
    assert best.read_bytes() == before
    train(few, best)


def test_a_training_holds_its_file_to_its_end(few, best, monkeypatch):
    model = utils.VAE(2)

    def save_into_it():
        with pytest.raises(utils.CheckpointError, match="another process is training into"):
            utils.save_checkpoint(best, model)

    with during_epoch(monkeypatch, 2, save_into_it):
        train(few, best)
    utils.save_checkpoint(best, model)


def test_a_lock_file_that_cannot_be_deleted_while_it_is_open_is_no_error(few, best, monkeypatch):
    """As on Windows."""
    unlink = os.unlink

    def refused(path, *args, **options):
        if str(path).endswith(".lock"):
            raise PermissionError(13, "The file is being used by another process")
        return unlink(path, *args, **options)

    monkeypatch.setattr(os, "unlink", refused)
    monkeypatch.setattr(os, "remove", refused)
    train(few, best, epochs=1)
    train(few, best, epochs=2)
    assert utils.load_checkpoint(best).metadata["epoch"] == 2


# what stands in the way


def a_folder(path):
    path.mkdir()
    (path / "inside").touch()


def a_fifo(path):
    os.mkfifo(path)


def notes(path):
    path.write_text("my notes")


def an_old_checkpoint(path):
    torch.save(utils.VAE(2).state_dict(), path)


def a_link_to_nothing(path):
    path.symlink_to(path.with_name("nothing"))


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize(
    "make, says",
    [
        (a_folder, "is not a checkpoint of this project"),
        (a_fifo, "is not a checkpoint of this project"),
        (notes, "is no sound checkpoint of this project"),
        (an_old_checkpoint, "a format that is no longer read"),
        (a_link_to_nothing, "there is no checkpoint at"),
    ],
)
def test_what_this_project_did_not_write_is_never_moved(
    few, tmp_path, monkeypatch, make, says, resume
):
    """Neither a folder, which may hold the references, nor a file of the user's."""
    path = tmp_path / "models"
    make(path)
    before = path.lstat()
    monkeypatch.setattr(utils, "_train_epoch", None)  # which would fail
    with pytest.raises((utils.CheckpointError, FileNotFoundError), match=says):
        train(few, path, resume=resume)
    after = path.lstat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert files(tmp_path) == ["models"]


def test_a_failed_read_is_no_other_run(few, best, monkeypatch):
    """A network drive that fails once must not cost a run its name."""
    train(few, best)
    before = best.read_bytes()

    def failed(path):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", failed)
        with pytest.raises(utils.CheckpointError, match=r"could not be read \(Input/output error"):
            train(few, best)
    assert best.read_bytes() == before
    assert files(best.parent) == [KEPT]


# what is written must load


def test_a_compiled_model_is_saved_under_plain_names(few, best):
    plain = fresh()
    compiled = torch.compile(plain, backend="eager")
    utils.fit(compiled, *few, epochs=1, batch_size=16, checkpoint=best)
    assert same_weights(utils.load_checkpoint(best), plain)
    elsewhere = best.with_name("elsewhere.safetensors")
    utils.save_checkpoint(elsewhere, compiled)
    loaded = utils.load_checkpoint(elsewhere)
    assert same_weights(loaded, plain)
    assert loaded.metadata["epoch"] == 1
    expected, _ = train(few, epochs=1)
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(plain.state_dict()[name], tensor)


class OneMoreLayer(utils.VAE):
    def __init__(self):
        super().__init__(2)
        self.extra = torch.nn.Linear(2, 2)


class NoisyCode(utils.VAE):
    """It adds no tensor, so that what it leaves is a VAE."""

    def encode(self, x):
        mu, logvar = super().encode(x)
        return mu + 0.1, logvar


@pytest.mark.parametrize(
    "make",
    [
        OneMoreLayer,
        lambda: utils.VAE(2).double(),
        lambda: utils.VAE(2).half(),
        lambda: utils.VAE(2).bfloat16(),
        lambda: wrecked(math.nan),
        lambda: wrecked(math.inf),
    ],
    ids=["layer", "double", "half", "bfloat16", "nan", "inf"],
)
@pytest.mark.parametrize("checkpoint", [True, False])
def test_a_model_that_could_not_be_loaded_is_refused_before_training(
    few, best, monkeypatch, make, checkpoint
):
    monkeypatch.setattr(utils, "_train_epoch", None)  # which would fail
    with pytest.raises(utils.CheckpointError, match="what would be saved is no sound checkpoint"):
        train(few, best if checkpoint else None, model=make())
    assert not best.parent.exists()


def wrecked(value):
    model = utils.VAE(2)
    model.decoder.conv[0].bias.data[0] = value
    return model


def test_a_subclass_that_adds_no_tensor_is_trained_and_loaded(few, best):
    model, _ = train(few, best, model=NoisyCode(2), epochs=1)
    assert same_weights(utils.load_checkpoint(best), model)


def test_what_is_no_model_is_named(few):
    with pytest.raises(TypeError, match="model must be an instance of"):
        utils.fit(torch.nn.Linear(2, 2), *few)


# numbers that go wrong


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_best(few, best, monkeypatch):
    def wreck():
        monkeypatch.setattr(utils, "learning_rate_at", lambda progress, rate: 1e30)

    model = fresh()
    with during_epoch(monkeypatch, 2, wreck):
        with pytest.raises(FloatingPointError, match="not finite at epoch 3, step [23]"):
            train(few, best, model=model, epochs=4)
    kept = utils.load_checkpoint(best)
    assert kept.metadata["epoch"] in (1, 2)
    assert same_weights(model, kept)


def test_a_validation_that_is_not_finite_stops_the_run(few, best, monkeypatch):
    loss = utils.Loss(math.nan, math.nan, 0.0)
    monkeypatch.setattr(utils, "evaluate", lambda *_, **__: loss)
    with pytest.raises(FloatingPointError, match="in the validation after epoch 1"):
        train(few, best)
    assert not best.exists()


# arguments


def a_cycle():
    cycle = []
    cycle.append(cycle)
    return cycle


def a_depth():
    deep = []
    for _ in range(200_000):
        deep = [deep]
    return deep


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.ones(1),
        object,
        lambda: {1, 2},
        lambda: {1: "a"},
        lambda: (1, 2),
        lambda: math.nan,
        a_cycle,
        a_depth,
        lambda: "x" * 2**22,
    ],
    ids=["tensor", "object", "set", "key", "tuple", "nan", "cycle", "depth", "length"],
)
def test_metadata_that_are_not_plain_are_refused_before_anything_is_written(few, best, make):
    value = make()
    with pytest.raises(ValueError, match="metadata must be plain values"):
        train(few, best, metadata={"value": value})
    with pytest.raises(ValueError, match="metadata must be plain values"):
        utils.save_checkpoint(best, utils.VAE(2), value=value)
    assert not best.parent.exists()


@pytest.mark.parametrize("path", [type(None), 3, "", "\0.safetensors", "x" * 300])
def test_a_path_that_is_no_path_is_named(few, tmp_path, path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    errors = (TypeError, ValueError, utils.CheckpointError)
    with pytest.raises(errors, match="^checkpoint must be the name|File name too long"):
        train(few, path)
    with pytest.raises(errors, match="^path must be the name|File name too long"):
        utils.save_checkpoint(path, utils.VAE(2))
    with pytest.raises(errors, match="^path must be the name|File name too long"):
        utils.load_checkpoint(path)


@pytest.mark.parametrize(
    "name, value, error",
    [
        ("epochs", 0, ValueError),
        ("epochs", 10**6, ValueError),
        ("epochs", 2.5, TypeError),
        ("epochs", True, TypeError),
        ("batch_size", 0, ValueError),
        ("batch_size", "64", TypeError),
        ("learning_rate", 0, ValueError),
        ("learning_rate", -1e-3, ValueError),
        ("learning_rate", math.nan, ValueError),
        ("learning_rate", "fast", TypeError),
        ("beta", -1, ValueError),
        ("beta", math.inf, ValueError),
        ("beta", None, TypeError),
        ("seed", -1, ValueError),
        ("seed", "0", TypeError),
        ("resume", "yes", TypeError),
        ("resume", 1, TypeError),
    ],
)
def test_bad_arguments_are_named(few, name, value, error):
    with pytest.raises(error, match=f"^{name} "):
        utils.fit(utils.VAE(2), *few, **{"epochs": 1, name: value})


BAD_IMAGES = [
    (torch.rand(4, 28, 28), ValueError, "the shape"),
    (torch.rand(4, 1, 32, 32), ValueError, "the shape"),
    (torch.rand(0, 1, 28, 28), ValueError, "the shape"),
    (torch.zeros(4, 1, 28, 28, dtype=torch.uint8), TypeError, "not of torch.uint8"),
    (torch.rand(4, 1, 28, 28).double(), TypeError, "not of torch.float64"),
    (torch.rand(4, 1, 28, 28).numpy(), TypeError, "not of <class 'numpy.ndarray'>"),
    (255 * torch.ones(4, 1, 28, 28), ValueError, r"\[0, 1\], not from 255 to 255"),
    (-torch.ones(4, 1, 28, 28), ValueError, r"\[0, 1\], not from -1 to -1"),
    (torch.full((4, 1, 28, 28), math.nan), ValueError, r"\[0, 1\], not from nan"),
    (torch.full((4, 1, 28, 28), math.inf), ValueError, r"\[0, 1\], not from inf"),
]


@pytest.mark.parametrize("images, error, says", BAD_IMAGES, ids=range(len(BAD_IMAGES)))
def test_bad_images_are_named(few, model, images, error, says):
    with pytest.raises(error, match=f"^train_images must .*{says}"):
        utils.fit(model, images, few[1])
    with pytest.raises(error, match=f"^val_images must .*{says}"):
        utils.fit(model, few[0], images)
    with pytest.raises(error, match=f"^images must .*{says}"):
        utils.evaluate(model, images)


# other devices


def test_the_noise_of_training_is_drawn_on_its_device(monkeypatch):
    """Noise that is drawn on the CPU would hold up every step on CUDA."""
    asked = []
    generator = torch.Generator

    def watched(device="cpu"):
        asked.append(torch.device(device).type)
        return generator()

    model = utils.VAE(2).to("meta")
    settings = {"seed": 0, "batch_size": 2, "epochs": 1, "learning_rate": 1e-3, "beta": 1.0}
    images = torch.empty(4, 1, 28, 28, device="meta")
    optimizer = utils._adam(model)
    average = utils._running_average(model, 2)
    monkeypatch.setattr(torch, "Generator", watched)
    with utils._progress_bar(2, 0) as bar:
        with pytest.raises(NotImplementedError):  # nothing is ever read from the meta device
            utils._train_epoch(model, optimizer, average, images, settings, 1, bar)
    assert asked == ["meta", "cpu"], "the noise on the device, the order on the CPU"


def test_what_makes_adams_moments_leaves_no_trace(few):
    """Else the first step would not be Adam's first, or the weights would not be the ones given."""
    model = fresh()
    start = weights_of(model)
    optimizer = utils._adam(model)
    assert holds(model, start)
    assert all(p.grad is None for p in model.parameters())
    dense = [p for p in model.parameters() if p.ndim == 2]
    for p in model.parameters():
        assert optimizer.state[p].keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(float(moment.abs().sum()) == 0 for moment in optimizer.state[p].values())
    other = fresh()
    plain = torch.optim.AdamW(
        [
            {"params": [p for p in other.parameters() if p.ndim != 2], "weight_decay": 0.0},
            {"params": [p for p in other.parameters() if p.ndim == 2], "weight_decay": 0.1},
        ],
        fused=True,
    )
    for network, adam in ((model, optimizer), (other, plain)):
        for group in adam.param_groups:
            group["lr"] = 1e-3
        logits, mu, logvar = network(few[0], torch.Generator().manual_seed(0))
        utils.vae_loss(logits, few[0], mu, logvar).loss.backward()
        adam.step()
    assert len(dense) == 6
    assert same_weights(model, other)


@pytest.mark.parametrize("device, fused", [("cpu", True), ("cuda", True), ("mps", False)])
def test_adam_is_fused_where_it_can_be(monkeypatch, device, fused):
    monkeypatch.setattr(utils, "_device", lambda model: torch.device(device))
    assert utils._adam(utils.VAE(2)).defaults["fused"] == fused


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA")
def test_a_run_on_cuda_goes_on_and_ends_like_the_uninterrupted_one(few, best, monkeypatch):
    def trained(checkpoint):
        model = fresh().to("cuda")
        return train(few, checkpoint, model=model, epochs=3)[0]

    whole = trained(None)
    with during_epoch(monkeypatch, 2, Stop), pytest.raises(Stop):
        trained(best)
    resumed = trained(best)
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], tensor)
    assert utils.load_checkpoint(best, "cuda").decoder.conv[0].bias.is_cuda


def test_a_model_in_eval_mode_is_trained_like_any_other(few):
    """As a loaded one is: else its batch normalisation would learn nothing."""
    whole, _ = train(few)
    assert same_weights(train(few, model=fresh().eval())[0], whole)


def test_a_trained_model_is_in_eval_mode(few, best):
    """Else the next look at an image goes through the statistics of its batch, and changes them."""
    for _ in range(2):  # the second time it is found, finished
        assert not train(few, best, epochs=1)[0].training
