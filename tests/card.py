"""What the pages say about measured numbers, written from models_mnist/reference.json.

    python tests/measure.py card

A page says where a table or a paragraph goes by two comments, <!-- table: NAME --> or
<!-- text: NAME --> and <!-- end -->; what stands between them is written here. Nothing that a
command measures is typed by hand.
"""

import json
import re
import statistics
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", ROOT / "models_mnist" / "README.md")
NAMES = {
    "vae": "VAE",
    "ae12": "AE 12",
    "ae32": "AE 32",
    "ae32 noisy code": "AE 32, noisy code",
    "ae32 denoising": "AE 32, denoising",
    "vae denoising": "VAE, denoising",
    "vae 2d": "VAE, 2 dimensions",
    "ae8": "AE 8",
    "ae16": "AE 16",
    "vae beta 0.25": "VAE, β = 0.25",
    "vae beta 4": "VAE, β = 4",
    "nothing": "doing nothing",
}
THREE_SEEDS = list(NAMES)[:6]
ONE_SEED = list(NAMES)[6:11]
MAIN = THREE_SEEDS[:4]  # in the README
SMALL = THREE_SEEDS[:3]
SCORES = ("reconstruction", "density")
NOT_MEASURED = "*Not measured yet:"


# ---------------------------------------- Cells ----------------------------------------


def per_seed(m, section, name, *keys):
    """A number of a model, seed by seed; KeyError if there is none."""
    found = []
    for figures in m[section][name].values():
        for key in keys:
            figures = figures[key]
        found.append(figures)
    if not found:
        raise KeyError(name)
    return found


def mean(m, section, name, *keys):
    return statistics.mean(per_seed(m, section, name, *keys))


def measured(m, section, names):
    """Those of the models of which a section knows something; KeyError if it is not there."""
    return [name for name in names if name in m[section]]


def spread(values, digits=1):
    """Mean and standard deviation over seeds; of one seed, the number alone."""
    text = f"{statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return text
    return f"{text} ± {statistics.stdev(values):.{digits}f}"


def percent(values, digits=1):
    return spread([100 * value for value in values], digits)


def bold_best(cells, higher_is_better=False):
    """Cells such as "4.8 ± 0.3", those with the best mean in bold."""
    means = [float(cell.split(" ± ")[0]) for cell in cells]
    best = max(means) if higher_is_better else min(means)
    marked = []
    for cell, value in zip(cells, means, strict=True):
        marked.append(f"**{cell}**" if value == best else cell)
    return marked


def markdown(table):
    """A DataFrame of text as a Markdown table."""
    lines = [table.columns, ["---"] * len(table.columns), *table.to_numpy()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# ---------------------------------------- Counting ----------------------------------------


def kind_of(level):
    """ "salt and pepper 0.1" -> "salt and pepper"."""
    return level.rpartition(" ")[0]


def standings_of(m, name, quantity):
    """{level or kind: where the VAE stands against a model}, without the clean images."""
    figures = m["compare"][name][quantity]
    return {key: figures[key]["standing"] for key in figures if key != "clean"}


def levels_by_kind(standings, which):
    """At how many levels of each kind of corruption a model stands so: {kind: count}."""
    return Counter(kind_of(level) for level, standing in standings.items() if standing == which)


def listed(names):
    """ "noise, blur and rotation"."""
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} and {names[-1]}"


def in_brackets(names):
    """ " (noise and blur)", or nothing for no names."""
    return f" ({listed(names)})" if names else ""


# ---------------------------------------- Tables ----------------------------------------
# Each takes the content of reference.json and returns a DataFrame of text.


def test_set(m):
    keys = {"-ELBO": "loss", "its BCE": "bce", "its KL": "kl"}
    return losses(m, "test", keys, "10,000 images")


def likelihood(m):
    keys = {
        "-ELBO": "loss grey",
        "-log p(x)": "nll grey",
        "-ELBO, binarised": "loss binarised",
        "-log p(x), binarised": "nll binarised",
    }
    return losses(m, "likelihood", keys, "1,000 images")


def losses(m, section, keys, title):
    """Nats per image of the VAE with both uncertainties, by the name of a row."""
    rows = []
    for text, key in keys.items():
        over_images = ""
        if key.startswith(("loss", "nll")):
            errors = per_seed(m, section, "vae", f"{key}, standard error")
            over_images = f"{max(errors):.2f}"
        rows.append([text, spread(per_seed(m, section, "vae", key), 2), over_images])
    columns = ["mean ± spread over seeds, nats", "standard error over images"]
    return pd.DataFrame(rows, columns=[title, *columns])


def models(m):
    rows = []
    for name in measured(m, "test", [*THREE_SEEDS, *ONE_SEED]):
        bce, kl, error, active = (
            spread(per_seed(m, "test", name, *keys), digits)
            for keys, digits in (
                (["bce"], 1),
                (["kl"], 1),
                (["error", "clean"], 2),
                (["active units"], 0),
            )
        )
        labels = percent(per_seed(m, "test", name, "labels by 5 nearest codes"))
        rows.append([NAMES[name], bce, kl, error, active, labels])
    columns = ["model", "BCE, nats", "KL, nats", "squared error"]
    return pd.DataFrame(rows, columns=[*columns, "active units", "right label, %"])


def robustness(m):
    """Where the VAE stands against each model: counts of levels, and of which kinds."""
    rows = []
    for name in measured(m, "compare", [*THREE_SEEDS[1:], "nothing"]):
        standings = standings_of(m, name, "error")
        cells = []
        for which in ("ahead", "behind"):
            kinds = levels_by_kind(standings, which)
            counts = ", ".join(f"{kind} {count}" for kind, count in kinds.items())
            total = sum(kinds.values())
            cells.append(f"**{total}**: {counts}" if total else "**0**")
        rows.append([NAMES[name], *cells])
    return pd.DataFrame(rows, columns=["VAE against", "ahead at", "behind at"])


def differences(m, quantity, digits):
    """The VAE's own numbers, then the VAE less each other model.

    Bold where the VAE is ahead, italic where it is behind.
    """
    others = measured(m, "compare", MAIN[1:])
    rows = []
    keys = m["compare"][others[0]][quantity]
    if quantity == "error":
        others.append("nothing")
    for key in keys:
        own = spread(per_seed(m, "test", "vae", quantity, key), digits)
        cells = [difference(m["compare"][name][quantity][key], digits) for name in others]
        rows.append([key, own, *cells])
    names = [f"less {NAMES[name]}" for name in others]
    return pd.DataFrame(rows, columns=["", "VAE", *names])


def difference(figures, digits):
    """ "**-18.9** (0.2)": mean over seeds (largest standard error over images)."""
    value = statistics.mean(figures["difference"])
    error = max(figures["standard error"])
    mark = {"ahead": "**", "behind": "*", "undecided": ""}[figures["standing"]]
    return f"{mark}{value:+.{digits}f}{mark} ({error:.{digits}f})"


def anomaly_kinds(m):
    """At how many kinds of anomaly the VAE stands where, and at which it is behind."""
    rows = []
    for score in SCORES:
        for name in measured(m, "compare", THREE_SEEDS[1:]):
            standings = standings_of(m, name, f"auroc {score}")
            ahead = list(standings.values()).count("ahead")
            behind = [kind for kind, standing in standings.items() if standing == "behind"]
            text = f"**{len(behind)}**: {', '.join(behind)}" if behind else "**0**"
            rows.append([NAMES[name], score, f"**{ahead}** of {len(standings)}", text])
    return pd.DataFrame(rows, columns=["VAE against", "score", "ahead at", "behind at"])


def decisions(m):
    """Shares flagged; "clean" should be 1 %, everything else 100 %."""
    columns = {}
    for name in measured(m, "test", SMALL):
        columns[f"{NAMES[name]}, reconstruction"] = (name, "reconstruction")
    columns["VAE, density"] = ("vae", "density")
    rows = []
    for kind in m["test"]["vae"]["0"]["flagged reconstruction"]:
        cells = [
            percent(per_seed(m, "test", name, f"flagged {score}", kind))
            for name, score in columns.values()
        ]
        rows.append([kind, *cells])
    return pd.DataFrame(rows, columns=["flagged, %", *columns])


def scores(m):
    """The choice of the score: mean AUROC over the tuned kinds, then what it costs elsewhere."""
    models = measured(m, "scores", SMALL)
    areas = {}
    for name in models:
        candidates = list(m["scores"][name]["0"]["auroc"])
        cells = [spread(per_seed(m, "scores", name, "auroc", one, "mean"), 3) for one in candidates]
        areas[name] = dict(zip(candidates, bold_best(cells, higher_is_better=True), strict=True))
    costs = m["scores"]["vae"]["0"]["costs"]
    kinds = list(next(iter(costs.values())))
    rows = []
    for candidate in areas["vae"]:
        cells = [areas[name].get(candidate, "") for name in models]
        for kind in kinds:
            cells.append(spread(per_seed(m, "scores", "vae", "costs", candidate, kind), 3))
        rows.append([candidate, *cells])
    columns = [f"{NAMES[name]}, mean of seven" for name in models]
    columns += [f"VAE, {kind}" for kind in kinds]
    return pd.DataFrame(rows, columns=["score, AUROC ↑", *columns])


def mixtures(m):
    sizes = list(m["scores"]["vae"]["0"]["mixture"])
    rows = []
    for name in measured(m, "scores", SMALL):
        cells = [spread(per_seed(m, "scores", name, "mixture", size)) for size in sizes]
        rows.append([NAMES[name], *cells])
    return pd.DataFrame(rows, columns=["components", *sizes])


def left_out(m):
    runs = m["left out, seed 0"]
    digits = list(runs["vae"])
    rows = []
    for name in measured(m, "left out, seed 0", SMALL):
        areas = [runs[name][digit] for digit in digits]
        rows.append([NAMES[name], *(f"{area:.2f}" for area in [*areas, statistics.mean(areas)])])
    return pd.DataFrame(rows, columns=["digit left out, AUROC ↑", *digits, "mean"])


def samples(m):
    images = m["samples"]["images"]["0"]
    rows = []
    for key in ("test", "validation"):
        quality = {measure: [value] for measure, value in images[key].items()}
        rows.append(["", f"{key} images", *sample_cells(quality)])
    for name in measured(m, "samples", SMALL):
        for source in m["samples"][name]["0"]:
            quality = {}
            for measure in images["test"]:
                quality[measure] = per_seed(m, "samples", name, source, measure)
            rows.append([NAMES[name], source, *sample_cells(quality)])
    columns = ["model", "images", "recognised, % ↑", "Fréchet distance ↓"]
    return pd.DataFrame(rows, columns=[*columns, "distance to nearest training image"])


def sample_cells(quality):
    return [
        percent(quality["recognised"]),
        spread([abs(value) for value in quality["frechet"]]),  # -0.0 of the test images
        spread(quality["nearest"], 2),
    ]


def edits(m):
    """The validation loss after each edit of utils.py, the lowest first."""
    quick = m["edits, mnist5k"]
    full = {"none": {"0": m["test"]["vae"]["0"]}, **m["edits, mnist"]}
    rows = []
    for name in sorted(full, key=lambda name: full[name]["0"]["validation loss"]):
        row = [quick[name]["0"]["edit"]]
        for runs in (full, quick):
            row.append(spread([figures["validation loss"] for figures in runs[name].values()]))
        rows.append(row)
    return pd.DataFrame(rows, columns=["edit", "in full", "under a minute"])


def benchmark(m):
    runs = {name: of_seeds["0"] for name, of_seeds in m["benchmark"].items()}
    keys = list(next(iter(runs.values())))
    rows = [[key, *(str(figures[key]) for figures in runs.values())] for key in keys]
    return pd.DataFrame(rows, columns=["", *runs])


def results(m):
    """The one table of the README."""
    names = measured(m, "test", MAIN)
    rows = []
    for level in ("clean", "noise 0.3", "occlusion 12", "blur 1.5", "rotation 20"):
        cells = [spread(per_seed(m, "test", name, "error", level)) for name in names]
        rows.append([f"{level}, error ↓", *bold_best(cells)])
    keys = ("auroc reconstruction", "letters")
    cells = [spread(per_seed(m, "test", name, *keys), 3) for name in names]
    rows.append(["letters, AUROC ↑", *bold_best(cells, higher_is_better=True)])
    return pd.DataFrame(rows, columns=["", *(NAMES[name] for name in names)])


# ---------------------------------------- Texts ----------------------------------------
# Sentences that are right whatever the numbers say.


OVER_TRAININGS = {
    1: "one training",
    2: "mean and standard deviation over two trainings",
    3: "mean and standard deviation over three trainings",
}


def headline(m):
    losses = per_seed(m, "test", "vae", "loss")
    return (
        f"**{spread(losses, 2)} nats per test image** after 20 epochs (-ELBO; "
        f"{OVER_TRAININGS[len(losses)]})."
    )


def dense(m):
    """The dense VAE beside this one, from the benchmark with the most threads."""
    figures = last_benchmark(m)
    loss = figures["test loss of the dense VAE, nats"]
    ours = 20 * figures["seconds per epoch"] / 60
    theirs = 20 * figures["seconds per epoch of the dense VAE"] / 60
    reached = figures["seconds until that loss"]
    text = (
        f"A dense 784-400-20 VAE reaches {loss:.1f} in 20 epochs. On {figures['threads']} threads "
        f"of a CPU ours takes {ours:.0f} minutes, the dense one {theirs:.0f}"
    )
    if reached is None:
        return f"{text}."
    return f"{text}; ours is below the other's last validation loss after {reached:.0f} seconds."


def last_benchmark(m):
    runs = [of_seeds["0"] for of_seeds in m["benchmark"].values()]
    return max(runs, key=lambda figures: figures["threads"])


def quick(m):
    figures = last_benchmark(m)
    return (
        f"After {figures['4,000 images: seconds']:.0f} seconds, 20 epochs of 4,000 images: "
        f"**{figures['4,000 images: test loss, nats']:.1f} nats** on MNIST's 10,000 test images. "
        "The notebook itself tests on the other 500 of its 5,000."
    )


def on_demand(m):
    """The share of the digits drawn to order that are taken for what was asked for."""
    parts = []
    for name in measured(m, "digits on demand", SMALL):
        shares = {}
        for digit in range(10):
            shares[digit] = mean(m, "digits on demand", name, str(digit))
        worst = min(shares, key=shares.get)
        all_digits = percent(per_seed(m, "digits on demand", name, "mean"))
        parts.append(f"{NAMES[name]} {all_digits} % (the {worst} {100 * shares[worst]:.1f} %)")
    return f"Recognised as the digit asked for, and in brackets the worst: {'; '.join(parts)}."


def verdict(m):
    """Two paragraphs: robustness, then anomalies."""
    return f"{robustness_text(m)}\n\n**Anomalies.** {anomalies_text(m)}"


def robustness_text(m):
    items = []
    for name in measured(m, "compare", [*MAIN[1:], "nothing"]):
        standings = standings_of(m, name, "error")
        parts = []
        for which in ("ahead", "behind"):
            kinds = levels_by_kind(standings, which)
            most = [kind for kind, count in kinds.items() if count >= 3]
            mostly = f", mostly {listed(most)}" if most else ""
            parts.append(f"{which} at {sum(kinds.values())}{mostly}")
        items.append(f"- {label(m, name)}: {'; '.join(parts)}")
    own = mean(m, "test", "vae", "error", "clean")
    text = (
        f"**{answer(m)}** The VAE beside others, at {len(standings)} levels of corruption, four of "
        f"each kind (in brackets the error on clean digits; the VAE's is {own:.1f}):\n\n"
    )
    text += "\n".join(items)
    if "ae32 denoising" in m["test"]:
        text += f"\n\n{denoising_text(m)}"
    return text


def label(m, name):
    """ "AE 32 (1.8)", the number being the error on clean digits."""
    if name == "nothing":
        return "doing nothing"
    return f"{NAMES[name]} ({mean(m, 'test', name, 'error', 'clean'):.1f})"


def answer(m):
    """Is the VAE more robust than plain autoencoders of the same network? In a few words."""
    standings = []
    for name in measured(m, "compare", ("ae12", "ae32")):
        standings += standings_of(m, name, "error").values()
    if "ahead" in standings and "behind" in standings:
        return "It depends on the corruption, and on what you compare with."
    if "ahead" in standings:
        return "Yes, wherever there is a difference."
    if "behind" in standings:
        return "No: it is behind wherever there is a difference."
    return "There is no difference beyond the two uncertainties."


def denoising_text(m):
    own = mean(m, "test", "vae", "error", "noise 0.3")
    trained = mean(m, "test", "ae32 denoising", "error", "noise 0.3")
    errors = f"at noise 0.3 its error is {trained:.1f}, the VAE's {own:.1f}."
    if trained > own:
        return f"Not even an autoencoder trained to remove noise resists it better: {errors}"
    better = "far better" if trained < own / 2 else "better"
    return f"An autoencoder trained to remove noise resists it {better}: {errors}"


def anomalies_text(m):
    items = []
    for name in measured(m, "compare", MAIN[1:]):
        standings = standings_of(m, name, "auroc reconstruction")
        ahead = list(standings.values()).count("ahead")
        behind = [kind for kind, standing in standings.items() if standing == "behind"]
        items.append(
            f"- {NAMES[name]}: ahead at {ahead}, behind at {len(behind)}{in_brackets(behind)}"
        )
    text = (
        f"The VAE beside others, at {len(standings)} kinds of anomaly, by the AUROC of the anomaly "
        "score:\n\n"
    )
    text += "\n".join(items)
    if "vae" in m.get("left out, seed 0", {}):
        text += f"\n\n{left_out_text(m)}"
    return text


def left_out_text(m):
    runs = m["left out, seed 0"]
    areas = runs["vae"]
    others = []
    for name in measured(m, "left out, seed 0", SMALL[1:]):
        others.append(f"{NAMES[name]}: {statistics.mean(runs[name].values()):.2f}")
    hardest = min(areas, key=areas.get)
    return (
        "A digit left out of training (five epochs, one seed) is told from the others with a "
        f"mean AUROC of {statistics.mean(areas.values()):.2f} ({', '.join(others)}). The VAE's "
        f"hardest is the {hardest}: {areas[hardest]:.2f}."
    )


# ---------------------------------------- Pages ----------------------------------------


class Place(NamedTuple):
    """What makes a table or a text, and the commands of measure.py that measure its numbers."""

    make: Callable
    command: str


PLACES = {
    "headline": Place(headline, "measure.py test"),
    "dense": Place(dense, "benchmark.py --keep"),
    "quick": Place(quick, "benchmark.py --keep"),
    "results": Place(results, "measure.py test"),
    "verdict": Place(verdict, "measure.py compare"),
    "edits": Place(edits, "measure.py edits"),
    "test set": Place(test_set, "measure.py test"),
    "likelihood": Place(likelihood, "measure.py likelihood"),
    "models": Place(models, "measure.py test"),
    "robustness": Place(robustness, "measure.py compare"),
    "differences": Place(lambda m: differences(m, "error", 1), "measure.py compare"),
    "anomaly kinds": Place(anomaly_kinds, "measure.py compare"),
    "anomalies, reconstruction": Place(
        lambda m: differences(m, "auroc reconstruction", 3), "measure.py compare"
    ),
    "decisions": Place(decisions, "measure.py test"),
    "scores": Place(scores, "measure.py scores"),
    "mixtures": Place(mixtures, "measure.py scores"),
    "left out": Place(left_out, "measure.py left-out"),
    "samples": Place(samples, "measure.py samples"),
    "digits on demand": Place(on_demand, "measure.py samples"),
    "benchmark": Place(benchmark, "benchmark.py --keep"),
}
MARKED = re.compile(r"(<!-- (?:table|text): ([^\n]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def read_reference():
    path = ROOT / "models_mnist" / "reference.json"
    if not path.exists():
        return {}
    return json.loads(path.read_text(encoding="utf-8"))


def filled(page, m):
    """The text of a page with its tables and paragraphs as they should be."""

    def fill(place):
        return f"{place[1]}{written(place[2], m)}\n{place[3]}"

    return MARKED.sub(fill, page.read_text(encoding="utf-8"))


def written(name, m):
    """A table or text as it stands on a page, or a note where its numbers are not there yet."""
    place = PLACES[name]
    try:
        made = place.make(m)
    except KeyError as missing:
        print(f"{name!r} is not written: reference.json has no {missing}")
        return f"{NOT_MEASURED} `python tests/{place.command}`*"
    return made if isinstance(made, str) else markdown(made)


def write():
    m = read_reference()
    for page in PAGES:
        text = filled(page, m)
        page.write_text(text, encoding="utf-8")
