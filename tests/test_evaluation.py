"""Likelihood, latent space, corruptions and figures, held against something computed another way."""

import math

import matplotlib.pyplot as plt
import pytest
import torch
import torch.overrides

import utils


@pytest.fixture
def images(digits):
    return digits.test.images[:6]


class Toy(utils.VAE):
    """One latent dimension and logits that are linear in it: log p(x) is an integral that a fine grid gives exactly."""

    def __init__(self):
        super().__init__(latent_dim=1)
        self.offset, self.slope = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0)).unsqueeze(1)

    def encode(self, x):
        return torch.full((len(x), 1), 0.3), torch.full((len(x), 1), -0.5)  # a proposal that is not the posterior

    def decode(self, z):
        return self.offset + 0.1 * self.slope * z[:, :, None, None]


@pytest.fixture
def toy():
    return Toy()


# likelihood


def exact_log_likelihood(model, images):
    """log of the integral of p(x|z) N(z; 0, 1), by the trapezoidal rule over a fine grid of the one dimension."""
    grid = torch.linspace(-8, 8, 4001)
    logits = model.decode(grid[:, None])
    prior = -0.5 * grid.square() - 0.5 * math.log(2 * math.pi)
    step = math.log(16 / 4000)
    return torch.stack([torch.logsumexp((prior - utils.bce_per_image(logits, x.expand(4001, 1, 28, 28))).double(), 0) + step
                        for x in images])


def test_log_likelihood_is_that_of_the_integral(toy, images):
    exact = exact_log_likelihood(toy, images)
    torch.testing.assert_close(utils.log_likelihood(toy, images, num_samples=3000), exact, atol=0.05, rtol=0)


def test_log_likelihood_rises_with_samples_from_the_elbo_to_the_truth(toy, images):
    elbo = -utils.evaluate(toy, images, num_samples=200).loss
    exact = float(exact_log_likelihood(toy, images).mean())

    def bound(samples):
        return float(torch.stack([utils.log_likelihood(toy, images, samples, seed) for seed in range(200 // samples)]).mean())

    one, ten, many = bound(1), bound(10), bound(200)
    assert one == pytest.approx(elbo, abs=0.1)
    assert one < ten < many < exact + 0.1
    assert exact - elbo > 0.3, "the bound is not tight here, or the test shows nothing"


def test_log_likelihood_of_a_decoder_that_ignores_z_is_exact(model, images, monkeypatch):
    logits = torch.randn(1, 1, 28, 28)
    monkeypatch.setattr(model, "decode", lambda z: logits.expand(len(z), 1, 28, 28))
    monkeypatch.setattr(model, "encode", lambda x: (torch.zeros(len(x), 4), torch.zeros(len(x), 4)))  # q is the prior
    expected = -utils.bce_per_image(logits.expand(6, 1, 28, 28), images)
    torch.testing.assert_close(utils.log_likelihood(model, images, num_samples=5), expected.double(), atol=1e-3, rtol=0)


def test_log_likelihood_repeats_with_its_seed(model, images):
    all_six = utils.log_likelihood(model, images, num_samples=3, seed=1)
    assert all_six.shape == (6,) and torch.equal(all_six, utils.log_likelihood(model, images, num_samples=3, seed=1))
    assert not torch.equal(all_six, utils.log_likelihood(model, images, num_samples=3, seed=2))


def test_an_autoencoder_has_no_likelihood(images):
    with pytest.raises(ValueError, match="plain autoencoder has no likelihood"):
        utils.log_likelihood(utils.VAE(2, variational=False), images)


# latent space


def test_active_units_are_those_whose_mean_varies():
    mu = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 0.05, 0.2]) + 3
    assert utils.active_units(mu).tolist() == [True, False, True]


def test_interpolation_runs_along_the_arc():
    start, end = torch.tensor([3.0, 0.0, 0.0]), torch.tensor([0.0, 3.0, 0.0])
    path = utils.interpolate(start, end, 5)
    torch.testing.assert_close(path[0], start), torch.testing.assert_close(path[-1], end)
    torch.testing.assert_close(path.norm(dim=1), torch.full((5,), 3.0))
    torch.testing.assert_close(path[2], torch.tensor([1.0, 1.0, 0.0]) * 3 / math.sqrt(2))
    torch.testing.assert_close((path[1:] - path[:-1]).norm(dim=1), torch.full((4,), 6 * math.sin(math.pi / 16)))  # even steps


def test_interpolation_where_there_is_no_arc():
    for start, end in (([1.0], [3.0]), ([1.0], [-1.0]), ([0.0, 0.0], [1.0, 1.0]), ([2.0, 2.0], [2.0, 2.0])):
        path = utils.interpolate(torch.tensor(start), torch.tensor(end), 3)
        assert path.isfinite().all()
        torch.testing.assert_close(path[0], torch.tensor(start)), torch.testing.assert_close(path[-1], torch.tensor(end))
    with pytest.raises(ValueError, match="steps is 1"):
        utils.interpolate(torch.ones(2), torch.ones(2), 1)


# corruptions


@pytest.mark.parametrize("kind", utils.CORRUPTIONS)
def test_corruptions_are_seeded_bounded_and_graded(kind, digits):
    images = digits.test.images[:50]
    before = images.clone()
    torch.testing.assert_close(utils.corrupt(images, kind, 0), images, atol=1e-5, rtol=0)
    top = utils.CORRUPTIONS[kind].largest
    errors = []
    for share in (0.1, 0.3, 0.6):
        level = round(share * top) if kind == "occlusion" else share * top / (2 if kind == "rotation" else 1)
        x = utils.corrupt(images, kind, level, seed=1)
        assert x.shape == images.shape and x.dtype == torch.float32 and 0 <= x.min() and x.max() <= 1
        assert torch.equal(x, utils.corrupt(images, kind, level, seed=1))
        if kind in ("noise", "salt and pepper"):
            assert not torch.equal(x, utils.corrupt(images, kind, level, seed=2))
        errors.append((x - images).square().sum((1, 2, 3)).mean())
    assert errors == sorted(errors) and errors[0] > 0
    assert torch.equal(images, before), "the images themselves were changed"


def test_levels_run_from_mild_to_severe_within_their_range():
    for corruption in utils.CORRUPTIONS.values():
        assert list(corruption.levels) == sorted(set(corruption.levels))
        assert 0 < corruption.levels[0] and corruption.levels[-1] <= corruption.largest


def test_corruptions_do_what_their_level_says():
    grey, white = torch.full((200, 1, 28, 28), 0.5), torch.ones(200, 1, 28, 28)
    assert utils.corrupt(grey, "noise", 0.1).std() == pytest.approx(0.1, rel=0.02)
    assert (utils.corrupt(grey, "salt and pepper", 0.2) != 0.5).float().mean() == pytest.approx(0.2, rel=0.05)
    assert utils.corrupt(white, "occlusion", 8).sum((1, 2, 3)).eq(784 - 64).all()
    assert utils.corrupt(white, "occlusion", 28).sum() == 0
    torch.testing.assert_close(utils.corrupt(white, "dimming", 0.3), 0.7 * white)
    dot = torch.zeros(1, 1, 28, 28)
    dot[0, 0, 14, 14] = 1
    blurred = utils.corrupt(dot, "blur", 2.0)[0, 0]
    offsets = torch.arange(28.0) - 14
    assert blurred.sum() == pytest.approx(1, rel=1e-3)
    assert float(blurred.sum(0) @ offsets.square()) == pytest.approx(4, rel=0.02)  # variance = level squared


def test_rotation_by_a_right_angle_is_exact(images):
    rotated = utils.corrupt(images, "rotation", 90)
    turns = [[k for k in range(4) if torch.allclose(y, x.rot90(k, (1, 2)), atol=1e-4)] for x, y in zip(images, rotated)]
    assert sorted({k for (k,) in turns}) == [1, 3], "to either side"


@pytest.mark.parametrize("kind, level, says", [
    ("fog", 1, "kind is 'fog'"), ("noise", -0.1, "level is -0.1"), ("noise", 1.1, "level is 1.1"), ("occlusion", 29, "is 29"),
    ("blur", math.nan, "level is nan"), ("rotation", "90", "level is '90'")])
def test_bad_corruptions_are_named(images, kind, level, says):
    with pytest.raises(ValueError, match=says):
        utils.corrupt(images, kind, level)
    with pytest.raises(ValueError, match="images must lie in"):
        utils.corrupt(images * 2, "noise", 0.1)


# anomalies


@pytest.fixture(scope="module")
def pair(digits):
    """A VAE and an autoencoder that know the digits a little."""
    models = []
    for variational in (True, False):
        torch.manual_seed(0)
        models.append(utils.VAE(8, variational))
        utils.fit(models[-1], digits.train.images[:640], digits.val.images[:50], epochs=10, batch_size=32)
    return [model.eval() for model in models]


def auroc(normal, anomalous):
    """The probability that an anomalous image scores higher than a normal one."""
    return float((anomalous[:, None] > normal).double().mean())


def test_anomalies_score_higher(pair, digits):
    normal, other = digits.test.images[:60], digits.test.images[60:120]
    for model in pair:
        score = utils.anomaly_score(model, normal)
        assert score.shape == (60,) and torch.equal(score, utils.anomaly_score(model, normal))
        for kind in ("noisy", "shuffled", "inverted"):
            assert auroc(score, utils.anomaly_score(model, utils.ANOMALIES[kind](other, 0))) > 0.8, kind


def test_the_score_is_that_of_the_definition(pair, digits):
    images, (model, _) = digits.test.images[:4], pair
    x, p = images.double(), model.reconstruct(images).double()
    entropy = -torch.special.xlogy(x, x).sum((1, 2, 3)) - torch.special.xlogy(1 - x, 1 - x).sum((1, 2, 3))
    excess = -(x * p.log() + (1 - x) * (1 - p).log()).sum((1, 2, 3)) - entropy
    ink = torch.stack([(x - p)[:, 0, i : i + 7, j : j + 7].sum((1, 2)) for i in range(22) for j in range(22)]).abs().amax(0)
    expected = (excess * ink * ink) ** (1 / 3) / (1 + x.sum((1, 2, 3))) ** (1 / 6)
    torch.testing.assert_close(utils.anomaly_score(model, images), expected, rtol=1e-3, atol=1e-3)


def test_anomalies_are_what_they_are_called(images):
    assert torch.equal(utils.ANOMALIES["mirrored"](images, 0)[..., 0], images[..., 27])
    assert torch.equal(utils.ANOMALIES["rotated"](utils.ANOMALIES["rotated"](images, 0), 0), images.flip(2, 3))
    assert torch.equal(utils.ANOMALIES["inverted"](images, 0), 1 - images)
    assert utils.ANOMALIES["black"](images, 0).eq(0).all()
    shuffled = utils.ANOMALIES["shuffled"](images, 0)
    assert torch.equal(shuffled.flatten(1).sort().values, images.flatten(1).sort().values) and not torch.equal(shuffled, images)
    for kind in utils.ANOMALIES:
        assert utils.ANOMALIES[kind](images, 0).shape == images.shape


def test_new_anomalies_are_what_they_are_called(images):
    made = {kind: utils.ANOMALIES[kind](images, 0) for kind in utils.ANOMALIES}
    assert torch.equal(made["upside down"], images.flip(2)) and torch.equal(made["transposed"], images.mT)
    assert (made["thicker"] >= images).all() and (made["thinner"] <= images).all()
    assert made["thicker"].sum() > 1.2 * images.sum() > 1.5 * made["thinner"].sum() > 0
    assert torch.equal(made["two overlaid"][1], torch.maximum(images[0], images[1]))
    assert torch.equal(made["half"][..., :14], images[..., :14]) and made["half"][..., 14:].eq(0).all()
    assert torch.equal(made["shifted"][..., 2:, 2:], images[..., :-2, :-2]) and made["shifted"][..., :2].eq(0).all()


def test_a_mixture_of_one_gaussian_is_that_of_mean_and_covariance(pair, digits):
    for model in pair:
        codes = utils.posterior(model, digits.train.images)[0]
        one = utils.fit_mixture(model, digits.train.images, 1)
        expected = torch.distributions.MultivariateNormal(codes.mean(0), codes.T.cov(correction=0) + 1e-4 * torch.eye(8))
        density = utils.density_score(one, model, digits.train.images[:20])
        torch.testing.assert_close(density.float(), -expected.log_prob(codes[:20]), rtol=0.01, atol=0.05)
        mixture = utils.fit_mixture(model, digits.train.images, 5, seed=1)
        assert mixture.score(codes.numpy()) > one.score(codes.numpy())
    with pytest.raises(ValueError, match="num_components is 0"):
        utils.fit_mixture(model, digits.train.images, 0)


def explained(decoded, image):
    """-log p(x|z) of one image as a * decoded + b + noise, everything fitted by least squares in double precision."""
    decoded, image = decoded.double().flatten(), image.double().flatten()
    design = torch.stack([decoded, torch.ones_like(decoded)], 1)
    rest = (image - design @ torch.linalg.lstsq(design, image[:, None]).solution[:, 0]).square().sum()
    total = (image - image.mean()).square().sum()
    return 392 * torch.log(rest / total)


@pytest.mark.parametrize("kind", [0, 1], ids=["vae", "autoencoder"])
@torch.no_grad()
def test_optimize_codes_is_more_probable_than_the_encoders_guess(pair, images, kind):
    model = pair[kind]
    model.zero_grad()
    guess, mode = utils.posterior(model, images)[0], utils.optimize_codes(model, images, steps=20, learning_rate=0.03)
    for z, better, x in zip(guess, mode, images):
        before, after = (explained(model.decode(code[None]).sigmoid(), x) for code in (z, better))
        if model.variational:
            before, after = before + 0.5 * z.square().sum(), after + 0.5 * better.square().sum()
        assert after < before
    assert not mode.requires_grad and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("contrast, brightness", [(1.0, 0.0), (0.4, 0.0), (0.4, 0.3)])
def test_optimize_codes_of_a_toy_is_the_best_of_a_grid_at_any_contrast_and_brightness(toy, images, contrast, brightness):
    mode = utils.optimize_codes(toy, contrast * images + brightness, steps=300)
    grid = torch.linspace(-4, 4, 801)
    with torch.no_grad():
        decoded = toy.decode(grid[:, None]).sigmoid()
    energy = torch.stack([torch.stack([explained(y, x) for y in decoded]) for x in images]) + 0.5 * grid.square()
    reached = energy.gather(1, (mode - grid).abs().argmin(1, keepdim=True))[:, 0]
    torch.testing.assert_close(reached, energy.min(1).values, atol=0.05, rtol=0)


def test_optimize_codes_of_what_says_nothing_is_that_of_the_prior(toy):
    mode = utils.optimize_codes(toy, torch.cat([torch.zeros(1, 1, 28, 28), torch.full((1, 1, 28, 28), 0.5)]), steps=300)
    torch.testing.assert_close(mode, torch.zeros(2, 1), atol=0.01, rtol=0)


def test_a_contrast_is_never_negative_for_optimize_codes(toy):
    with torch.no_grad():
        negative = 1 - toy.decode(torch.full((1, 1), 2.0)).sigmoid()  # no code explains it: the prior decides
    torch.testing.assert_close(utils.optimize_codes(toy, negative, steps=300), torch.zeros(1, 1), atol=0.01, rtol=0)


def test_optimize_codes_of_an_autoencoder_knows_no_prior(toy):
    toy.variational = False
    guess = torch.full((1, 1), 0.3)  # nothing moves it where the image says nothing
    torch.testing.assert_close(utils.optimize_codes(toy, torch.zeros(1, 1, 28, 28), steps=50), guess, atol=1e-6, rtol=0)


def test_optimize_codes_checks_its_arguments(toy, images):
    with pytest.raises(ValueError, match="steps is 0"):
        utils.optimize_codes(toy, images, steps=0)
    with pytest.raises(ValueError, match="learning_rate is -1"):
        utils.optimize_codes(toy, images, learning_rate=-1)
    with pytest.raises(ValueError, match="images must lie in"):
        utils.optimize_codes(toy, images + 1)


def test_squared_error_sums_over_pixels(images):
    assert utils.squared_error(images, images) == 0
    assert utils.squared_error(torch.zeros(2, 1, 28, 28), torch.full((2, 1, 28, 28), 0.5)) == pytest.approx(784 / 4)


# figures


def test_digits_grid_draws_what_it_was_given(images):
    figure = utils.digits_grid([images[:3], images[3:5] - images[:2]], ["a", "b"], ["0", "1", "2"], cmaps=["gray", "RdBu"])
    axes = [ax for ax in figure.axes if ax.images]
    assert len(axes) == 5
    for ax, x in zip(axes, [*images[:3], *(images[3:5] - images[:2])]):
        assert torch.equal(torch.as_tensor(ax.images[0].get_array().data), x[0])
    assert axes[0].images[0].get_clim() == (0, 1) and axes[3].images[0].get_clim() == (-1, 1)
    assert [ax.get_title() for ax in axes[:3]] == ["0", "1", "2"] and axes[0].get_ylabel() == "a"
    plt.close(figure)
    for rows in ([], [images[:0]], [images[0]]):
        with pytest.raises(ValueError, match="at least one"):
            utils.digits_grid(rows)


def test_plot_history_draws_every_epoch(few):
    history = utils.fit(utils.VAE(2), *few, epochs=2)
    figure = utils.plot_history(history)
    drawn = [line.get_ydata().tolist() for ax in figure.axes for line in ax.lines]
    assert drawn == [[row[f"{part}_{key}"] for row in history] for key in ("loss", "bce", "kl") for part in ("train", "val")]
    plt.close(figure)


# other devices


class NoDoubles(torch.overrides.TorchFunctionMode):
    """An accelerator without float64, such as Apple's: refuses any double made of a tensor that no `.cpu()` has moved."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        tensors = [x for x in (*args, *(kwargs or {}).values()) if isinstance(x, torch.Tensor)]
        tensors += [x for arg in args if isinstance(arg, (list, tuple)) for x in arg if isinstance(x, torch.Tensor)]
        result = function(*args, **(kwargs or {}))
        if function is torch.Tensor.cpu:
            result = result.view_as(result)  # on the CPU, cpu() gives the very same tensor: a new one can be told apart
        made_here = not tensors and "device" not in (kwargs or {})
        moved = function is torch.Tensor.cpu or any(hasattr(x, "moved") for x in tensors) or made_here
        if isinstance(result, torch.Tensor):
            if result.dtype == torch.float64 and not moved:
                raise TypeError("this device has no float64")
            if moved:
                result.moved = True
        return result


def test_the_simulated_device_has_no_doubles():
    with NoDoubles():
        there = torch.ones(2, device="cpu")
        there.cpu().double()
        with pytest.raises(TypeError, match="no float64"):
            there.double().cpu()


def test_nothing_needs_doubles_on_the_device(few):
    with NoDoubles():
        for variational in (True, False):
            model = utils.VAE(2, variational)
            utils.fit(model, *few, epochs=1)
            utils.evaluate(model, few[1], num_samples=1)
            utils.anomaly_score(model, few[1])
            utils.optimize_codes(model, few[1], steps=2)
            utils.fit_mixture(model, few[1], 2)
            utils.squared_error(model.reconstruct(few[1]), few[1])
            if variational:
                utils.log_likelihood(model, few[1], num_samples=2)
            for kind in utils.ANOMALIES:
                utils.ANOMALIES[kind](few[1], 0)


@pytest.mark.parametrize("use", [
    utils.VAE.encode, utils.VAE.reconstruct, utils.posterior, utils.evaluate, utils.log_likelihood, utils.anomaly_score,
    utils.optimize_codes, utils.loss_per_image, lambda model, x: utils.corrupt(x, "noise", 0.1),
    lambda model, x: utils.fit_mixture(model, x, 1),
    lambda model, x: utils.vae_loss(x, x, torch.zeros(6, 4), torch.zeros(6, 4))])
def test_images_are_checked_at_every_door(model, images, use):
    for x in (images.double(), images[:, 0], images[..., :27], images.numpy(), (255 * images).byte()):
        with pytest.raises(ValueError, match="must (be a float32 tensor|have the shape)"):
            use(model, x)


def test_what_does_not_go_together_is_named(model, images):
    with pytest.raises(ValueError, match="images are on cpu, the model is on meta"):
        model.to("meta").encode(images)
    with pytest.raises(ValueError, match="same shape"):
        utils.vae_loss(images[:3], images, torch.zeros(6, 4), torch.zeros(6, 4))
    with pytest.raises(ValueError, match="same shape"):
        utils.vae_loss(images, images, torch.zeros(6, 4), torch.zeros(6, 5))
