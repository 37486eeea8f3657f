"""Checkpoints: what is saved comes back, and nothing that a stranger sends does harm."""

import json
import math
import os
import pickle
import random
import resource
import struct
import sys
import threading
import time

import pytest
import safetensors.torch
import torch
from conftest import Stop, during_epoch, in_child, same_weights
from torch import nn

import utils

METADATA = {"data": "digits", "epoch": 3, "history": [{"epoch": 1, "val_loss": 2.5}], "note": None}


@pytest.fixture
def path(tmp_path, model):
    path = tmp_path / "vae.safetensors"
    utils.save_checkpoint(path, model, **METADATA)
    return path


def known_of(model):
    """A model's metadata without the versions that wrote them."""
    return {key: value for key, value in model.metadata.items() if key != "versions"}


# saving and loading


def test_round_trip(path, model, digits):
    loaded = utils.load_checkpoint(path)
    assert not loaded.training
    assert (loaded.latent_dim, loaded.variational) == (4, True)
    assert same_weights(model, loaded)
    assert loaded.metadata["versions"]["torch"] == str(torch.__version__)
    assert known_of(loaded) == METADATA
    x = digits.test.images[:4]
    assert torch.equal(model.reconstruct(x), loaded.reconstruct(x))


@pytest.mark.parametrize("latent_dim, variational", [(1, True), (2, False), (32, True)])
def test_loading_needs_no_knowledge_of_the_model(tmp_path, latent_dim, variational):
    path = tmp_path / "any.safetensors"
    utils.save_checkpoint(path, utils.VAE(latent_dim, variational))
    loaded = utils.load_checkpoint(path)
    assert (loaded.latent_dim, loaded.variational) == (latent_dim, variational)


def test_loading_leaves_the_random_state_alone(path):
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    utils.load_checkpoint(path)
    assert torch.equal(torch.rand(1), expected)


def test_a_checkpoint_is_a_safetensors_file(path, model):
    with safetensors.safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["json"])
        assert header["metadata"]["data"] == "digits"
        assert set(file.keys()) == set(model.state_dict())
        name = "encoder.conv.0.weight"
        assert torch.equal(file.get_tensor(name), model.state_dict()[name])


def test_a_model_keeps_what_is_known_of_it(path, tmp_path):
    loaded = utils.load_checkpoint(path)
    utils.save_checkpoint(tmp_path / "again", loaded, note="mine")
    assert known_of(utils.load_checkpoint(tmp_path / "again")) == {**METADATA, "note": "mine"}


def test_a_trained_model_is_saved_elsewhere_as_its_run_would_be(few, tmp_path, best):
    """As is advised when the disk is full: the model is found, and known, as that of its data."""
    model = utils.VAE(2)
    utils.fit(model, *few, epochs=1, checkpoint=best, metadata={"data": "digits"})
    path = utils.checkpoint_path(tmp_path / "elsewhere", "digits")
    utils.save_checkpoint(path, model)
    loaded = utils.load_best(path.parent, "digits")
    assert loaded.metadata == utils.load_checkpoint(best).metadata
    assert same_weights(loaded, model)


def test_a_reader_never_sees_a_half_written_file(tmp_path, model):
    path = tmp_path / "vae.safetensors"
    sizes = set()
    done = threading.Event()
    utils.save_checkpoint(path, model)

    def watch():
        while not done.is_set():
            sizes.add(os.path.getsize(path))

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(10):
        utils.save_checkpoint(path, model)
    done.set()
    watcher.join()
    assert sizes == {path.stat().st_size}
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_that_is_not_finite_replaces_nothing(path, model, value):
    before = path.read_bytes()
    model.decoder.conv[0].bias.data[3] = value
    with pytest.raises(utils.CheckpointError, match="what would be saved .*NaN, infinity"):
        utils.save_checkpoint(path, model)
    assert path.read_bytes() == before


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_model_of_another_dtype_replaces_nothing(path, model, dtype):
    before = path.read_bytes()
    with pytest.raises(utils.CheckpointError, match="what would be saved .*is not torch.float32"):
        utils.save_checkpoint(path, model.to(dtype))
    assert path.read_bytes() == before


def test_a_reference_is_written_only_on_request(tmp_path, model):
    path = tmp_path / "vae_digits_reference.safetensors"
    with pytest.raises(ValueError, match="is a reference checkpoint, which no run writes"):
        utils.save_checkpoint(path, model)
    assert not path.exists()
    utils.save_checkpoint(path, model, allow_reference=True)
    assert "allow_reference" not in utils.load_checkpoint(path).metadata


def test_paths_begin_at_the_users_folder(tmp_path, model, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    path = utils.checkpoint_path("~/models", "digits")
    assert path == tmp_path / "models" / "vae_digits_best.safetensors"
    utils.save_checkpoint("~/models/vae_digits_best.safetensors", model, data="digits")
    assert same_weights(utils.load_checkpoint("~/models/vae_digits_best.safetensors"), model)
    assert same_weights(utils.load_best("~/models", "digits"), model)
    assert os.listdir(tmp_path) == ["models"]


def test_names_tell_models_apart():
    names = set()
    for autoencoder in (True, False):
        for left_out in (None, 0, 4):
            for which in ("best", "reference"):
                path = utils.checkpoint_path("m", "mnist", autoencoder, left_out, which)
                names.add(path.name)
    assert len(names) == 12
    assert "vae_mnist_best.safetensors" in names
    assert "ae_mnist_without0_reference.safetensors" in names
    with pytest.raises(TypeError, match="autoencoder must be an instance of bool"):
        utils.checkpoint_path("m", "mnist", "false")


def test_the_users_own_model_is_taken_before_the_reference(tmp_path, model, capsys):
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*vae_digits_best"):
        utils.load_best(tmp_path, "digits")
    reference = utils.checkpoint_path(tmp_path, "digits", which="reference")
    utils.save_checkpoint(reference, model, data="digits", allow_reference=True)
    assert same_weights(utils.load_best(tmp_path, "digits"), model)
    assert "the reference" in capsys.readouterr().out
    own = utils.VAE(2)
    utils.save_checkpoint(utils.checkpoint_path(tmp_path, "digits"), own, data="digits")
    assert same_weights(utils.load_best(tmp_path, "digits"), own)
    assert "your own" in capsys.readouterr().out
    utils.checkpoint_path(tmp_path, "digits").write_text("my notes")
    with pytest.raises(utils.CheckpointError, match="no sound checkpoint"):
        utils.load_best(tmp_path, "digits")


def test_a_model_of_other_data_is_not_taken(tmp_path, model):
    utils.save_checkpoint(utils.checkpoint_path(tmp_path, "digits"), model, data="mnist")
    with pytest.raises(utils.CheckpointError, match="is not a model of digits"):
        utils.load_best(tmp_path, "digits")


# what is no checkpoint


def test_missing_files_and_places_that_cannot_be_written(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*nowhere.safetensors"):
        utils.load_checkpoint(tmp_path / "nowhere.safetensors")
    (tmp_path / "file").touch()
    with pytest.raises(utils.CheckpointError, match="could not be read"):
        utils.load_checkpoint(tmp_path / "file" / "vae.safetensors")
    with pytest.raises(utils.CheckpointError, match="could not be written"):
        utils.save_checkpoint(tmp_path / "file" / "vae.safetensors", utils.VAE(2))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "inside").touch()
    with pytest.raises(utils.CheckpointError, match="could not be written"):
        utils.save_checkpoint(tmp_path / "folder", utils.VAE(2))
    assert os.listdir(tmp_path / "folder") == ["inside"]
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


class Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_loading_executes_nothing(tmp_path, zipped):
    path = tmp_path / "evil"
    trap = {"format": 3, "tensors": Malicious(tmp_path / "owned")}
    if zipped:
        torch.save(trap, path)
    else:
        path.write_bytes(pickle.dumps(trap))
    with pytest.raises(utils.CheckpointError):
        utils.load_checkpoint(path)
    assert not (tmp_path / "owned").exists()
    if zipped:  # the trap is a real one: torch's permissive loader walks into it
        torch.load(path, weights_only=False)
        assert (tmp_path / "owned").exists()


def test_a_pt_file_is_refused_in_one_sentence(tmp_path, model):
    path = tmp_path / "vae_mnist_best.pt"
    torch.save({"tensors": model.state_dict()}, path)
    says = r"^[^\n]* \.pt file of torch.save, a format that is no longer read\)$"
    with pytest.raises(utils.CheckpointError, match=says):
        utils.load_checkpoint(path)


def test_somebody_elses_safetensors(tmp_path):
    path = tmp_path / "linear.safetensors"
    safetensors.torch.save_file(nn.Linear(3, 3).state_dict(), path)
    with pytest.raises(utils.CheckpointError, match="no sound checkpoint of this project"):
        utils.load_checkpoint(path)


# damage


class TinyHalf(nn.Module):
    """Stands in for Encoder and Decoder, so that every bit of a file can be flipped."""

    def __init__(self, latent_dim):
        super().__init__()
        self.weight = nn.Parameter(torch.arange(4.0).view(2, 2))
        self.running_var = nn.Parameter(torch.ones(2))


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The checkpoint of a model of twelve numbers."""
    monkeypatch.setattr(utils, "Encoder", TinyHalf)
    monkeypatch.setattr(utils, "Decoder", TinyHalf)
    path = tmp_path / "tiny.safetensors"
    model = utils.VAE(2)
    model.encoder.weight.data[0, 0] = 7
    utils.save_checkpoint(path, model, data="digits", val_loss=0.125)
    return path


def refused_or_the_same(path, mutations):
    """How many of these contents are refused; what is loaded all the same must be the same."""
    original = utils.load_checkpoint(path)
    target = path.with_name("mutated.safetensors")
    refused = 0
    for content in mutations:
        target.write_bytes(content)
        try:
            loaded = utils.load_checkpoint(target)
        except utils.CheckpointError:
            refused += 1
        else:
            assert same_weights(original, loaded)
            assert loaded.metadata == original.metadata
            assert loaded.variational == original.variational
    return refused


def flipped(content, bits):
    for bit in bits:
        mutated = bytearray(content)
        mutated[bit // 8] ^= 1 << bit % 8
        yield mutated


def test_every_single_bit_flipped_is_refused_or_loads_the_same(tiny):
    content = tiny.read_bytes()
    assert len(content) < 1200
    bits = range(8 * len(content))
    assert refused_or_the_same(tiny, flipped(content, bits)) > 0.95 * len(bits)


def test_bits_of_a_whole_model_flipped_are_refused_or_load_the_same(path):
    content = path.read_bytes()
    rng = random.Random(0)
    bits = rng.sample(range(8 * 8000), 40) + rng.sample(range(8 * len(content)), 20)
    assert refused_or_the_same(path, flipped(content, bits)) > 50


def mutated(content, rng):
    """Bits flipped; bytes cut out, put in, zeroed, swapped."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 10))):
        at = rng.randrange(len(content))
        n = rng.choice((1, 4, 8, 100))
        match rng.randrange(5):
            case 0:
                content[at] ^= 1 << rng.randrange(8)
            case 1:
                del content[at : at + n]
            case 2:
                content[at:at] = rng.randbytes(n)
            case 3:
                content[at : at + n] = bytes(len(content[at : at + n]))
            case 4:
                content = content[at:] + content[:at]
        content = content or bytearray(1)
    return content


def test_every_random_mutation_is_refused_or_loads_the_same(tiny):
    rng = random.Random(0)
    content = tiny.read_bytes()
    mutations = [mutated(content, rng) for _ in range(500)]
    assert refused_or_the_same(tiny, mutations) > 430


def test_truncated_anywhere_it_is_refused(tiny):
    content = tiny.read_bytes()
    sizes = range(len(content))
    assert refused_or_the_same(tiny, [content[:size] for size in sizes]) == len(sizes)
    longer = [content + bytes(n) for n in (1, 8, 1000)]
    assert refused_or_the_same(tiny, longer) == 3


# hostile files


def parts(content):
    """The header of a safetensors file, read, and the bytes of its tensors."""
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def joined(header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def with_right_digest(content):
    """The file as somebody would write it who knows how its digest is made."""
    header, _ = parts(content)
    tensors = safetensors.torch.load(content)
    text = header["__metadata__"]["json"]
    header["__metadata__"]["sha256"] = utils._digest(tensors, text)
    return joined(header, parts(content)[1])


WEIGHT = "encoder.weight"
OTHER = "decoder.weight"


def swapped(header, data):
    """The names of two tensors of the same shape."""
    header[WEIGHT], header[OTHER] = header[OTHER], header[WEIGHT]


def overlapping(header, data):
    header[WEIGHT]["data_offsets"] = header[OTHER]["data_offsets"]


def past_the_end(header, data):
    start, end = header[WEIGHT]["data_offsets"]
    header[WEIGHT]["data_offsets"] = [start + 2**20, end + 2**20]


def backwards(header, data):
    header[WEIGHT]["data_offsets"] = header[WEIGHT]["data_offsets"][::-1]


def huge_offsets(header, data):
    header[WEIGHT]["data_offsets"] = [2**64 - 16, 2**64 - 1]


def another_dtype(header, data):
    """The same bytes, read as integers."""
    header[WEIGHT]["dtype"] = "I32"


def another_shape(header, data):
    header[WEIGHT]["shape"] = [4, 1]


def no_name(header, data):
    header[""] = header.pop(WEIGHT)


def missing(header, data):
    del header[WEIGHT]


def another_text(header, data):
    text = header["__metadata__"]["json"]
    header["__metadata__"]["json"] = text.replace("digits", "digitS")


def no_metadata(header, data):
    del header["__metadata__"]


def no_digest(header, data):
    del header["__metadata__"]["sha256"]


def nested_metadata(header, data):
    header["__metadata__"] = {"json": {"format": 3}, "sha256": "0"}


CHANGES = [
    swapped,
    overlapping,
    past_the_end,
    backwards,
    huge_offsets,
    another_dtype,
    another_shape,
    no_name,
    missing,
    another_text,
    no_metadata,
    no_digest,
    nested_metadata,
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_header_is_refused(tiny, change):
    header, data = parts(tiny.read_bytes())
    change(header, data)
    tiny.write_bytes(joined(header, data))
    with pytest.raises(utils.CheckpointError, match="no sound checkpoint"):
        utils.load_checkpoint(tiny)


@pytest.mark.parametrize("duplicate", [WEIGHT, "__metadata__"])
@pytest.mark.parametrize("last", [True, False])
def test_a_name_that_is_there_twice_is_refused_or_loads_the_same(tiny, duplicate, last):
    """Two readers might take it for different things."""
    header, data = parts(tiny.read_bytes())
    if duplicate == WEIGHT:
        other = {**header[WEIGHT], "data_offsets": header[OTHER]["data_offsets"]}
    else:
        other = {"json": "{}", "sha256": utils._digest({}, "{}")}
    entry = json.dumps({duplicate: other})[1:-1].encode()
    text = json.dumps(header)[1:-1].encode()
    text = text + b", " + entry if last else entry + b", " + text
    mutation = joined(b"{" + text + b"}", data)
    refused_or_the_same(tiny, [mutation])


FIRST = "encoder.conv.0.weight"
VARIANCE = "encoder.conv.1.running_var"


@pytest.mark.parametrize(
    "name, tensor, says",
    [
        (FIRST, None, "missing or superfluous: .*encoder.conv.0.weight"),
        ("extra", torch.ones(1), "missing or superfluous: .*extra"),
        (FIRST, torch.ones(1), "is not torch.float32 of the shape"),
        (FIRST, torch.ones(16, 1, 4, 4).double(), "is not torch.float32 of the shape"),
        (FIRST, torch.ones(16, 1, 4, 4).bfloat16(), "is not torch.float32 of the shape"),
        (FIRST, torch.ones(16, 1, 4, 4).int(), "is not torch.float32 of the shape"),
        (FIRST, torch.full((16, 1, 4, 4), math.nan), "NaN, infinity"),
        (FIRST, torch.full((16, 1, 4, 4), -math.inf), "NaN, infinity"),
        (VARIANCE, -torch.ones(16), "negative variance"),
    ],
    ids=range(9),
)
def test_tensors_that_do_not_fit_are_named(path, name, tensor, says):
    """Even where the digest is right."""
    content = path.read_bytes()
    tensors = safetensors.torch.load(content)
    tensors.pop(name, None)
    if tensor is not None:
        tensors[name] = tensor
    written = parts(content)[0]["__metadata__"]
    path.write_bytes(with_right_digest(safetensors.torch.save(tensors, written)))
    with pytest.raises(utils.CheckpointError, match=says):
        utils.load_checkpoint(path)


def with_text(content, text):
    header, data = parts(content)
    header["__metadata__"]["json"] = text
    return with_right_digest(joined(header, data))


@pytest.mark.parametrize(
    "change, says",
    [
        ({"latent_dim": 5}, "is not torch.float32 of the shape"),
        ({"latent_dim": 10**12}, "latent_dim == 1000000000000"),
        ({"latent_dim": "4"}, "latent_dim must be"),
        ({"latent_dim": None}, "latent_dim must be"),
        ({"variational": 1}, "variational must be"),
        ({"metadata": None}, "NoneType"),
        ({"metadata": [1]}, "no sound checkpoint"),
        ({"format": 2}, "its format is not 3"),
        ({"format": "3"}, "its format is not 3"),
        ({"format": 99}, "its format is not 3"),
    ],
    ids=range(10),
)
def test_a_text_that_does_not_fit_is_told(path, change, says):
    """Even where the digest is right."""
    content = path.read_bytes()
    header = json.loads(parts(content)[0]["__metadata__"]["json"])
    path.write_bytes(with_text(content, json.dumps({**header, **change})))
    with pytest.raises(utils.CheckpointError, match=says):
        utils.load_checkpoint(path)
    for key in change:
        del header[key]
    path.write_bytes(with_text(content, json.dumps(header)))
    with pytest.raises(utils.CheckpointError, match="no sound checkpoint"):
        utils.load_checkpoint(path)


def hostile_files(folder, content):
    """Files, and what is no file, that would take a reader's time or memory; name -> path."""
    header, data = parts(content)
    deep = b"[" * 10**6
    many = {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(20_000)}
    sizes = {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}
    huge = {"dtype": "F32", "shape": [2**63, 2**63], "data_offsets": [0, 16]}
    contents = {
        "empty": b"",
        "text": b"hello",
        "picture": b"\x89PNG\r\n\x1a\n" + bytes(900),
        "zeros": bytes(10_000),
        "zip": b"PK\x03\x04" + bytes(500),
        "header of 2**63 bytes": struct.pack("<Q", 2**63) + content,
        "header of 35 MB": joined({"__metadata__": dict.fromkeys(map(str, range(2**21)), "")}, b""),
        "header of 2 MB of spaces": joined(b"{" + b" " * (2**21 - 2) + b"}", b""),
        "header of many names": joined(many, b""),
        "deep header": joined(deep, b""),
        "deep metadata": joined(b'{"__metadata__":' + deep, b""),
        "deep text": with_text(content, "[" * 10**6),
        "doubling text": with_text(content, "[" * 900 + "]" * 900),
        "long number": with_text(content, '{"format": ' + "9" * 10**6 + "}"),
        "not UTF-8": joined(b'{"\xff": 1}', b""),
        "tensor of 4 TB": joined({**header, "big": sizes}, data),
        "shape that overflows": joined({**header, "big": huge}, data),
        "all of 64 MB": content + bytes(2**26 - len(content)),
    }
    paths = {}
    for name, wrong in contents.items():
        paths[name] = folder / f"{name}.safetensors"
        paths[name].write_bytes(wrong)
    paths["folder"] = folder
    paths["device"] = "/dev/zero"
    paths["fifo"] = folder / "fifo.safetensors"
    os.mkfifo(paths["fifo"])
    paths["sparse file of 40 GB"] = folder / "sparse.safetensors"
    with open(paths["sparse file of 40 GB"], "wb") as file:
        file.truncate(40 * 2**30)
    return paths


def load_under_limits(paths):
    """Seconds and what was raised, for every path; megabytes of memory on top, in all."""
    found = {}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, path in paths.items():
        started = time.process_time()
        try:
            utils.load_checkpoint(path)
            error = None
        except Exception as raised:
            error = type(raised).__name__
        found[name] = (time.process_time() - started, error)
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return found, growth / unit


def test_hostile_files_are_refused_within_a_second_and_200_mb(path):
    paths = hostile_files(path.parent, path.read_bytes())
    found, megabytes = in_child(load_under_limits, paths)
    assert found.keys() == paths.keys()
    for name, (seconds, error) in found.items():
        assert error == "CheckpointError", name
        assert seconds < 1, name
    assert megabytes < 200


def test_an_unfinished_run_of_the_largest_model_stays_within_the_limits(
    tmp_path, few, monkeypatch, capsys
):
    options = {"epochs": 2, "checkpoint": tmp_path / "large_best"}
    images = few[0][:8], few[1][:8]
    model = utils.VAE(utils.MAX_LATENT_DIM)
    with during_epoch(monkeypatch, 2, Stop), pytest.raises(Stop):
        utils.fit(model, *images, **options)
    assert utils.load_checkpoint(tmp_path / "large_best").latent_dim == 1024
    utils.fit(model, *images, **options)
    assert "going on after epoch 1" in capsys.readouterr().out


def test_a_model_is_loaded_onto_the_device_that_is_asked_for(tmp_path, model):
    path = utils.checkpoint_path(tmp_path, "digits")
    utils.save_checkpoint(path, model, data="digits")
    assert utils._device(utils.load_checkpoint(path, "meta")).type == "meta"
    assert utils._device(utils.load_best(tmp_path, "digits", device="meta")).type == "meta"
