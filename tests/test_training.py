"""Training: it learns, repeats bit for bit, keeps the best epoch, goes on where it stopped, and loses nothing."""

import json
import math
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import Stop, context, during_epoch, in_child
from torch.optim.optimizer import register_optimizer_step_post_hook

import utils


def train(images, checkpoint=None, epochs=3, latent_dim=4, seed=0, variational=True, **options):
    """A fresh model and its history."""
    torch.manual_seed(seed)
    model = utils.VAE(latent_dim, variational)
    options = {"batch_size": 32, "metadata": {"data": "digits"}, **options}
    return model, utils.fit(model, *images, epochs=epochs, checkpoint=checkpoint, seed=seed, **options)


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def without_seconds(history):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in history]


def files(folder):
    return sorted(name for name in os.listdir(folder) if not name.endswith(".lock"))


KEPT = ["vae_digits_best.pt"]


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
def test_what_is_kept_is_the_running_average_of_the_weights(digits, best, steps, every, decay):
    model, seen = utils.VAE(4), []
    hook = register_optimizer_step_post_hook(lambda *_: seen.append({k: v.clone() for k, v in model.state_dict().items()}))
    utils.fit(model, digits.train.images[: 2 * steps], digits.val.images[:8], epochs=1, batch_size=2, checkpoint=best)
    hook.remove()
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
    whole = utils.evaluate(model, images, num_samples=2)
    monkeypatch.setattr(utils, "BATCH", 7)
    small = utils.loss_per_image(model, images, num_samples=2)
    monkeypatch.undo()
    assert whole.bce == pytest.approx(float(small.bce.mean()), rel=1e-5)
    assert model.training and utils.evaluate(model.eval(), images, num_samples=2) == whole and not model.training
    assert utils.evaluate(model, images, num_samples=2, seed=1) != whole


def test_evaluate_is_the_loss_of_the_definition(model, digits):
    images = digits.val.images[:20]
    logits, mu, logvar = model.eval()(images, torch.Generator().manual_seed(3))
    expected, measured = utils.vae_loss(logits, images, mu, logvar), utils.evaluate(model, images, num_samples=1, seed=3)
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
    assert loaded.metadata["epoch"] == lowest + 1 and loaded.metadata["val_loss"] == losses[lowest]
    assert utils.evaluate(loaded, few[1], num_samples=1).loss == pytest.approx(losses[lowest], rel=1e-6)
    assert without_seconds(loaded.metadata["history"]) == without_seconds(history)
    assert files(best.parent) == KEPT


def test_a_finished_run_is_not_trained_again(few, best, capsys):
    model, history = train(few, best)
    before = best.read_bytes()
    capsys.readouterr()
    again, same = train(few, best)
    assert same == history and same_weights(model, again) and best.read_bytes() == before
    printed = capsys.readouterr().out
    assert "finished" in printed and "epoch  3/3" in printed


def test_without_resume_a_finished_run_is_trained_again_and_kept(few, best):
    for _ in range(3):
        train(few, best, epochs=1, resume=False)
    assert files(best.parent) == [f"vae_digits_best.{name}pt" for name in ("before.", "before1.", "")]


@pytest.mark.parametrize("change, label", [
    ({"epochs": 4}, "epochs3"), ({"latent_dim": 5}, "latent_dim4"), ({"seed": 1}, "seed0"), ({"beta": 2.0}, "beta1.0"),
    ({"variational": False}, "variationalTrue"), ({"learning_rate": 0.01}, "learning_rate0.001"),
    ({"batch_size": 16}, "batch_size32"),
    ({"metadata": {"data": "mnist"}}, "datadigits")])
def test_a_changed_setting_starts_a_new_run_and_keeps_the_old_one(few, best, capsys, change, label):
    train(few, best)
    before, aside = best.read_bytes(), f"vae_digits_best.{label}.pt"
    capsys.readouterr()
    _, history = train(few, best, **change)
    assert f"it is kept as {aside}" in capsys.readouterr().out and files(best.parent) == sorted([*KEPT, aside])
    assert (best.parent / aside).read_bytes() == before
    assert without_seconds(utils.load_checkpoint(best).metadata["history"]) == without_seconds(history)
    train(few, best.parent / aside)  # the old run, under its new name: finished, and not trained again
    assert "finished" in capsys.readouterr().out


def test_three_runs_that_differ_in_the_same_setting_are_all_kept(few, best):
    for epochs in (1, 2, 1, 2):
        train(few, best, epochs=epochs)
    assert files(best.parent) == [f"vae_digits_best.{name}pt" for name in ("epochs1.", "epochs11.", "epochs2.", "")]


def test_a_run_stopped_in_its_first_epoch_leaves_what_stood_there(few, best, monkeypatch):
    train(few, best)
    before = best.read_bytes()
    with during_epoch(monkeypatch, 1, KeyboardInterrupt), pytest.raises(KeyboardInterrupt, match="best.pt: 0;"):
        train(few, best, seed=1)
    assert best.read_bytes() == before and files(best.parent) == KEPT
    train(few, best)
    assert best.read_bytes() == before, "the first run was not taken for finished"


def test_other_images_never_replace_a_model(few, best):
    train(few, best)
    before, digest = best.read_bytes(), utils.load_checkpoint(best).metadata["settings"]["train_images"]
    other = few[0][1:], few[1]  # which metadata cannot pass off as the same images
    train(other, best, metadata={"data": "digits", "train_images": digest})
    (aside,) = [path for path in best.parent.glob("*.pt") if path.read_bytes() == before]
    assert aside.name.startswith("vae_digits_best.train_images")


@pytest.mark.parametrize("resume", [True, False])
def test_what_is_no_file_of_this_run_is_moved_aside_and_not_lost(few, best, resume):
    best.parent.mkdir()
    best.write_text("my notes")
    train(few, best, resume=resume)
    assert utils.load_checkpoint(best).metadata["epoch"] == 3
    assert best.with_name("vae_digits_best.before.pt").read_text() == "my notes"


@pytest.mark.parametrize("name", ["a[1]_best.pt", "a**b_best.pt", "v.v2.pt", "no_ending"])
def test_odd_file_names_are_names(few, tmp_path, name):
    train(few, tmp_path / name, epochs=2)
    train(few, tmp_path / name, epochs=1)
    assert utils.load_checkpoint(tmp_path / name).metadata["epoch"] == 1 and len(files(tmp_path)) == 2


@pytest.mark.parametrize("path", ["x" * 300 + ".pt", "\0.pt", None.__class__, 3, ""])
def test_a_path_that_is_no_path_is_named(few, tmp_path, path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, utils.CheckpointError), match="checkpoint is|File name too long"):
        train(few, path)
    with pytest.raises((ValueError, utils.CheckpointError), match="path is|File name too long"):
        utils.save_checkpoint(path, utils.VAE(2))
    with pytest.raises((ValueError, FileNotFoundError), match="path is|there is no checkpoint at"):
        utils.load_checkpoint(path)


CYCLE = []
CYCLE.append(CYCLE)
DEEP = []
for _ in range(200_000):
    DEEP = [DEEP]


@pytest.mark.parametrize("value", [torch.ones(1), object(), {1, 2}, {1: "a"}, (1, 2), math.nan, math.inf, CYCLE, DEEP],
                         ids=range(9))
def test_metadata_that_are_not_plain_are_refused_before_anything_is_written(few, best, value):
    with pytest.raises(ValueError, match="metadata must be plain values"):
        train(few, best, metadata={"value": value})
    with pytest.raises(ValueError, match="metadata must be plain values"):
        utils.save_checkpoint(best, utils.VAE(2), value=value)
    assert not best.parent.exists()


@pytest.fixture
def unfinished(few, best, monkeypatch):
    """The payload of a run stopped in its second epoch, and the weights it would have had after its third."""
    whole, _ = train(few)
    with during_epoch(monkeypatch, 2, Stop), pytest.raises(Stop):
        train(few, best)
    return torch.load(best, weights_only=True), whole


@pytest.mark.parametrize("part", ["", "model/", "average/", "step/", "exp_avg/", "exp_avg_sq/"])
@pytest.mark.parametrize("change", ["shape", "dtype", "nan", "missing", "kind"])
def test_a_state_that_does_not_fit_is_not_loaded(few, best, unfinished, part, change):
    """Above all Adam's moments, which its fused kernel writes to without looking at their size."""
    payload, whole = unfinished
    tensors = payload["run" if part else "tensors"]
    name = next(name for name in tensors if name.startswith(part) and tensors[name].is_floating_point())
    tensor = tensors.pop(name)
    if change != "missing":
        tensors[name] = {"shape": tensor.flatten()[:1][None, None, None], "dtype": tensor.half(), "kind": [1.0],
                         "nan": torch.full_like(tensor, math.nan)}[change]
    torch.save(payload, best)
    again, _ = train(few, best)
    assert same_weights(whole, again) and best.with_name("vae_digits_best.before.pt").exists()


@pytest.mark.parametrize("of, key, value", [
    ("metadata", "history", None), ("metadata", "history", []), ("metadata", "history", [{"epoch": 1}]),
    ("metadata", "history", [3]), ("metadata", "history", "abc"), ("metadata", "history", lambda rows: [{**rows[0], "epoch": 2}]),
    ("metadata", "history", lambda rows: 4 * rows), ("metadata", "settings", 1), ("metadata", "settings", None),
    ("run", "resume", None), ("run", "resume", 3), ("run", "machine", None), (None, "run", None), (None, "run", []),
    (None, "metadata", None)])
def test_a_run_whose_header_is_odd_is_gone_on_with_or_moved_aside(few, best, unfinished, of, key, value):
    payload, whole = unfinished
    header = json.loads(payload["header"])
    part = header if of is None else header[of]
    history = header["metadata"]["history"]
    part.pop(key, None)
    if value is not None:
        part[key] = value(history) if callable(value) else value
    torch.save({**payload, "header": json.dumps(header)}, best)
    again, history = train(few, best)
    assert [row["epoch"] for row in history] == [1, 2, 3] and same_weights(whole, again)
    assert same_weights(whole, utils.load_checkpoint(best))


def test_an_unfinished_run_is_a_checkpoint_too(few, best, unfinished):
    loaded = utils.load_checkpoint(best)
    loss = utils.evaluate(loaded, few[1], num_samples=1).loss
    assert loss == pytest.approx(loaded.metadata["history"][0]["val_loss"], rel=1e-6)
    size = best.stat().st_size
    train(few, best)
    assert best.stat().st_size < size / 4, "what it takes to go on is still there"


def test_another_machine_is_said_to_round_otherwise(few, best, monkeypatch, capsys):
    with during_epoch(monkeypatch, 2, Stop), pytest.raises(Stop):
        train(few, best)
    train(few, best)
    assert "rounding" not in capsys.readouterr().out
    with during_epoch(monkeypatch, 2, Stop), pytest.raises(Stop):
        train(few, best, resume=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        train(few, best, resume=False)
    finally:
        torch.set_num_threads(threads)
    assert f"{threads} threads" in (printed := capsys.readouterr().out) and "not bit for bit" in printed


def test_no_run_writes_a_reference(few, tmp_path):
    with pytest.raises(ValueError, match="reference checkpoint"):
        train(few, tmp_path / "vae_digits_reference.pt")
    assert files(tmp_path) == []


# interruption


def during_write(monkeypatch, number, error):
    """Raise an error where the file of that number, counted from one, would be moved to its place."""
    replace, calls = os.replace, []

    def counted(*args):
        calls.append(args)
        if len(calls) == number:
            raise error
        return replace(*args)

    monkeypatch.setattr(os, "replace", counted)


@pytest.mark.parametrize("epoch", [1, 2, 5])
def test_a_resumed_run_ends_as_the_uninterrupted_one(few, best, tmp_path, monkeypatch, epoch):
    options = {"epochs": 5, "batch_size": 8}  # 12 steps: few enough to be quick, enough for the average to lag behind
    whole, history = train(few, tmp_path / "whole_best.pt", **options)
    with during_epoch(monkeypatch, epoch, Stop), pytest.raises(Stop):
        train(few, best, **options)
    resumed, same = train(few, best, **options)
    assert same_weights(whole, resumed) and without_seconds(history) == without_seconds(same)
    assert same_weights(utils.load_checkpoint(tmp_path / "whole_best.pt"), utils.load_checkpoint(best))


@pytest.mark.parametrize("epoch, says", [(2, "best.pt: 1;"), (3, "best.pt: 2;")])
@pytest.mark.parametrize("resume", [True, False])
def test_an_interrupt_says_what_is_kept_and_the_next_call_goes_on(few, best, monkeypatch, capsys, epoch, says, resume):
    train(few, best)  # a finished run, which resume=False starts afresh
    options = {"resume": resume, "seed": 0 if not resume else 1}
    with during_epoch(monkeypatch, epoch, KeyboardInterrupt), pytest.raises(KeyboardInterrupt, match=says):
        train(few, best, **options)
    assert utils.load_checkpoint(best).metadata["epoch"] == epoch - 1
    train(few, best, **options)
    assert f"going on after epoch {epoch - 1}" in capsys.readouterr().out


def test_an_interrupt_during_a_save_counts_only_what_is_on_disk(few, best, monkeypatch):
    during_write(monkeypatch, 2, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt, match="best.pt: 1;"):
        train(few, best)
    monkeypatch.undo()
    assert files(best.parent) == KEPT, "half-written files are left"
    assert len(utils.load_checkpoint(best).metadata["history"]) == 1
    train(few, best)
    assert len(utils.load_checkpoint(best).metadata["history"]) == 3 and files(best.parent) == KEPT


def test_a_run_killed_in_its_first_save_leaves_no_litter(few, best, monkeypatch):
    during_write(monkeypatch, 1, Stop)
    with pytest.raises(Stop):
        train(few, best)
    monkeypatch.undo()
    train(few, best)
    assert files(best.parent) == KEPT


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
    while not (best.exists() and len(finished := utils.load_checkpoint(best).metadata["history"]) == EPOCHS):
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
        if best.exists():
            utils.load_checkpoint(best)  # raises if it is half-written
    assert kills >= 20 and during_save >= 5, (kills, during_save)
    assert len(finished) == EPOCHS
    assert files(best.parent) == KEPT, "litter"
    threads = torch.get_num_threads()
    try:
        train_in_child(images, tmp_path / "whole_best.pt")
    finally:
        torch.set_num_threads(threads)
    assert same_weights(utils.load_checkpoint(tmp_path / "whole_best.pt"), utils.load_checkpoint(best))


# places that fail


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
        assert "could not be written (Permission denied)" in message
        assert (folder / "vae_digits_best.pt").read_bytes() == before and files(folder) == KEPT
    finally:
        folder.chmod(0o755)
        shutil.rmtree(folder)


def limit_file_size(size):
    """As a full disk would have it."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def train_on_a_disk_that_fills(images, best, epoch):
    """Full from the given epoch on; returns whether the model in memory is the trained one, all the same."""
    with pytest.MonkeyPatch.context() as patch, pytest.warns(UserWarning) as caught, \
            during_epoch(patch, epoch, lambda: limit_file_size(1000)):
        model, history = train(images, best, resume=False)
    texts = [str(warning.message) for warning in caught]
    assert "File too large" in texts[0] and "training goes on" in texts[0]
    assert "in memory alone" in texts[-1] and "save_checkpoint" in texts[-1]
    limit_file_size(resource.RLIM_INFINITY)
    utils.save_checkpoint(best.with_name("elsewhere.pt"), model)
    return utils.evaluate(model, images[1], num_samples=1).loss, [row["val_loss"] for row in history]


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_disk_that_fills_costs_no_checkpoint_and_no_training(few, best, epoch):
    train(few, best)
    before = best.read_bytes()
    loss, losses = in_child(train_on_a_disk_that_fills, few, best, epoch)
    assert loss == pytest.approx(min(losses), rel=1e-5) and len(losses) == 3
    assert before in [path.read_bytes() for path in best.parent.glob("vae*.pt")]
    train(few, best, resume=False)  # the disk has room again
    assert utils.load_checkpoint(best).metadata["epoch"] == 3


def test_a_save_that_failed_once_is_made_up_for(few, best, monkeypatch):
    during_write(monkeypatch, 3, OSError(28, "No space left on device"))  # the last epoch's
    with pytest.warns(UserWarning, match="No space left on device"):
        model, _ = train(few, best)
    assert same_weights(model, utils.load_checkpoint(best)) and utils.load_checkpoint(best).metadata["epoch"] == 3


def test_a_folder_that_vanishes_is_made_again(few, best, monkeypatch):
    with during_epoch(monkeypatch, 2, lambda: shutil.rmtree(best.parent)):
        train(few, best)
    assert files(best.parent) == KEPT and len(utils.load_checkpoint(best).metadata["history"]) == 3


def test_two_runs_do_not_share_a_checkpoint(few, best):
    child = context.Process(target=train_in_child, args=(few, best, 20))
    child.start()
    while not best.exists():
        time.sleep(0.01)
    with pytest.raises(utils.CheckpointError, match="another run is training"):
        train(few, best)
    with pytest.raises(utils.CheckpointError, match="another run is training"):
        utils.save_checkpoint(best, utils.VAE(2))
    train(few, best.with_name("ae_digits_best.pt"), epochs=1, variational=False)  # beside it is fine
    child.join()
    assert child.exitcode == 0 and len(utils.load_checkpoint(best).metadata["history"]) == 20


def test_a_lock_file_that_cannot_be_deleted_while_it_is_open_is_no_error(few, best, monkeypatch):
    """As on Windows."""
    unlink = os.unlink

    def refused(path, *args, **options):
        if str(path).endswith(".lock"):
            raise PermissionError(13, "The process cannot access the file because it is being used by another process")
        return unlink(path, *args, **options)

    monkeypatch.setattr(os, "unlink", refused)
    monkeypatch.setattr(os, "remove", refused)
    monkeypatch.setattr(Path, "unlink", lambda path, missing_ok=False: refused(path) if path.exists() or not missing_ok else None)
    train(few, best, epochs=1)
    train(few, best, epochs=2)
    assert utils.load_checkpoint(best).metadata["epoch"] == 2


# numbers that go wrong


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_best(few, best, monkeypatch):
    def wreck():
        monkeypatch.setattr(utils, "learning_rate_at", lambda progress, rate: 1e30)

    with during_epoch(monkeypatch, 2, wreck), pytest.raises(FloatingPointError, match="not finite at epoch 3, step [23]"):
        train(few, best, epochs=5)
    loaded = utils.load_checkpoint(best)
    assert loaded.metadata["epoch"] in (1, 2) and math.isfinite(utils.evaluate(loaded, few[1]).loss)


def test_an_exploding_learning_rate_stops_with_one_sentence(few, best):
    with pytest.raises(FloatingPointError, match="try a lower learning rate"):
        train(few, best, learning_rate=1e20)
    assert not best.exists()
    train(few, best)  # and a lower one just runs


@pytest.mark.parametrize("change, says", [
    ({"epochs": 0}, "epochs is 0"), ({"epochs": 2.5}, "epochs is 2.5"), ({"epochs": True}, "epochs is True"),
    ({"batch_size": 0}, "batch_size is 0"), ({"batch_size": "64"}, "batch_size is '64'"),
    ({"learning_rate": 0}, "learning_rate is 0"), ({"learning_rate": -1e-3}, "learning_rate"),
    ({"learning_rate": math.nan}, "learning_rate is nan"), ({"beta": -1}, "beta is -1"), ({"beta": math.inf}, "beta is inf"),
    ({"seed": -1}, "seed is -1"),
    ({"resume": "yes"}, "resume is 'yes'")])
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
