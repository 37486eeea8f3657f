"""Checkpoints: what is saved comes back, and nothing that a stranger sends does harm."""

import contextlib
import json
import math
import os
import pickle
import random
import resource
import threading
import time
import zipfile

import pytest
import torch
from conftest import Stop, during_epoch, in_child

import utils


@pytest.fixture
def path(tmp_path, model):
    path = tmp_path / "vae.pt"
    utils.save_checkpoint(path, model, data="digits", epoch=3, history=[{"epoch": 1, "val_loss": 2.5}], note=None)
    return path


def change_of(path):
    """Payload and header of a checkpoint, to be changed."""
    payload = torch.load(path, weights_only=True)
    return payload, json.loads(payload["header"])


def test_round_trip(path, model, digits):
    loaded = utils.load_checkpoint(path)
    assert not loaded.training and (loaded.latent_dim, loaded.variational) == (4, True)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True))
    metadata = dict(loaded.metadata)
    assert metadata.pop("versions")["torch"] == str(torch.__version__)
    assert metadata == {"data": "digits", "epoch": 3, "history": [{"epoch": 1, "val_loss": 2.5}], "note": None}
    x = digits.test.images[:4]
    assert torch.equal(model.eval().reconstruct(x), loaded.reconstruct(x))


@pytest.mark.parametrize("latent_dim, variational", [(1, True), (2, False), (32, True)])
def test_loading_needs_no_knowledge_of_the_model(tmp_path, latent_dim, variational):
    utils.save_checkpoint(tmp_path / "any.pt", utils.VAE(latent_dim, variational))
    loaded = utils.load_checkpoint(tmp_path / "any.pt")
    assert (loaded.latent_dim, loaded.variational) == (latent_dim, variational)


def test_loading_leaves_the_random_state_alone(path):
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    utils.load_checkpoint(path)
    assert torch.equal(torch.rand(1), expected)


def test_torch_and_json_can_read_the_file(path):
    payload, header = change_of(path)
    assert header["metadata"]["data"] == "digits" and payload["tensors"]["encoder.conv.0.weight"].shape == (16, 1, 4, 4)


def test_a_reader_never_sees_a_half_written_file(tmp_path, model):
    path, sizes, done = tmp_path / "vae.pt", set(), threading.Event()
    utils.save_checkpoint(path, model)

    def watch():
        while not done.is_set():
            sizes.add(os.path.getsize(path))

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(20):
        utils.save_checkpoint(path, model)
    done.set()
    watcher.join()
    assert sizes == {path.stat().st_size}


@pytest.mark.parametrize("wreck", [lambda p: p.fill_(float("nan")), lambda p: p.fill_(float("inf")), None])
def test_a_model_that_could_not_be_loaded_again_replaces_nothing(path, model, wreck):
    before = path.read_bytes()
    wreck(model.decoder.conv[0].bias.data) if wreck else model.double()
    with pytest.raises(utils.CheckpointError, match="NaN|more than tensors"):
        utils.save_checkpoint(path, model)
    assert path.read_bytes() == before


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*nowhere.pt"):
        utils.load_checkpoint(tmp_path / "nowhere.pt")
    with pytest.raises(utils.CheckpointError, match="no file at all"):
        utils.load_checkpoint(tmp_path)
    os.mkfifo(tmp_path / "fifo.pt")
    for special in (tmp_path / "fifo.pt", "/dev/zero"):
        with pytest.raises(utils.CheckpointError, match="no file at all"):
            utils.load_checkpoint(special)
    with open(tmp_path / "huge.pt", "wb") as file:
        file.truncate(40 * 2**30)
    with pytest.raises(utils.CheckpointError, match="42,949,672,960 bytes"):
        utils.load_checkpoint(tmp_path / "huge.pt")
    (tmp_path / "file").touch()
    with pytest.raises(utils.CheckpointError, match="could not be written"):
        utils.save_checkpoint(tmp_path / "file" / "vae.pt", utils.VAE(2))


class Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: {"format": 2, "header": "{}", "tensors": {"a": m}}])
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("zipped", [True, False])
def test_loading_executes_nothing(tmp_path, wrap, protocol, zipped):
    target = tmp_path / "evil.pt"
    if zipped:
        torch.save(wrap(Malicious(tmp_path / "owned")), target, pickle_protocol=protocol)
    else:
        target.write_bytes(pickle.dumps(wrap(Malicious(tmp_path / "owned")), protocol=protocol))
    with pytest.raises(utils.CheckpointError):
        utils.load_checkpoint(target)
    assert not (tmp_path / "owned").exists()
    if zipped and wrap(1) == 1:  # the trap is a real one: torch's permissive loader walks into it
        torch.load(target, weights_only=False)
        assert (tmp_path / "owned").exists()


def test_truncated_at_every_tenth(path):
    content = path.read_bytes()
    for size in [*(len(content) * tenth // 10 for tenth in range(10)), len(content) - 1]:
        path.write_bytes(content[:size])
        with pytest.raises(utils.CheckpointError, match="not a checkpoint of this project, or is damaged or was cut short"):
            utils.load_checkpoint(path)


def test_every_random_mutation_is_refused_or_loads_the_same(path, model):
    """Bits flipped, bytes cut out, put in, zeroed, swapped: anywhere, and where the structure is."""
    content, rng = path.read_bytes(), random.Random(0)
    start, target = content.index(b"data.pkl"), path.with_name("mutated.pt")
    for i in range(300):
        mutated = bytearray(content)
        for _ in range(rng.choice((1, 1, 2, 10))):
            low, high = rng.choice(((start, start + 6000), (len(content) - 5000, len(content)))) if i % 2 else (0, len(mutated))
            at = rng.randrange(low, high)
            n = rng.choice((1, 1, 8, 1000))
            match rng.randrange(5 if i % 3 else 1):
                case 0:
                    mutated[at % len(mutated)] ^= 1 << rng.randrange(8)
                case 1:
                    del mutated[at : at + n]
                case 2:
                    mutated[at:at] = rng.randbytes(n)
                case 3:
                    mutated[at : at + n] = bytes(len(mutated[at : at + n]))
                case 4:
                    mutated = mutated[at:] + mutated[:at]
        target.write_bytes(mutated)
        with contextlib.suppress(utils.CheckpointError):
            loaded = utils.load_checkpoint(target)
            assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True))
            assert loaded.metadata == utils.load_checkpoint(path).metadata


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n" + bytes(900), bytes(10_000), b"PK\x03\x04" + bytes(500)])
def test_files_of_other_kinds(tmp_path, content):
    (tmp_path / "file.pt").write_bytes(content)
    with pytest.raises(utils.CheckpointError, match="not a checkpoint of this project"):
        utils.load_checkpoint(tmp_path / "file.pt")


def test_somebody_elses_state_dict(tmp_path):
    torch.save(torch.nn.Linear(3, 3).state_dict(), tmp_path / "linear.pt")
    with pytest.raises(utils.CheckpointError, match="not a checkpoint"):
        utils.load_checkpoint(tmp_path / "linear.pt")


FIRST = "encoder.conv.0.weight"
VARIANCE = "encoder.conv.1.running_var"


@pytest.mark.parametrize("name, tensor, says", [
    (FIRST, None, "missing or superfluous"), ("extra", torch.ones(1), "missing or superfluous .*extra"),
    (FIRST, torch.ones(1), "is not torch.float32"), (FIRST, torch.ones(16, 1, 4, 4).double(), "more than tensors"),
    (FIRST, [1.0], "is not torch.float32"), (FIRST, torch.full((16, 1, 4, 4), math.nan), "NaN, infinity"),
    (FIRST, torch.full((16, 1, 4, 4), math.inf), "NaN, infinity"), (VARIANCE, -torch.ones(16), "negative variance"),
    (FIRST, torch.ones(16, 1, 4, 4).to_sparse(), "more than tensors"),
    (FIRST, torch.zeros(1).expand(2**40), "is not torch.float32"),
    (FIRST, torch.ones(16, 1, 4, 4, device="meta"), "more than tensors"), (FIRST, bytearray(2**20), "more than tensors"),
    (FIRST, torch.nn.Parameter(torch.ones(16, 1, 4, 4)), "more than tensors")])
def test_tensors_that_do_not_fit(path, name, tensor, says):
    payload, _ = change_of(path)
    payload["tensors"].pop(name, None)
    if tensor is not None:
        payload["tensors"][name] = tensor
    torch.save(payload, path)
    with pytest.raises(utils.CheckpointError, match=says):
        utils.load_checkpoint(path)


@pytest.mark.parametrize("change, says", [
    ({"latent_dim": 5}, "is not torch.float32"), ({"latent_dim": 10**12}, "latent_dim is 1000000000000"),
    ({"latent_dim": "4"}, "latent_dim is '4'"), ({"latent_dim": None}, "latent_dim is None"),
    ({"variational": 1}, "variational is 1"),
    ({"metadata": None}, "no metadata"), ({"metadata": [1]}, "no metadata")])
def test_a_header_that_does_not_fit(path, change, says):
    payload, header = change_of(path)
    torch.save({**payload, "header": json.dumps({**header, **change})}, path)
    with pytest.raises(utils.CheckpointError, match=says):
        utils.load_checkpoint(path)


@pytest.mark.parametrize("change", [
    {"format": 99}, {"format": 1}, {"format": "2"}, {"format": torch.tensor(2)}, {"format": True},
    {"header": "no json"}, {"header": "[]"}, {"header": torch.ones(2)}, {"header": "[" * 100_000},
    {"tensors": None}, {"tensors": [1]}, {"run": [1]}])
def test_a_payload_that_does_not_fit(path, change):
    payload, _ = change_of(path)
    torch.save({**payload, **change}, path)
    with pytest.raises(utils.CheckpointError, match="not a checkpoint"):
        utils.load_checkpoint(path)
    for key in change.keys() - {"run"}:
        torch.save({name: value for name, value in payload.items() if name != key}, path)
        with pytest.raises(utils.CheckpointError, match="not a checkpoint"):
            utils.load_checkpoint(path)


def archive_with(path, pickled, compress=zipfile.ZIP_STORED, extra=b""):
    """The checkpoint with another pickle, or with one more entry."""
    with zipfile.ZipFile(path) as old:
        entries = {name: old.read(name) for name in old.namelist()}
    root = next(iter(entries)).partition("/")[0]
    with zipfile.ZipFile(path, "w", compress) as new:
        for name, content in entries.items():
            new.writestr(name, pickled if pickled is not None and name.endswith("data.pkl") else content)
        if extra:
            new.writestr(f"{root}/data/999", extra)


def nested(depth):
    return b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b"."


def doubling(times):
    """Lists of lists of one list: a few bytes that unfold without end for whoever walks through them."""
    twice = (b"](h" + bytes([i, ord("h"), i]) + b"eq" + bytes([i + 1]) for i in range(times))
    return b"\x80\x02]q\x00" + b"".join(twice) + b"."


BOMBS = {
    "compressed": (None, zipfile.ZIP_DEFLATED, bytes(2**29)),
    "deep": (nested(10_000), zipfile.ZIP_STORED, b""),
    "deeper": (nested(10**6), zipfile.ZIP_STORED, b""),
    "doubling": (doubling(200), zipfile.ZIP_STORED, b""),
    "long": (b"\x80\x02" + b"K\x010" * 10**6 + b"N.", zipfile.ZIP_STORED, b""),
    "bytearray": (b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.", zipfile.ZIP_STORED, b"")}


def load_under_a_limit(path):
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(utils.CheckpointError):
        utils.load_checkpoint(path)
    return time.monotonic() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_are_refused_within_a_second_and_200_mb(path, bomb):
    archive_with(path, *BOMBS[bomb])
    seconds, kilobytes = in_child(load_under_a_limit, path)
    assert seconds < 1 and kilobytes < 200_000


def test_an_unfinished_run_of_the_largest_model_stays_within_the_limits(tmp_path, few, monkeypatch, capsys):
    options = {"epochs": 2, "checkpoint": tmp_path / "large_best.pt"}
    with during_epoch(monkeypatch, 2, Stop), pytest.raises(Stop):
        utils.fit(utils.VAE(1024), few[0][:8], few[1][:8], **options)
    assert utils.load_checkpoint(tmp_path / "large_best.pt").latent_dim == 1024
    utils.fit(utils.VAE(1024), few[0][:8], few[1][:8], **options)
    assert "going on after epoch 1" in capsys.readouterr().out
