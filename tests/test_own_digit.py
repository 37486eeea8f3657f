"""One's own digit: pictures as people take them, by kinds that were once read wrongly."""

import math
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageOps

import utils


def pen(size, points, width):
    """Ink from 0 to 1 along a path: size (w, h) -> (h, w)."""
    page = Image.new("L", (4 * size[0], 4 * size[1]), 0)
    path = [(4 * x, 4 * y) for x, y in points]
    ImageDraw.Draw(page).line(path, fill=255, width=round(4 * width), joint="curve")
    return np.asarray(page.resize(size, Image.Resampling.BOX), float) / 255


SEVEN = [(100, 120), (200, 120), (140, 300)]


def seven_on(paper, width=12, dark=0.7):
    height, side = paper.shape
    return paper * (1 - dark * pen((side, height), SEVEN, width))


def read(picture, tmp_path):
    picture = Image.fromarray((255 * np.clip(picture, 0, 1)).round().astype(np.uint8))
    picture.save(tmp_path / "mine.png")
    return utils.read_digit(tmp_path / "mine.png")[0, 0].numpy()


def page(level=0.8):
    return np.full((400, 300), level)


def agree(plain, mine):
    """The same digit up to one pixel, by which the rounded centre of mass may move it."""
    moves = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    moved = [np.roll(mine, move, (0, 1)).ravel() for move in moves]
    return max(np.corrcoef(plain.ravel(), each)[0, 1] for each in moved) > 0.9


def agrees_with_plain(picture, tmp_path):
    return agree(read(seven_on(page()), tmp_path), read(picture, tmp_path))


@pytest.mark.parametrize("width", [3, 4, 6])
@pytest.mark.parametrize("dark", [0.4, 0.8])
def test_thin_strokes_become_as_thick_and_bright_as_mnists(tmp_path, width, dark):
    mine = read(seven_on(page(), width, dark), tmp_path)
    assert np.sort(mine.ravel())[-20:].mean() > 0.73
    assert (mine > 0.5).sum() > 50  # a seven of two pixels' width; of one pixel it has 35


@pytest.mark.parametrize("spacing", [30, 45, 70])
@pytest.mark.parametrize("slope", [0, 0.03, -0.08])
@pytest.mark.parametrize("squared", [False, True])
def test_lines_on_the_paper_are_no_ink(tmp_path, spacing, slope, squared):
    y, x = np.mgrid[:400, :300]
    lines = np.abs((y + slope * x) % spacing - spacing / 2) < 1.6
    if squared:
        lines |= np.abs((x - slope * y) % spacing - spacing / 2) < 1.6
    assert agrees_with_plain(seven_on(page() * (1 - 0.3 * lines)), tmp_path)


def test_lines_as_dark_as_the_ink_are_named(tmp_path):
    y = np.mgrid[:400, :300][0]
    lines = np.abs(y % 30 - 15) < 2
    with pytest.raises(ValueError, match="lines"):
        read(page() * (1 - 0.7 * np.maximum(lines, pen((300, 400), SEVEN, 3))), tmp_path)


def table_edge(paper):
    paper[:30] = 0.3


def two_edges(paper):
    paper[:, :20] = paper[:, -25:] = 0.2


def light_edge(paper):
    paper[:, :20] = 1


def dark_row(paper):
    paper[-2:] = 0


def dark_rows_on_two_sides(paper):
    paper[-3:] = paper[:, :3] = 0.1


def corner(paper):
    paper[np.add(*np.mgrid[:400, :300]) < 40] = 0.1


def frame(paper):
    paper[[10, 11, -11, -12], 10:-10] = 0.1
    paper[10:-10, [10, 11, -11, -12]] = 0.1


BORDERS = [table_edge, two_edges, light_edge, dark_row, dark_rows_on_two_sides, corner, frame]


@pytest.mark.parametrize("height", [6, 24])
def test_a_strip_at_the_border_of_an_empty_page_is_no_digit(tmp_path, height):
    paper = page()
    paper[:height] = 0.2
    with pytest.raises(ValueError, match="does not show one digit"):
        read(paper, tmp_path)


def test_specks_and_hairs_are_no_ink(tmp_path):
    paper = seven_on(page())
    for row, column in [(40, 40), (60, 250), (350, 60), (330, 240), (200, 40), (250, 260)]:
        paper[row : row + 3, column : column + 25] = 0.2
    assert agrees_with_plain(paper, tmp_path)


@pytest.mark.parametrize("draw", BORDERS)
def test_what_lies_at_the_border_is_no_ink(tmp_path, draw):
    paper = page()
    draw(paper)
    assert agrees_with_plain(seven_on(paper), tmp_path)


@pytest.mark.parametrize("grey", [0.05, 0.2, 0.35])
@pytest.mark.parametrize("margins", [(20, 20, 30, 30), (90, 60, 70, 60), (0, 40, 60, 0)])
def test_the_sheet_on_a_dark_desk_is_not_taken_for_the_ink(tmp_path, grey, margins):
    top, bottom, left, right = margins
    desk = np.full((400, 300), grey)
    desk[top : 400 - bottom, left : 300 - right] = 0.8
    assert agrees_with_plain(seven_on(desk), tmp_path)


@pytest.mark.parametrize("light", [0.15, 0.25])
def test_the_light_of_a_lamp_is_not_taken_for_the_ink(tmp_path, light):
    y, x = np.mgrid[:400, :300]
    lamp = np.exp(-((x - 150) ** 2 + (y - 260) ** 2) / (2 * 90**2))
    assert agrees_with_plain(seven_on(page(0.6) + light * lamp, width=8, dark=0.3), tmp_path)


FIVE = [(190, 120), (110, 120), (105, 200), (160, 195), (195, 240), (160, 300), (105, 290)]


@pytest.mark.parametrize("points", [SEVEN, FIVE])
@pytest.mark.parametrize("width", [12, 25, 40])
@pytest.mark.parametrize("dark", [0.6, 1.0])
def test_a_crop_may_cut_through_the_strokes(tmp_path, points, width, dark):
    ink = pen((300, 400), points, width)
    rows, columns = np.nonzero(ink > 0.5)
    inner = np.s_[rows.min() + 1 : rows.max(), columns.min() + 1 : columns.max()]
    plain = read(0.9 * (1 - dark * ink), tmp_path)
    cropped = read(0.9 * (1 - dark * ink[inner]), tmp_path)
    assert agree(plain, cropped)


def test_a_crop_may_cut_only_the_sides(tmp_path):
    ink = pen((300, 400), SEVEN, 25)
    columns = np.nonzero((ink > 0.5).any(0))[0]
    inner = np.s_[90:330, columns.min() + 1 : columns.max()]
    plain = read(0.9 * (1 - 0.8 * ink), tmp_path)
    assert agree(plain, read(0.9 * (1 - 0.8 * ink[inner]), tmp_path))


def test_a_fold_across_an_empty_page_is_no_digit(tmp_path):
    paper = page()
    paper[:, 140:152] = 0.55
    with pytest.raises(ValueError, match="there is no ink on it"):
        read(paper, tmp_path)


@pytest.mark.parametrize("angle", range(0, 360, 45))
def test_the_edge_of_a_shadow_is_no_ink(tmp_path, angle):
    y, x = np.mgrid[:400, :300]
    a = math.radians(angle)
    across = (x - 150) * math.cos(a) + (y - 210) * math.sin(a) - 130
    shadow = 1 / (1 + np.exp(-across / 3))
    assert agrees_with_plain(seven_on(page() * (1 - 0.4 * shadow)), tmp_path)
    with pytest.raises(ValueError, match="does not show one digit"):
        read(page() * (1 - 0.4 * shadow), tmp_path)


@pytest.mark.parametrize("blur", [1, 3])
@pytest.mark.parametrize("angle", [0, 45, 90, 135, 270, 315])  # from 180 and 225 it may fail
def test_a_shadow_may_cross_the_digit(tmp_path, angle, blur):
    y, x = np.mgrid[:400, :300]
    a = math.radians(angle)
    across = (x - 150) * math.cos(a) + (y - 210) * math.sin(a) - 20
    shadow = 1 / (1 + np.exp(-across / blur))
    pencil = (page() + seven_on(page())) / 2
    # It takes its share of whatever light there is.
    assert agrees_with_plain(pencil * (1 - 0.4 * shadow), tmp_path)


@pytest.mark.parametrize("width", [40, 50])  # one of 30 is too narrow
def test_the_shadow_of_a_bar_may_cross_the_digit(tmp_path, width):
    y = np.mgrid[:400, :300][0]
    shadow = 1 / (1 + np.exp((np.abs(y - 210) - width / 2) / 2))
    pencil = (page() + seven_on(page())) / 2
    assert agrees_with_plain(pencil * (1 - 0.4 * shadow), tmp_path)


@pytest.mark.parametrize("inner", [0.3, 0.45])
@pytest.mark.parametrize("light", [False, True])
def test_the_border_tells_the_paper_where_ink_covers_most(tmp_path, inner, light):
    y, x = np.mgrid[-1:1:64j, -1:1:64j]
    r = np.hypot(x / 0.92, y)
    ring = (r < 1) & (r > inner)
    mine = read(ring if light else 1 - 0.9 * ring, tmp_path)
    assert mine[13:15, 13:15].max() < 0.5 and mine[4:8, 13:15].max() > 0.9


@pytest.mark.parametrize("digits", [2, 3, 4])
def test_several_digits_are_counted(tmp_path, digits):
    ink = sum(pen((400, 200), [(50 + 90 * i, 40), (50 + 90 * i, 160)], 9) for i in range(digits))
    with pytest.raises(ValueError, match=f"there are {digits} digits side by side"):
        read(1 - ink, tmp_path)


def test_a_digit_three_quarters_as_tall_counts(tmp_path):
    tall = pen((400, 200), [(80, 30), (80, 170)], 9)
    lower = pen((400, 200), [(220, 50), (220, 155)], 9)
    with pytest.raises(ValueError, match="there are 2 digits side by side"):
        read(1 - tall - lower, tmp_path)


def test_a_digit_in_pieces_is_one(tmp_path):
    five = pen((300, 300), [(110, 90), (105, 140), (160, 150), (165, 200), (100, 215)], 10)
    bar = pen((300, 300), [(125, 75), (180, 72)], 10)
    four = pen((300, 300), [(100, 60), (90, 140), (140, 142)], 10)
    stem = pen((300, 300), [(160, 70), (158, 240)], 10)
    for ink in (five + bar, four + stem):
        assert read(1 - ink, tmp_path).max() > 0.9
    assert read(1 - five - bar, tmp_path)[:9, 15:19].max() > 0.9  # the bar is there
    broken = pen((300, 400), FIVE, 12)
    plain = read(1 - broken, tmp_path)
    broken[150:160] = broken[250:260] = 0
    assert agree(plain, read(1 - broken, tmp_path))


def test_ink_in_five_pieces_is_no_digit(tmp_path):
    lines = sum(pen((300, 400), [(120, y), (180, y)], 8) for y in range(60, 310, 50))
    with pytest.raises(ValueError, match="the ink is in 5 pieces"):
        read(1 - lines, tmp_path)


def test_ink_fainter_than_a_tenth_is_noise(tmp_path):
    with pytest.raises(ValueError, match="^mine.png does not .* there is no ink on it"):
        read(seven_on(page(), dark=0.12), tmp_path)
    assert agrees_with_plain(seven_on(page(), dark=0.2), tmp_path)


def test_sentences(tmp_path, monkeypatch):
    (tmp_path / "mine.heic").write_bytes(b"\0\0\0\x18ftypheic")
    with pytest.raises(ValueError, match="^mine.heic .*JPEG or PNG") as caught:
        utils.read_digit(tmp_path / "mine.heic")
    assert str(tmp_path) not in str(caught.value)
    for wrong in (np.zeros((28, 28)), torch.zeros(28, 28), None, 3):
        with pytest.raises(TypeError, match=f"not {type(wrong).__name__}$"):
            utils.read_digit(wrong)
    monkeypatch.setenv("HOME", str(tmp_path))
    read(seven_on(page()), tmp_path)
    assert utils.read_digit("~/mine.png").shape == (1, 1, 28, 28)


def photograph(digit, style, rng):
    """A picture that somebody might have taken of a digit (28, 28).

    It is large and off-centre, in uneven light, with noise.
    """
    side = int(28 * rng.uniform(5, 16))
    ink = Image.fromarray((255 * digit).astype(np.uint8))
    ink = np.asarray(ink.resize((side, side), Image.Resampling.BICUBIC)) / 255
    height, width = (int(side * rng.uniform(1.1, 2)) for _ in range(2))
    page = np.zeros((height, width))
    top, left = rng.integers(height - side + 1), rng.integers(width - side + 1)
    page[top : top + side, left : left + side] = ink
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    angle = rng.uniform(0, 2 * math.pi)
    light = 1 - rng.uniform(0.1, 0.4) * (1 + np.cos(angle) * x + np.sin(angle) * y) / 2
    if style == "pen":
        page = light * (0.9 - 0.75 * page) + 0.03 * rng.standard_normal(page.shape)
    elif style == "pencil":
        page = light * (0.85 - 0.4 * page) + 0.04 * rng.standard_normal(page.shape)
    elif style == "on white":
        page = 1 - page
    return Image.fromarray((255 * page.clip(0, 1)).astype(np.uint8))


STYLES = {"pen": "JPEG", "pencil": "JPEG", "on white": "PNG", "on black": "PNG"}


@pytest.mark.parametrize("style", STYLES)
def test_a_digit_in_a_photograph_comes_back_as_it_was(mnist, tmp_path, style):
    rng, found = np.random.default_rng(0), []
    for digit in mnist.test.images[:12, 0].numpy():
        photograph(digit, style, rng).save(tmp_path / "digit", STYLES[style], quality=80)
        mine = utils.read_digit(tmp_path / "digit")
        assert (
            mine.shape == (1, 1, 28, 28)
            and mine.dtype == torch.float32
            and 0 <= mine.min() < mine.max() <= 1
        )
        found.append(np.corrcoef(mine.flatten(), digit.ravel())[0, 1])
    assert np.median(found) > 0.95 and np.quantile(found, 0.1) > 0.8, (
        np.median(found),
        np.quantile(found, 0.1),
    )


@pytest.fixture
def seven():
    """A black stroke like a 7 on white, 200x150."""
    picture = Image.new("L", (150, 200), 255)
    ImageDraw.Draw(picture).line([(30, 40), (110, 40), (60, 160)], fill=0, width=14)
    return picture


@pytest.mark.parametrize(
    "turn",
    [
        lambda p: p.convert("RGB"),
        lambda p: p.convert("1"),
        lambda p: p.convert("P"),
        lambda p: p.convert("CMYK"),
        ImageOps.invert,
        lambda p: p.convert("F"),
        lambda p: Image.fromarray(np.asarray(p, np.float32) / 255),
        lambda p: Image.fromarray(np.asarray(p).astype(np.uint16) * 200),
        lambda p: Image.fromarray((np.asarray(p).astype(np.uint16) + 99) * 180),
        lambda p: p.resize((1500, 2000)),
        lambda p: Image.merge("LA", (Image.new("L", p.size, 0), ImageOps.invert(p))),
        lambda p: Image.merge("LA", (Image.new("L", p.size, 255), ImageOps.invert(p))),
    ],
)
def test_size_mode_and_ground_do_not_matter(seven, tmp_path, turn):
    seven.save(tmp_path / "plain.png")
    turned = turn(seven)
    name = tmp_path / ("turned.tiff" if turned.mode in ("F", "CMYK") else "turned.png")
    turned.save(name)
    plain, other = (utils.read_digit(path).flatten() for path in (tmp_path / "plain.png", name))
    assert np.corrcoef(plain, other)[0, 1] > 0.97


def test_a_photograph_held_sideways_is_turned_by_its_exif(seven, tmp_path):
    seven.save(tmp_path / "upright.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    seven.rotate(90, expand=True).save(tmp_path / "sideways.jpg", exif=exif)
    upright, sideways = (
        utils.read_digit(tmp_path / name).flatten() for name in ("upright.png", "sideways.jpg")
    )
    assert np.corrcoef(upright, sideways)[0, 1] > 0.97


def test_a_digit_is_placed_as_mnist_places_it(seven, tmp_path):
    seven.save(tmp_path / "seven.png")
    mine = utils.read_digit(tmp_path / "seven.png")[0, 0]
    rows, columns = (mine > 0).any(1), (mine > 0).any(0)
    assert max(rows.sum(), columns.sum()) == 20
    grid = torch.arange(28.0)
    for mass in (mine.sum(0), mine.sum(1)):
        assert abs(float(mass @ grid / mass.sum()) - 14) <= 0.51


def write_bytes(content):
    return lambda path: path.write_bytes(content)


def page_of_writing(path):
    picture = Image.new("L", (600, 400), 255)
    draw = ImageDraw.Draw(picture)
    for row in range(10):
        draw.text((20, 20 + 35 * row), "the quick brown fox jumps over the lazy dog " * 2, fill=0)
    picture.save(path, "PNG")


def one_dot(path):
    picture = Image.new("L", (200, 200), 255)
    picture.putpixel((100, 100), 0)
    picture.save(path, "PNG")


def blot(path):
    picture = Image.new("L", (200, 200), 255)
    ImageDraw.Draw(picture).rectangle((60, 60, 130, 130), fill=0)
    picture.save(path, "PNG")


def bomb(path):
    """A PNG of 900 megapixels in a few bytes: what it says in its header."""
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c))
            for k, c in chunks
        )
    )


def cut_short(path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (100, 100), dtype=np.uint8)).save(
        path, "JPEG"
    )
    path.write_bytes(path.read_bytes()[:2000])


@pytest.mark.filterwarnings("error", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "make, says",
    [
        (lambda path: None, "there is no picture at"),
        (lambda path: path.mkdir(), "there is no picture at"),
        (os.mkfifo, "there is no picture at"),
        (write_bytes(b""), "cannot be read"),
        (write_bytes(b"my notes"), "cannot be read"),
        (cut_short, "cannot be read"),
        (bomb, "exceeds limit"),
        (lambda path: Image.new("L", (300, 200), 255).save(path, "PNG"), "there is no ink on it"),
        (lambda path: Image.new("L", (300, 200), 0).save(path, "PNG"), "there is no ink on it"),
        (lambda path: Image.new("L", (1, 1), 0).save(path, "PNG"), "there is no ink on it"),
        (lambda path: Image.new("I;16", (90, 60), 0).save(path, "PNG"), "there is no ink on it"),
        (lambda path: Image.new("L", (1, 600), 0).save(path, "PNG"), "it is too narrow"),
        (lambda path: Image.new("LAB", (90, 60)).save(path, "TIFF"), "^mine cannot be read"),
        (one_dot, "there is no ink on it"),
        (blot, "there is no ink on it"),
        (page_of_writing, "the ink is in 10 pieces"),
    ],
)
def test_what_is_no_picture_of_a_digit_is_told_in_one_sentence(tmp_path, make, says):
    make(tmp_path / "mine")
    with pytest.raises((ValueError, FileNotFoundError), match=says) as caught:
        utils.read_digit(tmp_path / "mine")
    assert "\n" not in str(caught.value) and caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_a_name_too_long_is_told_in_one_sentence():
    with pytest.raises(FileNotFoundError, match="there is no picture at"):
        utils.read_digit("x" * 5000)


@pytest.mark.filterwarnings("error", "ignore::DeprecationWarning")
def test_a_picture_of_108_megapixels_is_read_without_a_warning(seven, tmp_path):
    seven.save(tmp_path / "plain.png")
    seven.resize((9000, 12000)).save(tmp_path / "large.png")
    plain, large = (utils.read_digit(tmp_path / f"{name}.png") for name in ("plain", "large"))
    assert np.corrcoef(plain.flatten(), large.flatten())[0, 1] > 0.97


def test_an_empty_page_with_noise_and_uneven_light_has_no_digit_on_it(tmp_path):
    page = photograph(np.zeros((28, 28)), "pen", np.random.default_rng(0))
    page.save(tmp_path / "page.png")
    with pytest.raises(ValueError, match="does not show one digit"):
        utils.read_digit(tmp_path / "page.png")
