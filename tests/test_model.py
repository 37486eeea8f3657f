"""The mathematics of model and loss, each held against something computed another way."""

import math

import pytest
import torch
from torch.distributions import Bernoulli, Normal, kl_divergence

import utils


def test_seed_everything_repeats_all_three_generators():
    import random

    import numpy as np

    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    utils.seed_everything(7)
    first = draw()
    utils.seed_everything(7)
    assert draw() == first
    utils.seed_everything(8)
    assert all(a != b for a, b in zip(draw(), first))


def test_kl_is_that_of_torch_distributions():
    mu, logvar = torch.randn(7, 5), 3 * torch.randn(7, 5)
    expected = kl_divergence(Normal(mu, (0.5 * logvar).exp()), Normal(0.0, 1.0))
    torch.testing.assert_close(utils.kl_per_dimension(mu, logvar), expected, rtol=1e-5, atol=1e-5)
    assert utils.kl_per_dimension(torch.zeros(1, 3), torch.zeros(1, 3)).eq(0).all()


def test_bce_is_that_of_the_definition():
    logits, x = 3 * torch.randn(6, 1, 28, 28, dtype=torch.float64), torch.rand(6, 1, 28, 28, dtype=torch.float64)
    p = 1 / (1 + (-logits).exp())
    expected = -(x * p.log() + (1 - x) * (1 - p).log()).sum((1, 2, 3))
    torch.testing.assert_close(utils.bce_per_image(logits, x), expected)
    binary = x.round()
    torch.testing.assert_close(utils.bce_per_image(logits, binary), -Bernoulli(logits=logits).log_prob(binary).sum((1, 2, 3)))


def test_vae_loss_sums_over_pixels_and_averages_over_images():
    logits, x = torch.zeros(4, 1, 28, 28), torch.rand(4, 1, 28, 28)
    mu, logvar = torch.full((4, 3), 2.0), torch.zeros(4, 3)
    loss = utils.vae_loss(logits, x, mu, logvar, beta=0.5)
    assert loss.bce.item() == pytest.approx(784 * math.log(2), rel=1e-6)  # p = 1/2 costs log 2 a pixel
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


def test_reparameterize_has_the_mean_and_variance_it_was_given():
    mu, logvar = torch.tensor([[-1.0, 0.0, 2.0]]), torch.tensor([[-2.0, 0.0, 1.0]])
    z = utils.reparameterize(mu.expand(200_000, 3), logvar.expand(200_000, 3), torch.Generator().manual_seed(0))
    torch.testing.assert_close(z.mean(0), mu[0], atol=0.02, rtol=0)
    torch.testing.assert_close(z.var(0), logvar[0].exp(), rtol=0.02, atol=0)


def test_gradients_flow_through_reparameterize():
    mu, logvar = torch.randn(5, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    z = utils.reparameterize(mu, logvar, torch.Generator().manual_seed(0))
    eps = (z - mu).detach() / (0.5 * logvar).exp().detach()
    z.sum().backward()
    torch.testing.assert_close(mu.grad, torch.ones(5, 3))  # dz/dmu = 1
    torch.testing.assert_close(logvar.grad, 0.5 * (0.5 * logvar).exp().detach() * eps)  # dz/dlogvar = sigma eps / 2


def test_reparameterize_repeats_with_its_generator_alone():
    mu, logvar = torch.zeros(2, 3), torch.zeros(2, 3)
    draws = [utils.reparameterize(mu, logvar, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("latent_dim", [1, 2, 32])
@pytest.mark.parametrize("training", [True, False])
def test_shapes(batch, latent_dim, training):
    model = utils.VAE(latent_dim).train(training)
    x = torch.rand(batch, 1, 28, 28)
    logits, mu, logvar = model(x)
    assert logits.shape == x.shape and mu.shape == logvar.shape == (batch, latent_dim)
    assert model.decode(mu).shape == model.reconstruct(x).shape == model.sample(batch).shape == x.shape
    assert not model.reconstruct(x).requires_grad and 0 <= model.sample(batch).min() <= model.sample(batch).max() <= 1


def test_forward_samples_and_reconstruct_does_not(digits):
    model, x = utils.VAE(4).eval(), digits.test.images[:3]
    assert not torch.equal(model(x)[0], model(x)[0])
    assert torch.equal(model.reconstruct(x), model.reconstruct(x))
    torch.testing.assert_close(model.reconstruct(x), model.decode(model.encode(x)[0]).sigmoid())


def test_pictures_are_made_in_batches(digits, monkeypatch):
    model, x, seen = utils.VAE(4).eval(), digits.test.images[:5], []
    whole = model.reconstruct(x)
    monkeypatch.setattr(utils, "BATCH", 2)
    model.decoder.register_forward_hook(lambda *args: seen.append(len(args[2])))
    torch.testing.assert_close(model.reconstruct(x), whole, rtol=1e-4, atol=1e-5)
    assert seen == [2, 2, 1]


def test_looking_at_pictures_does_not_change_the_model(digits):
    """Batch normalisation in training mode would learn from whatever it is shown."""
    model = utils.VAE(4).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.reconstruct(digits.test.images[:3]), model.sample(3), utils.posterior(model, digits.test.images[:3])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()) and model.training


def test_autoencoder_is_the_same_network_without_sampling_and_kl(digits):
    torch.manual_seed(0)
    vae = utils.VAE(4).eval()
    torch.manual_seed(0)
    ae = utils.VAE(4, variational=False).eval()
    x = digits.test.images[:3]
    assert all(torch.equal(a, b) for a, b in zip(vae.state_dict().values(), ae.state_dict().values()))
    logits, mu, logvar = ae(x)
    assert torch.equal(mu, vae.encode(x)[0]) and torch.equal(logits, ae.decode(mu))
    assert utils.vae_loss(logits, x, mu, logvar).kl == 0
    assert utils.evaluate(ae, x).kl == 0


def test_images_of_a_batch_do_not_influence_each_other(digits):
    """Once trained: batch normalisation then uses what it has seen, not the company an image comes in."""
    model, x = utils.VAE(4).eval(), digits.test.images[:5]
    together, alone = model.encode(x)[0], torch.cat([model.encode(image[None])[0] for image in x])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variational", ["false", 1, None])
def test_variational_is_true_or_false(variational):
    with pytest.raises(ValueError, match="variational is .*True or False"):
        utils.VAE(2, variational)


@pytest.mark.parametrize("latent_dim", [0, -1, 2.0, True, "32", None, 10**9])
def test_bad_latent_size(latent_dim):
    with pytest.raises(ValueError, match="latent_dim is"):
        utils.VAE(latent_dim)


@pytest.mark.parametrize("cuda, mps, expected", [
    (True, True, "cuda"), (True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")])
def test_pick_device_prefers_cuda_then_mps(monkeypatch, cuda, mps, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert utils.pick_device().type == expected


def test_a_residual_layer_adds_to_what_comes_in():
    h = torch.randn(3, 5)
    assert torch.equal(utils.Residual(torch.nn.ReLU(), torch.nn.ReLU())(h), h + h.relu())
