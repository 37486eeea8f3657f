"""The tables of README.md and of the model card, from models_mnist/reference.json.

    python tests/measure.py card

A page says where a table goes by two comments, <!-- table: NAME --> and <!-- end -->; what stands
between them is written here. Prose is written by hand. Where it quotes measured numbers, it stands
between <!-- numbers: KEY; KEY --> and <!-- end -->, the keys being those of `numbers` in the order
of the text, and `misquoted` tells which of its numbers are not those that were measured.
"""

import json
import re
import statistics
from pathlib import Path

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
    "ae8": "AE 8",
    "ae16": "AE 16",
    "vae beta 0.25": "VAE, β = 0.25",
    "vae beta 4": "VAE, β = 4",
    "nothing": "doing nothing",
}
MAIN = list(NAMES)[:6]  # three seeds each
OTHERS = list(NAMES)[6:10]  # one seed each
SMALL = MAIN[:3]
STANDINGS = ("ahead", "undecided", "behind")
SCORES = ("reconstruction", "density")
NOT_MEASURED = "*Not measured yet:"


# ---------------------------------------- Cells ----------------------------------------


def per_seed(m, section, name, *keys):
    """A number of a model, seed by seed."""
    found = []
    for figures in m[section][name].values():
        for key in keys:
            figures = figures[key]
        found.append(figures)
    return found


def spread(values, digits=1):
    """Mean and standard deviation over seeds; of one seed, the number alone."""
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values):.{digits}f}"


def percent(values, digits=1):
    return spread([100 * value for value in values], digits)


def bold_best(cells, higher_is_better=False):
    """Cells such as "4.8 ± 0.3", those with the best mean in bold."""
    means = [float(cell.split(" ± ")[0]) for cell in cells]
    best = max(means) if higher_is_better else min(means)
    marked = []
    for cell, mean in zip(cells, means, strict=True):
        marked.append(f"**{cell}**" if mean == best else cell)
    return marked


def markdown(table):
    """A DataFrame of text as a Markdown table."""
    lines = [table.columns, ["---"] * len(table.columns), *table.to_numpy()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# ---------------------------------------- Counting ----------------------------------------


def kind_of(level):
    """ "salt and pepper 0.1" -> "salt and pepper"."""
    return level.rpartition(" ")[0]


def standing_of_kind(standings):
    """Where a model stands at one kind of corruption, by its standings at the kind's levels.

    "ahead": ahead at more than half of the levels and behind at none. "behind" likewise.
    """
    ahead = standings.count("ahead")
    behind = standings.count("behind")
    if behind == 0 and ahead > len(standings) / 2:
        return "ahead"
    if ahead == 0 and behind > len(standings) / 2:
        return "behind"
    return "undecided"


def standings_of_kinds(comparison):
    """{kind of corruption: standing} from the comparison of one model at every level."""
    levels = {}
    for level, figures in comparison.items():
        if level != "clean":
            levels.setdefault(kind_of(level), []).append(figures["standing"])
    return {kind: standing_of_kind(standings) for kind, standings in levels.items()}


def listed(standings, which):
    """The names that stand so, after their number: "2: blur, rotation"."""
    names = [name for name, standing in standings.items() if standing == which]
    if not names:
        return "0"
    return f"{len(names)}: {', '.join(names)}"


# ---------------------------------------- Tables ----------------------------------------
# Each takes the content of reference.json and returns text or a DataFrame of text.


def headline(m):
    loss = spread(per_seed(m, "test", "vae", "loss"), 2)
    return (
        f"**{loss} nats per test image** (-ELBO; mean and standard deviation over three seeds) "
        "after 20 epochs."
    )


def test_set(m):
    rows = []
    for text, section, key, digits in (
        ("-ELBO, 10,000 images, 10 samples of z each", "test", "loss", 2),
        ("of it BCE", "test", "bce", 2),
        ("of it KL", "test", "kl", 2),
        ("active units, of 32", "test", "active units", 1),
        ("-ELBO, 1,000 images", "likelihood", "loss grey", 2),
        ("-log p(x), the same images", "likelihood", "nll grey", 2),
        ("-ELBO, the same images binarised", "likelihood", "loss binarised", 2),
        ("-log p(x), the same images binarised", "likelihood", "nll binarised", 2),
    ):
        values = per_seed(m, section, "vae", key)
        each = ", ".join(f"{value:.{digits}f}" for value in values)
        over_images = ""
        if key.startswith(("loss", "nll")):
            errors_of_seeds = per_seed(m, section, "vae", f"{key}, standard error")
            over_images = f"{max(errors_of_seeds):.{digits}f}"
        rows.append([text, spread(values, digits), each, over_images])
    columns = ["nats per image", "mean ± spread over seeds", "by seed, from 0"]
    return pd.DataFrame(rows, columns=[*columns, "standard error over images"])


def models(m):
    rows = []
    for name in MAIN:
        rows.append(
            [
                NAMES[name],
                ", ".join(m["test"][name]),
                spread(per_seed(m, "test", name, "bce")),
                spread(per_seed(m, "test", name, "kl")),
                spread(per_seed(m, "test", name, "error", "validation"), 2),
                spread(per_seed(m, "test", name, "error", "clean"), 2),
                spread(per_seed(m, "test", name, "active units"), 0),
            ]
        )
    columns = ["model", "seeds", "BCE, nats", "KL, nats"]
    columns += ["squared error, validation", "squared error, test", "active units"]
    return pd.DataFrame(rows, columns=columns)


def errors(m, names, quantity, levels):
    """Squared errors of models (columns) at levels of corruption (rows), the lowest in bold."""
    rows = []
    for level in levels:
        cells = [spread(per_seed(m, "test", name, quantity, level)) for name in names]
        rows.append([level, *bold_best(cells)])
    return pd.DataFrame(rows, columns=["squared error ↓", *(NAMES[name] for name in names)])


def all_levels(m):
    return [level for level in m["test"]["vae"]["0"]["error"] if level != "validation"]


def one_pass(m):
    return errors(m, [*MAIN, "nothing"], "error", all_levels(m))


def rate_and_distortion(m):
    rows = []
    for name in ["vae", *OTHERS]:
        if name not in m["test"]:
            continue
        cells = [spread(per_seed(m, "test", name, key)) for key in ("bce", "kl")]
        active = spread(per_seed(m, "test", name, "active units"), 0)
        rows.append([NAMES[name], ", ".join(m["test"][name]), *cells, active])
    columns = ["model", "seeds", "BCE, nats", "KL, nats", "active units"]
    return pd.DataFrame(rows, columns=columns)


def optimised(m):
    """On the same 500 images: one pass above, optimised codes below."""
    names = [*MAIN, "nothing"]
    levels = list(m["test"]["vae"]["0"]["optimised"])
    before = errors(m, names, "error of the same 500", levels)
    after = errors(m, names, "optimised", levels)
    before.insert(1, "codes", "one pass")
    after.insert(1, "codes", "optimised")
    return pd.concat([before, after]).sort_index(kind="stable")


def kinds(m):
    """At how many of the six kinds of corruption the VAE stands where."""
    rows = []
    for quantity, codes in (("error", "one pass"), ("optimised", "optimised")):
        for name, comparisons in compared(m).items():
            standings = standings_of_kinds(comparisons[quantity])
            cells = [listed(standings, which) for which in STANDINGS]
            levels = [level_counts(comparisons[quantity], which) for which in ("ahead", "behind")]
            rows.append([NAMES[name], codes, *cells, *levels])
    columns = ["VAE against", "codes", "kinds ahead", "undecided", "behind"]
    columns += ["levels ahead (p < .05)", "levels behind (p < .05)"]
    return pd.DataFrame(rows, columns=columns)


def level_counts(comparison, which):
    """ "15 (11)": the levels at which a model stands so, and of these by Welch's test, too."""
    chosen = [
        figures
        for level, figures in comparison.items()
        if level != "clean" and figures["standing"] == which
    ]
    significant = [one for one in chosen if one["welch p"] is not None and one["welch p"] < 0.05]
    return f"{len(chosen)} ({len(significant)})"


def anomaly_kinds(m):
    """At how many kinds of anomaly the VAE stands where."""
    rows = []
    for score in SCORES:
        for name, comparisons in compared(m).items():
            if name == "nothing":
                continue
            figures = comparisons[f"auroc {score}"]
            standings = {kind: figures[kind]["standing"] for kind in figures}
            cells = [listed(standings, which) for which in ("ahead", "behind")]
            undecided = list(standings.values()).count("undecided")
            rows.append([NAMES[name], score, cells[0], str(undecided), cells[1]])
    columns = ["VAE against", "score", "ahead", "undecided", "behind"]
    return pd.DataFrame(rows, columns=columns)


def compared(m):
    """The comparisons with each model, in the order of the tables."""
    return {name: m["compare"][name] for name in [*MAIN[1:], "nothing"]}


def differences(m, quantity, digits):
    """The VAE less each other model; bold where the VAE is ahead, italic where it is behind."""
    others = compared(m)
    if quantity.startswith("auroc"):
        del others["nothing"]
    rows = []
    for kind in others["ae12"][quantity]:
        cells = [difference(others[name][quantity][kind], digits) for name in others]
        rows.append([kind, *cells])
    return pd.DataFrame(rows, columns=["VAE less", *(NAMES[name] for name in others)])


def difference(figures, digits):
    """ "-18.9 (0.2; .003)": mean over seeds (largest standard error over images; Welch's p)."""
    mean = statistics.mean(figures["difference"])
    error = max(figures["standard error"])
    p_text = p_value(figures["welch p"])
    mark = {"ahead": "**", "behind": "*", "undecided": ""}[figures["standing"]]
    return f"{mark}{mean:+.{digits}f}{mark} ({error:.{digits}f}; {p_text})"


def p_value(p):
    if p is None:
        return "–"
    return "<.001" if p < 0.001 else f"{p:.3f}".lstrip("0")


def anomalies(m, score, names):
    rows = []
    for kind in m["test"]["vae"]["0"][f"auroc {score}"]:
        values = [per_seed(m, "test", name, f"auroc {score}", kind) for name in names]
        if kind == "black":  # a spread would hide that one seed is at the other end
            cells = [", ".join(f"{value:.2f}" for value in of_model) for of_model in values]
        else:
            cells = [spread(of_model, 3) for of_model in values]
            cells = bold_best(cells, higher_is_better=True)
        rows.append([kind, *cells])
    return pd.DataFrame(rows, columns=["AUROC ↑", *(NAMES[name] for name in names)])


def decisions(m):
    """Shares flagged; "clean" should be 1 %, everything else 100 %."""
    rows = []
    for kind in m["test"]["vae"]["0"]["flagged reconstruction"]:
        cells = []
        for score in SCORES:
            for name in SMALL:
                cells.append(percent(per_seed(m, "test", name, f"flagged {score}", kind)))
        rows.append([kind, *cells])
    columns = ["flagged, %"]
    for score in SCORES:
        columns += [f"{NAMES[name]}, {score}" for name in SMALL]
    return pd.DataFrame(rows, columns=columns)


def scores(m):
    """The choice of the score; the best mean of each model in bold."""
    rows = []
    for name in SMALL:
        candidates = list(m["scores"][name]["0"]["auroc"])
        means = [spread(per_seed(m, "scores", name, "auroc", one, "mean"), 3) for one in candidates]
        means = bold_best(means, higher_is_better=True)
        for candidate, mean in zip(candidates, means, strict=True):
            row = [NAMES[name], candidate]
            for kind in ("mirrored", "rotated", "occluded"):
                row.append(spread(per_seed(m, "scores", name, "auroc", candidate, kind), 3))
            black = per_seed(m, "scores", name, "auroc", candidate, "black")
            row.append(", ".join(f"{value:.2f}" for value in black))
            rows.append([*row, mean])
    columns = ["model", "score, AUROC ↑", "mirrored", "rotated", "occluded", "black"]
    return pd.DataFrame(rows, columns=[*columns, "mean of seven"])


def mixtures(m):
    sizes = list(m["scores"]["vae"]["0"]["mixture"])
    rows = []
    for name in SMALL:
        cells = [spread(per_seed(m, "scores", name, "mixture", size)) for size in sizes]
        rows.append([f"{NAMES[name]}, nats ↑", *cells])
    seconds = [spread(per_seed(m, "scores", "vae", "seconds", size)) for size in sizes]
    rows.append(["seconds to fit, VAE", *seconds])
    return pd.DataFrame(rows, columns=["components", *sizes])


def samples(m):
    rows = []
    images = m["samples"]["images"]["0"]
    for key in ("test", "validation"):
        quality = {measure: [value] for measure, value in images[key].items()}
        rows.append(["", f"{key} images", *sample_cells(quality)])
    for name in MAIN:
        if name not in m["samples"]:
            continue
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


def on_demand(m):
    """The share of the digits drawn to order that are taken for what was asked for."""
    rows = []
    for name in MAIN:
        if name not in m["digits on demand"]:
            continue
        keys = m["digits on demand"][name]["0"]
        cells = [percent(per_seed(m, "digits on demand", name, key)) for key in keys]
        rows.append([NAMES[name], *cells])
    columns = ["recognised as the digit asked for, % ↑", *keys]
    return pd.DataFrame(rows, columns=columns)


def labels(m):
    """The share of test images whose label is that of their neighbours."""
    pixels = m["samples"]["images"]["0"]["labels by 5 nearest images"]
    rows = [["pixels themselves", percent([pixels])]]
    for name in MAIN:
        share = percent(per_seed(m, "test", name, "labels by 5 nearest codes"))
        rows.append([f"codes of {NAMES[name]}", share])
    return pd.DataFrame(rows, columns=["neighbours by", "right label, % ↑"])


def left_out(m):
    runs = m["left out, seed 0"]
    rows = []
    for name in SMALL:
        areas = list(runs[name].values())
        cells = [f"{area:.2f}" for area in areas]
        rows.append([NAMES[name], *cells, f"{statistics.mean(areas):.2f}"])
    return pd.DataFrame(rows, columns=["AUROC ↑, digit left out", *runs["vae"], "mean"])


def benchmark(m):
    runs = {device: figures["0"] for device, figures in m["benchmark"].items()}
    keys = []
    for figures in runs.values():
        keys += [key for key in figures if key not in keys]
    rows = []
    for key in keys:
        rows.append([key, *(str(figures.get(key, "–")) for figures in runs.values())])
    return pd.DataFrame(rows, columns=["", *runs])


def results(m):
    """The one table of the README."""
    names = [*MAIN, "nothing"]
    levels = ["clean", "noise 0.3", "occlusion 12", "blur 1.5", "rotation 20"]
    table = errors(m, names, "error", levels)
    table = table.rename(columns={"squared error ↓": ""})
    table[""] = "error ↓, " + table[""]
    areas = anomalies(m, "reconstruction", MAIN).rename(columns={"AUROC ↑": ""})
    areas = areas[areas[""] == "letters"]
    areas = areas.assign(**{"": "AUROC ↑, " + areas[""], NAMES["nothing"]: ""})
    return pd.concat([table, areas])


TABLES = {
    "headline": headline,
    "results": results,
    "test set": test_set,
    "models": models,
    "one pass": one_pass,
    "optimised": optimised,
    "kinds": kinds,
    "differences": lambda m: differences(m, "error", 1),
    "differences, optimised": lambda m: differences(m, "optimised", 1),
    "rate and distortion": rate_and_distortion,
    "anomalies, reconstruction": lambda m: anomalies(m, "reconstruction", MAIN),
    "anomalies, density": lambda m: anomalies(m, "density", MAIN),
    "anomaly kinds": anomaly_kinds,
    "anomaly differences, reconstruction": lambda m: differences(m, "auroc reconstruction", 3),
    "anomaly differences, density": lambda m: differences(m, "auroc density", 3),
    "decisions": decisions,
    "scores": scores,
    "mixtures": mixtures,
    "samples": samples,
    "digits on demand": on_demand,
    "labels": labels,
    "left out": left_out,
    "benchmark": benchmark,
}


# ---------------------------------------- Pages ----------------------------------------

PLACE = re.compile(r"(<!-- table: ([^\n]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def read_reference():
    return json.loads((ROOT / "models_mnist" / "reference.json").read_text())


def filled(page):
    """The text of a page with its tables as they should be."""
    m = read_reference()

    def fill(place):
        return f"{place[1]}{written(place[2], m)}\n{place[3]}"

    return PLACE.sub(fill, page.read_text())


def written(name, m):
    """A table as it stands on a page, or a note where its figures are not there yet."""
    make = TABLES[name]
    try:
        table = make(m)
    except KeyError as missing:
        print(f"table {name!r} is not written: reference.json has no {missing}")
        return f"{NOT_MEASURED} reference.json has no {missing}.*"
    return table if isinstance(table, str) else markdown(table)


def write():
    for page in PAGES:
        page.write_text(filled(page))


# ---------------------------------------- Prose ----------------------------------------

QUOTING = re.compile(r"<!-- numbers: ([^\n]+) -->\n(.*?)<!-- end -->", re.DOTALL)
NUMBER = re.compile(r"\d+ of \d+|-?\d+\.\d+(?: ± \d+\.\d+)?(?: %)?|\d+ %")


def numbers(m):
    """What prose may quote, by key: numbers as they stand in the tables, counts as "4 of 6"."""
    found = {}
    for name in MAIN:
        found |= test_numbers(m, name)
    found |= error_numbers(m, "nothing")
    for name, comparisons in compared(m).items():
        found |= counts(name, comparisons)
    for name, areas in m["left out, seed 0"].items():
        found[f"{name} without all"] = f"{statistics.mean(areas.values()):.2f}"
        for digit, area in areas.items():
            found[f"{name} without {digit}"] = f"{area:.2f}"
    for name in MAIN:
        if name in m["samples"]:
            found |= sample_numbers(m, name)
    for kind in ("grey", "binarised"):
        values = per_seed(m, "likelihood", "vae", f"nll {kind}")
        found[f"vae nll {kind}"] = spread(values, 2)
    pixels = m["samples"]["images"]["0"]["labels by 5 nearest images"]
    found["pixels labels"] = as_percent([pixels])
    return found


def test_numbers(m, name):
    """ "vae loss", "vae labels", "vae reconstruction mirrored", "vae density mirrored"."""
    found = error_numbers(m, name)
    found[f"{name} loss"] = spread(per_seed(m, "test", name, "loss"), 2)
    labels_right = per_seed(m, "test", name, "labels by 5 nearest codes")
    found[f"{name} labels"] = as_percent(labels_right)
    for score in SCORES:
        for kind in m["test"][name]["0"][f"auroc {score}"]:
            values = per_seed(m, "test", name, f"auroc {score}", kind)
            found[f"{name} {score} {kind}"] = f"{statistics.mean(values):.2f}"
    return found


def error_numbers(m, name):
    """ "vae error noise 0.3", "vae optimised noise 0.3"."""
    found = {}
    for quantity in ("error", "optimised"):
        for level in m["test"][name]["0"][quantity]:
            values = per_seed(m, "test", name, quantity, level)
            found[f"{name} {quantity} {level}"] = spread(values)
    return found


def counts(name, comparisons):
    """ "ahead of ae12, error", "behind ae12, density": counts of kinds."""
    found = {}
    for quantity, figures in comparisons.items():
        if quantity in ("error", "optimised"):
            standings = standings_of_kinds(figures)
        else:
            standings = {kind: figures[kind]["standing"] for kind in figures}
        levels = [figures[level]["standing"] for level in figures if level != "clean"]
        quantity = quantity.removeprefix("auroc ")
        for key, which in (("ahead of", "ahead"), ("behind", "behind")):
            count = list(standings.values()).count(which)
            found[f"{key} {name}, {quantity}"] = f"{count} of {len(standings)}"
            found[f"{key} {name}, {quantity} levels"] = f"{levels.count(which)} of {len(levels)}"
    return found


def sample_numbers(m, name):
    """ "vae recognised prior", "vae frechet mixture of 50", "vae on demand"."""
    found = {}
    for source in m["samples"][name]["0"]:
        recognised = per_seed(m, "samples", name, source, "recognised")
        found[f"{name} recognised {source}"] = as_percent(recognised)
        distances = per_seed(m, "samples", name, source, "frechet")
        found[f"{name} frechet {source}"] = f"{statistics.mean(distances):.1f}"
    if name in m["digits on demand"]:
        found[f"{name} on demand"] = as_percent(per_seed(m, "digits on demand", name, "mean"))
    return found


def as_percent(shares):
    return f"{100 * statistics.mean(shares):.1f} %"


def misquoted(text, m):
    """What is wrong with the numbers in the marked prose of a page, a sentence each."""
    known = numbers(m)
    wrong = []
    for place in QUOTING.finditer(text):
        keys = place[1].split("; ")
        quoted = numbers_in(place[2], all_levels(m))
        if len(keys) != len(quoted):
            wrong.append(f"{len(keys)} keys for {len(quoted)} numbers: {quoted}")
            continue
        for key, number in zip(keys, quoted, strict=True):
            if known[key] != number:
                wrong.append(f"{key} is {known[key]}, not {number}")
    return wrong


def numbers_in(prose, levels):
    """The measured numbers of a text; names of corruptions such as "noise 0.3" hold none."""
    for level in levels:
        prose = prose.replace(level, "")
    return NUMBER.findall(prose)
