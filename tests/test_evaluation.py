"""Likelihood, codes, corruptions and figures, held against something computed another way."""

import math

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.overrides
from scipy import ndimage
from torch.optim.optimizer import register_optimizer_step_post_hook

import utils


@pytest.fixture
def images(digits):
    return digits.test.images[:6]


class Toy(utils.VAE):
    """One latent dimension, logits linear in it: log p(x) is an integral that a grid gives."""

    def __init__(self):
        super().__init__(latent_dim=1)
        generator = torch.Generator().manual_seed(0)
        self.offset, self.slope = torch.randn(2, 1, 1, 28, 28, generator=generator)

    def encode(self, x):
        return torch.full((len(x), 1), 0.3), torch.full((len(x), 1), -0.5)  # not the posterior

    def decode(self, z):
        return self.offset + 0.1 * self.slope * z[:, :, None, None]


@pytest.fixture
def toy():
    return Toy()


# likelihood


def exact_log_likelihood(model, images):
    """log of the integral of p(x|z) N(z; 0, 1), by the trapezoidal rule over a fine grid."""
    grid = torch.linspace(-8, 8, 2001)
    logits = model.decode(grid[:, None])
    prior = -0.5 * grid.square() - 0.5 * math.log(2 * math.pi)
    step = math.log(16 / 2000)
    exact = []
    for x in images:
        log_joint = prior - utils.bce_per_image(logits, x.expand(2001, 1, 28, 28))
        exact.append(torch.logsumexp(log_joint.double(), 0) + step)
    return torch.stack(exact)


def test_log_likelihood_is_that_of_the_integral(toy, images):
    estimate = utils.log_likelihood(toy, images, num_samples=3000)
    torch.testing.assert_close(estimate, exact_log_likelihood(toy, images), atol=0.05, rtol=0)


def test_log_likelihood_rises_with_samples_from_the_elbo_to_the_truth(toy, images):
    elbo = -utils.evaluate(toy, images, num_samples=200).loss
    exact = float(exact_log_likelihood(toy, images).mean())

    def bound(samples):
        estimates = []
        for seed in range(200 // samples):
            estimates.append(utils.log_likelihood(toy, images, samples, seed))
        return float(torch.stack(estimates).mean())

    one = bound(1)
    ten = bound(10)
    many = bound(200)
    assert one == pytest.approx(elbo, abs=0.1)
    assert one < ten < many < exact + 0.1
    assert exact - elbo > 0.3, "the bound is tight here, and the test shows nothing"


def test_log_likelihood_of_a_decoder_that_ignores_z_is_exact(model, images, monkeypatch):
    logits = torch.randn(1, 1, 28, 28)
    zeros = torch.zeros(6, 4)  # q is the prior
    monkeypatch.setattr(model, "decode", lambda z: logits.expand(len(z), 1, 28, 28))
    monkeypatch.setattr(model, "encode", lambda x: (zeros, zeros))
    expected = -utils.bce_per_image(logits.expand(6, 1, 28, 28), images).double()
    estimate = utils.log_likelihood(model, images, num_samples=5)
    torch.testing.assert_close(estimate, expected, atol=1e-3, rtol=0)


def test_log_likelihood_repeats_with_its_seed(model, images):
    all_six = utils.log_likelihood(model, images, num_samples=3, seed=0)
    assert all_six.shape == (6,)
    assert torch.equal(all_six, utils.log_likelihood(model, images, num_samples=3, seed=0))
    assert not torch.equal(all_six, utils.log_likelihood(model, images, num_samples=3, seed=2))


def test_an_autoencoder_has_no_likelihood(images):
    with pytest.raises(ValueError, match="plain autoencoder has no likelihood"):
        utils.log_likelihood(utils.VAE(2, variational=False), images)


# latent space


def test_active_units_are_those_whose_mean_varies():
    mu = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0))
    mu = mu * torch.tensor([1.0, 0.05, 0.2]) + 3
    assert utils.active_units(mu).tolist() == [True, False, True]


def test_interpolation_runs_along_the_arc():
    start = torch.tensor([3.0, 0.0, 0.0])
    end = torch.tensor([0.0, 3.0, 0.0])
    path = utils.interpolate(start, end, 5)
    torch.testing.assert_close(path[0], start)
    torch.testing.assert_close(path[-1], end)
    torch.testing.assert_close(path.norm(dim=1), torch.full((5,), 3.0))
    torch.testing.assert_close(path[2], torch.tensor([1.0, 1.0, 0.0]) * 3 / math.sqrt(2))
    lengths = (path[1:] - path[:-1]).norm(dim=1)
    torch.testing.assert_close(lengths, torch.full((4,), 6 * math.sin(math.pi / 16)))


@pytest.mark.parametrize(
    "start, end",
    [
        ([1.0], [3.0]),
        ([1.0], [-1.0]),
        ([0.0, 0.0], [1.0, 1.0]),
        ([2.0, 2.0], [2.0, 2.0]),
    ],
)
def test_interpolation_where_there_is_no_arc(start, end):
    path = utils.interpolate(torch.tensor(start), torch.tensor(end), 3)
    assert path.isfinite().all()
    torch.testing.assert_close(path[0], torch.tensor(start))
    torch.testing.assert_close(path[-1], torch.tensor(end))


@pytest.mark.parametrize("steps", [1, 0, 2.0, "3"])
def test_interpolation_names_bad_steps(steps):
    with pytest.raises((TypeError, ValueError), match="^steps "):
        utils.interpolate(torch.ones(2), torch.ones(2), steps)


@pytest.mark.parametrize("shapes", [((2,), (3,)), ((1, 2), (1, 2)), ((2,), (1,)), ((), ())])
def test_interpolation_refuses_codes_that_do_not_go_together(shapes):
    start, end = (torch.ones(shape) for shape in shapes)
    with pytest.raises(ValueError, match=r"start and end must be \(D,\)"):
        utils.interpolate(start, end, 3)


# corruptions


@pytest.mark.parametrize("kind", utils.CORRUPTIONS)
def test_corruptions_are_seeded_bounded_and_graded(kind, digits):
    images = digits.test.images[:50]
    before = images.clone()
    torch.testing.assert_close(utils.corrupt(images, kind, 0), images, atol=1e-5, rtol=0)
    largest = utils.CORRUPTIONS[kind].largest
    if kind == "rotation":
        largest = largest / 2
    errors = []
    for share in (0.1, 0.3, 0.6):
        level = share * largest
        if kind == "occlusion":
            level = round(level)
        x = utils.corrupt(images, kind, level, seed=0)
        assert x.shape == images.shape
        assert x.dtype == torch.float32
        assert 0 <= x.min() and x.max() <= 1
        assert torch.equal(x, utils.corrupt(images, kind, level, seed=0))
        if kind not in ("blur", "dimming"):
            assert not torch.equal(x, utils.corrupt(images, kind, level, seed=2))
        errors.append(float(utils.squared_error(x, images).mean()))
    assert errors == sorted(errors)
    assert errors[0] > 0
    assert torch.equal(images, before), "the images themselves were changed"


def test_levels_run_from_mild_to_severe_within_their_range():
    for corruption in utils.CORRUPTIONS.values():
        assert list(corruption.levels) == sorted(set(corruption.levels))
        assert 0 < corruption.levels[0]
        assert corruption.levels[-1] <= corruption.largest


def grey(value, n=200):
    return torch.full((n, 1, 28, 28), value)


def test_noise_has_the_standard_deviation_of_its_level():
    x = utils.corrupt(grey(0.5), "noise", 0.1)
    assert x.std() == pytest.approx(0.1, rel=0.02)
    assert x.mean() == pytest.approx(0.5, abs=0.002)


def test_salt_and_pepper_hits_its_share_one_half_white_one_half_black():
    x = utils.corrupt(grey(0.5), "salt and pepper", 0.2)
    assert (x == 1).float().mean() == pytest.approx(0.1, rel=0.05)
    assert (x == 0).float().mean() == pytest.approx(0.1, rel=0.05)
    assert (x == 0.5).float().mean() == pytest.approx(0.8, rel=0.05)


def test_occlusion_blackens_a_square_of_its_side():
    x = utils.corrupt(grey(1.0, 2000), "occlusion", 8)
    assert x.sum((1, 2, 3)).eq(784 - 64).all()
    rows = (x == 0).any(3).sum(2)
    assert rows.eq(8).all(), "it is no square"
    hidden = (x == 0).any(0)[0]
    assert hidden[4:24, 4:24].all(), "it does not reach the whole digit"
    assert hidden.sum() == 400, "it leaves the digit"
    assert utils.corrupt(grey(1.0), "occlusion", 28).sum() == 0


def test_dimming_takes_its_share_of_the_brightness():
    torch.testing.assert_close(utils.corrupt(grey(1.0), "dimming", 0.3), grey(0.7))


@pytest.mark.parametrize("row, column", [(14, 14), (2, 25)])
def test_blur_is_that_of_a_gaussian_with_black_around_the_image(row, column):
    """Near the border, too, where a reflection would double the light."""
    dot = torch.zeros(1, 1, 28, 28)
    dot[0, 0, row, column] = 1
    pixels = torch.arange(-14, 15).float()
    kernel = (-0.5 * (pixels / 2).square()).exp()
    kernel = kernel / kernel.sum()
    vertical = torch.stack(
        [kernel[14 + i - row] if abs(i - row) < 15 else kernel[0] * 0 for i in range(28)]
    )
    horizontal = torch.stack(
        [kernel[14 + j - column] if abs(j - column) < 15 else kernel[0] * 0 for j in range(28)]
    )
    blurred = utils.corrupt(dot, "blur", 2.0)[0, 0]
    torch.testing.assert_close(blurred, vertical[:, None] * horizontal, atol=1e-5, rtol=0)


def test_rotation_by_a_right_angle_is_exact(images):
    rotated = utils.corrupt(images, "rotation", 90)
    turns = set()
    for x, y in zip(images, rotated, strict=True):
        for k in range(4):
            if torch.allclose(y, x.rot90(k, (1, 2)), atol=1e-4):
                turns.add(k)
    assert turns == {1, 3}, "to either side"


def test_rotation_is_by_its_angle():
    """A horizontal bar is turned by 30 degrees; its angle is read from its second moments."""
    bar = torch.zeros(20, 1, 28, 28)
    bar[:, :, 12:16, 4:24] = 1
    y, x = torch.meshgrid(torch.arange(28.0) - 13.5, torch.arange(28.0) - 13.5, indexing="ij")
    angles = []
    for ink in utils.corrupt(bar, "rotation", 30)[:, 0]:
        double = torch.atan2(2 * (ink * x * y).sum(), (ink * (x * x - y * y)).sum())
        angles.append(round(math.degrees(float(double) / 2)))
    assert set(angles) == {-30, 30}


@pytest.mark.parametrize(
    "kind, level, error, says",
    [
        ("fog", 1, ValueError, r"^kind must be one of \['noise', .* not 'fog'"),
        ("noise", -0.1, ValueError, "^level == -0.1"),
        ("noise", 1.1, ValueError, "^level == 1.1"),
        ("occlusion", 29, ValueError, "^level == 29"),
        ("blur", math.nan, ValueError, "^level must be a number, not nan"),
        ("rotation", "90", TypeError, "^level must be"),
    ],
)
def test_bad_corruptions_are_named(images, kind, level, error, says):
    with pytest.raises(error, match=says):
        utils.corrupt(images, kind, level)


class Elsewhere(torch.overrides.TorchFunctionMode):
    """Says of one tensor that it is on another device."""

    def __init__(self, tensor, device):
        super().__init__()
        self.tensor = tensor
        self.device = torch.device(device)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function == torch.Tensor.device.__get__ and args[0] is self.tensor:
            return self.device
        if function is torch.Tensor.cpu and args[0] is self.tensor:
            return self.tensor.clone()
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", utils.CORRUPTIONS)
def test_a_corrupted_image_is_where_the_image_was(images, kind):
    with Elsewhere(images, "meta"):
        assert images.device.type == "meta"
        corrupted = utils.corrupt(images, kind, utils.CORRUPTIONS[kind].levels[0])
    assert corrupted.device.type == "meta"


# anomalies


@pytest.fixture(scope="module")
def pair(digits):
    """A VAE and an autoencoder that know the digits a little."""
    models = []
    for variational in (True, False):
        torch.manual_seed(0)
        model = utils.VAE(8, variational)
        images = digits.train.images[:320]
        utils.fit(model, images, digits.val.images[:50], epochs=6, batch_size=16)
        models.append(model)
    return models


def auroc(normal, anomalous):
    """The probability that an anomalous image scores higher than a normal one."""
    return float((anomalous[:, None] > normal).double().mean())


def test_anomalies_score_higher(pair, digits):
    normal = digits.test.images[:60]
    other = digits.test.images[60:120]
    for model in pair:
        score = utils.anomaly_score(model, normal)
        assert score.shape == (60,)
        assert torch.equal(score, utils.anomaly_score(model, normal))
        for kind in ("noisy", "shuffled", "inverted"):
            anomalous = utils.anomaly_score(model, utils.ANOMALIES[kind](other, 0))
            assert auroc(score, anomalous) > 0.8, kind


def test_the_score_is_that_of_the_definition(pair, digits):
    model, _ = pair
    images = digits.test.images[:4]
    x = images.double()
    p = model.reconstruct(images).double()
    bce = -(x * p.log() + (1 - x) * (1 - p).log()).sum((1, 2, 3))
    entropy = -(torch.special.xlogy(x, x) + torch.special.xlogy(1 - x, 1 - x)).sum((1, 2, 3))
    windows = []
    for i in range(22):
        for j in range(22):
            windows.append((x - p)[:, 0, i : i + 7, j : j + 7].sum((1, 2)))
    window = torch.stack(windows).abs().amax(0)
    p = p.float()
    torch.testing.assert_close(utils.excess_bce(p, images), bce - entropy, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(utils.window_error(p, images), window, rtol=1e-3, atol=1e-3)
    expected = ((bce - entropy) * window * window) ** (1 / 3) / (1 + x.sum((1, 2, 3))) ** (1 / 6)
    score = utils.anomaly_score(model, images)
    torch.testing.assert_close(score, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("measure", [utils.squared_error, utils.window_error, utils.excess_bce])
def test_measures_refuse_images_that_do_not_go_together(images, measure):
    """Broadcasting would turn them into numbers that mean nothing."""
    assert measure(images, images).shape == (6,)
    with pytest.raises(ValueError, match="1 images cannot be compared with 6"):
        measure(images[:1], images)
    for other in (images[0], images[:, 0], images[..., :1], images.new_zeros(6, 3, 28, 28)):
        for pair in ((other, images), (images, other)):
            with pytest.raises(ValueError, match="must have the shape"):
                measure(*pair)
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        measure(255 * images, images)
    with pytest.raises(TypeError, match="float64"):
        measure(images, images.double())


def test_anomalies_are_what_they_are_called(images):
    made = {}
    for kind, change in utils.ANOMALIES.items():
        made[kind] = change(images, 0)
        assert made[kind].shape == images.shape, kind
        assert made[kind].dtype == torch.float32, kind
    assert torch.equal(made["mirrored"][..., 0], images[..., 27])
    assert torch.equal(utils.ANOMALIES["rotated"](made["rotated"], 0), images.flip(2, 3))
    assert torch.equal(made["inverted"], 1 - images)
    assert made["black"].eq(0).all()
    assert torch.equal(made["shuffled"].flatten(1).sort().values, images.flatten(1).sort().values)
    assert not torch.equal(made["shuffled"], images)
    assert torch.equal(made["upside down"], images.flip(2))
    assert torch.equal(made["transposed"], images.mT)
    assert torch.equal(made["two overlaid"][1], torch.maximum(images[0], images[1]))
    assert torch.equal(made["half"][..., :14], images[..., :14])
    assert made["half"][..., 14:].eq(0).all()
    assert torch.equal(made["shifted"][..., 2:, 2:], images[..., :-2, :-2])
    assert made["shifted"][..., :2].eq(0).all()
    assert made["shifted"][..., :2, :].eq(0).all()


def test_random_anomalies_follow_their_seed(images):
    for kind in ("occluded", "noisy", "shuffled"):
        change = utils.ANOMALIES[kind]
        assert torch.equal(change(images, 0), change(images, 0))
        assert not torch.equal(change(images, 0), change(images, 2))


def test_thicker_adds_a_pixel_on_either_side_and_thinner_takes_one_away(images):
    square = torch.zeros(1, 1, 28, 28)
    square[0, 0, 10:15, 10:15] = 1
    assert utils.ANOMALIES["thicker"](square, 0).sum() == 7 * 7
    assert utils.ANOMALIES["thinner"](square, 0).sum() == 4 * 4
    thicker = ndimage.maximum_filter(images.numpy(), (1, 1, 3, 3), mode="constant")
    thinner = ndimage.minimum_filter(images.numpy(), (1, 1, 2, 2), origin=(0, 0, -1, -1))
    assert np.array_equal(utils.ANOMALIES["thicker"](images, 0), thicker)
    np.testing.assert_allclose(
        utils.ANOMALIES["thinner"](images, 0)[..., :27, :27], thinner[..., :27, :27], atol=1e-6
    )


def test_a_mixture_of_one_gaussian_is_that_of_mean_and_covariance(pair, digits):
    images = digits.train.images[:600]
    for model in pair:
        codes = utils.posterior(model, images)[0].double()
        covariance = codes.T.cov(correction=0) + 1e-4 * torch.eye(8)
        expected = torch.distributions.MultivariateNormal(codes.mean(0), covariance)
        one = utils.fit_mixture(model, images, 1)
        density = utils.density_score(one, codes[:20])
        torch.testing.assert_close(density, -expected.log_prob(codes[:20]), rtol=1e-6, atol=1e-6)
        mixture = utils.fit_mixture(model, images, 5, seed=1)
        assert mixture.score(codes.numpy()) > one.score(codes.numpy())


def test_a_mixture_follows_its_seed_and_is_fitted_in_double_precision(pair, digits, recwarn):
    """In single precision its covariances are not symmetric, as scikit-learn warns."""
    images = digits.train.images[:300]
    means = []
    for seed in (0, 0, 2):
        mixture = utils.fit_mixture(pair[0], images, 5, seed)
        assert mixture.means_.dtype == np.float64
        means.append(mixture.means_)
    assert np.array_equal(means[0], means[1])
    assert not np.allclose(means[0], means[2])
    assert not recwarn.list


@pytest.mark.parametrize("count", [0, 7, 2.0, "5"])
def test_a_bad_number_of_components_is_named(model, images, count):
    with pytest.raises((TypeError, ValueError), match="^num_components "):
        utils.fit_mixture(model, images, count)


# codes by optimisation


def explained(decoded, image):
    """-log p(x|z) of an image as a * decoded + b + noise, all fitted by least squares."""
    decoded = decoded.double().flatten()
    image = image.double().flatten()
    design = torch.stack([decoded, torch.ones_like(decoded)], 1)
    fitted = design @ torch.linalg.lstsq(design, image[:, None]).solution[:, 0]
    rest = (image - fitted).square().sum()
    total = (image - image.mean()).square().sum()
    return 392 * torch.log(rest / total)


@pytest.mark.parametrize("kind", [0, 1], ids=["vae", "autoencoder"])
@torch.no_grad()
def test_optimize_codes_is_more_probable_than_the_encoders_guess(pair, images, kind):
    model = pair[kind]
    model.zero_grad()
    guess, _ = utils.posterior(model, images)
    mode = utils.optimize_codes(model, images, steps=20, learning_rate=0.03)
    for z, better, x in zip(guess, mode, images, strict=True):
        before = explained(model.decode(z[None]).sigmoid(), x)
        after = explained(model.decode(better[None]).sigmoid(), x)
        if model.variational:
            before = before + 0.5 * z.square().sum()
            after = after + 0.5 * better.square().sum()
        assert after < before
    assert not mode.requires_grad
    assert all(p.grad is None for p in model.parameters())


def energies(toy, images, grid):
    """-log p(x|z) - log p(z) of every image at every code of a grid."""
    with torch.no_grad():
        decoded = toy.decode(grid[:, None]).sigmoid()
    rows = []
    for x in images:
        rows.append(torch.stack([explained(y, x) for y in decoded]) + 0.5 * grid.square())
    return torch.stack(rows)


@pytest.mark.parametrize("contrast, brightness", [(1.0, 0.0), (0.4, 0.3)])
def test_optimize_codes_finds_the_best_of_a_grid_at_any_contrast_and_brightness(
    toy, images, contrast, brightness
):
    x = contrast * images[:3] + brightness
    mode = utils.optimize_codes(toy, x, steps=200)
    grid = torch.linspace(-4, 4, 401)
    energy = energies(toy, x, grid)
    nearest = (mode - grid).abs().argmin(1, keepdim=True)
    reached = energy.gather(1, nearest)[:, 0]
    torch.testing.assert_close(reached, energy.min(1).values, atol=0.05, rtol=0)


def test_optimize_codes_weighs_the_prior_once(toy):
    """Images full of noise say little: the prior draws their codes towards zero, once."""
    with torch.no_grad():
        clear = toy.decode(torch.full((4, 1), 2.5)).sigmoid()
    noise = torch.randn(clear.shape, generator=torch.Generator().manual_seed(1))
    x = (0.5 + 0.2 * (clear - 0.5) + 0.05 * noise).clamp(0, 1)
    mode = utils.optimize_codes(toy, x, steps=200)
    grid = torch.linspace(-4, 4, 801)
    likelihood = energies(toy, x, grid) - 0.5 * grid.square()
    best = grid[(likelihood + 0.5 * grid.square()).argmin(1)]
    twice = grid[(likelihood + grid.square()).argmin(1)]
    never = grid[likelihood.argmin(1)]
    assert (best - twice).abs().min() > 0.2, "the prior makes no difference here"
    assert (best - never).abs().min() > 0.2, "the prior makes no difference here"
    torch.testing.assert_close(mode[:, 0], best, atol=0.02, rtol=0)


def test_optimize_codes_of_what_says_nothing_is_that_of_the_prior(toy):
    mode = utils.optimize_codes(toy, torch.cat([grey(0.0, 1), grey(0.5, 1)]), steps=200)
    torch.testing.assert_close(mode, torch.zeros(2, 1), atol=0.01, rtol=0)


def test_a_contrast_is_never_negative_for_optimize_codes(toy):
    with torch.no_grad():
        negative = 1 - toy.decode(torch.full((1, 1), 2.0)).sigmoid()  # no code explains it
    mode = utils.optimize_codes(toy, negative, steps=200)
    torch.testing.assert_close(mode, torch.zeros(1, 1), atol=0.01, rtol=0)


def test_optimize_codes_of_an_autoencoder_knows_no_prior(toy):
    toy.variational = False
    guess = torch.full((1, 1), 0.3)  # nothing moves it where the image says nothing
    mode = utils.optimize_codes(toy, grey(0.0, 1), steps=20)
    torch.testing.assert_close(mode, guess, atol=1e-6, rtol=0)


def test_the_rate_of_optimize_codes_falls_in_a_straight_line(toy, images):
    rates = []
    hook = register_optimizer_step_post_hook(
        lambda adam, *_: rates.append(adam.param_groups[0]["lr"])
    )
    utils.optimize_codes(toy, images, steps=5, learning_rate=0.5)
    hook.remove()
    assert rates == pytest.approx([0.5, 0.4, 0.3, 0.2, 0.1])


def test_optimize_codes_works_in_inference_mode(model, images):
    expected = utils.optimize_codes(model, images, steps=3)
    with torch.inference_mode():
        mode = utils.optimize_codes(model, images * 1, steps=3)
    torch.testing.assert_close(mode, expected)
    assert not torch.equal(expected, utils.posterior(model, images)[0])


@pytest.mark.parametrize(
    "name, value, error",
    [
        ("steps", 0, ValueError),
        ("steps", 2.5, TypeError),
        ("learning_rate", -1, ValueError),
        ("learning_rate", "fast", TypeError),
    ],
)
def test_optimize_codes_checks_its_arguments(toy, images, name, value, error):
    with pytest.raises(error, match=f"^{name} "):
        utils.optimize_codes(toy, images, **{name: value})


def test_squared_error_sums_over_the_pixels_of_an_image(images):
    assert utils.squared_error(images, images).tolist() == [0] * 6
    expected = torch.full((2,), 784 / 4)
    torch.testing.assert_close(utils.squared_error(grey(0.0, 2), grey(0.5, 2)), expected)


# figures


def test_digits_grid_draws_what_it_was_given(images):
    rows = [images[:3], images[3:5] - images[:2]]
    figure = utils.digits_grid(rows, ["a", "b"], ["0", "1", "2"])
    (ax,) = figure.axes
    for row, strip, highest in zip(rows, ax.images, (0, 1), strict=True):
        left, right, bottom, top = strip.get_extent()
        assert (left, right, bottom, top) == (0, len(row), highest + 1, highest)
        drawn = torch.as_tensor(strip.get_array().filled(math.nan))
        assert drawn.shape == (30, 30 * len(row))
        for i, x in enumerate(row):
            assert torch.equal(drawn[1:29, 30 * i + 1 : 30 * i + 29], x[0])
    assert [strip.get_clim() for strip in ax.images] == [(0, 1), (-1, 1)]
    assert [strip.get_cmap().name for strip in ax.images] == ["gray", "RdBu"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "1", "2"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b"]
    assert ax.get_xticks().tolist() == [0.5, 1.5, 2.5]
    assert ax.get_yticks().tolist() == [0.5, 1.5]
    plt.close(figure)


def test_digits_grid_stretches_no_faint_row():
    figure = utils.digits_grid([grey(0.5, 2), -grey(0.5, 2)])
    assert [strip.get_clim() for strip in figure.axes[0].images] == [(0, 1), (-1, 1)]
    plt.close(figure)


@pytest.mark.parametrize("n", [None, 0, 1])
def test_digits_grid_without_images_says_what_it_needs(images, n):
    rows = {None: [], 0: [images[:0]], 1: [images[0]]}[n]
    with pytest.raises(ValueError, match="at least one"):
        utils.digits_grid(rows)


@pytest.mark.parametrize("labels", [{"row_labels": ["a"]}, {"column_labels": ["1", "2"]}])
def test_digits_grid_counts_its_labels(images, labels):
    with pytest.raises(ValueError, match="the number of labels"):
        utils.digits_grid([images[:3], images[:2]], **labels)
    plt.close("all")


# other devices


class NoDoubles(torch.overrides.TorchFunctionMode):
    """An accelerator without float64, such as Apple's.

    It refuses any double that is made of a tensor which no `.cpu()` has moved.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = []
        for x in (*args, *kwargs.values()):
            parts = x if isinstance(x, list | tuple) else [x]
            tensors += [part for part in parts if isinstance(part, torch.Tensor)]
        result = function(*args, **kwargs)
        if function is torch.Tensor.cpu:
            # On the CPU, cpu() gives the very same tensor: a new one can be told apart.
            result = result.view_as(result)
        made_here = not tensors and "device" not in kwargs
        moved = function is torch.Tensor.cpu or made_here
        moved = moved or any(hasattr(x, "moved") for x in tensors)
        for part in result if isinstance(result, list | tuple) else [result]:
            if isinstance(part, torch.Tensor) and part.dtype == torch.float64 and not moved:
                raise TypeError("this device has no float64")
            if isinstance(part, torch.Tensor) and moved:
                part.moved = True
        return result


def test_the_simulated_device_has_no_doubles():
    with NoDoubles():
        there = torch.ones(2, device="cpu")
        there.cpu().double()
        with pytest.raises(TypeError, match="no float64"):
            there.double().cpu()


def test_nothing_needs_doubles_on_the_device(few):
    train, val = few
    with NoDoubles():
        for variational in (True, False):
            model = utils.VAE(2, variational)
            utils.fit(model, train, val, epochs=1)
            utils.evaluate(model, val, num_samples=1)
            utils.anomaly_score(model, val)
            utils.optimize_codes(model, val, steps=2)
            utils.fit_mixture(model, val, 2)
            utils.squared_error(model.reconstruct(val), val)
            model.draw(np.zeros((2, 2)))
            if variational:
                utils.log_likelihood(model, val, num_samples=2)
            for change in utils.ANOMALIES.values():
                change(val, 0)


def test_images_are_moved_to_the_model(images):
    """A data set on the CPU and a model on an accelerator are the usual case."""
    model = utils.VAE(2).to("meta")
    mu, logvar = utils.posterior(model, images)
    assert mu.device.type == logvar.device.type == "meta"
    assert utils.optimize_codes(model, images, steps=1).device.type == "meta"
    assert model.reconstruct(images).device.type == "meta"


@pytest.mark.parametrize(
    "use",
    [
        utils.VAE.encode,
        utils.VAE.reconstruct,
        utils.posterior,
        utils.evaluate,
        utils.loss_per_image,
        utils.log_likelihood,
        utils.anomaly_score,
        utils.optimize_codes,
        lambda model, x: utils.corrupt(x, "noise", 0.1),
        lambda model, x: utils.fit_mixture(model, x, 1),
        lambda model, x: utils.vae_loss(x, x, torch.zeros(6, 4), torch.zeros(6, 4)),
    ],
)
def test_images_are_checked_at_every_door(model, images, use):
    for x in (images.double(), images.numpy(), (255 * images).byte()):
        kind = x.dtype if isinstance(x, torch.Tensor) else "numpy.ndarray"
        with pytest.raises(TypeError, match=f"must be a torch.Tensor of float32, not of .*{kind}"):
            use(model, x)
    for x in (images[:, 0], images[..., :27], images[:0]):
        with pytest.raises(ValueError, match="must have the shape"):
            use(model, x)
    if use is not utils.VAE.encode:  # which a training loop calls
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
            use(model, images + 1)


@pytest.mark.parametrize("measure", [utils.evaluate, utils.loss_per_image, utils.log_likelihood])
@pytest.mark.parametrize("name, value", [("num_samples", 0), ("num_samples", 1.5), ("seed", -1)])
def test_measures_check_their_arguments(model, images, measure, name, value):
    with pytest.raises((TypeError, ValueError), match=f"^{name} "):
        measure(model, images, **{name: value})


@pytest.mark.parametrize("angle", [0.1, 3.0])
def test_an_arc_may_be_short_or_nearly_half_a_turn(angle):
    end = torch.tensor([math.cos(angle), math.sin(angle)])
    path = utils.interpolate(torch.tensor([1.0, 0.0]), end, 5)
    angles = torch.linspace(0, angle, 5)
    expected = torch.stack([angles.cos(), angles.sin()], dim=1)
    torch.testing.assert_close(path, expected, atol=1e-5, rtol=0)


def test_rotation_is_bilinear(images):
    for x, y in zip(images, utils.corrupt(images, "rotation", 30), strict=True):
        turns = [ndimage.rotate(x[0], a, reshape=False, order=1).clip(0, 1) for a in (-30, 30)]
        assert min(np.abs(turned - y[0].numpy()).max() for turned in turns) < 1e-3


def test_the_first_row_of_a_grid_is_at_the_top(images):
    figure = utils.digits_grid([images[:3], images[3:5]])
    (ax,) = figure.axes
    assert ax.get_ylim() == (2, 0)
    assert ax.get_xlim() == (0, 3)
    plt.close(figure)
