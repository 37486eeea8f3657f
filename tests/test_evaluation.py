"""Likelihood, codes, corruptions and figures, held against something computed another way."""

import functools
import json
import math
import random

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.overrides
from conftest import EDITED, ROOT
from scipy import ndimage

import utils

# the committed references


REFERENCES = {
    "vae_mnist_reference": (True, 32),
    "ae_mnist_reference": (False, 32),
    "vae_mnist_2d_reference": (True, 2),
}


@pytest.fixture
def reference():
    """Loads a committed checkpoint."""

    def load(name):
        try:
            return utils.load_checkpoint(ROOT / f"models_mnist/{name}.safetensors")
        except (utils.CheckpointError, FileNotFoundError) as error:
            pytest.fail(f"{EDITED} ({error})")

    return load


@pytest.mark.parametrize("name", REFERENCES)
def test_the_committed_references_are_what_they_say(name, reference, digits):
    """On the images that chose their epoch; with a VAE's noise they differ by a few hundredths."""
    model = reference(name)
    known = model.metadata
    assert (model.variational, model.latent_dim) == REFERENCES[name]
    assert (known["data"], known.get("left_out")) == ("mnist", None)
    recipe = {"epochs": 20, "batch_size": 64, "learning_rate": 1e-3, "beta": 1.0}
    assert {key: known["settings"][key] for key in recipe} == recipe
    losses = [row["val_loss"] for row in known["history"]]
    assert len(losses) == 20
    assert known["val_loss"] == min(losses)
    images = torch.cat([split.images for split in digits[1:]])
    loss = utils.evaluate(model, images, num_samples=1).loss
    assert loss == pytest.approx(known["val_loss"], abs=0.3 if model.variational else 0.01), EDITED


def test_the_committed_model_has_the_test_loss_of_the_readme(reference, mnist):
    measured = json.loads((ROOT / "models_mnist/reference.json").read_text(encoding="utf-8"))
    expected = measured["test"]["vae"]["0"]["loss"]
    loss = utils.evaluate(reference("vae_mnist_reference"), mnist.test.images, 1).loss
    assert loss == pytest.approx(expected, abs=0.2), EDITED


# the loss over a data set


@pytest.fixture
def images(digits):
    return digits.test.images[:6]


@torch.no_grad()
def test_evaluate_is_the_loss_of_the_definition(model, images):
    logits, mu, logvar = model.eval()(images, torch.Generator().manual_seed(3))
    bce = float(utils.bce_per_image(logits, images).mean())
    kl = float(utils.kl_per_dimension(mu, logvar).sum(1).mean())
    measured = utils.evaluate(model, images, num_samples=1, seed=3, beta=2.0)
    assert list(measured) == pytest.approx([bce + 2 * kl, bce, kl], rel=1e-5)
    measured = utils.evaluate(model, images, num_samples=1, seed=3)
    assert list(measured) == pytest.approx([bce + kl, bce, kl], rel=1e-5)


def test_evaluate_does_not_depend_on_batches_or_mode(model, digits, monkeypatch):
    images = digits.val.images[:50]
    whole = utils.evaluate(model.train(), images, num_samples=2)
    assert model.training
    assert utils.evaluate(model.eval(), images, num_samples=2) == whole
    assert not model.training
    monkeypatch.setattr(utils, "BATCH", 7)
    assert utils.evaluate(model, images, num_samples=2) == pytest.approx(whole, rel=1e-5)
    per_image = utils.loss_per_image(model, images, num_samples=2)
    assert [float(values.mean()) for values in per_image] == pytest.approx(list(whole), rel=1e-5)
    assert utils.evaluate(model, images, num_samples=2, seed=2) != whole


@pytest.mark.parametrize("measure", [utils.log_likelihood, utils.loss_per_image])
def test_every_image_and_every_sample_has_noise_of_its_own(model, images, measure):
    twice = images[[0, 0]]
    one = measure(model, twice, num_samples=1)
    two = measure(model, twice, num_samples=2)
    if measure is utils.loss_per_image:
        one = one.bce
        two = two.bce
    assert abs(one[0] - one[1]) > 1e-3
    assert abs(two[0] - one[0]) > 1e-4


# likelihood


class Toy(utils.VAE):
    """Two latent dimensions, logits linear in them: log p(x) is an integral that a grid gives."""

    def __init__(self):
        super().__init__(latent_dim=2)
        generator = torch.Generator().manual_seed(0)
        self.maps = torch.randn(3, 784, generator=generator)

    def encode(self, x):
        mu = torch.tensor([0.3, 0.6]).expand(len(x), 2)  # not the posterior
        return mu, torch.tensor([-0.5, 0.2]).expand(len(x), 2)

    def decode(self, z):
        return (self.maps[0] + 0.1 * z @ self.maps[1:]).view(-1, 1, 28, 28)


def exact_log_likelihood(model, images):
    """log of the integral of p(x|z) N(z; 0, I), by the trapezoidal rule over a fine grid."""
    line = torch.linspace(-5, 5, 61)
    grid = torch.cartesian_prod(line, line)
    logits = model.decode(grid)
    prior = -0.5 * grid.square().sum(1) - math.log(2 * math.pi)
    cell = 2 * math.log(10 / 60)
    exact = []
    for x in images:
        log_joint = prior - utils.bce_per_image(logits, x.expand_as(logits))
        exact.append(torch.logsumexp(log_joint.double(), 0) + cell)
    return torch.stack(exact)


def test_log_likelihood_is_that_of_the_integral(images):
    estimate = utils.log_likelihood(Toy(), images[:3], num_samples=1000)
    exact = exact_log_likelihood(Toy(), images[:3])
    torch.testing.assert_close(estimate, exact, atol=0.1, rtol=0)


def test_log_likelihood_rises_with_samples_from_the_elbo_to_the_truth(images):
    images = images[:3]
    elbo = -utils.evaluate(Toy(), images, num_samples=60).loss
    exact = float(exact_log_likelihood(Toy(), images).mean())

    def bound(samples):
        estimates = []
        for seed in range(60 // samples):
            estimates.append(utils.log_likelihood(Toy(), images, samples, seed))
        return float(torch.stack(estimates).mean())

    one = bound(1)
    ten = bound(10)
    assert exact - elbo > 0.8, "the bound is tight here, and the test shows nothing"
    assert one == pytest.approx(elbo, abs=0.6)  # nats: both are means of 180 samples
    assert one + 0.3 < ten < exact + 0.2


def test_log_likelihood_repeats_with_its_seed(model, images):
    all_six = utils.log_likelihood(model, images, num_samples=3, seed=0)
    assert all_six.shape == (6,)
    assert torch.equal(all_six, utils.log_likelihood(model, images, num_samples=3, seed=0))
    assert not torch.equal(all_six, utils.log_likelihood(model, images, num_samples=3, seed=2))
    with pytest.raises(ValueError, match="plain autoencoder has no likelihood"):
        utils.log_likelihood(utils.VAE(2, variational=False), images)


# latent space


def test_active_units_are_those_whose_mean_varies():
    mu = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0))
    mu = mu * torch.tensor([1.0, 0.05, 0.2]) + 3
    assert utils.active_units(mu).tolist() == [True, False, True]


@pytest.mark.parametrize("angle", [0.1, math.pi / 2, 3.0])
def test_interpolation_runs_along_the_arc(angle):
    start = torch.tensor([3.0, 0.0, 0.0])
    end = 3 * torch.tensor([math.cos(angle), math.sin(angle), 0.0])
    angles = torch.linspace(0, angle, 5)
    expected = 3 * torch.stack([angles.cos(), angles.sin(), 0 * angles], dim=1)
    torch.testing.assert_close(utils.interpolate(start, end, 5), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("start, end", [([1.0, 2.0], [3.0, 6.0]), ([1.0], [-1.0]), ([0.0], [0.0])])
def test_interpolation_where_there_is_no_arc(start, end):
    path = utils.interpolate(torch.tensor(start), torch.tensor(end), 3)
    middle = (torch.tensor(start) + torch.tensor(end)) / 2
    expected = torch.stack([torch.tensor(start), middle, torch.tensor(end)])
    torch.testing.assert_close(path, expected)


def test_interpolation_names_what_makes_no_sense():
    for steps in (1, 0, 2.0, "3"):
        with pytest.raises((TypeError, ValueError), match="^steps "):
            utils.interpolate(torch.ones(2), torch.ones(2), steps)
    for shapes in (((2,), (3,)), ((1, 2), (1, 2)), ((2,), (1,)), ((), ())):
        start, end = (torch.ones(shape) for shape in shapes)
        with pytest.raises(ValueError, match=r"start and end must be \(D,\)"):
            utils.interpolate(start, end, 3)


@pytest.mark.parametrize("variational", [True, False])
def test_a_mixture_of_one_gaussian_is_that_of_the_codes_of_all_images(digits, variational, recwarn):
    """In single precision its covariances are not symmetric, as scikit-learn warns."""
    torch.manual_seed(0)
    model = utils.VAE(4, variational)
    images = digits.train.images[:300]
    codes = utils.posterior(model, images)[0].double()
    covariance = codes.T.cov(correction=0) + 1e-4 * torch.eye(4)
    expected = torch.distributions.MultivariateNormal(codes.mean(0), covariance)
    one = utils.fit_mixture(model, images, 1)
    density = utils.density_score(one, codes[:20].float())
    torch.testing.assert_close(density, -expected.log_prob(codes[:20]), rtol=1e-5, atol=1e-5)
    means = [utils.fit_mixture(model, images, 5, seed).means_ for seed in (0, 0, 2)]
    assert means[0].dtype == np.float64
    assert np.array_equal(means[0], means[1])
    assert not np.allclose(means[0], means[2])
    assert not recwarn.list
    for count in (0, 301, 2.0, "5"):
        with pytest.raises((TypeError, ValueError), match="n_components"):
            utils.fit_mixture(model, images, count)


# corruptions


@pytest.mark.parametrize("kind", utils.CORRUPTIONS)
def test_corruptions_are_seeded_bounded_and_graded(kind, digits):
    images = digits.test.images[:50]
    before = images.clone()
    torch.testing.assert_close(utils.corrupt(images, kind, 0), images, atol=1e-5, rtol=0)
    errors = []
    for level in utils.CORRUPTIONS[kind].levels:
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
    utils.corrupt(images[:2], kind, utils.CORRUPTIONS[kind].largest)


def grey(value, n=200):
    return torch.full((n, 1, 28, 28), value)


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
    x = utils.corrupt(grey(1.0, 2000), "occlusion", 8)
    assert x.sum((1, 2, 3)).eq(784 - 64).all()
    rows = (x == 0).any(3).sum(2)
    assert rows.eq(8).all(), "it is no square"
    hidden = (x == 0).any(0)[0]
    assert hidden[4:24, 4:24].all(), "it does not reach the whole digit"
    assert hidden.sum() == 400, "it leaves the digit"
    assert utils.corrupt(grey(1.0), "occlusion", 28).sum() == 0


def test_dimming_takes_its_share_of_the_brightness(images):
    torch.testing.assert_close(utils.corrupt(images, "dimming", 0.3), 0.7 * images)


@pytest.mark.parametrize("row, column", [(14, 14), (2, 25)])
def test_blur_is_that_of_a_gaussian_with_black_around_the_image(row, column):
    """Near the border, too, where a reflection would double the light."""
    dot = torch.zeros(1, 1, 28, 28)
    dot[0, 0, row, column] = 1
    weights = (-0.5 * (torch.arange(-30, 31) / 2).square()).exp()
    weights = weights / weights.sum()
    vertical = weights[30 - row : 58 - row]
    horizontal = weights[30 - column : 58 - column]
    blurred = utils.corrupt(dot, "blur", 2.0)[0, 0]
    torch.testing.assert_close(blurred, vertical[:, None] * horizontal, atol=1e-5, rtol=0)


def test_rotation_is_bilinear_to_either_side_by_its_angle(images):
    sides = set()
    for x, y in zip(images, utils.corrupt(images, "rotation", 30), strict=True):
        errors = {}
        for angle in (-30, 30):
            turned = ndimage.rotate(x[0], angle, reshape=False, order=1).clip(0, 1)
            errors[angle] = np.abs(turned - y[0].numpy()).max()
        assert min(errors.values()) < 1e-3
        sides.add(min(errors, key=errors.get))
    assert sides == {-30, 30}


@pytest.mark.parametrize(
    "kind, level, says",
    [
        ("fog", 1, r"^kind must be one of \['noise', .* not 'fog'"),
        ("noise", -0.1, "^level == -0.1"),
        ("occlusion", 29, "^level == 29"),
        ("blur", math.nan, "^level must be a number, not nan"),
        ("rotation", "90", "^level must be"),
    ],
)
def test_bad_corruptions_are_named(images, kind, level, says):
    with pytest.raises((TypeError, ValueError), match=says):
        utils.corrupt(images, kind, level)


# anomalies


def test_the_score_is_the_largest_window_error_over_the_root_of_the_ink(model, images):
    x = images.double()
    p = model.reconstruct(images).double()
    windows = []
    for i in range(22):
        for j in range(22):
            windows.append((x - p)[:, 0, i : i + 7, j : j + 7].sum((1, 2)))
    window = torch.stack(windows).abs().amax(0)
    torch.testing.assert_close(utils.window_error(p.float(), images), window, rtol=1e-4, atol=1e-4)
    expected = window / (1 + x.sum((1, 2, 3))).sqrt()
    score = utils.anomaly_score(model, images)
    torch.testing.assert_close(score, expected, rtol=1e-4, atol=1e-4)
    score = utils.reconstruction_score(p.float(), images)
    torch.testing.assert_close(score, expected, rtol=1e-4, atol=1e-4)
    x = grey(0.0, 2)
    x[1, 0, 10:17, 10:17] = 1  # 49 pixels of ink, all in one window
    assert utils.reconstruction_score(grey(0.0, 2), x).tolist() == pytest.approx([0, 49 / 50**0.5])


def test_the_score_of_a_perfect_reconstruction_is_zero(images):
    for perfect in (images, grey(0.0, 3), grey(1.0, 3)):
        score = utils.reconstruction_score(perfect, perfect)
        assert score.tolist() == pytest.approx([0] * len(perfect), abs=1e-4)


@pytest.mark.parametrize("measure", [utils.squared_error, utils.window_error])
def test_measures_refuse_images_that_do_not_go_together(images, measure):
    """Broadcasting would turn them into numbers that mean nothing."""
    assert measure(images, images).shape == (6,)
    with pytest.raises(ValueError, match="1 images cannot be compared with 6"):
        measure(images[:1], images)
    for other in (images[0], images[..., :1], images.new_zeros(6, 3, 28, 28)):
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
        assert torch.equal(change(images, 0), made[kind])
        if kind in ("occluded", "noisy", "shuffled"):
            assert not torch.equal(change(images, 2), made[kind])
    assert torch.equal(made["mirrored"][..., 0], images[..., 27])
    assert torch.equal(utils.ANOMALIES["rotated"](made["rotated"], 0), images.flip(2, 3))
    assert torch.equal(made["inverted"], 1 - images)
    assert made["black"].eq(0).all()
    assert torch.equal(made["shuffled"].flatten(1).sort().values, images.flatten(1).sort().values)
    assert torch.equal(made["upside down"], images.flip(2))
    assert torch.equal(made["transposed"], images.mT)
    assert torch.equal(made["two overlaid"][1], torch.maximum(images[0], images[1]))
    assert torch.equal(made["half"][..., :14], images[..., :14])
    assert made["half"][..., 14:].eq(0).all()
    assert torch.equal(made["shifted"][..., 2:, 2:], images[..., :-2, :-2])
    assert made["shifted"][..., :2].eq(0).all() and made["shifted"][..., :2, :].eq(0).all()
    thicker = ndimage.maximum_filter(images.numpy(), (1, 1, 3, 3), mode="constant")
    thinner = ndimage.minimum_filter(images.numpy(), (1, 1, 2, 2), origin=(0, 0, -1, -1))
    assert np.array_equal(made["thicker"], thicker)
    inner = (..., slice(27), slice(27))
    np.testing.assert_allclose(made["thinner"][inner], thinner[inner], atol=1e-6)


def test_squared_error_sums_over_the_pixels_of_an_image(images):
    assert utils.squared_error(images, images).tolist() == [0] * 6
    expected = torch.full((2,), 784 / 4)
    torch.testing.assert_close(utils.squared_error(grey(0.0, 2), grey(0.5, 2)), expected)


# figures


def test_digits_grid_draws_what_it_was_given(images):
    rows = [images[:3], images[3:5] - images[:2], 0.5 * images[:1]]
    figure = utils.digits_grid(rows, ["a", "b", "c"], ["0", "1", "2"])
    (ax,) = figure.axes
    for row, strip, highest in zip(rows, ax.images, (0, 1, 2), strict=True):
        assert tuple(strip.get_extent()) == (0, len(row), highest + 1, highest)
        drawn = torch.as_tensor(strip.get_array().filled(math.nan))
        assert drawn.shape == (30, 30 * len(row))
        for i, x in enumerate(row):
            assert torch.equal(drawn[1:29, 30 * i + 1 : 30 * i + 29], x[0])
    assert [strip.get_clim() for strip in ax.images] == [(0, 1), (-1, 1), (0, 1)]
    assert [strip.get_cmap().name for strip in ax.images] == ["gray", "RdBu", "gray"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "1", "2"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b", "c"]
    assert ax.get_xticks().tolist() == [0.5, 1.5, 2.5]
    assert ax.get_yticks().tolist() == [0.5, 1.5, 2.5]
    assert (ax.get_xlim(), ax.get_ylim()) == ((0, 3), (3, 0)), "the first row is at the top"
    plt.close(figure)


def test_digits_grid_names_what_makes_no_sense(images):
    for rows in ([], [images[:0]], [images[0]]):
        with pytest.raises(ValueError, match="at least one"):
            utils.digits_grid(rows)
    for labels in ({"row_labels": ["a"]}, {"column_labels": ["1", "2"]}):
        with pytest.raises(ValueError, match="the number of labels"):
            utils.digits_grid([images[:3], images[:2]], **labels)
    plt.close("all")


# every door


def random_states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


MEASURES = (utils.evaluate, utils.loss_per_image, utils.log_likelihood)
USES = [
    utils.VAE.reconstruct,
    utils.posterior,
    utils.anomaly_score,
    *(functools.partial(measure, num_samples=2) for measure in MEASURES),
    *(functools.partial(utils.corrupt, kind=kind, level=0.5) for kind in utils.CORRUPTIONS),
    functools.partial(utils.fit_mixture, num_components=1),
    lambda model, x: utils.vae_loss(x, x, torch.zeros(6, 4), torch.zeros(6, 4)),
]


@pytest.mark.parametrize("use", USES, ids=range(len(USES)))
def test_images_are_checked_at_every_door_and_no_global_seed_is_set(model, images, use):
    if isinstance(use, functools.partial) and use.func is utils.corrupt:
        corrupt = use
        use = lambda model, x: corrupt(x)  # noqa: E731
    before = random_states()
    use(model, images)
    assert random_states() == before
    for x in (images.double(), images.numpy(), (255 * images).byte()):
        kind = x.dtype if isinstance(x, torch.Tensor) else "numpy.ndarray"
        with pytest.raises(TypeError, match=f"must be a torch.Tensor of float32, not of .*{kind}"):
            use(model, x)
    for x in (images[:, 0], images[..., :27], images[:0]):
        with pytest.raises(ValueError, match="must have the shape"):
            use(model, x)
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        use(model, images + 1)


def test_measures_check_their_arguments(model, images):
    for measure in MEASURES:
        for name, value in (("num_samples", 0), ("num_samples", 1.5), ("seed", -1)):
            with pytest.raises((TypeError, ValueError), match=f"^{name} "):
                measure(model, images, **{name: value})
        with pytest.raises(TypeError, match=r"must be torch.float32, not torch.float16: model.flo"):
            measure(utils.VAE(2).half(), images)
        with pytest.raises(TypeError, match="needs the methods encode and decode: Linear"):
            measure(torch.nn.Linear(2, 2), images)


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
            result = result.view_as(result)  # a new one, which can be told apart
        made_here = not tensors and "device" not in kwargs
        moved = function is torch.Tensor.cpu or made_here
        moved = moved or any(hasattr(x, "moved") for x in tensors)
        for part in result if isinstance(result, list | tuple) else [result]:
            if isinstance(part, torch.Tensor) and moved:
                part.moved = True
            elif isinstance(part, torch.Tensor) and part.dtype == torch.float64:
                raise TypeError("this device has no float64")
        return result


@pytest.mark.parametrize("variational", [True, False])
def test_nothing_needs_doubles_on_the_device(few, variational):
    train, val = few
    there = torch.ones(2)
    with NoDoubles():
        with pytest.raises(TypeError, match="no float64"):
            there.double()
        model = utils.VAE(2, variational)
        utils.fit(model, train, val, epochs=1)
        utils.anomaly_score(model, val)
        utils.fit_mixture(model, val, 2)
        model.decode_images(np.zeros((2, 2)))
        if variational:
            utils.log_likelihood(model, val, num_samples=2)


def test_images_are_moved_to_the_model(images):
    """A data set on the CPU and a model on an accelerator are the usual case."""
    model = utils.VAE(2).to("meta")
    mu, logvar = utils.posterior(model, images)
    assert mu.device.type == logvar.device.type == "meta"
    assert model.reconstruct(images).device.type == "meta"
    assert model.sample(2).device.type == "meta"
