"""Likelihood, codes, corruptions and figures, held against something computed another way."""

import inspect
import json
import math
import random

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import EDITED, ROOT, splits_of
from scipy import ndimage

import utils


@pytest.fixture
def images(digits):
    return digits.test.images[:6]


# the committed references


@pytest.mark.parametrize(
    "file, name, variational, latent_dim",
    [
        ("vae_mnist_reference", "vae", True, 32),
        ("ae_mnist_reference", "ae32", False, 32),
        ("vae_mnist_2d_reference", "vae 2d", True, 2),
    ],
)
def test_a_committed_reference_has_the_loss_that_was_measured(
    file, name, variational, latent_dim, digits
):
    """On the images that chose its epoch; with a VAE's noise it differs by a few hundredths.

    A file is loaded only if the network computes what it did when the file was written.
    """
    model = utils.load_checkpoint(ROOT / f"models_mnist/{file}.safetensors")
    assert (model.variational, model.latent_dim) == (variational, latent_dim)
    measured = json.loads((ROOT / "models_mnist/reference.json").read_text(encoding="utf-8"))
    expected = measured["test"][name]["0"]["validation loss"]
    assert model.metadata["val_loss"] == pytest.approx(expected, abs=1e-4)
    validation = torch.cat([split.images for split in splits_of(digits)])
    loss = utils.evaluate(model, validation, num_samples=1).loss
    assert loss == pytest.approx(expected, abs=0.3 if variational else 0.01), EDITED


def test_the_committed_vae_has_the_test_loss_that_was_measured(mnist):
    vae = utils.load_checkpoint(ROOT / "models_mnist/vae_mnist_reference.safetensors")
    measured = json.loads((ROOT / "models_mnist/reference.json").read_text(encoding="utf-8"))
    loss = utils.evaluate(vae, mnist.test.images, num_samples=1).loss
    assert loss == pytest.approx(measured["test"]["vae"]["0"]["loss"], abs=0.1), EDITED


def test_as_many_samples_are_drawn_as_the_docstrings_say():
    drawn = [utils.loss_per_image, utils.evaluate, utils.log_likelihood]
    defaults = [inspect.signature(f).parameters["num_samples"].default for f in drawn]
    assert defaults == [10, 10, 500]


# the loss over a data set


@torch.no_grad()
def test_evaluate_is_the_loss_of_the_definition_in_either_mode(model, images):
    model.encoder.dense[-1].bias.fill_(1.0)  # a KL that shows beside the BCE
    logits, mu, logvar = model.eval()(images, torch.Generator().manual_seed(3))
    bce = float(utils.bce_per_image(logits, images).mean())
    kl = float(utils.kl_per_dimension(mu, logvar).sum(1).mean())
    model.train()
    measured = utils.evaluate(model, images, num_samples=1, seed=3, beta=2.0)
    assert list(measured) == pytest.approx([bce + 2 * kl, bce, kl], rel=1e-5)
    measured = utils.evaluate(model, images, num_samples=1, seed=3)
    assert list(measured) == pytest.approx([bce + kl, bce, kl], rel=1e-5)


def test_batches_make_no_difference(model, digits, monkeypatch):
    images = digits.val.images[:50]
    whole = utils.evaluate(model, images, num_samples=2)
    monkeypatch.setattr(utils, "BATCH", 7)
    assert utils.evaluate(model, images, num_samples=2) == pytest.approx(whole, rel=1e-5)


def per_image_loss(*arguments, **options):
    return utils.loss_per_image(*arguments, **options).loss


@pytest.mark.parametrize("measure", [per_image_loss, utils.log_likelihood])
def test_every_image_every_sample_and_every_seed_has_noise_of_its_own(model, images, measure):
    twice = images[[0, 0]]
    one = measure(model, twice, num_samples=1)
    assert torch.equal(one, measure(model, twice, num_samples=1))
    assert abs(one[0] - one[1]) > 1e-3
    two = measure(model, twice, num_samples=2)
    assert abs(two[0] - one[0]) > 1e-4
    other = measure(model, twice, num_samples=1, seed=2)
    assert abs(other[0] - one[0]) > 1e-4


# likelihood


class Toy(utils.VAE):
    """Two latent dimensions, logits linear in them: log p(x) is an integral that a grid gives."""

    def __init__(self):
        super().__init__(latent_dim=2)
        self.maps = torch.randn(3, 784, generator=torch.Generator().manual_seed(0))

    def encode(self, x):
        mu = torch.tensor([0.3, 0.6]).expand(len(x), 2)  # not the posterior
        return mu, torch.tensor([-0.5, 0.2]).expand(len(x), 2)

    def decode(self, z):
        return (self.maps[0] + 0.1 * z @ self.maps[1:]).view(-1, 1, 28, 28)


def test_log_likelihood_is_that_of_the_integral(images):
    """The integral of p(x|z) N(z; 0, I), by the trapezoidal rule over a fine grid."""
    model = Toy()
    line = torch.linspace(-5, 5, 61)
    grid = torch.cartesian_prod(line, line)
    logits = model.decode(grid)
    log_prior = -0.5 * grid.square().sum(1) - math.log(2 * math.pi)
    log_cell = 2 * math.log(10 / 60)
    exact = []
    for x in images[:3]:
        log_joint = log_prior - utils.bce_per_image(logits, x.expand_as(logits))
        exact.append(torch.logsumexp(log_joint.double(), 0) + log_cell)
    estimate = utils.log_likelihood(model, images[:3], num_samples=1000)
    torch.testing.assert_close(estimate, torch.stack(exact), atol=0.1, rtol=0)
    elbo = -utils.loss_per_image(model, images[:3], num_samples=100).loss
    assert (estimate - elbo).mean() > 0.8, "the bound is tight here, and the test shows nothing"


def test_log_likelihood_is_finite_where_the_variance_vanishes(model, images, monkeypatch):
    encoded = torch.zeros(len(images), 4), torch.full((len(images), 4), -300.0)
    monkeypatch.setattr(model, "encode", lambda x: encoded)
    assert utils.log_likelihood(model, images, 2).isfinite().all()


def test_a_plain_autoencoder_has_no_likelihood(images):
    with pytest.raises(ValueError, match="plain autoencoder has no likelihood"):
        utils.log_likelihood(utils.VAE(2, variational=False), images)


# latent space


def test_a_mixture_of_one_gaussian_is_that_of_the_codes_of_all_images(digits):
    """In double precision: in single, covariances lose their symmetry. Also of an autoencoder."""
    torch.manual_seed(0)
    model = utils.VAE(4, variational=False)
    images = digits.train.images[:300]
    codes = utils.posterior(model, images)[0].double()
    covariance = codes.T.cov(correction=0) + 1e-4 * torch.eye(4)
    expected = torch.distributions.MultivariateNormal(codes.mean(0), covariance)
    one = utils.fit_mixture(model, images, 1)
    assert one.means_.dtype == np.float64
    log_p = torch.from_numpy(one.score_samples(codes[:20]))
    torch.testing.assert_close(log_p, expected.log_prob(codes[:20]), rtol=1e-5, atol=1e-5)


def test_a_mixture_has_50_gaussians_and_follows_from_its_seed(digits, model):
    images = digits.train.images[:100]
    first, again, other = [utils.fit_mixture(model, images, seed=seed).means_ for seed in (0, 0, 2)]
    assert first.shape == (50, 4)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


# corruptions


def test_the_levels_are_those_of_the_figures():
    assert {kind: corruption.levels for kind, corruption in utils.CORRUPTIONS.items()} == {
        "noise": (0.1, 0.2, 0.3, 0.5),
        "salt and pepper": (0.02, 0.05, 0.1, 0.2),
        "occlusion": (4, 8, 12, 16),
        "blur": (0.5, 1.0, 1.5, 2.0),
        "dimming": (0.2, 0.4, 0.6, 0.8),
        "rotation": (10, 20, 30, 45),
    }, EDITED


def test_a_blur_reaches_three_standard_deviations():
    dot = torch.zeros(1, 1, 28, 28)
    dot[0, 0, 14, 14] = 1
    blurred = utils.corrupt(dot, "blur", 4.0)
    assert blurred[0, 0, 14, 26] > 0


def grey(value, n=200):
    return torch.full((n, 1, 28, 28), value)


@pytest.mark.parametrize("kind", utils.CORRUPTIONS)
def test_corruptions_are_seeded_bounded_and_graded(kind, digits):
    images = digits.test.images[:50]
    before = images.clone()
    torch.testing.assert_close(utils.corrupt(images, kind, 0), images, atol=1e-5, rtol=0)
    errors = []
    for level in utils.CORRUPTIONS[kind].levels:
        x = utils.corrupt(images, kind, level)
        assert 0 <= x.min() and x.max() <= 1
        errors.append(float(utils.squared_error(x, images).mean()))
        if kind not in ("blur", "dimming"):
            assert not torch.equal(x, utils.corrupt(images, kind, level, seed=2))
    assert 0 < errors[0] and errors == sorted(errors)
    assert torch.equal(images, before), "the images themselves were changed"


def test_noise_has_the_standard_deviation_of_its_level():
    x = utils.corrupt(grey(0.5), "noise", 0.1)
    assert x.std() == pytest.approx(0.1, rel=0.02)
    assert x.mean() == pytest.approx(0.5, abs=0.002)
    assert not torch.equal(x[0], x[1])


def test_salt_and_pepper_hits_its_share_one_half_white_one_half_black():
    x = utils.corrupt(grey(0.5), "salt and pepper", 0.2)
    assert (x == 1).float().mean() == pytest.approx(0.1, rel=0.05)
    assert (x == 0).float().mean() == pytest.approx(0.1, rel=0.05)
    assert (x == 0.5).float().mean() == pytest.approx(0.8, rel=0.05)


def test_occlusion_blackens_a_square_of_its_side():
    is_hidden = utils.corrupt(grey(1.0, 2000), "occlusion", 8)[:, 0] == 0
    for axis in (1, 2):
        assert is_hidden.any(axis).sum(1).eq(8).all()
    assert is_hidden.sum((1, 2)).eq(64).all()
    reached = is_hidden.any(0)
    assert reached[4:24, 4:24].all(), "it does not reach the whole digit"
    assert reached.sum() == 400, "it leaves the digit"
    assert torch.equal(utils.corrupt(grey(1.0), "occlusion", 20)[0, 0] == 0, reached)


def test_dimming_takes_its_share_of_the_brightness(images):
    torch.testing.assert_close(utils.corrupt(images, "dimming", 0.3), 0.7 * images)


def test_blur_is_that_of_a_gaussian_with_black_around_the_image():
    """Near the border, too, where a reflection would double the light."""
    dot = grey(0.0, 1)
    dot[0, 0, 2, 25] = 1
    row, column = torch.meshgrid(torch.arange(28), torch.arange(28), indexing="ij")
    squared_distance = (row - 2) ** 2 + (column - 25) ** 2
    expected = torch.exp(-squared_distance / (2 * 2.0**2)) / (2 * math.pi * 2.0**2)
    blurred = utils.corrupt(dot, "blur", 2.0)[0, 0]
    torch.testing.assert_close(blurred, expected, atol=1e-5, rtol=0)


def test_rotation_is_bilinear_to_either_side_by_its_angle(images):
    found = utils.corrupt(images, "rotation", 30).numpy()
    errors = []
    for angle in (-30, 30):
        turned = ndimage.rotate(images, angle, axes=(2, 3), reshape=False, order=1)
        errors.append(np.abs(turned - found).max((1, 2, 3)))
    assert np.min(errors, axis=0).max() < 1e-3
    assert set(np.argmin(errors, axis=0)) == {0, 1}, "all turned to one side"


# anomalies


def test_the_score_is_the_largest_window_error_over_the_root_of_the_ink(model, images):
    differences = (images - model.reconstruct(images))[:, 0].double().numpy()
    windows = np.lib.stride_tricks.sliding_window_view(differences, (7, 7), axis=(1, 2))
    largest = np.abs(windows.sum((3, 4))).max((1, 2))
    ink = images.double().sum((1, 2, 3)).numpy()
    score = utils.anomaly_score(model, images)
    np.testing.assert_allclose(score, largest / np.sqrt(1 + ink), rtol=1e-4)


def test_the_score_of_a_perfect_reconstruction_is_zero(images):
    for perfect in (images, grey(0.0, 6), grey(1.0, 6)):
        score = utils.reconstruction_score(perfect, perfect)
        assert score.tolist() == pytest.approx([0] * 6, abs=1e-4)


@pytest.mark.parametrize("measure", [utils.squared_error, utils.reconstruction_score])
def test_only_pairs_of_images_are_compared(images, measure):
    """Broadcasting would turn others into numbers that mean nothing."""
    for first, second in ((images[:1], images), (images, images[0])):
        with pytest.raises(ValueError, match="shapes to compare differ"):
            measure(first, second)


def test_anomalies_are_what_they_are_called(images):
    made = {kind: change(images, 0) for kind, change in utils.ANOMALIES.items()}
    for kind in ("occluded", "noisy", "shuffled"):
        assert not torch.equal(utils.ANOMALIES[kind](images, 2), made[kind]), "it has no seed"
    assert torch.equal(made["mirrored"][..., 10], images[..., 17])
    assert torch.equal(utils.ANOMALIES["rotated"](made["rotated"], 0), images.flip(2, 3))
    assert torch.equal(made["upside down"][..., 10, :], images[..., 17, :])
    around = images[..., 13:16, 13:16].flatten(1).amax(1)
    assert torch.equal(made["thicker"][:, 0, 14, 14], around)
    assert torch.equal(made["two overlaid"][1], torch.maximum(images[0], images[1]))
    assert torch.equal(made["inverted"], 1 - images)
    assert torch.equal(made["black"], grey(0.0, 6))
    assert not torch.equal(made["shuffled"], images)
    assert torch.equal(made["shuffled"].flatten(1).sort().values, images.flatten(1).sort().values)


def test_squared_error_sums_over_the_pixels_of_an_image():
    error = utils.squared_error(grey(0.0, 2), grey(0.5, 2))
    assert error.tolist() == [784 / 4] * 2


# figures


def test_digits_grid_draws_what_it_was_given(images):
    single = 0.5 * images[:1]
    single[0, 0, 3, 3] = -0.01  # one pixel below 0 makes no difference of it
    rows = [images[:3], images[3:5] - images[:2], single]
    figure = utils.digits_grid(rows, ["a", "b", "c"], ["0", "1", "2"])
    (ax,) = figure.axes
    for i, (row, strip) in enumerate(zip(rows, ax.images, strict=True)):
        assert tuple(strip.get_extent()) == (0, len(row), i + 1, i)
        drawn = torch.as_tensor(strip.get_array().filled(math.nan))
        unframed = [framed[1:29, 1:29] for framed in drawn.split(30, dim=1)]
        assert torch.equal(torch.stack(unframed), row[:, 0])
    colours = [(strip.get_cmap().name, *strip.get_clim()) for strip in ax.images]
    assert colours == [("gray", 0, 1), ("RdBu", -1, 1), ("gray", 0, 1)]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "1", "2"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b", "c"]
    assert ax.get_xticks().tolist() == ax.get_yticks().tolist() == [0.5, 1.5, 2.5]
    tick = ax.xaxis.get_major_ticks()[0]
    assert tick.label2.get_visible() and not tick.label1.get_visible(), "they stand above"
    assert {label.get_fontsize() for label in ax.get_yticklabels()} == {9}
    assert {strip.get_interpolation() for strip in ax.images} == {"nearest"}
    assert (ax.get_xlim(), ax.get_ylim()) == ((0, 3), (3, 0)), "the first row is at the top"
    plt.close(figure)


def test_digits_grid_is_as_wide_as_its_longest_row(images):
    figure = utils.digits_grid([images[:1], images[:3]])
    assert figure.axes[0].get_xlim() == (0, 3)
    assert figure.get_size_inches().tolist() == [3 * 0.75 + 1, 2 * 0.75 + 0.3]
    plt.close(figure)


# every door


def random_states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


@pytest.mark.parametrize(
    "use",
    [
        lambda model, x: model.reconstruct(x),
        lambda model, x: utils.anomaly_score(model, x),
        lambda model, x: utils.fit_mixture(model, x, num_components=2),
        lambda model, x: utils.vae_loss(x, x, torch.zeros(6, 4), torch.zeros(6, 4)),
        lambda model, x: [utils.corrupt(x, kind, 0.5) for kind in utils.CORRUPTIONS],
        lambda model, x: utils.log_likelihood(model, x, num_samples=2),
        lambda model, x: utils.evaluate(model, x),
    ],
)
def test_images_are_checked_at_every_door_and_no_global_seed_is_set(model, images, use):
    before = random_states()
    use(model, images)
    assert random_states() == before
    for x in (images.double(), images.numpy()):
        with pytest.raises(TypeError, match="must be a torch.Tensor of float32, not "):
            use(model, x)
    for x in (images[:, 0], images[..., :27], images[:0]):
        with pytest.raises(ValueError, match="must have the shape"):
            use(model, x)
    for x in (255 * images, images - 0.1, images * math.nan):
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
            use(model, x)


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda model, x: utils.loss_per_image(model, x, num_samples=0), "^num_samples "),
        (lambda model, x: utils.log_likelihood(model, x, num_samples=1.5), "^num_samples "),
        (lambda model, x: utils.corrupt(x, "fog", 1), "^kind must be one of .* not 'fog'"),
        (lambda model, x: utils.corrupt(x, "occlusion", -1), "^level "),
        (lambda model, x: utils.corrupt(x, "blur", math.nan), "^level "),
    ],
)
def test_what_makes_no_sense_is_named(model, images, call, says):
    with pytest.raises((TypeError, ValueError), match=says):
        call(model, images)


# other devices


class OnDevice(torch.Tensor):
    """A tensor on an accelerator without float64, such as Apple's, until `cpu` moves it."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        result = super().__torch_function__(function, types, args, kwargs)
        if function is torch.Tensor.cpu:
            return result.as_subclass(torch.Tensor)
        if isinstance(result, cls) and result.dtype == torch.float64:
            raise TypeError("this device has no float64")
        return result


class WithoutDoubles(utils.VAE):
    """What it computes is on such a device."""

    def encode(self, x):
        mu, logvar = super().encode(x)
        return mu.as_subclass(OnDevice), logvar.as_subclass(OnDevice)


def test_nothing_needs_doubles_on_the_device(few):
    train, val = few
    model = WithoutDoubles(2)
    with pytest.raises(TypeError, match="no float64"):
        utils.posterior(model, val)[0].double()
    utils.fit(model, train, val, epochs=1)
    utils.anomaly_score(model, val)
    utils.fit_mixture(model, val, 2)
    utils.log_likelihood(model, val, num_samples=2)


def test_images_are_moved_to_the_model(images):
    """A data set on the CPU and a model on an accelerator are the usual case."""
    model = utils.VAE(2).to("meta")
    for result in (*utils.posterior(model, images), model.reconstruct(images), model.sample(2)):
        assert result.device.type == "meta"
