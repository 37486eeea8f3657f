"""Checkpoints: what is saved comes back, and nothing that a stranger sends does harm."""

import hashlib
import io
import os
import pickle
import random
import threading
import zipfile

import pytest
import torch

import utils


@pytest.fixture
def path(tmp_path, model):
    path = tmp_path / "vae.pt"
    utils.save_checkpoint(path, model, data="digits", epoch=3, history=[{"epoch": 1, "val_loss": 2.5}], note=None)
    return path


def seal(content: bytes) -> bytes:
    """Content with the digest that a file of ours ends in: what a stranger who knows the format could write."""
    return content + utils.TAG + hashlib.sha256(content).digest()


def write(path, payload, **pickle_options):
    buffer = io.BytesIO()
    torch.save(payload, buffer, **pickle_options)
    path.write_bytes(seal(buffer.getvalue()))


def payload_of(path):
    return utils._read(path, "model")


def test_round_trip(path, model, digits):
    loaded = utils.load_checkpoint(path)
    assert not loaded.training and (loaded.latent_dim, loaded.variational) == (4, True)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True))
    facts = dict(loaded.facts)
    assert facts.pop("versions")["torch"] == str(torch.__version__)
    assert facts == {"data": "digits", "epoch": 3, "history": [{"epoch": 1, "val_loss": 2.5}], "note": None}
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


def test_torch_itself_can_read_the_file(path):
    assert torch.load(path, weights_only=True)["facts"]["data"] == "digits"


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


@pytest.mark.parametrize("fact", [torch.ones(1), object(), {"a": {1, 2}}, {1: "a"}, [lambda: 0]])
def test_facts_are_plain(path, model, fact):
    before = path.read_bytes()
    with pytest.raises(ValueError, match="plain values"):
        utils.save_checkpoint(path, model, fact=fact)
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*nowhere.pt"):
        utils.load_checkpoint(tmp_path / "nowhere.pt")
    with pytest.raises(utils.CheckpointError, match="cannot be read"):
        utils.load_checkpoint(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(utils.CheckpointError, match="could not be written"):
        utils.save_checkpoint(tmp_path / "file" / "vae.pt", utils.VAE(2))


class Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: {"format": 1, "kind": "model", "build": {}, "weights": {}, "facts": m}])
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("sealed", [True, False])
def test_loading_executes_nothing(tmp_path, wrap, protocol, zipped, sealed):
    buffer = io.BytesIO()
    if zipped:
        torch.save(wrap(Malicious(tmp_path / "owned")), buffer, pickle_protocol=protocol)
    else:
        pickle.dump(wrap(Malicious(tmp_path / "owned")), buffer, protocol=protocol)
    (tmp_path / "evil.pt").write_bytes(seal(buffer.getvalue()) if sealed else buffer.getvalue())
    with pytest.raises(utils.CheckpointError):
        utils.load_checkpoint(tmp_path / "evil.pt")
    assert not (tmp_path / "owned").exists()
    if zipped and sealed and wrap(1) == 1:  # the trap is a real one: torch's permissive loader walks into it
        torch.load(tmp_path / "evil.pt", weights_only=False)
        assert (tmp_path / "owned").exists()


def test_truncated_at_every_tenth(path):
    content = path.read_bytes()
    for tenth in range(10):
        path.write_bytes(content[: len(content) * tenth // 10])
        with pytest.raises(utils.CheckpointError, match="not a checkpoint of this project, or was cut short"):
            utils.load_checkpoint(path)
    path.write_bytes(content[:-1])
    with pytest.raises(utils.CheckpointError):
        utils.load_checkpoint(path)


def test_every_random_mutation_is_refused(path, model):
    """Bytes flipped, cut out, put in, zeroed, swapped: 250 of each mixture, all found by the digest."""
    content, rng = path.read_bytes(), random.Random(0)
    target = path.with_name("mutated.pt")
    for _ in range(250):
        mutated = bytearray(content)
        for _ in range(rng.choice((1, 1, 2, 10))):
            at, n = rng.randrange(len(mutated)), rng.choice((1, 1, 8, 1000))
            match rng.randrange(5):
                case 0:
                    mutated[at] ^= 1 << rng.randrange(8)
                case 1:
                    del mutated[at : at + n]
                case 2:
                    mutated[at:at] = rng.randbytes(n)
                case 3:
                    mutated[at : at + n] = bytes(len(mutated[at : at + n]))
                case 4:
                    mutated = mutated[at:] + mutated[:at]
        target.write_bytes(mutated)
        if mutated == content:
            continue
        with pytest.raises(utils.CheckpointError):
            utils.load_checkpoint(target)


def test_mutations_that_carry_a_right_digest_are_harmless_too(path, model):
    """Somebody who knows the format can seal anything: it loads to these weights, or it is refused, nothing else."""
    content, rng = path.read_bytes()[: -len(utils.TAG) - 32], random.Random(1)
    start = content.index(b"data.pkl")
    for _ in range(200):
        mutated = bytearray(content)
        for _ in range(rng.choice((1, 3))):  # the pickle and the zip's directory, where structure is
            at = rng.choice((rng.randrange(start, start + 6000), rng.randrange(len(content) - 3000, len(content))))
            mutated[at] = rng.randrange(256)
        path.write_bytes(seal(bytes(mutated)))
        try:
            loaded = utils.load_checkpoint(path)
        except utils.CheckpointError:
            continue
        assert loaded.state_dict().keys() == model.state_dict().keys()
        assert all(tensor.isfinite().all() for tensor in loaded.state_dict().values())


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n" + bytes(900), bytes(10_000), b"PK\x03\x04" + bytes(500)])
def test_files_of_other_kinds(tmp_path, content):
    for sealed in (content, seal(content)):
        (tmp_path / "file.pt").write_bytes(sealed)
        with pytest.raises(utils.CheckpointError):
            utils.load_checkpoint(tmp_path / "file.pt")


def test_somebody_elses_state_dict(tmp_path):
    torch.save(torch.nn.Linear(3, 3).state_dict(), tmp_path / "linear.pt")
    with pytest.raises(utils.CheckpointError, match="not a checkpoint of this project"):
        utils.load_checkpoint(tmp_path / "linear.pt")
    write(tmp_path / "linear.pt", torch.nn.Linear(3, 3).state_dict())
    with pytest.raises(utils.CheckpointError, match="not a model checkpoint"):
        utils.load_checkpoint(tmp_path / "linear.pt")


def first(payload):
    return next(iter(payload["weights"]))


def without_one(payload):
    del payload["weights"][first(payload)]


def one_more(payload):
    payload["weights"]["extra"] = torch.ones(1)


def other_shape(payload):
    payload["weights"][first(payload)] = torch.ones(1)


def other_dtype(payload):
    payload["weights"][first(payload)] = payload["weights"][first(payload)].double()


def not_a_tensor(payload):
    payload["weights"][first(payload)] = [1.0]


def nan(payload):
    payload["weights"][first(payload)].view(-1)[0] = float("nan")


def infinity(payload):
    payload["weights"][first(payload)].view(-1)[0] = float("inf")


def wrong_latent_dim(payload):
    payload["build"]["latent_dim"] = 5


def absurd_latent_dim(payload):
    payload["build"]["latent_dim"] = 10**12


def text_latent_dim(payload):
    payload["build"]["latent_dim"] = "4"


def unknown_setting(payload):
    payload["build"]["width"] = 64


def no_build(payload):
    del payload["build"]


def no_weights(payload):
    del payload["weights"]


def tensor_in_facts(payload):
    payload["facts"]["t"] = torch.ones(1)


def future_format(payload):
    payload["format"] = 99


def format_of_text(payload):
    payload["format"] = "1"


def other_kind(payload):
    payload["kind"] = "run"


@pytest.mark.parametrize("change, says", [
    (without_one, "missing or superfluous"), (one_more, "missing or superfluous .*extra"), (other_shape, "is not torch.float32"),
    (other_dtype, "is not torch.float32"), (not_a_tensor, "is not torch.float32"), (nan, "NaN or infinity"),
    (infinity, "NaN or infinity"), (wrong_latent_dim, "is not torch.float32"), (absurd_latent_dim, "latent_dim is 1000000000000"),
    (text_latent_dim, "latent_dim is '4'"), (unknown_setting, "cannot be built"), (no_build, "does not say how"),
    (no_weights, "missing or superfluous"), (tensor_in_facts, "does not say how"), (future_format, "format 99, newer"),
    (format_of_text, "not a model checkpoint"), (other_kind, "not a model checkpoint")])
def test_a_well_formed_file_that_does_not_fit(path, change, says):
    payload = payload_of(path)
    change(payload)
    write(path, payload)
    with pytest.raises(utils.CheckpointError, match=says):
        utils.load_checkpoint(path)


def test_a_compressed_archive_and_a_view_of_gigabytes_allocate_nothing(path):
    payload = payload_of(path)
    payload["weights"][first(payload)] = torch.zeros(1).expand(2**40)
    write(path, payload)
    with pytest.raises(utils.CheckpointError):
        utils.load_checkpoint(path)


def test_a_resume_file_is_not_taken_for_a_model(path, tmp_path, few):
    utils.fit(utils.VAE(2), *few, epochs=1, checkpoint=tmp_path / "run_best.pt")
    with pytest.raises(utils.CheckpointError, match="not a model checkpoint"):
        utils.load_checkpoint(tmp_path / "run_best.resume.pt")


def test_a_checkpoint_is_a_zip_of_tensors(path):
    with zipfile.ZipFile(path) as archive:
        assert any(name.endswith("data.pkl") for name in archive.namelist())
    assert path.stat().st_size < 10e6
