"""The order report: what the page embeds, what it must not hold, and the picture."""

import json
import re

import matplotlib.image
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from lomdm_jax.errors import UserError
from lomdm_jax.evaluation import order_charts, order_page, order_report
from lomdm_jax.evaluation.order_charts import Chart, Reference, Series
from lomdm_jax.evaluation.order_means import Mean
from lomdm_jax.evaluation.order_page import rank_curve
from lomdm_jax.evaluation.order_report import write_order_report
from lomdm_jax.evaluation.order_text import SampleTrace

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<b>&",
    "$x^2$",
    "",
    "\n\n  ",
    "日本😀e\u0301\x00\u202e",
    "\ud800",
    "x" * 200,
    "@@data@@",
]
NOTES = {"sampler": "ancestral", "k<": "</dd>$"}


def ranks_of(samples, length):
    rng = np.random.default_rng(0)
    return np.stack([rng.permutation(length) for _ in range(samples)])


def traces_of(count=2):
    steps = np.arange(len(HOSTILE))  # position 0 is given
    return [SampleTrace(HOSTILE, np.roll(steps, i)) for i in range(count)]


def read_data(page):
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    return json.loads(found[1])


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "new"
    ranks = ranks_of(50, len(HOSTILE))
    title = "<i>Order</i> of @@data@@ $"
    page, picture = write_order_report(folder, traces_of(), ranks, title=title, notes=NOTES)
    return page.read_text(encoding="utf-8"), picture, ranks


def test_page_needs_nothing_from_outside(report):
    page, picture, _ = report
    assert picture.with_name("order.html").exists()
    for word in ("http://", "https://", "src=", "@import", "url(", "<link", "<img"):
        assert word not in page


def test_hostile_text_is_escaped(report):
    page, _, _ = report
    assert page.count("<script") == page.count("</script>") == 2
    assert "alert(1)</script>" not in page and "<b>&" not in page
    assert "<h1>&lt;i&gt;Order&lt;/i&gt; of @@data@@ $</h1>" in page
    assert "<dt>k&lt;</dt><dd>&lt;/dd&gt;$</dd>" in page


def test_page_embeds_every_piece_and_step(report):
    data = read_data(report[0])
    for got, trace in zip(data["runs"][0]["traces"], traces_of(), strict=True):
        assert got["pieces"] == trace.pieces
        assert got["steps"] == trace.reveal_step_L.tolist()
        assert set(got["nats"]) == {None}  # what a token cost is unknown here


def test_curve_matches_numpy(report):
    page, _, ranks = report
    ranks = ranks / (len(HOSTILE) - 1)
    found = read_data(page)["runs"][0]["curve"]
    assert found.pop("samples") == 50
    curve = {name: np.array(values) for name, values in found.items()}
    error = ranks.std(axis=0, ddof=1) / np.sqrt(len(ranks))
    np.testing.assert_allclose(curve["mean"], ranks.mean(axis=0), atol=1e-3)
    np.testing.assert_allclose(curve["error"], error, atol=1e-3)
    np.testing.assert_allclose(curve["low"], np.quantile(ranks, 0.1, axis=0), atol=1e-3)
    np.testing.assert_allclose(curve["high"], np.quantile(ranks, 0.9, axis=0), atol=1e-3)
    np.testing.assert_allclose(curve["ordered"], np.linspace(0, 1, ranks.shape[1]))


def test_picture_is_a_full_png(report):
    _, picture, _ = report
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    image = matplotlib.image.imread(picture)[..., :3]
    assert image.shape[1] == 1500 and image.var() > 0.005
    border = np.concatenate([image[:8].ravel(), image[-8:].ravel(), image[:, -8:].ravel()])
    assert (border == 1).all()  # nothing is cut off at the top, bottom or right


def test_given_positions_leave_the_chart():
    ranks = np.array([[np.nan, 1.0, 0.0, np.nan, 2.0]] * 3)
    curve = rank_curve(ranks)
    np.testing.assert_array_equal(curve.mean, ranks[0] / 2)
    np.testing.assert_array_equal(curve.ordered, [np.nan, 0, 0.5, np.nan, 1])
    np.testing.assert_array_equal(curve.high, ranks[0] / 2)


def test_texts_of_several_lengths_make_one_curve():
    """Two of two tokens and one of three, from left to right: ranks are shares of the own text."""
    curve = rank_curve(np.array([[0, 1, np.nan], [0, 1, np.nan], [0, 1, 2.0]]))
    np.testing.assert_allclose(curve.mean, [0, (1 + 1 + 0.5) / 3, 1])
    np.testing.assert_allclose(curve.ordered, curve.mean)


def test_trace_rank_shares_ties():
    rank = order_report.trace_rank(np.array([0, 2, 1, 2, 5]))
    np.testing.assert_array_equal(rank, [np.nan, 1.5, 0, 1.5, 3])


@pytest.mark.parametrize("steps", [[1], [0]])
def test_one_position_and_one_sample(tmp_path, steps):
    rank = np.zeros((1, 1)) if steps[0] else np.full((1, 1), np.nan)
    trace = SampleTrace(["a"], np.array(steps))
    page, picture = write_order_report(tmp_path, [trace], rank, title="", notes={})
    assert read_data(page.read_text())["runs"][0]["traces"][0]["steps"] == steps
    assert picture.stat().st_size > 0


def test_long_sample_keeps_the_picture_on_a_page(tmp_path):
    trace = SampleTrace(["word\n"] * 200, np.arange(1, 201))
    _, picture = write_order_report(tmp_path, [trace], ranks_of(2, 200), title="t", notes={})
    assert matplotlib.image.imread(picture).shape[0] < 20 * 150


def luminance(colour):
    rgb = np.array(to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return linear @ np.array([0.2126, 0.7152, 0.0722])


def test_text_on_every_shade_is_legible(report):
    shades = read_data(report[0])["shades"]
    assert len(shades) == order_page.SHADES
    for background, ink in shades:
        dark, light = sorted([luminance(background), luminance(ink)])
        assert (light + 0.05) / (dark + 0.05) >= 4.5  # the WCAG level AA


@pytest.mark.parametrize(
    "traces, ranks",
    [
        ([SampleTrace(["a"], np.array([1, 2]))], np.zeros((3, 2))),
        ([SampleTrace(["a", "b"], np.array([1]))], np.zeros((3, 2))),
        ([SampleTrace(["a", "b"], np.array([1, 2]))], np.zeros((3, 4))),
        ([SampleTrace(["a", "b"], np.array([1, 2]))], np.zeros(2)),
        ([SampleTrace(["a", "b"], np.array([1, 2]))], np.zeros((0, 2))),
        ([SampleTrace(["a", "b"], np.array([1, -2]))], np.zeros((3, 2))),
        ([SampleTrace(["a", "b"], np.array([1.0, 2.0]))], np.zeros((3, 2))),
        ([], np.zeros((3, 2))),
    ],
)
def test_bad_input_is_named(tmp_path, traces, ranks):
    with pytest.raises(UserError, match=r"give .*"):
        write_order_report(tmp_path, traces, ranks, title="t", notes={})
    assert not list(tmp_path.iterdir())


def test_runs_are_told_apart_on_light_and_dark_pages():
    pages = {"light": order_charts.COLOURS, "dark": order_page.DARK_COLOURS}
    ground = {"light": luminance("#ffffff"), "dark": luminance("#1c1e22")}  # --card of the page
    assert len(order_charts.DASHES) == len(order_charts.MARKERS) == len(order_charts.COLOURS)
    for name, colours in pages.items():
        for colour in colours:
            dark, light = sorted([luminance(colour), ground[name]])
            assert (light + 0.05) / (dark + 0.05) >= 4.5, colour


def chart_of(**fields):
    means = [Mean(0.25, 0.1, 40), Mean(0.75, float("nan"), 1)]
    series = [Series("a<b", np.arange(2), means), Series("none", np.zeros(0), [])]
    return Chart("curve", "A & B", "What <it> says.", "x", "y (nats)", series, **fields)


def test_a_chart_is_drawn_and_tabled(tmp_path):
    line = Reference("zero", np.array([0.0, 1.0]), np.zeros(2))
    for chart in (chart_of(references=[line]), chart_of(categories=["one", "two"])):
        png, svg, table = order_charts.save(chart, tmp_path)
        assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert "<text" not in svg.read_text()  # outlines need no font
        header, *rows = table.read_text().splitlines()
        assert header == "run,x,mean y (nats),standard error,values"
        assert rows[1].endswith("0.75,nan,1") and len(rows) == 2
    assert rows[0].startswith("a<b,one,0.25")
    again = tmp_path / "again"
    again.mkdir()
    assert order_charts.save(chart, again)[1].read_bytes() == svg.read_bytes()


def test_a_chart_in_a_page_has_the_colours_and_ids_of_the_page():
    svg = order_charts.inline_svg(chart_of(categories=["one", "two"]))
    assert "var(--run0)" in svg and "var(--ink)" in svg and "y (nats)" in svg
    assert order_charts.COLOURS[0] not in svg and "http" not in svg and "<style" not in svg
    ids = re.findall(r'\bid="([^"]*)"', svg)
    assert ids and len(set(ids)) == len(ids) and all(i.startswith("curve-") for i in ids)
    for used in re.findall(r"url\(#([^)]*)\)", svg):
        assert used in ids
