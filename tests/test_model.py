"""The mathematics of model and loss, each held against something computed another way.

The network itself is held to the committed references, in test_evaluation.py.
"""

import copy
import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import EDITED, same_weights
from torch.distributions import Normal, kl_divergence

import utils

# seeds and devices


def test_seed_everything_repeats_all_three_generators(monkeypatch):
    """And makes CUDA repeatable and exact: else evaluation there differs in the third decimal."""

    def draw(seed):
        utils.seed_everything(seed)
        return random.random(), np.random.rand(), torch.rand(1).item()

    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    first = draw(7)
    assert draw(7) == first
    assert not set(draw(9)) & set(first)
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("there", [True, False])
def test_an_accelerator_is_picked_if_there_is_one(monkeypatch, there):
    """A build of torch for CUDA names it even where there is none."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: there)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    assert utils.pick_device().type == ("cuda" if there else "cpu")


# loss


def test_kl_is_that_of_torch_distributions():
    mu = torch.randn(7, 5)
    logvar = 3 * torch.randn(7, 5)
    logvar[0] = torch.tensor([-20.0, -10.0, 0.0, 10.0, 20.0])
    expected = kl_divergence(Normal(mu, (0.5 * logvar).exp()), Normal(0.0, 1.0))
    torch.testing.assert_close(utils.kl_per_dimension(mu, logvar), expected, rtol=1e-5, atol=1e-5)


def test_bce_is_that_of_the_definition():
    """For logits of any size: -x log p - (1 - x) log(1 - p) with p = 1 / (1 + exp(-logit))."""
    logits = 20 * torch.randn(6, 1, 28, 28, dtype=torch.float64)
    x = torch.rand(6, 1, 28, 28, dtype=torch.float64)
    minus_log_p = (1 + (-logits).exp()).log()
    expected = (x * minus_log_p + (1 - x) * (logits + minus_log_p)).sum((1, 2, 3))
    torch.testing.assert_close(utils.bce_per_image(logits, x), expected)


def test_vae_loss_sums_over_pixels_and_dimensions_and_averages_over_images():
    logits = torch.zeros(2, 1, 28, 28)
    x = torch.rand(2, 1, 28, 28)
    mu = torch.tensor([[2.0] * 3, [6.0] * 3])
    logvar = torch.zeros(2, 3)
    bce = 784 * math.log(2)  # p = 1/2 in each pixel
    kl = 3 * (2.0**2 / 2 + 6.0**2 / 2) / 2
    half = utils.vae_loss(logits, x, mu, logvar, beta=0.5)
    assert torch.stack(half).tolist() == pytest.approx([bce + kl / 2, bce, kl]), EDITED
    usual = utils.vae_loss(logits, x, mu, logvar)
    assert torch.stack(usual).tolist() == pytest.approx([bce + kl, bce, kl]), EDITED
    plain = utils.vae_loss(logits, x, mu, None)
    assert torch.stack(plain).tolist() == pytest.approx([bce, bce, 0]), EDITED


def test_loss_and_gradients_stay_finite_at_extremes():
    logits = torch.tensor([1e30, -1e30]).repeat(2, 392).view(2, 1, 28, 28).requires_grad_()
    logvar = torch.tensor([[1e4, -1e4, 50.0], [100.0, -100.0, 0.0]], requires_grad=True)
    mu = torch.zeros(2, 3, requires_grad=True)
    loss = utils.vae_loss(logits, torch.rand(2, 1, 28, 28).round(), mu, logvar)
    z = utils.reparameterize(mu, logvar)
    (loss.loss + z.sum()).backward()
    for value in (*loss, z, logits.grad, mu.grad, logvar.grad):
        assert value.isfinite().all()


# reparameterization


def test_reparameterize_has_its_mean_and_variance_and_lets_gradients_through():
    mu = torch.tensor([-1.0, 0.0, 2.0], requires_grad=True)
    logvar = torch.tensor([-2.0, 0.0, 1.0], requires_grad=True)
    generator = torch.Generator().manual_seed(0)
    z = utils.reparameterize(mu.expand(200_000, 3), logvar.expand(200_000, 3), generator)
    torch.testing.assert_close(z.mean(0), mu, atol=0.02, rtol=0)
    torch.testing.assert_close(z.T.cov(), logvar.exp().diag(), atol=0.02, rtol=0.02)
    z.square().mean(0).sum().backward()
    by_logvar = (z * (z - mu)).mean(0)  # dz/dlogvar = sigma eps / 2, and dz/dmu = 1
    torch.testing.assert_close(logvar.grad, by_logvar, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(mu.grad, 2 * z.mean(0), atol=1e-3, rtol=1e-3)


def test_noise_repeats_with_its_generator_alone(model):
    x = torch.rand(2, 1, 28, 28)
    model.eval()
    for use in (lambda generator: model.sample(2, generator), lambda g: model(x, g)[0]):
        before = torch.get_rng_state()
        draws = [use(torch.Generator().manual_seed(seed)) for seed in (1, 1, 3)]
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(draws[0], draws[1])
        assert not torch.equal(draws[0], draws[2])
        assert not torch.equal(use(None), use(None))


def test_noise_is_drawn_where_its_generator_lives():
    generator = torch.Generator().manual_seed(0)
    mu = torch.zeros(2, 3, device="meta")
    assert utils.reparameterize(mu, mu, generator).device.type == "meta"
    drawn = torch.Generator().manual_seed(0)
    torch.randn(2, 3, generator=drawn)
    assert torch.equal(generator.get_state(), drawn.get_state())


# model


def test_a_model_is_a_vae_of_32_dimensions_unless_it_is_told_otherwise():
    mu, logvar = utils.VAE().encode(torch.rand(3, 1, 28, 28))
    assert mu.shape == logvar.shape == (3, 32), EDITED


def test_layers_are_those_that_the_readme_describes():
    model = utils.VAE()
    layers = {}
    for name in ("encoder", "decoder"):
        modules = getattr(model, name).modules()
        counts = Counter(type(module).__name__ for module in modules if not list(module.children()))
        layers[name] = dict(counts)
    convolutions = {"Conv2d": 3, "BatchNorm2d": 2}
    assert layers["encoder"] == {**convolutions, "Flatten": 1, "Linear": 3, "GELU": 5}, EDITED
    convolutions = {"Conv2d": 2, "ConvTranspose2d": 2, "BatchNorm2d": 2}
    assert layers["decoder"] == {**convolutions, "Unflatten": 1, "Linear": 3, "GELU": 6}, EDITED


def test_what_comes_out_of_a_model(digits):
    x = digits.test.images[:3]
    model = utils.VAE(np.int64(1)).eval()  # NumPy's integers are integers
    logits, mu, logvar = model(x)
    assert mu.shape == logvar.shape == (3, 1)
    assert logits.shape == x.shape
    mean = model.decode(mu).sigmoid()
    torch.testing.assert_close(model.reconstruct(x), mean.detach())
    for images in (model.reconstruct(x), model.sample(3), model.decode_images(mu)):
        assert images.shape == x.shape
        assert not images.requires_grad
        assert 0 <= images.min() <= images.max() <= 1


class Shows(utils.VAE):
    """It returns the codes that it should decode."""

    def decode_images(self, z):
        return z


def test_samples_are_decoded_from_the_prior():
    """z ~ N(0, I): from any wider a cloud, samples would look worse than the model is."""
    z = Shows(4).sample(20_000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(z.mean(0), torch.zeros(4), atol=0.03, rtol=0)
    torch.testing.assert_close(z.T.cov(), torch.eye(4), atol=0.04, rtol=0)


def test_codes_are_decoded_in_batches_from_torch_or_numpy(model, monkeypatch):
    """scikit-learn's mixtures sample in double precision."""
    z = torch.randn(5, 4)
    whole = model.decode_images(z)
    sizes = []
    monkeypatch.setattr(utils, "BATCH", 2)
    model.decoder.register_forward_hook(lambda *args: sizes.append(len(args[2])))
    for codes in (z, z.double().numpy()):
        torch.testing.assert_close(model.decode_images(codes), whole, rtol=1e-4, atol=1e-5)
    assert sizes == [2, 2, 1] * 2


def test_looking_does_not_change_the_model(model, digits):
    """Batch normalisation in training mode would learn from whatever it is shown."""
    before = copy.deepcopy(model)
    x = digits.test.images[:3]
    utils.evaluate(model, x)
    utils.log_likelihood(model, x, 2)
    utils.anomaly_score(model, x)
    model.sample(3)
    assert model.training
    with pytest.raises(RuntimeError):
        model.decode_images(torch.zeros(1, 3))
    assert model.training, "also after an error"
    assert same_weights(model, before)
    model.eval()
    model.sample(3)
    assert not model.training


def test_log_variances_are_bounded_where_float32_is_exact_enough():
    logvar = torch.tensor([-1e4, -30.0, 25.0, 1e4])
    kl = 0.5 * (logvar.clamp(-30, 30).exp() - 1 - logvar.clamp(-30, 30))
    torch.testing.assert_close(utils.kl_per_dimension(torch.zeros(4), logvar), kl)


def test_an_autoencoder_is_the_same_network_without_noise_and_kl(digits):
    """Noise on the code makes another model of it, and a more robust one: the baseline is off."""
    torch.manual_seed(0)
    vae = utils.VAE(4)
    torch.manual_seed(0)
    ae = utils.VAE(4, variational=False)
    x = digits.test.images[:8]
    logits, mu, logvar = ae(x)
    assert logvar is None
    assert torch.equal(mu, vae.encode(x)[0])
    assert torch.equal(logits, ae.decode(mu))
    expected = utils.bce_per_image(ae.eval()(x)[0], x).detach().double()
    per_image = utils.loss_per_image(ae, x, num_samples=2)
    torch.testing.assert_close(per_image.bce, expected, rtol=1e-6, atol=0)
    assert torch.equal(per_image.loss, per_image.bce)
    assert per_image.kl.eq(0).all()


@pytest.mark.parametrize("mps", [False, True])
def test_convolutions_lie_in_the_order_that_is_fastest_unless_mps_would_be_wrong(monkeypatch, mps):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    weight = utils.VAE(2).decoder.conv[0].weight  # (64, 16, 3, 3)
    assert weight.is_contiguous(memory_format=torch.channels_last) is not mps
    assert weight.is_contiguous() is mps


# arguments

X = torch.zeros(6, 1, 28, 28)
CODES = torch.zeros(6, 4)


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: utils.seed_everything(-1), "Seed must be between"),
        (lambda: utils.VAE(0), "^latent_dim "),
        (lambda: utils.VAE("32"), "^latent_dim "),
        (lambda: utils.vae_loss(X[:1], X, CODES, CODES), "size"),
        (lambda: utils.vae_loss(X, X, CODES, CODES[:, :1]), "differ in shape"),
    ],
)
def test_what_makes_no_sense_is_named(call, says):
    with pytest.raises((TypeError, ValueError), match=says):
        call()
