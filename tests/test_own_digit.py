"""One's own digit: pictures as people take them, by kinds that were once read wrongly."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageOps
from scipy import ndimage

import utils


def pen(size, points, width):
    """Ink from 0 to 1 along a path: size (w, h) -> (h, w)."""
    page = Image.new("L", (4 * size[0], 4 * size[1]), 0)
    path = [(4 * x, 4 * y) for x, y in points]
    ImageDraw.Draw(page).line(path, fill=255, width=round(4 * width), joint="curve")
    return np.asarray(page.resize(size, Image.Resampling.BOX), float) / 255


def ellipse(x, y, radius_x, radius_y):
    """Points of an ellipse around (x, y), closed."""
    t = np.linspace(0, 2 * math.pi, 60)
    return list(zip(x + radius_x * np.cos(t), y + radius_y * np.sin(t), strict=True))


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
    rows, columns = np.nonzero(plain)
    assert max(np.ptp(rows), np.ptp(columns)) == 19  # 20 pixels
    assert np.abs(np.subtract(ndimage.center_of_mass(plain), 14)).max() <= 0.51


@pytest.mark.parametrize("turns", range(4))
def test_a_digit_heavy_at_one_side_is_not_cut_off(read, turns):
    stem = pen((300, 300), [(150, 60), (150, 230)], 6)
    foot = pen((300, 300), [(70, 230), (230, 230)], 40)
    mine = np.rot90(read(np.rot90(1 - np.maximum(stem, foot), turns)), -turns)
    assert (mine > 0.5).any(1).sum() >= 19


def photograph(digit, rng):
    """A picture that somebody might have taken of a digit (28, 28), from 0 to 1.

    It is large and off-centre, in uneven light, with noise.
    """
    side = int(28 * rng.uniform(5, 16))
    enlarged = picture_of(digit).resize((side, side), Image.Resampling.BICUBIC)
    margins = rng.integers(side // 2, size=(2, 2))
    ink = np.pad(np.asarray(enlarged) / 255, margins)
    light = np.linspace(1, rng.uniform(0.6, 0.9), ink.shape[1])
    contrast = rng.uniform(0.4, 0.75)  # from a pencil's to a pen's
    return light * (0.9 - contrast * ink) + 0.035 * rng.standard_normal(ink.shape)


def test_a_digit_in_a_photograph_comes_back_as_it_was(digits, read):
    rng = np.random.default_rng(0)
    found = []
    for digit in digits.test.images[:12, 0].numpy():
        mine = read(photograph(digit, rng), "digit.jpg", quality=80)
        found.append(np.corrcoef(mine.ravel(), digit.ravel())[0, 1])
    assert np.median(found) > 0.95 and np.quantile(found, 0.1) > 0.8, sorted(found)


# What does not matter: the paper, its light, its border


Y, X = np.mgrid[:400, :300]


def page_with(grey, *parts):
    paper = page()
    for part in parts:
        paper[part] = grey
    return paper


def ruled(spacing, slope, squared=False):
    lines = np.abs((Y + slope * X) % spacing - spacing / 2) < 1.6
    if squared:
        lines |= np.abs((X - slope * Y) % spacing - spacing / 2) < 1.6
    return page_with(0.56, lines)


def sheet(grey, top, bottom, left, right):
    """A sheet of paper with these margins on a desk of this grey."""
    desk = page(grey)
    desk[top : 400 - bottom, left : 300 - right] = 0.8
    return desk


HAIRS = [np.s_[y : y + 3, x : x + 25] for y, x in [(40, 40), (60, 250), (350, 60), (200, 40)]]
PAPERS = {
    "ruled": ruled(30, 0),
    "ruled, slanted": ruled(70, -0.08),
    "squared": ruled(30, 0, squared=True),
    "squared, slanted": ruled(45, 0.03, squared=True),
    "hairs": page_with(0.2, *HAIRS),
    "table edge": page_with(0.3, np.s_[:30]),
    "two edges": page_with(0.2, np.s_[:, :20], np.s_[:, -25:]),
    "light edge": page_with(1, np.s_[:, :20]),
    "dark rows": page_with(0, np.s_[-2:]),
    "dark rows on two sides": page_with(0.1, np.s_[-3:], np.s_[:, :3]),
    "corner": page_with(0.1, X + Y < 40),
    "frame": page_with(0.1, np.s_[[10, 11, -11, -12], 10:-10], np.s_[10:-10, [10, 11, -11, -12]]),
    "sheet on a black desk": sheet(0.05, 20, 20, 30, 30),
    "small sheet on a black desk": sheet(0.05, 90, 60, 70, 60),
    "sheet on a dark desk": sheet(0.35, 90, 60, 70, 60),
    "corner of a sheet": sheet(0.35, 0, 40, 60, 0),
}


@pytest.mark.parametrize("paper", PAPERS)
def test_what_is_on_the_paper_or_beside_it_is_no_ink(read, plain, paper):
    assert agree(plain, read(seven_on(PAPERS[paper])))


def test_the_light_of_a_lamp_is_not_taken_for_the_ink(read, plain):
    lamp = np.exp(-((X - 150) ** 2 + (Y - 260) ** 2) / (2 * 90**2))
    for light in (0.15, 0.25):
        assert agree(plain, read(seven_on(page(0.6) + light * lamp, width=8, dark=0.3)))


def shadow_beyond(distance, angle, blur):
    """A shadow, from 0 to 1, on one side of a line that is turned by an angle in degrees."""
    a = math.radians(angle)
    across = (X - 150) * math.cos(a) + (Y - 210) * math.sin(a) - distance
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


def test_the_shadow_of_a_bar_may_cross_the_digit(read, plain):
    half_width = 20  # one of 15 is too narrow
    shadow = 1 / (1 + np.exp((np.abs(Y - 210) - half_width) / 2))
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
    paper = 0.9 * (1 - dark * ink)
    whole = read(paper)
    rows, columns = np.nonzero(ink > 0.5)
    across = np.s_[columns.min() + 1 : columns.max()]
    assert agree(whole, read(paper[rows.min() + 1 : rows.max(), across]))
    assert width == 12 or agree(whole, read(paper[90:330, across]))


CUT = {  # width and height of the page, and a path that leaves it
    "4": ((160, 200), [(110, 210), (110, -10), (28, 118), (160, 118)]),
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


def ones(*heights):
    """Strokes of these heights side by side, dark on white."""
    ink = np.zeros((200, 400))
    for i, height in enumerate(heights):
        x = 50 + 90 * i
        ink += pen((400, 200), [(x, 40), (x, 40 + height)], 9)
    return 1 - ink


def writing():
    picture = Image.new("L", (600, 400), 255)
    draw = ImageDraw.Draw(picture)
    for row in range(10):
        draw.text((20, 20 + 35 * row), "the quick brown fox jumps over the lazy dog " * 2, fill=0)
    return picture


DASHES = [np.s_[y : y + 8, 120:180] for y in range(60, 310, 50)]
NOISE = np.random.default_rng(0).normal(0, 0.03, (400, 300))
NO_INK = "there is no ink on it"
REFUSED = {
    "white": (page(1), NO_INK),
    "black": (page(0), NO_INK),
    "one pixel": (page()[:1, :1], NO_INK),
    "16 bits": (Image.new("I;16", (90, 60)), NO_INK),
    "table edge": (page_with(0.2, np.s_[:24]), NO_INK),
    "fold": (page_with(0.55, np.s_[:, 140:152]), NO_INK),
    "lamp and noise": (np.linspace(0.8, 0.5, 300) + NOISE, NO_INK),
    "speck": (page_with(0, np.s_[200, 150]), NO_INK),
    "blob": (page_with(0, np.s_[100:240, 100:240]), NO_INK),
    "faint": (seven_on(page(), dark=0.12), NO_INK),
    "dark lines": (seven_on(page_with(0.24, np.abs(Y % 30 - 15) < 2), width=3), ""),
    "two digits": (ones(120, 120), "there are 2 digits side by side"),
    "a large and a small one": (ones(140, 95), "there are 2 digits side by side"),
    "four digits": (ones(120, 120, 120, 120), "there are 4 digits side by side"),
    "dashes": (page_with(0.1, *DASHES), "the ink is in 5 pieces"),
    "writing": (writing(), "the ink is in 10 pieces"),
}


@pytest.mark.parametrize("picture", REFUSED)
def test_what_is_no_digit_or_more_than_one_is_refused(read, picture):
    greys, says = REFUSED[picture]
    with pytest.raises(ValueError, match=f"^mine.png does not show one digit: .*{says}"):
        read(greys)


def test_faint_ink_is_ink(read, plain):
    assert agree(plain, read(seven_on(page(), dark=0.2)))


def test_a_digit_in_pieces_is_one(read):
    five = pen((300, 300), [(110, 90), (105, 140), (160, 150), (165, 200), (100, 215)], 10)
    bar = pen((300, 300), [(125, 75), (180, 72)], 10)
    assert read(1 - five - bar)[:9, 15:19].max() > 0.9  # the bar is there
    broken = pen((300, 400), FIVE, 12)
    whole = read(1 - broken)
    broken[150:160] = broken[250:260] = 0
    assert agree(whole, read(1 - broken))


# Files


@pytest.mark.filterwarnings("error", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "turn",
    [
        lambda p: p.convert("1"),
        lambda p: p.convert("P"),
        ImageOps.invert,
        lambda p: Image.fromarray((np.asarray(p).astype(np.uint16) + 99) * 180),
        lambda p: Image.merge("LA", (Image.new("L", p.size, 0), ImageOps.invert(p))),
        lambda p: Image.merge("LA", (Image.new("L", p.size, 255), ImageOps.invert(p))),
    ],
)
def test_mode_and_ground_do_not_matter(read, turn):
    black_on_white = picture_of(seven_on(page(1), dark=1))
    expected = read(black_on_white)
    assert agree(expected, read(turn(black_on_white), "turned.png"), least=0.97)


def test_the_pictures_of_telephones_are_no_danger_to_pillow():
    assert Image.MAX_IMAGE_PIXELS > 200_000_000, "Pillow warns from here"


@pytest.mark.parametrize("colour", [(0.8, 0.1, 0.1), (0.1, 0.8, 0.1), (0.1, 0.1, 0.8)])
def test_the_colour_of_the_pen_does_not_matter(read, plain, colour):
    ink = pen((300, 400), SEVEN, 12)[..., None]  # (h, w, 1)
    assert agree(plain, read(0.8 * (1 - ink) + ink * colour))


def test_a_photograph_held_sideways_is_turned_by_its_exif(read, plain):
    exif = Image.Exif()
    exif[0x0112] = 6
    sideways = picture_of(seven_on(page())).rotate(90, expand=True)
    assert agree(plain, read(sideways, "sideways.jpg", exif=exif), least=0.97)


def test_a_path(plain, tmp_path, monkeypatch):
    with pytest.raises(TypeError, match="Tensor"):
        utils.read_digit(torch.zeros(28, 28))
    with pytest.raises(FileNotFoundError, match="nothing.png"):
        utils.read_digit(tmp_path / "nothing.png")
    with pytest.raises(ValueError, match=f"{tmp_path.name} cannot be read"):
        utils.read_digit(tmp_path)
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    assert np.array_equal(utils.read_digit("~/mine.png")[0, 0], plain)


def bytes_of(picture, format):
    buffer = io.BytesIO()
    picture.save(buffer, format)
    return buffer.getvalue()


@pytest.mark.filterwarnings("error", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "content, says",
    [
        (b"", ""),
        (b"my notes", "save it as JPEG or PNG"),
        (bytes_of(writing(), "JPEG")[:2000], ""),  # cut short
        (b"P5 30000 30000 255\n", ".*exceeds limit"),  # 900 megapixels
        (bytes_of(Image.new("L", (1, 600)), "PNG"), ""),  # too narrow to scale
    ],
)
def test_what_cannot_be_read_is_told_in_one_sentence(tmp_path, content, says):
    path = tmp_path / "mine"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^mine cannot be read; .*{says}") as caught:
        utils.read_digit(path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) not in str(caught.value)
    assert caught.value.__suppress_context__, "a second traceback stands above the sentence"
