"""Checkpoints: what is saved comes back, and nothing that is damaged or foreign is taken."""

import json
import math
import os
import pickle
import random
import re
import threading

import pytest
import safetensors.torch
import torch
from conftest import same_weights
from torch import nn

import utils

METADATA = {"data": "mnist5k", "epoch": 3, "history": [{"epoch": 1, "val_loss": 2.5}], "note": None}
MADE = {"model_class", "latent_dim", "variational", "versions", "saved", "run"}  # when saved


@pytest.fixture
def path(tmp_path, model):
    path = tmp_path / "vae.safetensors"
    utils.save_checkpoint(path, model, **METADATA)
    return path


class Further(utils.VAE):
    """One's own: further layers, another way through them."""

    def __init__(self, latent_dim, variational):
        super().__init__(latent_dim, variational)
        self.further = nn.Linear(latent_dim, latent_dim)

    def encode(self, x):
        mu, logvar = super().encode(x)
        return self.further(mu), logvar


class Louder(utils.VAE):
    """One's own: nothing that is saved tells it from a VAE."""

    def decode(self, z):
        return 1.1 * super().decode(z)


# saving and loading


@pytest.mark.parametrize("kind", [utils.VAE, Further, Louder])
@pytest.mark.parametrize("latent_dim, variational", [(1, True), (3, False)])
def test_round_trip(tmp_path, digits, kind, latent_dim, variational):
    path = tmp_path / "any.safetensors"
    model = kind(latent_dim, variational)
    utils.save_checkpoint(path, model, **METADATA)
    assert model.metadata == {}, "saving writes into the file alone"
    before = torch.get_rng_state()
    loaded = utils.load_checkpoint(path, model_class=kind)
    assert torch.equal(torch.get_rng_state(), before)
    assert type(loaded) is kind
    assert not loaded.training
    assert same_weights(model, loaded)
    x = digits.test.images[:4]
    assert torch.equal(model.reconstruct(x), loaded.reconstruct(x))
    known = loaded.metadata
    assert {name: known[name] for name in known.keys() - MADE} == METADATA
    assert (loaded.latent_dim, loaded.variational) == (latent_dim, variational)
    assert (known["latent_dim"], known["variational"]) == (latent_dim, variational)
    assert known["model_class"] == kind.__name__
    assert known["versions"]["torch"] == str(torch.__version__)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d", known["saved"])
    assert utils.read_metadata(path) == known


def test_a_model_of_another_class_is_refused_in_one_sentence(path, model):
    for kind in (Further, Louder):
        says = r"another network .* \(its class is VAE: pass it as model_class\)$"
        with pytest.raises(utils.CheckpointError, match=says):
            utils.load_checkpoint(path, model_class=kind)
    utils.save_checkpoint(path, Louder(4, True))
    with pytest.raises(utils.CheckpointError, match="its class is Louder: pass it"):
        utils.load_checkpoint(path)


@pytest.mark.parametrize(
    "old, new",
    [
        ("nn.GELU()", "nn.SiLU()"),
        ("384", "256"),
        ("return h + super", "return super"),
        ("return mu, (logvar if", "return mu, (logvar + 0.01 if"),
    ],
    ids=["activation", "width", "residual", "log-variance"],
)
def test_another_network_is_refused_in_one_sentence_and_its_metadata_are_read(
    path, edited, old, new
):
    module = edited(old, new)
    with pytest.raises(module.CheckpointError) as caught:
        module.load_checkpoint(path)
    says = rf"^{re.escape(str(path))} was trained by another network than .* the edit \(.*\)$"
    assert re.search(says, str(caught.value))
    assert module.read_metadata(path)["data"] == "mnist5k"


def test_a_loaded_model_trains(path, few, model, tmp_path):
    with torch.inference_mode():
        loaded = utils.load_checkpoint(path)
    before = [p.clone() for p in loaded.parameters()]
    utils.fit(loaded, *few, epochs=1, batch_size=16, checkpoint=tmp_path / "more")
    for p, old in zip(loaded.parameters(), before, strict=True):
        assert p.requires_grad
        assert not torch.equal(p, old)


def test_a_model_keeps_what_is_known_of_it_and_takes_no_note_of_a_save(path, tmp_path):
    loaded = utils.load_checkpoint(path)
    known = dict(loaded.metadata)
    utils.save_checkpoint(tmp_path / "again", loaded, note="mine", epoch=4)
    assert loaded.metadata == known
    again = utils.read_metadata(tmp_path / "again")
    expected = {**known, "note": "mine", "epoch": 4, "saved": again["saved"]}
    assert again == expected


def test_a_checkpoint_is_a_safetensors_file(path, model):
    with safetensors.safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["json"])["metadata"]["data"] == "mnist5k"
        assert set(file.keys()) == set(model.state_dict())
        name = "encoder.conv.0.weight"
        assert torch.equal(file.get_tensor(name), model.state_dict()[name])


@pytest.fixture
def defaults():
    """What a notebook may have set for the whole process, taken back at the end."""
    yield {
        "dtype": lambda: torch.set_default_dtype(torch.float64),
        "device": lambda: torch.set_default_device("meta"),
    }
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


@pytest.mark.parametrize("which", ["dtype", "device"])
def test_defaults_of_the_process_make_no_difference(path, model, digits, defaults, which):
    expected = model.reconstruct(digits.test.images[:2])
    defaults[which]()
    loaded = utils.load_checkpoint(path)
    utils.save_checkpoint(path, loaded)
    loaded = utils.load_checkpoint(path)
    for tensor in loaded.state_dict().values():
        assert tensor.device.type == "cpu"
        assert tensor.dtype in (torch.float32, torch.int64)
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    assert torch.equal(loaded.reconstruct(digits.test.images[:2]), expected)


def test_a_model_is_loaded_onto_the_device_that_is_asked_for(tmp_path, model):
    path = utils.checkpoint_path(tmp_path, "mnist5k")
    utils.save_checkpoint(path, model, data="mnist5k")
    for loaded in (
        utils.load_checkpoint(path, "meta"),
        utils.load_best(tmp_path, "mnist5k", device="meta"),
    ):
        assert {p.device.type for p in loaded.parameters()} == {"meta"}


def test_a_reader_never_sees_a_half_written_file(tmp_path, model):
    path = tmp_path / "vae.safetensors"
    utils.save_checkpoint(path, model)
    sizes = set()
    done = threading.Event()

    def watch():
        while not done.is_set():
            sizes.add(os.path.getsize(path))

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(5):
        utils.save_checkpoint(path, model)
    done.set()
    watcher.join()
    assert sizes == {path.stat().st_size}
    assert sorted(os.listdir(tmp_path)) == [f".{path.name}.lock", path.name]


def test_a_file_that_is_replaced_while_it_is_read_is_the_old_one(path, model, monkeypatch):
    load = safetensors.torch.load

    def load_slowly(content):
        monkeypatch.undo()
        utils.save_checkpoint(path, utils.VAE(4), note="new")
        return load(content)

    monkeypatch.setattr(safetensors.torch, "load", load_slowly)
    old = utils.load_checkpoint(path)
    assert same_weights(old, model)
    assert old.metadata["epoch"] == METADATA["epoch"]


# what is not saved


def wrecked(value):
    model = utils.VAE(4)
    model.decoder.conv[0].bias.data[3] = value
    return model


class OfThree(utils.VAE):
    """It cannot be built from latent_dim and variational alone."""

    def __init__(self, latent_dim, variational, width):
        super().__init__(latent_dim, variational)


@pytest.mark.parametrize(
    "make, error, says",
    [
        (lambda: wrecked(math.nan), ValueError, "not JSON compliant"),
        (lambda: wrecked(math.inf), ValueError, "not JSON compliant"),
        (lambda: utils.VAE(4).half(), RuntimeError, "bias type .*Half"),
        (lambda: utils.VAE(4).double(), RuntimeError, "bias type .*double"),
        (lambda: OfThree(4, True, 5), utils.CheckpointError, "width"),
        (lambda: nn.Linear(2, 2), AttributeError, "no attribute 'encode'"),
    ],
    ids=["nan", "inf", "half", "double", "class", "no model"],
)
def test_what_could_not_be_loaded_replaces_nothing(path, few, make, error, says):
    before = path.read_bytes()
    with pytest.raises(error, match=says):
        utils.save_checkpoint(path, make())
    with pytest.raises(error, match=says):
        utils.fit(make(), *few, epochs=1, checkpoint=path, objective=None)
    assert path.read_bytes() == before


@pytest.mark.parametrize("value", [torch.ones(1), object(), math.nan], ids=["tensor", "any", "nan"])
def test_metadata_that_are_not_plain_are_refused_before_anything_is_written(few, best, value):
    with pytest.raises((TypeError, ValueError), match="JSON"):
        utils.fit(utils.VAE(2), *few, checkpoint=best, objective=None, metadata={"value": value})
    with pytest.raises((TypeError, ValueError), match="JSON"):
        utils.save_checkpoint(best, utils.VAE(2), value=value)
    assert not best.parent.exists()


def test_places_that_cannot_be_written_are_named(tmp_path, model):
    """And references, which are never written."""
    path = tmp_path / "vae_mnist_reference.safetensors"
    with pytest.raises(ValueError, match="reference checkpoint"):
        utils.save_checkpoint(path, model)
    assert not path.exists()
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        utils.save_checkpoint(tmp_path / "file" / "vae", model)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/inside").touch()
    with pytest.raises(utils.CheckpointError, match="folder could not be written"):
        utils.save_checkpoint(tmp_path / "folder", model)
    assert os.listdir(tmp_path / "folder") == ["inside"]
    assert not list(tmp_path.glob(".*.part"))
    for name in (None, 3):
        with pytest.raises(TypeError, match=type(name).__name__):
            utils.save_checkpoint(name, model)


# what is not loaded


@pytest.mark.parametrize("read", [utils.load_checkpoint, utils.read_metadata])
def test_what_is_no_checkpoint_is_named(tmp_path, model, read):
    with pytest.raises(FileNotFoundError, match="nothing"):
        read(tmp_path / "nothing")
    made = {"empty": b"", "notes": b"my notes", "zeros": bytes(10_000), "zip": b"PK\x03\x04"}
    for name, content in made.items():
        (tmp_path / name).write_bytes(content)
    safetensors.torch.save_file(nn.Linear(3, 3).state_dict(), tmp_path / "linear")
    torch.save(model.state_dict(), tmp_path / "vae.pt")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        read(tmp_path / "folder")
    for name in (*made, "linear", "vae.pt"):
        with pytest.raises(utils.CheckpointError) as caught:
            read(tmp_path / name)
        text = str(caught.value)
        assert f"{tmp_path / name} is damaged, or no checkpoint of ours" in text
        assert "\n" not in text


class Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("zipped", [True, False])
def test_loading_executes_nothing(few, tmp_path, zipped):
    path = tmp_path / "evil"
    trap = {"settings": {}, "history": [], "tensors": Malicious(tmp_path / "owned")}
    if zipped:
        torch.save(trap, path)
    else:
        path.write_bytes(pickle.dumps(trap))
    with pytest.raises(utils.CheckpointError):
        utils.load_checkpoint(path)
    unfinished = tmp_path / "evil.safetensors.unfinished"
    path.rename(unfinished)
    with pytest.raises(utils.CheckpointError):
        utils.fit(utils.VAE(2), *few, checkpoint=tmp_path / "evil.safetensors", objective=None)
    assert not (tmp_path / "owned").exists()
    if zipped:  # the trap is a real one: torch's permissive loader walks into it
        torch.load(unfinished, weights_only=False)
        assert (tmp_path / "owned").exists()


def damaged(content, rng):
    """Bits flipped; bytes cut out, put in, zeroed, swapped; the end cut off."""
    half = len(content) // 2
    near_the_start = [rng.randrange(3000) for _ in range(15)]
    for at in [*near_the_start, *(rng.randrange(len(content)) for _ in range(10))]:
        yield content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
    for n in (1, 8, 100):
        yield content[:half] + content[half + n :]
        yield content[:half] + bytes(n) + content[half:]
        yield content[:half] + b"\1" * n + content[half + n :]
        yield content[:-n]
        yield content + bytes(n)
    yield content[half:] + content[:half]
    for size in (0, 1, 7, 8, 100, half):
        yield content[:size]


def test_damage_is_refused_or_makes_no_difference(path, model):
    content = path.read_bytes()
    known = utils.read_metadata(path)
    refused = 0
    total = 0
    for wrong in damaged(content, random.Random(0)):
        path.write_bytes(wrong)
        total += 1
        try:
            loaded = utils.load_checkpoint(path)
        except utils.CheckpointError as error:
            assert "is damaged, or no checkpoint" in str(error)
            refused += 1
        else:
            assert same_weights(model, loaded)
            assert loaded.metadata == known
    assert refused > 0.9 * total


def rewritten(path, tensors, **changes):
    """A file as somebody would write it who knows how its digest is made."""
    with safetensors.safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["json"])
    for name, value in changes.items():
        place = header if name in header else header["metadata"]
        place[name] = value
    text = json.dumps(header)
    written = {"json": text, "sha256": utils._digest(tensors, text)}
    path.write_bytes(safetensors.torch.save(tensors, written))


@pytest.mark.parametrize(
    "change, says",
    [
        ({"tensor": None}, "another network"),
        ({"tensor": torch.ones(1)}, "another network"),
        ({"tensor": torch.ones(16, 1, 4, 4)}, "other results"),
        ({"tensor": torch.full((16, 1, 4, 4), math.nan)}, "other results"),
        ({"extra": torch.ones(1)}, "another network"),
        ({"latent_dim": 5}, "another network"),
        ({"latent_dim": "4"}, "another network"),
    ],
    ids=["missing", "shape", "values", "nan", "extra", "size", "text"],
)
def test_what_does_not_fit_is_told_in_one_sentence(path, model, change, says):
    """Even where the digest is right."""
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    for name in change.keys() & {"tensor", "extra"}:
        tensor = change.pop(name)
        name = name.replace("tensor", "encoder.conv.0.weight")
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    rewritten(path, tensors, **change)
    with pytest.raises(utils.CheckpointError, match=says) as caught:
        utils.load_checkpoint(path)
    assert "\n" not in str(caught.value)


# one's own best


def save(folder, kind="vae", name="mnist5k", which="best", model=None, **metadata):
    variational = kind == "vae"
    path = utils.checkpoint_path(folder, name, variational, which=which)
    metadata = {"data": name, **metadata}
    model = model or utils.VAE(3, variational)
    beside = path.with_name("beside")
    utils.save_checkpoint(beside, model, **metadata)
    beside.replace(path)
    return path


ROWS = [{"epoch": 1, "val_loss": 200.0}, {"epoch": 2, "val_loss": 111.11}]


def test_checkpoint_paths(tmp_path):
    def named(*arguments, **options):
        return utils.checkpoint_path(tmp_path, *arguments, **options).name

    assert named("mnist") == "vae_mnist_best.safetensors"
    assert named("mnist5k", False) == "ae_mnist5k_best.safetensors"
    assert named("mnist", left_out=0) == "vae_mnist_without0_best.safetensors"
    assert named("mnist", which="reference") == "vae_mnist_reference.safetensors"
    assert utils.checkpoint_path(tmp_path, "mnist").parent == tmp_path


def test_load_best_takes_ones_own_and_says_which(tmp_path, capsys):
    known = {"epoch": 2, "history": ROWS, "val_loss": 111.11, "train_loss": 99.99}
    save(tmp_path, name="mnist", which="reference")
    path = save(tmp_path, settings={"beta": 4.0, "epochs": 3}, **known)
    model = utils.load_best(tmp_path, "mnist5k")
    assert model.metadata["val_loss"] == 111.11
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{path.name}: ")
    for said in ("your own", "3 latent dimensions", "beta 4", "epoch 2 of 3", "saved 20"):
        assert said in line
    assert "validation loss 111.11" in line
    assert "99.99" not in line


def test_load_best_takes_a_model_that_fit_did_not_train(tmp_path, capsys):
    path = save(tmp_path)
    assert utils.load_best(tmp_path, "mnist5k").latent_dim == 3
    assert f"{path.name}: your own, 3 latent dimensions, beta 1, " in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["vae", "ae"])
def test_load_best_falls_back_to_the_reference_of_mnist(tmp_path, capsys, kind):
    path = save(tmp_path, kind, "mnist", "reference", settings={"beta": 1.0})
    for name in ("mnist", "mnist5k"):
        model = utils.load_best(tmp_path, name, kind == "vae")
        assert model.variational == (kind == "vae")
        (line,) = capsys.readouterr().out.splitlines()
        assert f"{path.name}: the reference" in line
        assert "beta 1," in line


def test_without_any_file_load_best_says_where_it_looked(tmp_path):
    save(tmp_path, "vae", "mnist")
    with pytest.raises(FileNotFoundError, match="ae_mnist_reference"):
        utils.load_best(tmp_path, "mnist", variational=False)


@pytest.mark.parametrize(
    "wrong, says",
    [
        ({"left_out": 4}, "'left_out': 4"),
        ({"left_out": 0}, "'left_out': 0"),
        ({"data": "mnist"}, "'data': 'mnist',"),
        ({"data": None}, "'data': None,"),
        ({"model": utils.VAE(3, variational=False)}, "'variational': False"),
        ({"model": Louder(3, True)}, "its class is Louder"),
    ],
    ids=["left out", "zero", "data", "no data", "kind", "class"],
)
def test_load_best_leaves_out_what_is_not_what_its_name_says(tmp_path, capsys, wrong, says):
    save(tmp_path, **wrong)
    save(tmp_path, name="mnist", which="reference")
    assert utils.load_best(tmp_path, "mnist5k").metadata["data"] == "mnist"
    left_out, taken = capsys.readouterr().out.splitlines()
    assert left_out.startswith("Left out: ")
    assert re.search(says, left_out)
    assert "the reference" in taken


def test_a_vae_under_the_name_of_an_autoencoder_is_left_out(tmp_path, capsys):
    save(tmp_path, "ae", model=utils.VAE(3))
    with pytest.raises(FileNotFoundError):
        utils.load_best(tmp_path, "mnist5k", variational=False)
    assert "'variational': True" in capsys.readouterr().out


def test_load_best_leaves_out_another_network_and_a_damaged_file(tmp_path, edited, capsys):
    save(tmp_path, name="mnist", which="reference")
    module = edited("nn.GELU()", "nn.SiLU()")
    with pytest.raises(module.CheckpointError, match="another network"):
        module.load_best(tmp_path, "mnist5k")
    own = save(tmp_path)
    own.write_bytes(own.read_bytes()[:-1])
    assert utils.load_best(tmp_path, "mnist5k").metadata["data"] == "mnist"
    assert f"Left out: {own} is damaged, or no checkpoint" in capsys.readouterr().out
