"""The mathematics of model and loss, each held against something computed another way."""

import math
import random

import numpy as np
import pytest
import torch
from torch.distributions import Bernoulli, Normal, kl_divergence

import utils

# seeds and devices


def test_seed_everything_repeats_all_three_generators():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    utils.seed_everything(7)
    first = draw()
    utils.seed_everything(7)
    assert draw() == first
    utils.seed_everything(9)
    for a, b in zip(draw(), first, strict=True):
        assert a != b


def test_seed_everything_makes_cuda_repeatable_and_exact(monkeypatch):
    """Else runs on CUDA differ from each other, and evaluation there in the third decimal."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    utils.seed_everything(0)
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("seed", [-1, 2**32, "0", None, 1.0, True])
def test_a_bad_seed_is_named(seed):
    with pytest.raises((TypeError, ValueError), match="^seed "):
        utils.seed_everything(seed)


@pytest.mark.parametrize(
    "cuda, mps, expected",
    [
        (True, True, "cuda"),
        (True, False, "cuda"),
        (False, True, "mps"),
        (False, False, "cpu"),
    ],
)
def test_pick_device_prefers_cuda_then_mps(monkeypatch, cuda, mps, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert utils.pick_device().type == expected


# loss


def test_kl_is_that_of_torch_distributions():
    mu = torch.randn(7, 5)
    logvar = 3 * torch.randn(7, 5)
    expected = kl_divergence(Normal(mu, (0.5 * logvar).exp()), Normal(0.0, 1.0))
    torch.testing.assert_close(utils.kl_per_dimension(mu, logvar), expected, rtol=1e-5, atol=1e-5)
    assert utils.kl_per_dimension(torch.zeros(1, 3), torch.zeros(1, 3)).eq(0).all()


def test_bce_is_that_of_the_definition():
    logits = 3 * torch.randn(6, 1, 28, 28, dtype=torch.float64)
    x = torch.rand(6, 1, 28, 28, dtype=torch.float64)
    p = 1 / (1 + (-logits).exp())
    expected = -(x * p.log() + (1 - x) * (1 - p).log()).sum((1, 2, 3))
    torch.testing.assert_close(utils.bce_per_image(logits, x), expected)
    binary = x.round()
    expected = -Bernoulli(logits=logits).log_prob(binary).sum((1, 2, 3))
    torch.testing.assert_close(utils.bce_per_image(logits, binary), expected)


def test_vae_loss_sums_over_pixels_and_averages_over_images():
    logits = torch.zeros(4, 1, 28, 28)
    x = torch.rand(4, 1, 28, 28)
    mu = torch.full((4, 3), 2.0)
    loss = utils.vae_loss(logits, x, mu, torch.zeros(4, 3), beta=0.5)
    assert loss.bce.item() == pytest.approx(784 * math.log(2), rel=1e-6)  # p = 1/2 in each pixel
    assert loss.kl.item() == pytest.approx(3 * 2.0**2 / 2, rel=1e-6)
    assert loss.loss.item() == pytest.approx(loss.bce.item() + 0.5 * loss.kl.item(), rel=1e-6)
    assert utils.vae_loss(logits, x, mu, None).kl == 0


@pytest.mark.parametrize("size", [1e4, 1e30])
def test_loss_and_gradients_stay_finite_at_extremes(size):
    logits = torch.tensor([size, -size]).repeat(2, 392).view(2, 1, 28, 28).requires_grad_()
    logvar = torch.tensor([[1e4, -1e4, 50.0], [100.0, -100.0, 0.0]], requires_grad=True)
    mu = torch.zeros(2, 3, requires_grad=True)
    loss = utils.vae_loss(logits, torch.rand(2, 1, 28, 28).round(), mu, logvar)
    z = utils.reparameterize(mu, logvar)
    (loss.loss + z.sum()).backward()
    for value in (*loss, z, logits.grad, mu.grad, logvar.grad):
        assert value.isfinite().all()


@pytest.mark.parametrize(
    "change",
    [
        lambda x: 255 * x,
        lambda x: (x - 0.1307) / 0.3081,
        lambda x: x + 0.1,
        lambda x: x * math.nan,
        lambda x: x / 0,
    ],
    ids=["bytes", "standardised", "too bright", "nan", "inf"],
)
def test_vae_loss_of_images_outside_0_to_1_is_refused(change):
    """Their binary cross-entropy would be a number, far below zero, that means nothing."""
    x = change(torch.linspace(0, 1, 1568).view(2, 1, 28, 28))
    codes = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"x must lie in \[0, 1\]"):
        utils.vae_loss(torch.zeros(2, 1, 28, 28), x, codes, codes)


@pytest.mark.parametrize("beta", [-1, math.nan, math.inf, "1", None, True])
def test_vae_loss_names_a_bad_beta(beta):
    x = torch.zeros(2, 1, 28, 28)
    with pytest.raises((TypeError, ValueError), match="^beta "):
        utils.vae_loss(x, x, torch.zeros(2, 3), torch.zeros(2, 3), beta=beta)


def test_vae_loss_refuses_tensors_that_do_not_go_together():
    """Broadcasting would turn them into a number that means nothing."""
    x = torch.zeros(6, 1, 28, 28)
    codes = torch.zeros(6, 4)
    with pytest.raises(ValueError, match="logits .* and x .* differ in shape"):
        utils.vae_loss(x[:1], x, codes, codes)
    with pytest.raises(ValueError, match="differ in shape"):
        utils.vae_loss(x, x, codes, codes[:, :1])


# reparameterization


def test_reparameterize_has_the_mean_and_variance_it_was_given():
    mu = torch.tensor([[-1.0, 0.0, 2.0]])
    logvar = torch.tensor([[-2.0, 0.0, 1.0]])
    generator = torch.Generator().manual_seed(0)
    z = utils.reparameterize(mu.expand(200_000, 3), logvar.expand(200_000, 3), generator)
    torch.testing.assert_close(z.mean(0), mu[0], atol=0.02, rtol=0)
    torch.testing.assert_close(z.var(0), logvar[0].exp(), rtol=0.02, atol=0)


def test_gradients_flow_through_reparameterize():
    mu = torch.randn(5, 3, requires_grad=True)
    logvar = torch.randn(5, 3, requires_grad=True)
    z = utils.reparameterize(mu, logvar, torch.Generator().manual_seed(0))
    sigma = (0.5 * logvar).exp().detach()
    eps = (z - mu).detach() / sigma
    z.sum().backward()
    torch.testing.assert_close(mu.grad, torch.ones(5, 3))  # dz/dmu = 1
    torch.testing.assert_close(logvar.grad, 0.5 * sigma * eps)  # dz/dlogvar = sigma eps / 2


def test_reparameterize_repeats_with_its_generator_alone():
    zeros = torch.zeros(2, 3)
    draws = []
    for seed in (1, 1, 3):
        draws.append(utils.reparameterize(zeros, zeros, torch.Generator().manual_seed(seed)))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


# model


@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("latent_dim", [1, 32])
@pytest.mark.parametrize("training", [True, False])
def test_shapes(batch, latent_dim, training):
    model = utils.VAE(latent_dim).train(training)
    x = torch.rand(batch, 1, 28, 28)
    logits, mu, logvar = model(x)
    assert logits.shape == x.shape
    assert mu.shape == logvar.shape == (batch, latent_dim)
    assert model.decode(mu).shape == x.shape
    for images in (model.reconstruct(x), model.sample(batch), model.draw(mu)):
        assert images.shape == x.shape
        assert not images.requires_grad
        assert 0 <= images.min() <= images.max() <= 1


def test_forward_samples_and_reconstruct_does_not(digits):
    model = utils.VAE(4).eval()
    x = digits.test.images[:3]
    assert not torch.equal(model(x)[0], model(x)[0])
    assert torch.equal(model.reconstruct(x), model.reconstruct(x))
    torch.testing.assert_close(model.reconstruct(x), model.decode(model.encode(x)[0]).sigmoid())


def test_samples_are_decoded_from_the_prior(model, monkeypatch):
    """z ~ N(0, I): from any wider a cloud, samples would look worse than the model is."""
    monkeypatch.setattr(model, "draw", lambda z: z)
    z = model.sample(20_000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(z.mean(0), torch.zeros(4), atol=0.03, rtol=0)
    torch.testing.assert_close(z.T.cov(), torch.eye(4), atol=0.04, rtol=0)


@pytest.mark.parametrize("n", [0, -1, 1.0, "3", None, True])
def test_a_bad_number_of_samples_is_named(model, n):
    with pytest.raises((TypeError, ValueError), match="^n "):
        model.sample(n)


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_codes_of_numpy_are_drawn(model, kind):
    """scikit-learn's mixtures sample in double precision."""
    z = torch.randn(3, 4)
    torch.testing.assert_close(model.draw(z.numpy().astype(kind)), model.draw(z))


@pytest.mark.parametrize("shape", [(4,), (3, 5), (0, 4), (3, 4, 1), ()])
def test_codes_of_another_shape_are_named(model, shape):
    with pytest.raises(ValueError, match=r"codes must have the shape \(N, 4\), not"):
        model.draw(torch.zeros(shape))


def test_pictures_are_made_in_batches(digits, monkeypatch):
    model = utils.VAE(4).eval()
    x = digits.test.images[:5]
    whole = model.reconstruct(x)
    seen = []
    monkeypatch.setattr(utils, "BATCH", 2)
    model.decoder.register_forward_hook(lambda *args: seen.append(len(args[2])))
    torch.testing.assert_close(model.reconstruct(x), whole, rtol=1e-4, atol=1e-5)
    assert seen == [2, 2, 1]


def test_looking_at_pictures_does_not_change_the_model(digits):
    """Batch normalisation in training mode would learn from whatever it is shown."""
    model = utils.VAE(4).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = digits.test.images[:3]
    model.reconstruct(x)
    model.sample(3)
    utils.posterior(model, x)
    utils.evaluate(model, x)
    utils.optimize_codes(model, x, steps=2)
    assert model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def twins():
    """A VAE and a plain autoencoder of the same weights."""
    torch.manual_seed(0)
    vae = utils.VAE(4)
    torch.manual_seed(0)
    return vae, utils.VAE(4, variational=False)


def test_autoencoder_is_the_same_network_without_kl(digits):
    vae, ae = twins()
    x = digits.test.images[:3]
    for a, b in zip(vae.state_dict().items(), ae.state_dict().items(), strict=True):
        assert a[0] == b[0]
        assert torch.equal(a[1], b[1])
    logits, mu, logvar = ae.eval()(x)
    assert logvar is None
    assert torch.equal(mu, vae.eval().encode(x)[0])
    assert utils.vae_loss(logits, x, mu, logvar).kl == 0
    assert utils.evaluate(ae, x).kl == 0


@pytest.mark.parametrize("training", [True, False])
def test_an_autoencoder_decodes_its_code_without_any_noise(digits, training):
    """Noise on the code makes another model of it, and a more robust one: the baseline is off."""
    _, ae = twins()
    ae.train(training)
    x = digits.test.images[:8]
    logits, mu, _ = ae(x)
    assert torch.equal(logits, ae.decode(mu))
    ae.eval()
    expected = utils.bce_per_image(ae.decode(ae.encode(x)[0]), x).double()
    per_image = utils.loss_per_image(ae, x, num_samples=2)
    torch.testing.assert_close(per_image.bce, expected, rtol=1e-6, atol=0)
    assert torch.equal(per_image.loss, per_image.bce)


def test_images_of_a_batch_do_not_influence_each_other(digits):
    """Batch normalisation in eval mode uses what it has seen, not an image's company."""
    model = utils.VAE(4).eval()
    x = digits.test.images[:5]
    together = model.encode(x)[0]
    alone = torch.cat([model.encode(image[None])[0] for image in x])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variational", ["false", 1, None])
def test_variational_is_true_or_false(variational):
    with pytest.raises(TypeError, match="variational must be an instance of bool"):
        utils.VAE(2, variational)


@pytest.mark.parametrize(
    "latent_dim, error",
    [
        (0, ValueError),
        (-1, ValueError),
        (10**9, ValueError),
        (2.0, TypeError),
        (True, TypeError),
        ("32", TypeError),
        (None, TypeError),
    ],
)
def test_bad_latent_size(latent_dim, error):
    with pytest.raises(error, match="^latent_dim "):
        utils.VAE(latent_dim)


def test_numpys_integers_are_integers():
    assert utils.VAE(np.int64(3)).latent_dim == 3


def test_a_residual_layer_adds_to_what_comes_in():
    h = torch.randn(3, 5)
    assert torch.equal(utils.Residual(torch.nn.ReLU(), torch.nn.ReLU())(h), h + h.relu())


@pytest.mark.parametrize("device, channels_last", [("cpu", True), ("cuda", True), ("mps", False)])
def test_convolutions_are_laid_out_for_the_device(monkeypatch, device, channels_last):
    """On Apple's MPS, gradients of batch normalisation are wrong in channels last."""
    monkeypatch.setattr(utils, "_device", lambda model: torch.device(device))
    weight = utils.VAE(2).decoder.conv[0].weight  # (64, 16, 3, 3)
    assert weight.is_contiguous(memory_format=torch.channels_last) == channels_last
    assert weight.is_contiguous() != channels_last


def test_samples_repeat_with_their_generator(model):
    first = model.sample(2, torch.Generator().manual_seed(3))
    assert torch.equal(first, model.sample(2, torch.Generator().manual_seed(3)))
    assert not torch.equal(first, model.sample(2, torch.Generator().manual_seed(4)))


def test_a_narrow_or_wide_posterior_keeps_its_width():
    logvar = torch.tensor([[-20.0, 20.0]])
    mu = torch.zeros(1, 2)
    expected = 0.5 * (logvar.exp() - 1 - logvar)
    torch.testing.assert_close(utils.kl_per_dimension(mu, logvar), expected)
    z = utils.reparameterize(mu, logvar, torch.Generator().manual_seed(0))
    eps = torch.randn(1, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(z, (0.5 * logvar).exp() * eps)
