"""The mathematics of measure.py and card.py, against oracles: by hand, by bootstrap, by SciPy."""

import card
import measure
import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from torch.distributions import Normal, kl_divergence

import utils

# ---------------------------------------- Statistics ----------------------------------------


def auroc_by_hand(normal, anomalous):
    wins = [(a > n) + 0.5 * (a == n) for a in anomalous for n in normal]
    return sum(wins) / len(wins)


def test_auroc_counts_pairs_and_half_of_each_tie():
    assert measure.auroc([1.0, 2.0], [2.0, 3.0, 0.0]) == pytest.approx(3.5 / 6)
    assert measure.auroc([1.0, 1.0], [1.0, 1.0]) == 0.5


def test_placements_are_shares_of_pairs():
    rng = np.random.default_rng(0)
    normal = rng.integers(0, 9, 40).astype(float)  # with many ties
    anomalous = rng.integers(2, 12, 30).astype(float)
    of_anomalous, of_normal = measure.placements(normal, anomalous)
    for value, placement in zip(anomalous, of_anomalous, strict=True):
        assert placement == pytest.approx(auroc_by_hand(normal, [value]))
    for value, placement in zip(normal, of_normal, strict=True):
        assert placement == pytest.approx(auroc_by_hand([value], anomalous))
    area = measure.auroc(normal, anomalous)
    assert of_anomalous.mean() == pytest.approx(area) == pytest.approx(of_normal.mean())


def test_mean_difference_is_paired():
    a = np.array([5.0, 7.0, 9.0, 11.0])
    b = np.array([4.0, 5.0, 8.0, 9.0])  # a - b = 1, 2, 1, 2, of variance 1/3
    difference, error = measure.mean_difference(a, b)
    assert difference == pytest.approx(1.5)
    assert error == pytest.approx((1 / 3 / 4) ** 0.5)


def scores_of_two_models(n, m, shared, rng):
    """Normal and anomalous scores of two models; images share what makes them hard."""
    hard = rng.normal(size=n)
    hard_anomalous = hard if shared else rng.normal(size=m)
    normal = [hard + 0.5 * rng.normal(size=n) for _ in range(2)]
    anomalous = [hard_anomalous + shift + 0.5 * rng.normal(size=m) for shift in (0.9, 0.5)]
    return normal[0], anomalous[0], normal[1], anomalous[1]


def difference_of_areas(normal_a, anomalous_a, normal_b, anomalous_b):
    area_a = measure.placements(normal_a, anomalous_a)[0].mean()
    area_b = measure.placements(normal_b, anomalous_b)[0].mean()
    return area_a - area_b


@pytest.mark.parametrize("same_images", [True, False])
def test_the_standard_error_of_an_auroc_difference_is_the_bootstraps(same_images):
    rng = np.random.default_rng(1)
    n, m = 300, 300 if same_images else 120
    scores = scores_of_two_models(n, m, same_images, rng)
    difference, error = measure.auroc_difference(*scores, same_images)
    assert difference == pytest.approx(difference_of_areas(*scores))
    drawn = []
    for _ in range(1500):
        rows = rng.integers(n, size=n)
        rows_anomalous = rows if same_images else rng.integers(m, size=m)
        normal_a, anomalous_a, normal_b, anomalous_b = scores
        drawn.append(
            difference_of_areas(
                normal_a[rows],
                anomalous_a[rows_anomalous],
                normal_b[rows],
                anomalous_b[rows_anomalous],
            )
        )
    assert error == pytest.approx(np.std(drawn), rel=0.08)


def test_the_standard_error_of_an_auroc_knows_that_images_come_twice():
    """Against draws of whole new data sets, with a second model that tells nothing apart."""
    rng = np.random.default_rng(2)
    drawn = []
    clustered = []
    independent = []
    nothing = np.zeros(100)
    for _ in range(500):
        hard = rng.normal(size=100)
        normal = hard + 0.3 * rng.normal(size=100)
        anomalous = hard + 0.7 + 0.3 * rng.normal(size=100)
        scores = (normal, anomalous, nothing, nothing)
        difference, error = measure.auroc_difference(*scores, same_images=True)
        drawn.append(difference)
        clustered.append(error)
        independent.append(measure.auroc_difference(*scores, same_images=False)[1])
    assert np.mean(clustered) == pytest.approx(np.std(drawn), rel=0.1)
    assert np.mean(independent) > 1.3 * np.std(drawn)


@pytest.mark.parametrize(
    "differences, errors, lower, higher",
    [
        ([-1.0, -2.0, -3.0], [0.4, 0.4, 0.4], "ahead", "behind"),
        ([1.0, 2.0, 3.0], [0.4, 0.4, 0.4], "behind", "ahead"),
        ([-1.0, -2.0, -3.0], [0.6, 0.4, 0.4], "undecided", "undecided"),  # one seed is within two
        ([1.0, 2.0, 3.0], [0.6, 0.4, 0.4], "undecided", "undecided"),
        ([-1.0, 2.0, -3.0], [0.1, 0.1, 0.1], "undecided", "undecided"),  # of different signs
        ([0.0, 0.0, 0.0], [0.0, 0.0, 0.0], "undecided", "undecided"),
    ],
)
def test_ahead_is_beyond_two_standard_errors_in_every_seed(differences, errors, lower, higher):
    assert measure.standing(differences, errors, higher_is_better=False) == lower
    assert measure.standing(differences, errors, higher_is_better=True) == higher


def test_welch_by_its_formula():
    a, b = [1.0, 2.0, 4.0], [3.0, 7.0, 8.0, 9.0]
    va, vb = np.var(a, ddof=1) / 3, np.var(b, ddof=1) / 4
    t = (np.mean(a) - np.mean(b)) / np.sqrt(va + vb)
    freedom = (va + vb) ** 2 / (va**2 / 2 + vb**2 / 3)
    assert measure.welch(a, b) == pytest.approx(2 * scipy.stats.t.sf(abs(t), freedom))
    assert measure.welch([1.0], [2.0]) is None
    assert measure.welch([1.0, 1.0], [1.0, 1.0]) is None


def features_with(mean, covariance, n=500):
    """Features whose sample mean and covariance are exactly these."""
    white = torch.randn(n, len(mean), generator=torch.Generator().manual_seed(0)).double()
    white -= white.mean(0)
    white = white @ torch.linalg.inv(torch.linalg.cholesky(white.T.cov())).T
    return white @ torch.linalg.cholesky(covariance).T + mean


def test_frechet_distance_of_known_gaussians():
    mean_a, mean_b = torch.tensor([1.0, 2.0]).double(), torch.tensor([4.0, -2.0]).double()
    cov_a = torch.tensor([[2.0, 0.5], [0.5, 1.0]]).double()
    cov_b = torch.tensor([[1.0, -0.3], [-0.3, 3.0]]).double()
    root = scipy.linalg.sqrtm((cov_a @ cov_b).numpy()).real
    expected = 25 + float(cov_a.trace() + cov_b.trace()) - 2 * np.trace(root)
    a, b = features_with(mean_a, cov_a), features_with(mean_b, cov_b)
    assert measure.frechet_distance(a, b) == pytest.approx(expected)
    assert measure.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    wide = features_with(mean_a, 4 * torch.eye(2).double())
    narrow = features_with(mean_a, torch.eye(2).double())
    assert measure.frechet_distance(wide, narrow) == pytest.approx(2 * (2 - 1) ** 2)


# ------------------------------------ Models and images ------------------------------------


def test_the_noisy_code_has_a_fixed_width(digits):
    torch.manual_seed(0)
    model = measure.NoisyCode().eval()
    mu, logvar = utils.posterior(model, digits.test.images[:8])
    expected = kl_divergence(Normal(mu, 0.3), Normal(0.0, 1.0))
    torch.testing.assert_close(utils.kl_per_dimension(mu, logvar), expected)
    penalty = 0.5 * mu.square()
    constant = utils.kl_per_dimension(mu, logvar) - penalty
    torch.testing.assert_close(constant, torch.full_like(mu, constant[0, 0]))


def test_the_denoising_models_see_noise_in_training_alone(digits, monkeypatch):
    torch.manual_seed(0)
    model = measure.Denoising(variational=False)
    seen = []
    encode = model.encode
    monkeypatch.setattr(model, "encode", lambda x: (seen.append(x), encode(x))[1])
    grey = torch.full((2000, 1, 28, 28), 0.5)
    model.train()(grey[:1000], torch.Generator().manual_seed(0))
    deviations = seen[0].flatten(1).std(1)
    assert deviations.max() < 0.32 and deviations.mean() == pytest.approx(0.15, abs=0.02)
    model.eval()(digits.test.images[:8])
    assert torch.equal(seen[1], digits.test.images[:8])


@pytest.mark.parametrize("name", ["vae", "ae12", "ae32 noisy code", "vae denoising"])
def test_a_finished_run_is_found(digits, few, name, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "RUNS", tmp_path)
    split = utils.Split(few[0], digits.train.labels[: len(few[0])])
    data = utils.Data("digits", split, utils.Split(few[1], None), digits.test)
    first = measure.train(data, name, 3, epochs=1)
    monkeypatch.setattr(utils, "_train_epoch", None)  # training again would fail
    again = measure.train(data, name, 3, epochs=1)
    assert type(again) is measure.MODELS[name].model
    assert [path.name for path in tmp_path.glob("*.safetensors")] == [
        f"{name.replace(' ', '_')}_seed3_best.safetensors"
    ]
    for tensor, like in zip(again.state_dict().values(), first.state_dict().values(), strict=True):
        assert torch.equal(tensor, like)


def test_anomalies_that_are_corruptions_are_the_same_images(digits):
    for level, anomaly in measure.SCORED.items():
        corrupted = utils.corrupt(digits.test.images, *measure.LEVELS[level], seed=5)
        expected = digits.test.images
        if anomaly != "clean":
            expected = utils.ANOMALIES[anomaly](digits.test.images, 5)
        assert torch.equal(corrupted, expected)


def test_every_level_is_measured_and_one_of_each_kind_optimised():
    assert len(measure.LEVELS) == 25
    kinds = [measure.LEVELS[level][0] for level in measure.OPTIMISED if level != "clean"]
    assert kinds == list(utils.CORRUPTIONS)


def test_foreign_images_are_like_mnist_and_repeat(digits):
    for images, again in (
        (measure.letters(), measure.letters()),
        (measure.strokes(20, seed=1), measure.strokes(20, seed=1)),
    ):
        utils._check_images(images)
        assert torch.equal(images, again)
        assert len(images.flatten(1).unique(dim=0)) > 0.95 * len(images)
        rows = (images > 0).any(3).sum((1, 2))
        columns = (images > 0).any(2).sum((1, 2))
        assert (torch.maximum(rows, columns) >= 19).all() and rows.max() <= 20
    assert len(measure.letters()) == 12 * 38


def test_a_line_goes_through_the_middle(digits):
    lines = measure.line_through(torch.zeros(500, 1, 28, 28), seed=0)
    assert (lines[:, 0, 13:15, 13:15].amax((1, 2)) == 1).all()
    length = (lines > 0).any(3).sum((1, 2)).square() + (lines > 0).any(2).sum((1, 2)).square()
    assert (length.sqrt() > 20).all()
    struck = measure.line_through(digits.test.images[:50], seed=0)
    assert (struck >= digits.test.images[:50]).all()


@pytest.fixture
def small(digits, monkeypatch):
    """A data set of 12 test and 20 validation images, and a mixture of two components."""
    monkeypatch.setattr(measure, "NUM_COMPONENTS", 2)
    foreign = {
        "scikit-learn's digits": lambda x, seed: x[:7],
        "letters": lambda x, seed: measure.strokes(9, seed=9),
        "random strokes": lambda x, seed: measure.strokes(8, seed),
        "line through": measure.line_through,
    }
    monkeypatch.setattr(measure, "FOREIGN", foreign)
    test = utils.Split(digits.test.images[:12], digits.test.labels[:12])
    val = utils.Split(digits.val.images[:20], digits.val.labels[:20])
    train = utils.Split(digits.train.images[:300], digits.train.labels[:300])
    return utils.Data("digits", train, val, test)


def test_errors_and_scores_are_those_of_utils(small, tmp_path):
    torch.manual_seed(0)
    model = utils.VAE(latent_dim=4).eval()
    arrays = measure.measure_images(small, model, seed=3)
    test = small.test.images
    blurred = utils.corrupt(test, "blur", 1.5, 3)
    errors = utils.squared_error(model.reconstruct(blurred), test)
    np.testing.assert_allclose(arrays["error"]["blur 1.5"], errors, rtol=1e-5)
    np.testing.assert_allclose(arrays["input"]["blur 1.5"], utils.squared_error(blurred, test))
    mixture = measure.mixture_of(model, small, 3, 2)
    for kind in ("mirrored", "noisy", "occluded", "line through"):
        make = {**utils.ANOMALIES, **measure.FOREIGN}[kind]
        images = make(test, 3)
        scores = utils.anomaly_score(model, images)
        np.testing.assert_allclose(arrays["reconstruction"][kind], scores, rtol=1e-5)
        codes, _ = utils.posterior(model, images)
        densities = utils.density_score(mixture, codes)
        np.testing.assert_allclose(arrays["density"][kind], densities, rtol=1e-5)
    measure.save_arrays(arrays, tmp_path / "runs" / "x.npz")
    loaded = measure.load_arrays(tmp_path / "runs" / "x.npz")
    assert loaded.keys() == arrays.keys()
    for quantity, kinds in arrays.items():
        assert loaded[quantity].keys() == kinds.keys()
        for kind, values in kinds.items():
            np.testing.assert_array_equal(loaded[quantity][kind], values)


def test_summary_and_comparison_of_made_up_arrays():
    rng = np.random.default_rng(0)

    def arrays(shift):
        scores = {kind: rng.normal(2 + shift, 1, 400) for kind in measure.KINDS}
        scores["clean"] = rng.normal(0, 1, 400)
        scores["validation"] = np.arange(100.0) / 50  # its quantile of 99 % is 1.9602
        errors = {"clean": np.full(400, 5 - shift), "noise 0.3": rng.normal(9 - shift, 1, 400)}
        return {
            "input": {"clean": np.zeros(400), "noise 0.3": np.full(400, 8.5)},
            "error": errors,
            "optimised": {"noise 0.3": np.full(400, 3 - shift)},
            "reconstruction": scores,
            "density": scores,
        }

    better = arrays(1.0)
    figures = measure.summarise(better)
    flagged = np.mean(better["density"]["mirrored"] > 1.9602)
    assert figures["flagged density"]["mirrored"] == pytest.approx(flagged)
    assert figures["error"]["clean"] == pytest.approx(4.0)
    vae = [arrays(1.0) for _ in range(3)]
    other = [arrays(0.0) for _ in range(3)]
    errors = measure.compare_errors(vae, other, "error")["noise 0.3"]
    assert errors["standing"] == "ahead"
    assert np.mean(errors["difference"]) == pytest.approx(-1, abs=0.15)
    assert errors["standard error"][0] == pytest.approx((2 / 400) ** 0.5, rel=0.1)
    areas = measure.compare_scores(other, vae, "density")["letters"]
    assert areas["standing"] == "behind" and areas["welch p"] < 0.05
    nothing = [measure.as_if_a_model(one) for one in vae]
    assert nothing[0]["error"]["noise 0.3"].mean() == 8.5
    assert measure.compare_errors(vae, nothing, "error")["clean"]["standing"] == "behind"


def test_figures_of_two_seeds_stand_beside_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "FOLDER", tmp_path)
    measure.keep({"b": np.float32(0.1234567), "c": [1, None, "text"]}, "test", "vae", 1)
    measure.keep({"b": torch.tensor(2.0)}, "test", "vae", 0)
    expected = {"0": {"b": 2.0}, "1": {"b": 0.12346, "c": [1, None, "text"]}}
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


def test_from_measuring_to_the_card(small, tmp_path, monkeypatch):
    """All that the pages show is written by some command, under the names that they ask for."""

    def untrained(data, name, seed):
        torch.manual_seed(seed)
        recipe = measure.MODELS[name]
        return recipe.model(**recipe.arguments).eval()

    monkeypatch.setattr(measure, "FOLDER", tmp_path)
    monkeypatch.setattr(measure, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(measure, "train", untrained)
    monkeypatch.setattr(measure, "MIXTURE_IMAGES", 60)
    monkeypatch.setattr(measure, "COMPONENTS", (1, 2))
    monkeypatch.setattr(measure, "TUNING_IMAGES", 10)
    monkeypatch.setattr(utils, "optimize_codes", lambda model, x: utils.posterior(model, x)[0])
    log_likelihood = utils.log_likelihood
    few_samples = lambda model, x, n, seed=0: log_likelihood(model, x, 2, seed)  # noqa: E731
    monkeypatch.setattr(utils, "log_likelihood", few_samples)
    on_demand = measure.digits_on_demand
    few_digits = lambda *arguments: on_demand(*arguments, n=4, num_components=1)  # noqa: E731
    monkeypatch.setattr(measure, "digits_on_demand", few_digits)
    monkeypatch.setattr(measure, "draw_from", lambda mixture, model, n, seed: model.sample(n))

    for name in [*measure.THREE_SEEDS, "ae8"]:
        measure.measure_test(small, name, 0)
    for name in ("vae", "ae12", "ae32"):
        measure.measure_scores(small, name, 0)
    measure.measure_likelihood(small, "vae", 0)
    measure.compare(measure.THREE_SEEDS, [0])
    measure.measure_samples(small, ["vae", "ae12"], [0])
    for name in ("vae", "ae12", "ae32"):
        for digit in range(10):
            measure.keep(0.5, "left out, seed 0", name, digit)
    measure.keep({"epochs": 20}, "benchmark", "cpu", 0)

    reference = measure.read_reference()
    for name in card.TABLES:
        assert not card.written(name, reference).startswith(card.NOT_MEASURED), name
    numbers = card.numbers(reference)
    assert numbers["ahead of nothing, error"].endswith(" of 6")
    assert numbers["vae without 1"] == "0.50" and "vae on demand" in numbers


# ------------------------------------------ Card ------------------------------------------


@pytest.mark.parametrize(
    "standings, expected",
    [
        (["ahead"] * 4, "ahead"),
        (["ahead"] * 3 + ["undecided"], "ahead"),
        (["ahead"] * 3 + ["behind"], "undecided"),
        (["ahead"] * 2 + ["undecided"] * 2, "undecided"),
        (["undecided"] + ["behind"] * 3, "behind"),
        (["ahead"], "ahead"),
        (["undecided"], "undecided"),
    ],
)
def test_a_kind_counts_by_most_of_its_levels_and_none_against(standings, expected):
    assert card.standing_of_kind(standings) == expected


def test_cells():
    assert card.spread([1.0, 2.0, 3.0], 1) == "2.0 ± 1.0"
    assert card.spread([1.234], 2) == "1.23"
    assert card.bold_best(["4.8 ± 0.3", "4.6", "5.0 ± 0.1"]) == [
        "4.8 ± 0.3",
        "**4.6**",
        "5.0 ± 0.1",
    ]
    assert card.bold_best(["0.9", "1.0", "1.0"], True) == ["0.9", "**1.0**", "**1.0**"]
    figures = {
        "difference": [-1.0, -2.0],
        "standard error": [0.2, 0.1],
        "welch p": 0.0301,
        "standing": "ahead",
    }
    assert card.difference(figures, 1) == "**-1.5** (0.2; .030)"


def test_a_table_without_figures_is_a_note():
    assert card.written("test set", {"test": {}}).startswith(card.NOT_MEASURED)
    with pytest.raises(KeyError):
        card.written("no such table", {})


def test_tables_are_written_where_the_page_says(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    place = "<!-- table: one -->\n{}<!-- end -->\ntext\n<!-- table: two -->\n{}<!-- end -->\n"
    monkeypatch.setattr(card, "read_reference", lambda: {})
    frame = card.pd.DataFrame([["x", "1"]], columns=["", "n"])
    monkeypatch.setattr(card, "TABLES", {"one": lambda m: "1 nat", "two": lambda m: frame})
    expected = place.format("1 nat\n", "|  | n |\n| --- | --- |\n| x | 1 |\n")
    for before in (place.format("", ""), place.format("old\n", "old\n\nold\n"), expected):
        page.write_text(before)
        assert card.filled(page) == expected


def test_a_misquoted_number_is_found(monkeypatch):
    monkeypatch.setattr(card, "numbers", lambda m: {"loss": "90.94 ± 0.12", "won": "4 of 6"})
    monkeypatch.setattr(card, "all_levels", lambda m: ["noise 0.3"])
    page = (
        "Free: 7.5.\n<!-- numbers: loss; won -->\nAt noise 0.3 {}, ahead at {} kinds.\n<!-- end -->"
    )
    assert card.misquoted(page.format("90.94 ± 0.12", "4 of 6"), {}) == []
    assert card.misquoted(page.format("90.94 ± 0.13", "4 of 6"), {}) == [
        "loss is 90.94 ± 0.12, not 90.94 ± 0.13"
    ]
    assert len(card.misquoted(page.format("90.94 ± 0.12", "five"), {})) == 1
