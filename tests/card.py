"""The tables of README.md and models_mnist/README.md, written from models_mnist/reference.json: `python tests/measure.py card`.

A page says where a table goes by two comments, <!-- table: NAME --> and <!-- end -->; what stands between them is made here.
"""

import json
import re
import statistics
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", ROOT / "models_mnist" / "README.md")
NAMES = {"vae": "VAE", "ae32": "AE 32", "ae16": "AE 16", "ae12": "AE 12", "ae8": "AE 8", "vae beta 0.25": "VAE, β = 0.25",
         "vae beta 4": "VAE, β = 4"}
MAIN = ("vae", "ae12", "ae32")


def measured(m):
    return [name for name in NAMES if name in m["test"]]


def values(m, name, *keys, section="test"):
    """A figure of a model, seed by seed."""
    found = []
    for run in m[section][name].values():
        for key in keys:
            run = run[key]
        found.append(run)
    return found


def spread(found, digits=1, factor=1.0):
    """Mean and standard deviation over seeds; of one seed, the figure alone."""
    found = [factor * value for value in found]
    mean = f"{statistics.mean(found):.{digits}f}"
    return f"{mean} ± {statistics.stdev(found):.{digits}f}" if len(found) > 1 else mean


def seeds(found):
    """Each of them, where no spread would tell that one is at the other end."""
    return ", ".join(f"{value:.2f}" for value in found)


def ahead(a, b, higher=False):
    """1 if a is ahead of b by more than the spread of both over seeds, -1 if b is ahead of a, else 0; small is good
    unless `higher`."""
    difference = statistics.mean(b) - statistics.mean(a)
    if abs(difference) <= statistics.stdev(a) + statistics.stdev(b):
        return 0
    return 1 if (difference > 0) != higher else -1


def table(head, rows):
    lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def headline(m):
    loss = spread(values(m, "vae", "loss"), 2)
    return f"**{loss} nats per test image** (-ELBO, mean and standard deviation over three seeds) after 20 epochs."


def test_set(m):
    rows = [("-ELBO, 10,000 images, 10 samples of z each", "loss", 2), ("of it BCE", "bce", 2), ("of it KL", "kl", 2),
            ("-ELBO, first 1,000 images", "loss of the first 1,000", 2),
            ("-log p(x), first 1,000 images, 500 importance samples", "nll grey", 2),
            ("-log p(x), the same images binarised", "nll binarised", 2), ("active units, of 32", "active units", 1)]
    return table(["nats per image", "mean ± spread", "seeds 0, 1, 2"],
                 [[text, spread(values(m, "vae", key), digits), ", ".join(f"{v:.{digits}f}" for v in values(m, "vae", key))]
                  for text, key, digits in rows])


def models(m):
    rows = [[NAMES[name], ", ".join(m["test"][name]), *(spread(values(m, name, key), 2) for key in ("bce", "kl")),
             spread(values(m, name, "error", "clean")), spread(values(m, name, "active units"), 0)] for name in measured(m)]
    return table(["model", "seeds", "BCE", "KL", "squared error, clean", "active units"], rows)


def corruptions(m, way):
    names = measured(m)
    rows = [[level, *(spread(values(m, name, way, level)) for name in names), spread(values(m, "vae", "input", level))]
            for level in m["test"]["vae"]["0"]["error"]]
    return table(["corruption, level", *(NAMES[name] for name in names), "corrupted input"], rows)


def standings(m):
    """How often the VAE is ahead, within the spread, and behind, like against like."""
    levels = [level for level in m["test"]["vae"]["0"]["error"] if level != "clean"]
    rows = []
    for other, question in (("ae32", "same size: AE 32"), ("ae12", "same clean error: AE 12")):
        for way, text in (("error", "one pass"), ("optimised", "optimised")):
            found = {level: ahead(values(m, "vae", way, level), values(m, other, way, level)) for level in levels}
            rows.append([question, text, *(str(list(found.values()).count(x)) for x in (1, 0, -1)), behind(found)])
    return table(["VAE against", "codes", "ahead", "within the spread", "behind", "behind at"], rows)


def behind(found):
    kinds = {}
    for level, standing in found.items():
        if standing < 0:
            kind, _, number = level.rpartition(" ")
            kinds.setdefault(kind or number, []).append(number)
    return "; ".join(f"{kind} {', '.join(numbers)}" if numbers != [kind] else kind for kind, numbers in kinds.items()) or "none"


def anomaly_standings(m):
    rows = []
    for other, question in (("ae32", "same size: AE 32"), ("ae12", "same clean error: AE 12")):
        for score in ("misfit", "density"):
            kinds = m["test"]["vae"]["0"][f"auroc {score}"]
            found = {kind: ahead(values(m, "vae", f"auroc {score}", kind), values(m, other, f"auroc {score}", kind), higher=True)
                     for kind in kinds}
            rows.append([question, score, *(str(list(found.values()).count(x)) for x in (1, 0, -1)),
                         ", ".join(kind for kind, x in found.items() if x < 0) or "none"])
    return table(["VAE against", "score", "ahead", "within the spread", "behind", "behind at"], rows)


def anomalies(m, names=MAIN):
    rows = []
    for kind in m["test"]["vae"]["0"]["auroc misfit"]:
        found = [values(m, name, f"auroc {score}", kind) for score in ("misfit", "density") for name in names]
        rows.append([kind, *(seeds(x) if kind == "black" else spread(x, 3) for x in found)])
    return table(["AUROC", *(f"{NAMES[name]}, {score}" for score in ("misfit", "density") for name in names)], rows)


def other_anomalies(m):
    return anomalies(m, [name for name in measured(m) if name not in MAIN])


def decisions(m):
    kinds = m["test"]["vae"]["0"]["flagged misfit"]
    columns = [(name, score) for score in ("misfit", "density") for name in MAIN]
    rows = [[kind, *(spread(values(m, name, f"flagged {score}", kind), 1, 100) for name, score in columns)] for kind in kinds]
    return table(["flagged, %", *(f"{NAMES[name]}, {score}" for name, score in columns)], rows)


def scores(m):
    hard = ("mirrored", "rotated", "occluded", "black", "mean")
    rows = []
    for name in MAIN:
        for score in m["scores"][name]["0"]["auroc"]:
            found = {kind: values(m, name, "auroc", score, kind, section="scores") for kind in hard}
            rows.append([NAMES[name], score, *(seeds(x) if kind == "black" else spread(x, 3) for kind, x in found.items())])
    return table(["model", "score", *hard[:-1], "mean of seven"], rows)


def mixtures(m):
    sizes = list(m["scores"]["vae"]["0"]["mixture"])
    rows = [[NAMES[name], *(spread(values(m, name, "mixture", size, section="scores")) for size in sizes)] for name in MAIN]
    rows.append(["seconds to fit, VAE", *(spread(values(m, "vae", "seconds", size, section="scores")) for size in sizes)])
    return table(["components", *sizes], rows)


def samples(m, names=MAIN):
    measure, images = ("recognised", "frechet", "nearest"), m["samples"]["images"]["0"]
    rows = []
    for text, key in (("test images", "test"), ("validation images", "validation")):
        share, distance, nearest = (images[key][name] for name in measure)
        rows.append(["", text, f"{100 * share:.1f}", f"{abs(distance):.1f}", f"{nearest:.2f}"])
    for name in names:
        for kind in m["samples"][name]["0"]:
            found = [values(m, name, kind, key, section="samples") for key in measure]
            rows.append([NAMES[name], kind, spread(found[0], 1, 100), spread(found[1]), spread(found[2], 2)])
    return table(["model", "images", "recognised, %", "Fréchet distance", "distance to nearest training image"], rows)


def left_out(m):
    runs = m["left out, seed 0"]
    rows = []
    for name in MAIN:
        areas = list(runs[name].values())
        rows.append([NAMES[name], *(f"{area:.2f}" for area in areas), f"{statistics.mean(areas):.3f}"])
    return table(["AUROC, digit left out", *runs["vae"], "mean"], rows)


def benchmark(m):
    found = {device: next(iter(run.values())) for device, run in m["benchmark"].items()}
    keys = next(iter(found.values()))
    return table(["", *found], [[key, *(str(run[key]) for run in found.values())] for key in keys])


def results(m):
    """The one table of the README."""
    rows = [["squared error, clean", *(spread(values(m, name, "error", "clean")) for name in MAIN)]]
    for level in ("noise 0.3", "occlusion 12", "blur 1.5"):
        rows.append([f"squared error, {level}", *(spread(values(m, name, "error", level)) for name in MAIN)])
        rows.append(["the same, optimised codes", *(spread(values(m, name, "optimised", level)) for name in MAIN)])
    for kind in ("mirrored", "thinner"):
        rows.append([f"AUROC of the misfit, {kind}", *(spread(values(m, name, "auroc misfit", kind), 3) for name in MAIN)])
    areas = [statistics.mean(m["left out, seed 0"][name].values()) for name in MAIN]
    rows.append(["AUROC, a digit never seen (mean of ten, one seed)", *(f"{area:.3f}" for area in areas)])
    return table(["", "VAE, code of 32", "autoencoder, code of 12", "autoencoder, code of 32"], rows)


def standing_of(m, other, key, higher=False):
    """{what: 1, 0 or -1} for the VAE against another model."""
    kinds = [kind for kind in m["test"]["vae"]["0"][key] if kind != "clean"]
    return {kind: ahead(values(m, "vae", key, kind), values(m, other, key, kind), higher) for kind in kinds}


def kinds_of(found, standing):
    """The kinds of corruption of which two levels or more stand so, in words."""
    kinds = list(dict.fromkeys(level.rpartition(" ")[0] for level in found))
    levels = {kind: [x for level, x in found.items() if level.rpartition(" ")[0] == kind] for kind in kinds}
    often = [kind for kind in kinds if levels[kind].count(standing) >= 2]
    return " and ".join([", ".join(often[:-1]), often[-1]]) if len(often) > 1 else "".join(often)


def verdict(m):
    count = {(other, key): [list(standing_of(m, other, key, "auroc" in key).values()).count(x) for x in (1, -1)]
             for other in ("ae12", "ae32") for key in ("error", "optimised", "auroc misfit", "auroc density")}
    small, large = standing_of(m, "ae12", "optimised"), {way: standing_of(m, "ae32", way) for way in ("error", "optimised")}
    misfit = standing_of(m, "ae32", "auroc misfit", True)
    mean = {name: {kind: statistics.mean(values(m, name, "auroc misfit", kind)) for kind in misfit} for name in MAIN}
    shares = [(mean["ae12"][kind] - mean["ae32"][kind]) / (mean["vae"][kind] - mean["ae32"][kind])
              for kind, x in misfit.items() if x > 0]
    areas = {name: statistics.mean(m["left out, seed 0"][name].values()) for name in MAIN}
    clean = {name: spread(values(m, name, "error", "clean")) for name in MAIN}

    def nowhere(number):
        return "nowhere" if number == 0 else f"at {number}"

    return f"""\
**At the same error on clean images, yes.** Against the autoencoder with a code of 12 (clean error {clean["ae12"]}, the VAE's \
{clean["vae"]}), the VAE's error is lower by more than the seeds' spread at {count["ae12", "error"][0]} of 24 corruptions and \
{nowhere(count["ae12", "error"][1])} higher; if codes are optimised, lower at {count["ae12", "optimised"][0]} and higher \
{nowhere(count["ae12", "optimised"][1])} ({kinds_of(small, -1)}).

**At the same size of the code, 32, it is a trade.** The autoencoder is more exact on clean digits ({clean["ae32"]}); in one \
pass the VAE is ahead at {count["ae32", "error"][0]} corruptions (mostly {kinds_of(large["error"], 1)}) and behind \
{nowhere(count["ae32", "error"][1])} (mostly {kinds_of(large["error"], -1)}), and with optimised codes ahead at \
{count["ae32", "optimised"][0]} ({kinds_of(large["optimised"], 1)}) and behind {nowhere(count["ae32", "optimised"][1])}.

**Anomalies.** By the misfit of the reconstruction the VAE is ahead of the large autoencoder at \
{count["ae32", "auroc misfit"][0]} of {len(misfit)} kinds and behind {nowhere(count["ae32", "auroc misfit"][1])} \
({", ".join(kind for kind, x in misfit.items() if x < 0)}), ahead of the small one at {count["ae12", "auroc misfit"][0]} and \
{nowhere(count["ae12", "auroc misfit"][1])} behind; where it leads the large one, a code of 12 alone brings \
{min(shares):.0%} to {max(shares):.0%} of that lead. By the density of the codes it is ahead of the large one at \
{count["ae32", "auroc density"][0]} and behind {nowhere(count["ae32", "auroc density"][1])}; a digit never seen in training \
is told apart with an AUROC of {areas["vae"]:.2f}, against {areas["ae12"]:.2f} and {areas["ae32"]:.2f} (one seed)."""


TABLES = {"headline": headline, "verdict": verdict, "test set": test_set, "models": models,
          "one pass": lambda m: corruptions(m, "error"),
          "optimised": lambda m: corruptions(m, "optimised"), "standings": standings, "anomalies": anomalies,
          "other anomalies": other_anomalies, "anomaly standings": anomaly_standings, "decisions": decisions, "scores": scores,
          "mixtures": mixtures, "samples": samples, "left out": left_out, "benchmark": benchmark, "results": results}
PLACE = re.compile(r"(<!-- table: (.+?) -->\n).*?(\n<!-- end -->)", re.DOTALL)


def filled(page):
    """The text of a page with its tables as they should be."""
    m = json.loads((ROOT / "models_mnist" / "reference.json").read_text())
    return PLACE.sub(lambda place: place[1] + TABLES[place[2]](m) + place[3], page.read_text())


def write():
    for page in PAGES:
        page.write_text(filled(page))
