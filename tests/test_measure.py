"""measure.py and card.py: mathematics against oracles, by hand, by bootstrap, by SciPy; the edits
that the README invites to; and that the pages say what was measured."""

from pathlib import Path

import benchmark
import card
import measure
import numpy as np
import pytest
import scipy.linalg
import scipy.ndimage
import torch
from conftest import EDITED, same_weights
from torch.distributions import Normal, kl_divergence

import utils

# ---------------------------------------- Statistics ----------------------------------------


def test_placements_count_pairs_and_half_of_each_tie():
    rng = np.random.default_rng(0)
    normal = rng.integers(0, 9, 40).astype(float)  # with many ties
    anomalous = rng.integers(2, 12, 30).astype(float)
    higher = anomalous[:, None] > normal
    same = anomalous[:, None] == normal
    wins = higher + 0.5 * same  # (30, 40)
    of_anomalous, of_normal = measure.placements(normal, anomalous)
    np.testing.assert_allclose(of_anomalous, wins.mean(1))
    np.testing.assert_allclose(of_normal, wins.mean(0))
    assert measure.auroc(normal, anomalous) == pytest.approx(wins.mean())


def test_mean_difference_is_paired():
    a = np.array([5.0, 7.0, 9.0, 11.0])
    b = np.array([4.0, 5.0, 8.0, 9.0])  # a - b = 1, 2, 1, 2, of variance 1/3
    assert measure.mean_difference(a, b) == pytest.approx((1.5, (1 / 3 / 4) ** 0.5))


def difference_of_areas(normal_a, anomalous_a, normal_b, anomalous_b):
    return measure.auroc(normal_a, anomalous_a) - measure.auroc(normal_b, anomalous_b)


@pytest.mark.parametrize("same_images", [True, False])
def test_the_standard_error_of_an_auroc_difference_is_the_bootstraps(same_images):
    """Of two models; what is hard for one is easy for the other, and so for its anomaly."""
    rng = np.random.default_rng(1)
    n, m = 300, 300 if same_images else 120
    hard = rng.normal(size=n)
    hard_anomalous = hard if same_images else rng.normal(size=m)
    normal_a = hard + 0.5 * rng.normal(size=n)
    normal_b = -hard + 0.5 * rng.normal(size=n)
    anomalous_a = hard_anomalous + 0.9 + 0.5 * rng.normal(size=m)
    anomalous_b = -hard_anomalous + 0.5 + 0.5 * rng.normal(size=m)
    scores = (normal_a, anomalous_a, normal_b, anomalous_b)
    difference, error = measure.auroc_difference(*scores, same_images)
    assert difference == pytest.approx(difference_of_areas(*scores))
    drawn = []
    for _ in range(500):
        i = rng.integers(n, size=n)
        j = i if same_images else rng.integers(m, size=m)
        drawn.append(difference_of_areas(normal_a[i], anomalous_a[j], normal_b[i], anomalous_b[j]))
    assert error == pytest.approx(np.std(drawn), rel=0.08)


@pytest.mark.parametrize(
    "differences, errors, lower, higher",
    [
        ([-1.0, -2.0, -3.0], [0.4, 0.4, 0.4], "ahead", "behind"),
        ([1.0, 2.0, 3.0], [0.4, 0.4, 0.4], "behind", "ahead"),
        ([-1.0, -2.0, -3.0], [0.6, 0.4, 0.4], "undecided", "undecided"),  # one seed is within two
        ([1.0, 2.0, 3.0], [0.6, 0.4, 0.4], "undecided", "undecided"),
        ([-1.0, 2.0, -3.0], [0.1, 0.1, 0.1], "undecided", "undecided"),  # of different signs
        ([0.0], [0.0], "undecided", "undecided"),
    ],
)
def test_ahead_is_beyond_two_standard_errors_in_every_seed(differences, errors, lower, higher):
    assert measure.standing(differences, errors, higher_is_better=False) == lower
    assert measure.standing(differences, errors, higher_is_better=True) == higher


def test_frechet_distance_is_that_of_two_gaussians():
    generator = torch.Generator().manual_seed(0)
    white = torch.randn(2, 500, 3, generator=generator).double()
    a = white[0] @ torch.diag(torch.tensor([1.0, 2.0, 3.0]).double())
    b = white[1] @ torch.ones(3, 3).double().triu() + 1
    root = scipy.linalg.sqrtm((a.T.cov() @ b.T.cov()).numpy()).real
    difference = a.mean(0) - b.mean(0)
    traces = a.T.cov().trace() + b.T.cov().trace() - 2 * np.trace(root)
    assert measure.frechet_distance(a, b) == pytest.approx(float(difference @ difference + traces))
    assert measure.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_a_unit_is_active_if_its_mean_varies_over_images():
    steps = torch.linspace(-1, 1, 101)[:, None]  # their variance is 0.343
    codes = steps * torch.tensor([1.0, 0.2, 0.1, 0.0]) + torch.tensor([0.0, 3.0, 3.0, 3.0])
    assert measure.active_units(codes) == 2


# ------------------------------------ Models and edits ------------------------------------


def test_the_noisy_code_has_a_fixed_width(few):
    torch.manual_seed(0)
    model = measure.NoisyCode().eval()
    mu, logvar = utils.posterior(model, few[1])
    expected = kl_divergence(Normal(mu, 0.3), Normal(0.0, 1.0))
    torch.testing.assert_close(utils.kl_per_dimension(mu, logvar), expected)


class Spy(utils.VAE):
    """Remembers what it was shown and what it made of it."""

    def encode(self, x):
        self.seen = x
        return super().encode(x)

    def decode(self, z):
        self.logits = super().decode(z)
        return self.logits


def test_denoising_shows_noise_and_asks_for_the_clean_image():
    torch.manual_seed(0)
    model = Spy()
    grey = torch.full((1000, 1, 28, 28), 0.5)
    loss = measure.denoising(model, grey, torch.Generator().manual_seed(0), 2.0, 0.5)
    deviations = model.seen.flatten(1).std(1)  # uniform from 0 to 0.3
    assert deviations.mean() == pytest.approx(0.15, abs=0.01)
    assert deviations.max() == pytest.approx(0.3, abs=0.02)
    expected = utils.bce_per_image(model.logits, grey).mean() + 2 * loss.kl
    assert loss.loss.item() == pytest.approx(expected.item(), rel=1e-5), EDITED


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Numbers and trained models go to a temporary folder."""
    monkeypatch.setattr(measure, "FOLDER", tmp_path)
    monkeypatch.setattr(measure, "RUNS", tmp_path / "runs")
    return tmp_path / "runs"


def data_of(few):
    """48 training images; validation and test are the same 16, of which nobody asks the labels."""
    train, val = (utils.Split(images, torch.arange(len(images)) % 10) for images in few)
    return utils.Data("mnist5k", train, val, val)


@pytest.mark.parametrize("name", ["ae12", "ae32 noisy code", "vae denoising"])
def test_a_finished_run_is_loaded_and_not_trained_again(few, name, runs, monkeypatch):
    measure.train(data_of(few), name, 2, epochs=1)
    with pytest.raises(SystemExit, match="missing or not finished.*measure.py train"):
        measure.load(name, 1)
    model = measure.load(name, 2)
    assert type(model) is measure.MODELS[name].model_class
    assert len(model.metadata["history"]) == 1
    monkeypatch.setattr(utils, "fit", None)  # to train again would fail
    measure.train(data_of(few), name, 2, epochs=1)


def test_an_interrupted_run_is_not_loaded(few, runs):
    def stop(model, row):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure.train(data_of(few), "vae", 0, epochs=2, on_epoch=stop)
    assert measure.run_path("vae", 0).exists()
    with pytest.raises(SystemExit, match="not finished"):
        measure.load("vae", 0)


def test_the_references_are_the_finished_runs(few, runs):
    for name in measure.REFERENCES.values():
        measure.train(data_of(few), name, 0, epochs=1)
    measure.save_references()
    kinds = {}
    for stem, name in measure.REFERENCES.items():
        reference = utils.load_checkpoint(runs.parent / f"{stem}.safetensors")
        assert same_weights(reference, measure.load(name, 0))
        assert reference.metadata["data"] == "mnist5k"
        kinds[stem] = (reference.variational, reference.latent_dim)
    assert kinds == {
        "vae_mnist_reference": (True, 32),
        "ae_mnist_reference": (False, 32),
        "vae_mnist_2d_reference": (True, 2),
    }


def short_run(module, few):
    """The validation loss after two short epochs, long enough for a running average."""
    utils.seed_everything(0)
    return module.fit(module.VAE(), *few, epochs=2, batch_size=4)[-1]["val_loss"]


def test_edits_fit_utils_and_change_the_run(few, edited):
    losses = {"utils.py itself": short_run(utils, few)}
    whole = Path(utils.__file__).read_text(encoding="utf-8")
    for name, edit in measure.EDITS.items():
        losses[name] = short_run(edited(whole, measure.edited(edit)), few)
    assert np.isfinite(list(losses.values())).all()
    assert losses.pop("utils.py itself") == losses["none"]
    assert len(set(losses.values())) == len(measure.EDITS)


def test_an_edit_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="does not contain 'nn.Mystery'"):
        measure.edited(measure.Edit("", [("nn.Mystery", "nn.ReLU")]))


@pytest.mark.slow
def test_an_edited_copy_is_what_trains(runs, monkeypatch):
    made_up = "utils.Data(data_name, *3 * [utils.Split(torch.rand(64, 1, 28, 28), None)])"
    script = measure.TRAIN_EDITED.replace("utils.load_images(data_name, data_folder)", made_up)
    script = script.replace("*images,", "*images, epochs=1,")
    assert script.count(made_up) == script.count("epochs=1") == 1
    monkeypatch.setattr(measure, "TRAIN_EDITED", script)
    measure.measure_edit("latent 16", "mnist5k", 0)
    kept = measure.read_reference()["edits, mnist5k"]["latent 16"]["0"]
    parameters = sum(p.numel() for p in utils.VAE(latent_dim=16).parameters())
    assert kept["parameters"] == parameters
    assert kept["edit"] == measure.EDITS["latent 16"].text
    path = measure.run_path("edit latent 16 mnist5k", 0)
    assert utils.read_metadata(path)["data"] == "mnist5k"
    monkeypatch.setattr(measure, "TRAIN_EDITED", "raise SystemExit(1)")
    measure.measure_edit("latent 16", "mnist5k", 0)  # it is finished


# ---------------------------------------- Images ----------------------------------------


@pytest.mark.parametrize(
    "make", [measure.letters, lambda: measure.strokes(20, seed=1), measure.sklearn_digits]
)
def test_foreign_images_are_like_mnist_and_repeat(make):
    images = make()
    assert images.shape[1:] == (1, 28, 28) and images.dtype == torch.float32
    assert images.min() == 0 and images.max() <= 1
    assert torch.equal(images, make())
    assert len(images.flatten(1).unique(dim=0)) > 0.95 * len(images)
    height = (images > 0).any(3).sum((1, 2))
    width = (images > 0).any(2).sum((1, 2))
    longer_side = torch.maximum(height, width)
    assert longer_side.max() <= 20 and (longer_side >= 18).double().mean() > 0.95


def test_the_further_anomalies_by_their_definitions(few):
    images = few[0]
    made = {kind: measure.ANOMALIES[kind](images, 0) for kind in ("thinner", "half", "shifted")}
    thinner = scipy.ndimage.minimum_filter(images.numpy(), (1, 1, 2, 2), origin=(0, 0, -1, -1))
    np.testing.assert_allclose(made["thinner"][..., :27, :27], thinner[..., :27, :27], atol=1e-6)
    assert torch.equal(made["half"][..., :14], images[..., :14])
    assert not made["half"][..., 14:].any()
    assert torch.equal(made["shifted"][..., 2:, 2:], images[..., :26, :26])
    assert not made["shifted"][..., :2, :].any() and not made["shifted"][..., :2].any()
    transposed = measure.ANOMALIES["transposed"](images, 0)
    assert torch.equal(transposed[..., 10, 17], images[..., 17, 10])


def test_a_line_goes_through_the_middle_of_the_image(few):
    lines = measure.line_through(torch.zeros(500, 1, 28, 28), seed=0)
    assert (lines[:, 0, 13:15, 13:15].amax((1, 2)) == 1).all()
    assert lines.sum((1, 2, 3)).min() > 50  # 22 pixels long, 2.6 wide
    assert (measure.line_through(few[0], seed=0) >= few[0]).all()


# ---------------------------------------- Figures ----------------------------------------


@pytest.fixture
def small(few, monkeypatch):
    """A small data set, few independent images, and a mixture of two components."""
    monkeypatch.setattr(measure, "NUM_COMPONENTS", 2)
    independent = {
        "scikit-learn's digits": lambda x, seed: x[:7],
        "letters": lambda x, seed: measure.strokes(9, seed=9),
        "random strokes": lambda x, seed: measure.strokes(8, seed),
    }
    monkeypatch.setattr(measure, "ANOMALIES", {**measure.ANOMALIES, **independent})
    return data_of(few)


@pytest.fixture
def evaluated():
    torch.manual_seed(0)
    return utils.VAE(latent_dim=4).eval()


def test_errors_and_scores_are_those_of_utils(small, evaluated, tmp_path):
    arrays = measure.measure_images(small, evaluated, seed=3)
    test = small.test.images
    blurred = utils.corrupt(test, "blur", 1.5, 3)
    errors = utils.squared_error(evaluated.reconstruct(blurred), test)
    np.testing.assert_allclose(arrays["error"]["blur 1.5"], errors, rtol=1e-5)
    np.testing.assert_allclose(arrays["input"]["blur 1.5"], utils.squared_error(blurred, test))
    mixture = utils.fit_mixture(evaluated, small.train.images, 2, seed=3)
    for kind, make in measure.ANOMALIES.items():
        images = make(test, 3)
        scores = utils.anomaly_score(evaluated, images)
        np.testing.assert_allclose(arrays["reconstruction"][kind], scores, rtol=1e-5)
        codes, _ = utils.posterior(evaluated, images)
        densities = -mixture.score_samples(codes.double())
        np.testing.assert_allclose(arrays["density"][kind], densities, rtol=1e-5)
    path = tmp_path / "runs" / "x.npz"
    measure.save_arrays(arrays, path)
    np.testing.assert_equal(measure.load_arrays(path), arrays)


def test_the_candidates_of_the_score_by_their_definitions(few, evaluated):
    images = few[1]
    scores = measure.candidate_scores(evaluated, utils.fit_mixture(evaluated, few[0], 2), images)
    x, rebuilt = images.double(), evaluated.reconstruct(images).double()
    bce = -(x * rebuilt.log() + (1 - x) * (1 - rebuilt).log()).flatten(1).sum(1)
    entropy = -(torch.xlogy(x, x) + torch.xlogy(1 - x, 1 - x)).flatten(1).sum(1)
    chosen = utils.anomaly_score(evaluated, images)
    expected = {
        "BCE of the decoded mean": bce,
        "the same less the image's entropy": bce - entropy,
        "largest window error / √(1 + ink): `anomaly_score`": chosen,
    }
    for name, values in expected.items():
        np.testing.assert_allclose(scores[name], values, rtol=1e-4)


def made_up_arrays(shift, rng):
    """Those of a model that is the better the larger `shift` is."""
    scores = {kind: rng.normal(2 + shift, 1, 400) for kind in measure.ANOMALIES}
    scores["clean"] = rng.normal(0, 1, 400)
    scores["validation"] = np.arange(100.0) / 50  # its quantile of 99 % is 1.9602
    errors = {level: rng.normal(9 - shift, 1, 400) for level in measure.LEVELS}
    return {"error": errors, "reconstruction": scores, "density": scores}


def test_summary_and_comparison_of_made_up_arrays():
    rng = np.random.default_rng(0)
    pairs = [(made_up_arrays(1.0, rng), made_up_arrays(0.0, rng)) for _ in range(3)]
    better = pairs[0][0]
    figures = measure.summarise(better)
    flagged = np.mean(better["density"]["mirrored"] > 1.9602)
    assert figures["flagged density"]["mirrored"] == pytest.approx(flagged)
    assert figures["error"]["clean"] == pytest.approx(np.mean(better["error"]["clean"]))
    errors = measure.compare_errors(pairs)["noise 0.3"]
    assert errors["standing"] == "ahead"
    assert np.mean(errors["difference"]) == pytest.approx(-1, abs=0.15)
    assert errors["standard error"][0] == pytest.approx((2 / 400) ** 0.5, rel=0.1)
    assert measure.compare_scores(pairs, "density")["letters"]["standing"] == "ahead"


def test_figures_of_two_seeds_stand_beside_each_other(runs):
    measure.keep({"b": np.float32(0.1234567), "c": [1, None, "β"]}, "test", "vae", 1)
    measure.keep({"b": torch.tensor(2.0)}, "test", "vae", 0)
    expected = {"0": {"b": 2.0}, "1": {"b": 0.12346, "c": [1, None, "β"]}}
    assert measure.read_reference() == {"test": {"vae": expected}}


def test_digits_on_demand_are_judged_by_what_was_asked_for(small, model):
    class AlwaysThree:
        def look_at(self, images):
            probabilities = torch.zeros(len(images), 10)
            probabilities[:, 3] = 1
            return images.flatten(1), probabilities

    shares = measure.digits_on_demand(small, model, AlwaysThree(), 0, n=5, num_components=1)
    assert shares["3"] == 1 and shares["4"] == 0
    assert shares["mean"] == pytest.approx(0.1)


def untrained(name, seed, left_out=None):
    torch.manual_seed(seed)
    recipe = measure.MODELS[name]
    model = recipe.model_class(**recipe.arguments).eval()
    model.metadata = {"val_loss": 91.5}
    return model


@pytest.mark.slow
def test_from_measuring_to_the_card(small, runs, monkeypatch):
    """All that the pages show is written by some command, under the names that they ask for."""
    monkeypatch.setattr(measure, "load", untrained)
    monkeypatch.setattr(measure, "is_finished", lambda path: True)
    monkeypatch.setattr(measure, "train", lambda *arguments, **options: None)
    monkeypatch.setattr(measure, "MIXTURE_IMAGES", 40)
    monkeypatch.setattr(measure, "COMPONENTS", (1, 2))
    monkeypatch.setattr(measure, "TUNING_IMAGES", 8)
    log_likelihood = utils.log_likelihood
    few_samples = lambda model, x, n, seed=0: log_likelihood(model, x, 2, seed)  # noqa: E731
    monkeypatch.setattr(utils, "log_likelihood", few_samples)
    on_demand = measure.digits_on_demand
    few_digits = lambda *arguments: on_demand(*arguments, n=4, num_components=1)  # noqa: E731
    monkeypatch.setattr(measure, "digits_on_demand", few_digits)
    monkeypatch.setattr(measure, "draw_from", lambda mixture, model, n, seed: model.sample(n))
    monkeypatch.setattr(utils, "load_images", lambda source, root=None: small)
    for command in ("test", "scores", "likelihood", "compare", "samples", "left-out"):
        measure.run(command, None, [0], [])
    for name, edit in measure.EDITS.items():
        measured = {"edit": edit.text, "validation loss": 92.0}
        measure.keep(measured, "edits, mnist5k", name, 0)
        if name != "none":
            measure.keep(measured, "edits, mnist", name, 0)
    figures = benchmark.measure(small, small, epochs=3)
    measure.keep(figures, "benchmark", "cpu, 1 thread", 0)

    reference = measure.read_reference()
    for name in card.PLACES:
        assert card.NOT_MEASURED not in card.written(name, reference), name
    committed = card.read_reference().get("benchmark", {})
    for of_machine in committed.values():
        assert list(of_machine["0"]) == list(figures), "run: python tests/benchmark.py --keep"


# ------------------------------------------ Card ------------------------------------------


LEVELS = ("clean", "noise 0.1", "noise 0.2", "noise 0.3", "blur 1")
A, B, U = "ahead", "behind", "undecided"


def made_up(levels, anomalies, denoised=4.0):
    """Numbers for the verdict: where the VAE stands against all at LEVELS and at kinds."""
    errors = {"vae": 47.0, "ae12": 60.0, "ae32": 20.0, "ae32 noisy code": 30.0}
    errors["ae32 denoising"] = denoised
    test = {}
    for name, error in errors.items():
        test[name] = {"0": {"error": {"clean": error / 10, "noise 0.3": error}}}
    figures = {
        "error": {level: {"standing": one} for level, one in zip(LEVELS, levels, strict=True)},
        "auroc reconstruction": {kind: {"standing": one} for kind, one in anomalies.items()},
    }
    others = ("ae12", "ae32", "ae32 noisy code", "nothing")
    return {"test": test, "compare": dict.fromkeys(others, figures)}


@pytest.mark.parametrize(
    "standings, answer, counts",
    [
        ((A, B, B, B, A), "It depends", "ahead at 1; behind at 3, mostly noise"),
        ((B, A, A, A, U), "Yes", "ahead at 3, mostly noise; behind at 0"),
        ((A, B, U, U, B), "No", "ahead at 0; behind at 2"),
        ((A, U, U, U, U), "There is no difference", "ahead at 0; behind at 0"),
    ],
)
def test_the_verdict_says_what_the_numbers_say(standings, answer, counts):
    """Clean images are no corruption: whoever is ahead there does not count."""
    m = made_up(standings, {"letters": B, "half": A, "black": A})
    text = card.verdict(m)
    assert text.startswith(f"**{answer}")
    assert text.count(f": {counts}\n") == 4
    assert "at 4 levels of corruption" in text and "- AE 12 (6.0): ahead" in text
    assert "at noise 0.3 its error is 4.0, the VAE's 47.0" in text
    assert text.count("ahead at 2, behind at 1 (letters)") == 3


@pytest.mark.parametrize(
    "denoised, says",
    [(4.0, "resists it far better"), (40.0, "resists it better"), (50.0, "Not even")],
)
def test_the_verdict_on_training_with_noise(denoised, says):
    assert says in card.verdict(made_up([A] * 5, {}, denoised))


def test_the_verdict_on_a_digit_left_out():
    m = made_up([A] * 5, {"letters": A})
    assert "left out" not in card.verdict(m)
    m["left out, seed 0"] = {
        "vae": {"0": 0.9, "1": 0.4},
        "ae12": {"0": 0.9, "1": 0.8},
        "ae32": {"0": 0.5, "1": 0.7},
    }
    text = card.verdict(m)
    assert "(five epochs, one seed) is told" in text
    assert "mean AUROC of 0.65 (AE 12: 0.85, AE 32: 0.60). The" in text
    assert text.endswith("hardest is the 1: 0.40.")


def test_what_is_not_measured_is_a_note_with_its_command():
    for name, place in card.PLACES.items():
        assert card.written(name, {"test": {"vae": {}}}) == (
            f"{card.NOT_MEASURED} `python tests/{place.command}`*"
        )
    with pytest.raises(KeyError):
        card.written("no such table", {})


@pytest.mark.parametrize("page", card.PAGES, ids=["README", "card"])
def test_the_pages_say_what_was_measured(page, tmp_path):
    """The numbers are written into a page with none, too."""
    text = page.read_text(encoding="utf-8")
    emptied = card.MARKED.sub(r"\1\3", text)
    assert len(emptied) < len(text)
    new_page = tmp_path / "page.md"
    new_page.write_text(emptied, encoding="utf-8")
    for before in (page, new_page):
        assert card.filled(before, card.read_reference()) == text, (
            "run: python tests/measure.py card"
        )
