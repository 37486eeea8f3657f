"""The mathematics of model and loss, each held against something computed another way."""

import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import EDITED
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
    for seed in (-1, 2**32, "0", None, 1.0, True):
        with pytest.raises((TypeError, ValueError), match="^seed "):
            utils.seed_everything(seed)


def test_pick_device_prefers_cuda_then_mps(monkeypatch):
    picked = []
    for cuda, mps in ((True, True), (True, False), (False, True), (False, False)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=cuda: there)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda there=mps: there)
        picked.append(utils.pick_device().type)
    assert picked == ["cuda", "cuda", "mps", "cpu"]


# loss


def test_kl_is_that_of_torch_distributions():
    mu = torch.randn(7, 5)
    logvar = 3 * torch.randn(7, 5)
    logvar[0] = torch.tensor([-20.0, -10.0, 0.0, 10.0, 20.0])
    expected = kl_divergence(Normal(mu, (0.5 * logvar).exp()), Normal(0.0, 1.0))
    torch.testing.assert_close(utils.kl_per_dimension(mu, logvar), expected, rtol=1e-5, atol=1e-5)
    assert utils.kl_per_dimension(torch.zeros(1, 3), torch.zeros(1, 3)).eq(0).all()


def test_bce_is_that_of_the_definition():
    """For logits of any size: -x log p - (1 - x) log(1 - p) with p = 1 / (1 + exp(-logit))."""
    logits = 20 * torch.randn(6, 1, 28, 28, dtype=torch.float64)
    x = torch.rand(6, 1, 28, 28, dtype=torch.float64)
    minus_log_p = (1 + (-logits).exp()).log()
    expected = (x * minus_log_p + (1 - x) * (logits + minus_log_p)).sum((1, 2, 3))
    torch.testing.assert_close(utils.bce_per_image(logits, x), expected)


def test_vae_loss_sums_over_pixels_and_dimensions_and_averages_over_images():
    logits = torch.zeros(4, 1, 28, 28)
    x = torch.rand(4, 1, 28, 28)
    mu = torch.tensor([2.0, 2.0, 2.0, 6.0])[:, None].repeat(1, 3)
    logvar = torch.zeros(4, 3)
    bce = 784 * math.log(2)  # p = 1/2 in each pixel
    kl = (3 * 3 * 2.0**2 / 2 + 3 * 6.0**2 / 2) / 4
    loss = utils.vae_loss(logits, x, mu, logvar, beta=0.5)
    assert [value.item() for value in loss] == pytest.approx([bce + kl / 2, bce, kl]), EDITED
    loss = utils.vae_loss(logits, x, mu, logvar)
    assert [value.item() for value in loss] == pytest.approx([bce + kl, bce, kl]), EDITED
    loss = utils.vae_loss(logits, x, mu, None)
    assert [value.item() for value in loss] == pytest.approx([bce, bce, 0]), EDITED


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


def test_vae_loss_names_what_makes_no_sense():
    """Images outside [0, 1] or tensors of different shapes would give a number that means none."""
    x = torch.linspace(0, 1, 6 * 784).view(6, 1, 28, 28)
    codes = torch.zeros(6, 4)
    for wrong in (255 * x, (x - 0.1307) / 0.3081, x + 0.1, x * math.nan, x / 0):
        with pytest.raises(ValueError, match=r"x must lie in \[0, 1\]"):
            utils.vae_loss(x, wrong, codes, codes)
    for beta in (-1, math.nan, math.inf, "1", None, True):
        with pytest.raises((TypeError, ValueError), match="^beta "):
            utils.vae_loss(x, x, codes, codes, beta=beta)
    with pytest.raises(ValueError, match="size"):
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
    torch.testing.assert_close(z.T.cov(), logvar[0].exp().diag(), rtol=0.02, atol=0.02)


def test_gradients_flow_through_reparameterize():
    mu = torch.randn(5, 3, requires_grad=True)
    logvar = torch.randn(5, 3, requires_grad=True)
    z = utils.reparameterize(mu, logvar, torch.Generator().manual_seed(0))
    sigma = (0.5 * logvar).exp().detach()
    eps = (z - mu).detach() / sigma
    z.sum().backward()
    torch.testing.assert_close(mu.grad, torch.ones(5, 3))  # dz/dmu = 1
    torch.testing.assert_close(logvar.grad, 0.5 * sigma * eps)  # dz/dlogvar = sigma eps / 2


def test_noise_repeats_with_its_generator_alone(model, digits):
    x = digits.val.images[:2]
    zeros = torch.zeros(2, 3)
    uses = (
        lambda generator: utils.reparameterize(zeros, zeros, generator),
        lambda generator: model.sample(2, generator),
        lambda generator: model.eval()(x, generator)[0],
    )
    for use in uses:
        before = torch.get_rng_state()
        draws = [use(torch.Generator().manual_seed(seed)) for seed in (1, 1, 3)]
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(draws[0], draws[1])
        assert not torch.equal(draws[0], draws[2])
        assert not torch.equal(use(None), use(None))


# model


def test_a_model_is_a_vae_of_32_dimensions_unless_it_is_told_otherwise():
    model = utils.VAE()
    assert (model.latent_dim, model.variational) == (32, True), EDITED
    assert model.encode(torch.rand(1, 1, 28, 28))[0].shape == (1, 32), EDITED


def normalised(h, weights, name):
    """Batch normalisation by the statistics that were collected in training."""
    mean, var = (weights[f"{name}.running_{what}"][:, None, None] for what in ("mean", "var"))
    scale, shift = (weights[f"{name}.{what}"][:, None, None] for what in ("weight", "bias"))
    return (h - mean) / (var + 1e-5).sqrt() * scale + shift


def gelu(h):
    return h * Normal(0.0, 1.0).cdf(h)


def written_out(x, w):
    """The network layer by layer: images to mu, logvar and the logits of mu."""

    def layer(function, h, name, *options):
        return function(h, w[f"{name}.weight"], w[f"{name}.bias"], *options)

    h = layer(F.conv2d, x, "encoder.conv.0", 2, 1)
    h = gelu(normalised(h, w, "encoder.conv.1"))
    h = layer(F.conv2d, h, "encoder.conv.3", 2)
    h = gelu(normalised(h, w, "encoder.conv.4"))
    h = gelu(layer(F.conv2d, h, "encoder.conv.6", 1, 1)).flatten(1)
    h = gelu(layer(F.linear, h, "encoder.dense.1"))
    h = h + gelu(layer(F.linear, h, "encoder.dense.3.0"))
    mu, logvar = layer(F.linear, h, "encoder.dense.4").chunk(2, 1)
    h = gelu(layer(F.linear, mu, "decoder.dense.0"))
    h = h + gelu(layer(F.linear, h, "decoder.dense.2.0"))
    h = gelu(layer(F.linear, h, "decoder.dense.3")).view(-1, 16, 7, 7)
    h = layer(F.conv2d, h, "decoder.conv.0", 1, 1)
    h = gelu(normalised(h, w, "decoder.conv.1"))
    inner = layer(F.conv2d, h, "decoder.conv.3.0", 1, 1)
    h = h + gelu(normalised(inner, w, "decoder.conv.3.1"))
    h = gelu(layer(F.conv_transpose2d, h, "decoder.conv.4", 2, 1))
    return mu, logvar, layer(F.conv_transpose2d, h, "decoder.conv.6", 2, 1)


@torch.no_grad()
def test_the_network_is_the_one_that_is_written_out_here(digits):
    torch.manual_seed(0)
    model = utils.VAE(4)
    utils.fit(model, digits.train.images[:64], digits.val.images[:8], epochs=1, batch_size=8)
    x = digits.test.images[:5]
    mu, logvar = model.encode(x)
    logits = model.decode(mu)
    expected = None
    try:
        expected = written_out(x, model.state_dict())
    except (KeyError, RuntimeError) as error:
        pytest.fail(f"{EDITED} ({error})")
    for found, value in zip((mu, logvar, logits), expected, strict=True):
        assert found.shape == value.shape, EDITED
        assert torch.allclose(found, value, rtol=1e-3, atol=1e-4), EDITED


@pytest.mark.parametrize("latent_dim, batch", [(1, 7), (32, 1)])
def test_shapes(batch, latent_dim):
    model = utils.VAE(latent_dim).train(batch > 1)
    x = torch.rand(batch, 1, 28, 28)
    logits, mu, logvar = model(x)
    assert logits.shape == x.shape
    assert mu.shape == logvar.shape == (batch, latent_dim)
    assert model.decode(mu).shape == x.shape
    for images in (model.reconstruct(x), model.sample(batch), model.decode_images(mu)):
        assert images.shape == x.shape
        assert not images.requires_grad
        assert 0 <= images.min() <= images.max() <= 1


def test_forward_samples_and_reconstruct_does_not(model, digits):
    x = digits.test.images[:3]
    model.eval()
    assert not torch.equal(model(x)[0], model(x)[0])
    assert torch.equal(model.reconstruct(x), model.reconstruct(x))
    torch.testing.assert_close(model.reconstruct(x), model.decode(model.encode(x)[0]).sigmoid())


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
    for codes in (z, z.numpy(), z.double().numpy()):
        torch.testing.assert_close(model.decode_images(codes), whole, rtol=1e-4, atol=1e-5)
    assert sizes == [2, 2, 1] * 3


def test_what_makes_no_sense_is_named(model):
    for shape in ((4,), (3, 5), (0, 4), (3, 4, 1), ()):
        with pytest.raises(ValueError, match=r"codes must have the shape \(N, 4\), not"):
            model.decode_images(torch.zeros(shape))
    for n in (0, -1, 1.0, "3", None, True):
        with pytest.raises((TypeError, ValueError), match="^n "):
            model.sample(n)
    for latent_dim in (0, -1, 2.0, True, "32", None):
        with pytest.raises((TypeError, ValueError), match="^latent_dim "):
            utils.VAE(latent_dim)
    for variational in ("false", 1, None):
        with pytest.raises(TypeError, match="variational must be an instance of bool"):
            utils.VAE(2, variational)
    assert utils.VAE(np.int64(3)).latent_dim == 3, "NumPy's integers are integers"


def test_looking_does_not_change_the_model(model, digits):
    """Batch normalisation in training mode would learn from whatever it is shown."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = digits.test.images[:3]
    model.train()
    utils.evaluate(model, x)
    utils.log_likelihood(model, x, 2)
    utils.anomaly_score(model, x)
    model.sample(3)
    assert model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_an_autoencoder_is_the_same_network_without_noise_and_kl(digits, training):
    """Noise on the code makes another model of it, and a more robust one: the baseline is off."""
    torch.manual_seed(0)
    vae = utils.VAE(4).train(training)
    torch.manual_seed(0)
    ae = utils.VAE(4, variational=False).train(training)
    x = digits.test.images[:8]
    logits, mu, logvar = ae(x)
    assert logvar is None
    assert torch.equal(mu, vae.encode(x)[0])
    assert torch.equal(logits, ae.decode(mu))
    ae.eval()
    expected = utils.bce_per_image(ae.decode(ae.encode(x)[0]), x).double()
    per_image = utils.loss_per_image(ae, x, num_samples=2)
    torch.testing.assert_close(per_image.bce, expected, rtol=1e-6, atol=0)
    assert torch.equal(per_image.loss, per_image.bce)
    assert per_image.kl.eq(0).all()


def test_images_of_a_batch_do_not_influence_each_other(model, digits):
    """Batch normalisation in eval mode uses what it has seen, not an image's company."""
    x = digits.test.images[:5]
    together = utils.posterior(model, x)[0]
    alone = torch.cat([utils.posterior(model, image[None])[0] for image in x])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_convolutions_lie_in_the_order_that_is_fastest_on_a_cpu():
    weight = utils.VAE(2).cpu().decoder.conv[0].weight  # (64, 16, 3, 3)
    assert weight.is_contiguous(memory_format=torch.channels_last)
