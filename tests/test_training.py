"""Training: it learns, repeats bit for bit, keeps the best epoch, goes on where it stopped, and loses nothing."""

import contextlib
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
import traceback
from pathlib import Path

import pytest
import torch

import utils

context = multiprocessing.get_context("forkserver")  # starts processes in which torch is already imported
context.set_forkserver_preload(["utils", "torch._dynamo"])  # which Adam would import in every child


def train(images, checkpoint=None, epochs=3, latent_dim=4, seed=0, variational=True, **options):
    """A fresh model and its history."""
    torch.manual_seed(seed)
    model = utils.VAE(latent_dim, variational)
    options = {"batch_size": 32, "facts": {"data": "digits"}, **options}
    return model, utils.fit(model, *images, epochs=epochs, checkpoint=checkpoint, seed=seed, **options)


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def without_seconds(history):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in history]


def files(folder):
    return sorted(os.listdir(folder))


KEPT = ["vae_digits_best.pt", "vae_digits_best.resume.pt"]


# learning


def test_history_has_a_row_per_epoch(few):
    _, history = train(few)
    assert [row["epoch"] for row in history] == [1, 2, 3]
    for row in history:
        assert row["val_loss"] == pytest.approx(row["val_bce"] + row["val_kl"])
        assert row["train_loss"] == pytest.approx(row["train_bce"] + row["train_kl"], rel=1e-5)
        assert row["seconds"] > 0
    assert history[0]["learning_rate"] == 1e-3
    assert history[-1]["val_loss"] < history[0]["val_loss"]


def test_the_learning_rate_doubles_and_falls_to_zero():
    rates = [utils.learning_rate_at(i / 1000, 1e-3) for i in range(1001)]
    assert rates[0] == 1e-3 and max(rates) == pytest.approx(2e-3) and rates.index(max(rates)) == 100
    assert rates[-1] == pytest.approx(0, abs=1e-12)
    assert rates[325] == pytest.approx(1.5e-3), "not a straight line"
    assert max(abs(a - b) for a, b in zip(rates, rates[1:])) < 2e-5, "the schedule has a jump"


def test_only_the_dense_layers_matrices_decay(few, monkeypatch):
    """With no gradient at all, what still moves is what decays: by 1 - rate * decay at every step."""
    def nothing(logits, x, mu, logvar, beta):
        zero = 0 * (logits.sum() + mu.sum() + logvar.sum())
        return utils.Loss(zero, zero.detach(), zero.detach())

    monkeypatch.setattr(utils, "vae_loss", nothing)
    model = utils.VAE(4)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    utils.fit(model, *few, epochs=2, batch_size=48)
    left = math.prod(1 - utils.learning_rate_at(i / 4, 1e-3) * utils.WEIGHT_DECAY for i in range(4))
    dense = {f"{name}.weight" for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
    assert dense and left < 1
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * (left if name in dense else 1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("steps, every, decay", [(24, 1, 1 - 10 / 24), (250, 2, 0.92)])
def test_what_is_kept_is_the_running_average_of_the_weights(digits, best, monkeypatch, steps, every, decay):
    model, adam, seen = utils.VAE(4), utils._adam, []

    def watched(*args):
        optimizer = adam(*args)
        optimizer.register_step_post_hook(lambda *_: seen.append({k: v.clone() for k, v in model.state_dict().items()}))
        return optimizer

    monkeypatch.setattr(utils, "_adam", watched)
    utils.fit(model, digits.train.images[: 2 * steps], digits.val.images[:8], epochs=1, batch_size=2, checkpoint=best)
    assert len(seen) == steps
    expected, *rest = seen[every - 1 :: every]
    for weights in rest:
        expected = {name: decay * expected[name] + (1 - decay) * weights[name] for name in expected}
    for kept in (model.state_dict(), utils.load_checkpoint(best).state_dict()):
        for name, tensor in kept.items():
            if tensor.is_floating_point():
                torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-6)
                assert not torch.equal(tensor, seen[-1][name])


@pytest.mark.parametrize("variational", [True, False])
def test_the_network_overfits_64_images(digits, variational):
    images = digits.train.images[:64]
    torch.manual_seed(0)
    model = utils.VAE(16, variational)
    before = utils.evaluate(model, images)
    utils.fit(model, images, images, epochs=90, batch_size=64, beta=0.1)
    after = utils.evaluate(model, images)
    floor = utils.bce_per_image(images.logit(1e-6), images).mean()  # the entropy of the grey values
    assert after.bce - floor < 0.2 * (before.bce - floor)


def test_training_figures_weight_every_image_the_same(few, monkeypatch):
    """With the mean grey value as the loss, the figure of an epoch is that of all images, short last batch or not."""
    def grey(logits, x, mu, logvar, beta):
        value = x.mean() + 0 * logits.sum() + 0 * logvar.sum()
        return utils.Loss(value, value, 0 * value)

    images = torch.cat([few[0][:90], torch.ones(6, 1, 28, 28)])
    monkeypatch.setattr(utils, "vae_loss", grey)
    _, history = train((images, few[1]), epochs=1, batch_size=36)
    assert history[0]["train_bce"] == pytest.approx(float(images.mean()), rel=1e-5)


def test_evaluate_does_not_depend_on_batches_or_mode(model, digits, monkeypatch):
    images = digits.val.images[:50]
    whole = utils.evaluate(model, images, passes=2)
    small = utils.loss_per_image(model, images, passes=2, batch_size=7)
    assert whole.bce == pytest.approx(float(small.bce.mean()), rel=1e-5)
    assert model.training and utils.evaluate(model.eval(), images, passes=2) == whole and not model.training
    assert utils.evaluate(model, images, passes=2, seed=1) != whole


def test_evaluate_is_the_loss_of_the_definition(model, digits):
    images = digits.val.images[:20]
    logits, mu, logvar = model.eval()(images, torch.Generator().manual_seed(3))
    expected, measured = utils.vae_loss(logits, images, mu, logvar), utils.evaluate(model, images, passes=1, seed=3)
    assert measured.bce == pytest.approx(expected.bce.item(), rel=1e-5)
    assert measured.kl == pytest.approx(expected.kl.item(), rel=1e-5)


def test_same_seed_same_weights_bit_for_bit(few):
    (a, first), (b, second), (c, _) = train(few), train(few), train(few, seed=1)
    assert same_weights(a, b) and without_seconds(first) == without_seconds(second)
    assert not same_weights(a, c)


def test_every_epoch_of_every_seed_has_noise_and_an_order_of_its_own(few, monkeypatch):
    seen, forward = [], utils.VAE.forward

    def watched(self, x, generator=None):
        seen.append((generator.initial_seed(), x[0].sum().item()))
        return forward(self, x, generator)

    monkeypatch.setattr(utils.VAE, "forward", watched)
    for seed in (0, 1):
        train(few, batch_size=96, seed=seed)
    assert len(set(noise for noise, _ in seen)) == len(set(first for _, first in seen)) == len(seen) == 6


def test_training_leaves_the_global_random_state_alone(few):
    model = utils.VAE(4)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    utils.fit(model, *few, epochs=1)
    assert torch.equal(torch.rand(1), expected)


def test_two_epochs_on_real_mnist(mnist):
    torch.manual_seed(0)
    model = utils.VAE()
    history = utils.fit(model, mnist.train.images, mnist.val.images, epochs=2)
    assert history[-1]["val_loss"] < 106


# the best checkpoint


def test_the_best_checkpoint_is_the_minimum_of_validation(few, best, monkeypatch):
    """A run that gets worse: from its middle on the learning rate wrecks the weights."""
    calm = utils.learning_rate_at
    monkeypatch.setattr(utils, "learning_rate_at", lambda progress, rate: calm(progress, rate) if progress < 0.5 else 0.1)
    _, history = train(few, best, epochs=6, batch_size=8)
    losses = [row["val_loss"] for row in history]
    lowest = losses.index(min(losses))
    assert lowest < 5, "the run did not get worse"
    loaded = utils.load_checkpoint(best)
    assert loaded.facts["epoch"] == lowest + 1 and loaded.facts["val_loss"] == losses[lowest]
    assert utils.evaluate(loaded, few[1], passes=1).loss == pytest.approx(losses[lowest], rel=1e-6)
    assert without_seconds(loaded.facts["history"]) == without_seconds(history)
    assert files(best.parent) == KEPT


def test_a_finished_run_is_not_trained_again(few, best, capsys):
    model, history = train(few, best)
    before = best.read_bytes()
    capsys.readouterr()
    again, same = train(few, best)
    assert same == history and same_weights(model, again) and best.read_bytes() == before
    printed = capsys.readouterr().out
    assert "finished" in printed and "epoch  3/3" in printed


@pytest.mark.parametrize("change, named", [
    ({"epochs": 4}, "epochs 3 -> 4"), ({"latent_dim": 5}, "latent_dim 4 -> 5"), ({"seed": 1}, "seed 0 -> 1"),
    ({"variational": False}, "variational True -> False"), ({"beta": 2.0}, "beta"), ({"learning_rate": 0.01}, "learning_rate")])
def test_a_changed_setting_is_named_and_nothing_mixed(few, best, change, named):
    train(few, best)
    before = best.read_bytes()
    with pytest.raises(ValueError, match=f"other settings .*{named}.*resume=False"):
        train(few, best, **change)
    assert best.read_bytes() == before
    train(few, best, **change, resume=False)
    assert utils.load_checkpoint(best).facts["settings"][next(iter(change))] == next(iter(change.values()))


@pytest.mark.parametrize("resume", [True, False])
def test_a_model_never_overwrites_one_trained_on_other_images(few, best, resume):
    train(few, best)
    before = best.read_bytes()
    for images, facts in (((few[0][1:], few[1]), {"data": "digits"}), (few, {"data": "mnist"})):
        with pytest.raises(ValueError, match="other images .*digits.* not overwritten"):
            train(images, best, facts=facts, resume=resume)
    assert best.read_bytes() == before


def test_a_lone_best_checkpoint_is_not_replaced_silently(few, best):
    train(few, best)
    (best.parent / KEPT[1]).unlink()
    with pytest.raises(ValueError, match="nothing to resume from"):
        train(few, best)
    train(few, best, resume=False)


def test_no_run_writes_a_reference(few, tmp_path):
    with pytest.raises(ValueError, match="reference checkpoint"):
        train(few, tmp_path / "vae_digits_reference.pt")
    assert files(tmp_path) == []


def test_a_foreign_or_damaged_file_is_neither_resumed_nor_overwritten(few, best):
    train(few, best)
    state = best.parent / KEPT[1]
    state.write_bytes(state.read_bytes()[:-5])
    with pytest.raises(utils.CheckpointError, match="resume.pt .*cut short"):
        train(few, best)
    best.write_text("my notes")
    with pytest.raises(utils.CheckpointError, match="not a checkpoint"):
        train(few, best, resume=False)
    assert best.read_text() == "my notes"


# interruption


class Stop(Exception):
    pass


@contextlib.contextmanager
def during_epoch(monkeypatch, epoch, action):
    """Do something in the middle of a run: when the validation of an epoch begins."""
    calls, evaluate = [], utils.evaluate

    def counted(*args, **options):
        calls.append(1)
        if len(calls) == epoch:
            action()
        return evaluate(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(utils, "evaluate", counted)
        yield


def stop(error):
    def action():
        raise error
    return action


@pytest.mark.parametrize("epoch", [1, 2, 5])
def test_a_resumed_run_ends_as_the_uninterrupted_one(few, best, tmp_path, monkeypatch, epoch):
    options = {"epochs": 5, "batch_size": 8}  # 12 steps: few enough to be quick, enough for the average to lag behind
    whole, history = train(few, tmp_path / "whole_best.pt", **options)
    with during_epoch(monkeypatch, epoch, stop(Stop())), pytest.raises(Stop):
        train(few, best, **options)
    resumed, same = train(few, best, **options)
    assert same_weights(whole, resumed) and without_seconds(history) == without_seconds(same)
    assert same_weights(utils.load_checkpoint(tmp_path / "whole_best.pt"), utils.load_checkpoint(best))


def test_an_interrupt_says_what_is_kept_and_how_to_go_on(few, best, monkeypatch, capsys):
    with during_epoch(monkeypatch, 3, stop(KeyboardInterrupt())), pytest.raises(KeyboardInterrupt):
        train(few, best)
    assert "2 finished epochs are kept" in capsys.readouterr().out
    assert files(best.parent) == KEPT and utils.load_checkpoint(best).facts["epoch"] == 2


EPOCHS = 90


def train_in_child(images, best, epochs=EPOCHS):
    torch.set_num_threads(1)
    train(images, best, epochs=epochs, batch_size=16)


@pytest.mark.slow
def test_killed_at_any_moment_and_resumed(few, best, tmp_path):
    """At least 20 kills, a third of them in the middle of a save; then the same weights as without any."""
    images = few[0][:32], few[1][:8]
    rng = random.Random(0)
    kills = during_save = 0
    while not (best.exists() and len(finished := utils.load_checkpoint(best).facts["history"]) == EPOCHS):
        child = context.Process(target=train_in_child, args=(images, best))
        child.start()
        deadline = time.monotonic() + rng.uniform(0.02, 0.7)
        wait_for_save = kills % 3 == 0
        while child.is_alive() and time.monotonic() < deadline + 5 * wait_for_save:
            if kills >= 26:
                child.join(60)
            elif wait_for_save and list(best.parent.glob(".*.part")):
                during_save += 1
                break
        if child.is_alive():
            os.kill(child.pid, signal.SIGKILL)
            kills += 1
        child.join()
        if (best.parent / KEPT[1]).exists() and utils._read(best.parent / KEPT[1], "run")["history"]:
            utils.load_checkpoint(best)  # raises if it is missing or half-written
    assert kills >= 20 and during_save >= 5, (kills, during_save)
    assert len(finished) == EPOCHS
    assert files(best.parent) == KEPT, "litter"
    threads = torch.get_num_threads()
    try:
        train_in_child(images, tmp_path / "whole_best.pt")
    finally:
        torch.set_num_threads(threads)
    for kind, name in (("model", "whole_best.pt"), ("run", "whole_best.resume.pt")):
        whole = utils._read(tmp_path / name, kind)
        resumed = utils._read(best.parent / name.replace("whole", "vae_digits"), kind)
        for part in {"weights", "average"} & whole.keys():
            assert all(torch.equal(whole[part][key], resumed[part][key]) for key in whole[part])


# places that fail


def in_child(function, *args):
    """Run a function in a process of its own and bring back what it returns; its exceptions fail the test."""
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=report, args=(sender, function, args))
    child.start()
    assert receiver.poll(60), "the process did not answer"
    ok, value = receiver.recv()
    child.join()
    assert ok, value
    return value


def report(sender, function, args):
    try:
        sender.send((True, function(*args)))
    except BaseException:
        sender.send((False, traceback.format_exc()))


def train_as_nobody(images, best):
    if os.geteuid() == 0:
        os.setuid(65534)
    try:
        train(images, best, resume=False)
    except utils.CheckpointError as error:
        return str(error)


def test_a_folder_without_write_permission(few):
    folder = Path("/tmp", f"vae-mnist-test-{os.getpid()}")
    try:
        train(few, folder / "vae_digits_best.pt")
        before = (folder / "vae_digits_best.pt").read_bytes()
        folder.chmod(0o555)
        message = in_child(train_as_nobody, few, folder / "vae_digits_best.pt")
        assert "cannot be written (Permission denied)" in message
        assert (folder / "vae_digits_best.pt").read_bytes() == before and files(folder) == KEPT
    finally:
        folder.chmod(0o755)
        shutil.rmtree(folder)


def train_with_small_files(images, best):
    """A limit on the size of files, as a full disk would have it: from the start, then between two epochs."""
    size = best.stat().st_size // 2

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    limit(size)
    try:
        train(images, best, resume=False)
        return "no error"
    except utils.CheckpointError as error:
        assert "could not be written (File too large)" in str(error)
    utils.load_checkpoint(best)
    limit(resource.RLIM_INFINITY)
    with pytest.MonkeyPatch.context() as patch, pytest.warns(UserWarning, match="File too large.*training goes on"), \
            during_epoch(patch, 2, lambda: limit(size)):
        _, history = train(images, best, resume=False)
    assert utils.load_checkpoint(best).facts["epoch"] == 1
    return len(history)


def test_a_disk_that_fills_costs_no_checkpoint_and_no_training(few, best):
    train(few, best)
    assert in_child(train_with_small_files, few, best) == 3
    assert files(best.parent) == KEPT
    model, _ = train(few, best)  # the disk has room again: the run goes on after its first epoch
    assert utils.load_checkpoint(best).facts["epoch"] == 3


def test_a_folder_that_vanishes_is_made_again(few, best, monkeypatch):
    with during_epoch(monkeypatch, 2, lambda: shutil.rmtree(best.parent)):
        train(few, best)
    assert files(best.parent) == KEPT and len(utils.load_checkpoint(best).facts["history"]) == 3


def test_two_runs_do_not_share_a_checkpoint(few, best):
    child = context.Process(target=train_in_child, args=(few, best, 20))
    child.start()
    lock = best.parent / f".{best.name}.lock"
    while not lock.exists():
        time.sleep(0.01)
    time.sleep(0.1)
    with pytest.raises(utils.CheckpointError, match="another run is training"):
        train(few, best)
    train(few, best.with_name("ae_digits_best.pt"), epochs=1, variational=False)  # beside it is fine
    child.join()
    assert child.exitcode == 0 and len(utils.load_checkpoint(best).facts["history"]) == 20
    assert not lock.exists()


# numbers that go wrong


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_best(few, best, monkeypatch):
    def wreck():
        monkeypatch.setattr(utils, "learning_rate_at", lambda progress, rate: 1e30)

    with during_epoch(monkeypatch, 2, wreck), pytest.raises(FloatingPointError, match="not finite at epoch 3, step [23]"):
        train(few, best, epochs=5)
    loaded = utils.load_checkpoint(best)
    assert loaded.facts["epoch"] in (1, 2) and math.isfinite(utils.evaluate(loaded, few[1]).loss)


@pytest.mark.parametrize("learning_rate", [1.0, 1e4, 1e20])
def test_an_exploding_learning_rate_stops_or_stays_finite(few, best, learning_rate):
    try:
        _, history = train(few, best, learning_rate=learning_rate)
        assert all(math.isfinite(row["val_loss"]) for row in history)
    except FloatingPointError as error:
        assert "not finite" in str(error)
    if best.exists():
        utils.load_checkpoint(best)


@pytest.mark.parametrize("change, says", [
    ({"epochs": 0}, "epochs is 0"), ({"epochs": 2.5}, "epochs is 2.5"), ({"epochs": True}, "epochs is True"),
    ({"batch_size": 0}, "batch_size is 0"), ({"batch_size": "64"}, "batch_size is '64'"),
    ({"learning_rate": 0}, "learning_rate is 0"), ({"learning_rate": -1e-3}, "learning_rate"),
    ({"learning_rate": math.nan}, "learning_rate is nan"), ({"beta": -1}, "beta is -1"), ({"beta": math.inf}, "beta is inf"),
    ({"seed": -1}, "seed is -1")])
def test_bad_arguments_are_named(few, change, says):
    options = {"epochs": 1, **change}
    with pytest.raises(ValueError, match=says):
        utils.fit(utils.VAE(2), *few, **options)


BAD_IMAGES = [
    (torch.rand(4, 28, 28), "shape"), (torch.rand(4, 1, 32, 32), "shape"), (torch.rand(0, 1, 28, 28), "shape"),
    (torch.zeros(4, 1, 28, 28, dtype=torch.uint8), "float32"), (torch.rand(4, 1, 28, 28).double(), "float32"),
    (torch.rand(4, 1, 28, 28).numpy(), "float32"), (255 * torch.ones(4, 1, 28, 28), r"\[0, 1\]"),
    (-torch.ones(4, 1, 28, 28), r"\[0, 1\]"), (torch.full((4, 1, 28, 28), math.nan), "NaN"),
    (torch.full((4, 1, 28, 28), math.inf), r"\[0, 1\]")]


@pytest.mark.parametrize("images, says", BAD_IMAGES)
def test_bad_images_are_named(few, model, images, says):
    with pytest.raises(ValueError, match=f"train_images must .*{says}"):
        utils.fit(model, images, few[1])
    with pytest.raises(ValueError, match=f"val_images must .*{says}"):
        utils.fit(model, few[0], images)
    with pytest.raises(ValueError, match=f"images must .*{says}"):
        utils.evaluate(model, images)
