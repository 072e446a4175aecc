"""The order report: numbers on orders made by hand, every order end to end, the page in a browser,
and what is refused."""

import csv
import json
import re

import jax
import numpy as np
import pytest

from lomdm_jax.config import default_config, validate
from lomdm_jax.data.symbols import ByteTokenizer
from lomdm_jax.distributed import mesh as meshes
from lomdm_jax.errors import UserError
from lomdm_jax.evaluation import order_comparison, order_texts
from lomdm_jax.evaluation.order_comparison import Reading, binned
from lomdm_jax.evaluation.trajectories import Trajectory
from lomdm_jax.generator import init_params, make_generator
from lomdm_jax.jobs import report as job
from lomdm_jax.trained import Trained
from tests.networks import noisy

LENGTH = 8
TEXTS = ["The end.", "of 12", "a b\tc d"]
# One of each way in which an order is drawn and scored; `folder` has two more.
ORDERS = ("r2l", "block:4", "genmd4", "lomdm-order", "lomdm-ranked", "mdm ranked")


def model_of(name, folder, texts="", length=LENGTH, ignore_first=False):
    """A run of bytes with fresh parameters, as `trained.load` gives one."""
    config = default_config()
    config.order.name, *ranked = name.split()
    config.objective.name, config.objective.ignore_first = "order", ignore_first
    config.model.update(width=8, layers=1, heads=2, cond_dim=4, head_layers=1, dropout=0.0)
    config.model.layout = "ranked" if ranked else "own"
    config.data.update(length=length, tokenizer="bytes", vocab_size=0)
    config.train.random_steps = 1 if "walk" in name or "lomdm-" in name else 0
    config.eval.batch_size = 2  # three texts: the last batch is filled up
    config.mesh.data = 1
    config.report.texts = str(texts)
    validate(config)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(config.to_json())
    tokenizer = ByteTokenizer()
    generator = make_generator(config, tokenizer.rows, tokenizer.mask_id)
    mesh = meshes.make_mesh(data=1, fsdp=1, tensor=1)
    shapes = jax.eval_shape(lambda: init_params(config, tokenizer.rows, jax.random.key(0)))
    return Trained(config, folder, tokenizer, generator, mesh, noisy(shapes, 0.2))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    file = tmp_path_factory.mktemp("texts") / "texts.txt"
    file.write_text("\n".join([TEXTS[0], "", *TEXTS[1:]]) + "\n")  # a blank line is none
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory, texts):
    """The report of two runs."""
    root = tmp_path_factory.mktemp("report")
    runs = {name: model_of(name, root / name, texts) for name in ("lomdm", "ar")}
    (root / "lomdm" / "train.csv").write_text(
        "step,velocity_confidence_correlation\n1,0.0\n2,0.25\n3,-0.125\n"
    )
    runs["lomdm"].config.report.runs = f"{root / 'ar'}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "load", lambda folder: runs[folder.name])
        job.report(runs["lomdm"])
    return root / "lomdm" / "report"


def reading(rank_NL, log_q=0.0, log_p=0.0, **arrays):
    """Ranks and, where they are not given, zeros."""
    rank_NL = np.array(rank_NL)
    ones = np.ones(rank_NL.shape)
    fields = dict.fromkeys(Trajectory._fields, 0 * ones) | {
        "rank_BL": rank_NL,
        "targets_BL": ones > 0,
        "log_q_BL": log_q * ones,
        "log_p_BL": log_p * ones,
    }
    found = Trajectory(**fields | arrays)
    tokens_NL = np.tile(np.arange(rank_NL.shape[1]), (len(rank_NL), 1))
    return Reading("run", lambda ids: ["ab"] * len(ids), tokens_NL, ones > 0, found)


@pytest.mark.parametrize(("order", "tau"), [(range(8), 1.0), (range(7, -1, -1), -1.0)])
def test_tau_of_orders_along_the_text(order, tau):
    found = order_comparison.taus(reading([list(order)] * 3))
    assert found["left to right"] == pytest.approx((tau, 0.0, 3))
    assert found["right to left"] == pytest.approx((-tau, 0.0, 3))
    # 16 of 28 pairs lie in different blocks of 4.
    assert found["blocks of 4"].mean == pytest.approx(tau * 16 / np.sqrt(16 * 28))
    assert found["blocks of 16"].values == 0  # one block says nothing


def test_a_random_order_has_a_tau_of_zero():
    rng = np.random.default_rng(0)
    found = order_comparison.taus(reading([rng.permutation(32) for _ in range(400)]))
    for mean in found.values():
        assert abs(mean.mean) < 4 * mean.standard_error < 0.1


def test_the_gap_counts_per_reveal_per_token_and_per_text():
    rows = order_comparison.summary(
        reading([[0, 1, 2, 3]] * 2, log_q=-1.0, log_p=-1.25, nll_BL=2.0 * np.ones((2, 4)))
    )
    found = {(measure, unit): mean for measure, unit, mean in rows}
    assert found["log q - log p", "nats per token"] == pytest.approx((0.25, 0.0, 8))
    assert found["log q - log p", "nats per text"] == pytest.approx((1.0, 0.0, 2))
    assert found["bound, both together", "nats per token"].mean == pytest.approx(2.25)


def test_a_uniform_order_has_the_entropy_of_its_reference():
    """Entropy ln(remaining) at every reveal, wherever it is in the text: the line is met."""
    rank_NL = np.array([[2, 0, 1], [0, 2, 1]])
    charts = order_comparison.charts([reading(rank_NL, order_entropy_BL=np.log(3 - rank_NL))])
    (chart,) = (chart for chart in charts if chart.name == "order_entropy")
    np.testing.assert_allclose(chart.series[0].mean, np.log([3, 2, 1]), atol=1e-12)
    np.testing.assert_allclose(chart.references[0].y, chart.series[0].mean)
    steps = list(order_comparison.step_rows(reading(rank_NL)))
    names = order_comparison.STEP_HEADER
    assert [dict(zip(names, row, strict=True))["log_remaining"] for row in steps] == pytest.approx(
        np.log([3, 2, 1]), abs=1e-5
    )


def test_bins_hold_their_means_and_empty_ones_are_left_out():
    x_NL, y_NL = np.array([[0.0, 1.0, 4.0]]), np.array([[1.0, 3.0, 5.0]])
    found = binned("run", x_NL, y_NL, np.ones((1, 3), bool), np.array([0.0, 2.0, 3.0, 4.0]))
    assert found.x.tolist() == [0.5, 4.0] and found.mean.tolist() == [2.0, 5.0]
    same = binned("run", 0 * x_NL, y_NL, np.ones((1, 3), bool), np.array([0.0]))
    assert same.mean.tolist() == [3.0]


@pytest.mark.parametrize("name", ORDERS)
def test_every_order_is_read_end_to_end(tmp_path, texts, name):
    """Texts shorter than a row: all their tokens get a rank and a cost, and nothing else does."""
    model = model_of(name, tmp_path / "run", texts)
    (rows,) = order_texts.read([model], str(texts), 0)
    found = job._read(model, "run", rows, seed=1)
    sizes = [len(text) for text in TEXTS]
    assert found.counted_NL.sum(-1).tolist() == sizes
    np.testing.assert_array_equal(found.found.targets_BL, found.counted_NL)
    for size, step_L, nll_L in zip(sizes, found.step_NL, found.found.nll_BL, strict=True):
        assert sorted(step_L[:size]) == [*range(size)]
        assert (nll_L[:size] > 0).all() and not nll_L[size:].any()
    taus = order_comparison.taus(found)
    if name == "r2l":
        assert taus["left to right"].mean == pytest.approx(-1)
        assert not found.found.order_entropy_BL.any()
    if name == "mdm ranked":
        left_NL = np.where(found.counted_NL, found.left_NL, 1)
        np.testing.assert_allclose(found.found.order_entropy_BL, np.log(left_NL), atol=1e-5)
    summary = order_comparison.summary(found)
    assert all(np.isfinite(mean.mean) for _, _, mean in summary if mean.values)


def test_all_files_are_there_and_agree(folder):
    names = {path.name for path in folder.iterdir()}
    charts = (
        *("rank_by_position", "kendall_tau", "rank_by_entropy", "surprisal_by_rank", "order_gap"),
        *("order_entropy", "velocity_confidence"),
    )
    assert names == {
        *(f"{chart}.{kind}" for chart in charts for kind in ("png", "svg", "csv")),
        *(f"texts_{run}.{kind}" for run in ("lomdm", "ar") for kind in ("png", "svg")),
        *("summary.csv", "tokens.csv", "steps.csv", "report.html"),
    }  # of no kind of token there are enough to draw
    with open(folder / "tokens.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * sum(map(len, TEXTS))
    ours = [row for row in rows if row["run"] == "ar"]
    assert "".join(row["piece"] for row in ours) == "".join(TEXTS)
    assert [row["step"] for row in ours[: len(TEXTS[0])]] == [str(i) for i in range(8)]
    with open(folder / "summary.csv", newline="", encoding="utf-8") as file:
        summary = {(row["run"], row["measure"]): row for row in csv.DictReader(file)}
    nll = np.mean([float(row["nll"]) for row in ours])
    assert float(summary["ar", "surprisal"]["mean"]) == pytest.approx(nll, rel=1e-4)
    with open(folder / "velocity_confidence.csv", newline="", encoding="utf-8") as file:
        logged = [(row["run"], row["training step"]) for row in csv.DictReader(file)]
    assert logged == [("lomdm", "2.0"), ("lomdm", "3.0")]


def test_the_page_needs_nothing_from_outside(folder):
    page = (folder / "report.html").read_text(encoding="utf-8")
    for word in ("http://", "https://", "src=", "@import", "<link", "<img", "@@"):
        assert word not in page
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    assert [run["name"] for run in data["runs"]] == ["lomdm", "ar"]
    for run in data["runs"]:
        assert ["".join(trace["pieces"]) for trace in run["traces"]] == TEXTS
    for link in re.findall(r'href="([^"#]*)"', page):
        assert (folder / link).exists()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 360])
def test_the_page_works_in_a_browser(browser, folder, scheme, width):
    from playwright.sync_api import expect

    view = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 800})
    wrong, asked, address = [], [], (folder / "report.html").as_uri()
    view.on("console", lambda message: wrong.append(message.text))
    view.on("pageerror", lambda error: wrong.append(str(error)))
    view.on("request", lambda request: asked.append(request.url))
    view.goto(address)
    assert view.evaluate("document.documentElement.scrollWidth") <= width
    ground = view.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(re.search(r"\d+", ground)[0]) < 128) == (scheme == "dark")
    assert view.inner_text("#status") == "step 8 of 8"
    for _ in range(3):
        view.keyboard.press("ArrowLeft")
    assert view.inner_text("#status") == "step 5 of 8"
    hidden = view.evaluate(
        "[...document.querySelectorAll('.text')].map(t => t.querySelectorAll('.off').length)"
    )
    assert hidden == [3, 3]  # both runs in step
    view.focus("#step")
    view.keyboard.press("Home")
    assert view.inner_text("#status") == "step 0 of 8"
    view.keyboard.press("Space")
    expect(view.locator("#status")).to_have_text(re.compile("step [1-7] of 8"))
    expect(view.locator("#play")).to_have_text("Pause")
    view.click("text=Text 2")
    assert view.inner_text("#status") == "step 5 of 5"
    view.focus(".panel:nth-child(2) .tok")
    view.keyboard.press("ArrowRight")
    assert re.fullmatch(
        r'"f": position 1, step 2 of 5, surprisal [\d.]+ nats', view.inner_text("#spoken")
    )
    view.click("#numbers summary")
    expect(view.locator("#table tbody tr")).to_have_count(8)
    assert wrong == [] and asked == [address]
    view.close()


def refused(tmp_path, words, **report):
    model = model_of("ar", tmp_path / "run")
    model.config.report.update(report)
    with pytest.raises(UserError, match=words):
        job.report(model)
    assert not (tmp_path / "run" / "report").exists()


def test_runs_that_cannot_be_compared_are_refused(tmp_path):
    refused(tmp_path, "gone is no folder of a run", runs=str(tmp_path / "gone"))
    refused(tmp_path, "names a run twice", runs=str(tmp_path / "run"))
    many = ",".join(str(tmp_path / str(number)) for number in range(6))
    refused(tmp_path, "makes 7 runs: name 5 or fewer", runs=many)
    model = model_of("mdm", tmp_path / "timed")
    model.config.model.time_conditioning = True
    (tmp_path / "timed" / "config.json").write_text(model.config.to_json())
    refused(tmp_path, "timed has model.time_conditioning", runs=str(tmp_path / "timed"))


def test_texts_that_do_not_fit_are_refused(tmp_path):
    file = tmp_path / "texts.txt"
    refused(tmp_path, "texts.txt', which cannot be read", texts=str(file))
    file.write_text("\n \n")
    refused(tmp_path, "texts.txt', which holds no text", texts=str(file))
    file.write_text("short\nlonger than 8")
    refused(tmp_path, "Text 2 has 13 tokens in .*run, whose data.length is 8", texts=str(file))
    file.write_bytes(b"\xff\xfe")
    refused(tmp_path, "cannot be read .*utf-8", texts=str(file))
    refused(tmp_path, "samples.jsonl cannot be read .*--job sample", texts="samples")
    short = model_of("ar", tmp_path / "short", length=4)
    file.write_text("seven b")
    with pytest.raises(UserError, match=r"Text 1 has 7 tokens in .*short"):
        order_texts.read([model_of("ar", tmp_path / "run"), short], str(file), 0)
    first = model_of("ar", tmp_path / "first", ignore_first=True)
    file.write_text("two\n1")
    with pytest.raises(UserError, match=r"Text 2 has no token that .*first generates"):
        order_texts.read([first], str(file), 0)


def test_samples_of_each_run_are_read(tmp_path):
    models = [model_of("ar", tmp_path / name) for name in ("one", "two")]
    for model, texts in zip(models, (["ab", "c"], ["de"]), strict=True):
        records = [{"tokens": [*text.encode(), 256], "length": len(text)} for text in texts]
        lines = "\n".join(json.dumps(record) for record in records)
        (model.workdir / "samples.jsonl").write_text(lines)
    one, two = order_texts.read(models, "samples", 0)
    assert len(one["tokens"]) == len(two["tokens"]) == 1
    assert [bytes(r["tokens"][r["counted"]].tolist()) for r in (one, two)] == [b"ab", b"de"]


def test_validation_text_is_read_by_runs_of_any_tokenizer(tmp_path):
    """The blocks themselves where the run reads them alike, their text where not."""
    source = tmp_path / "text.txt"
    source.write_text("\n\n".join(f"paragraph {i}" for i in range(60)))
    models = [model_of("ar", tmp_path / n, length=size) for n, size in (("one", 8), ("two", 16))]
    data = dict(source=str(source), unit="paragraph", directory=str(tmp_path / "data"), workers=1)
    models[0].config.data.update(valid_share=0.3, **data)
    one, two = order_texts.read(models, "", 3)
    assert one["tokens"].shape == (3, 8) and one["counted"].all() and "absent" not in one
    assert two["tokens"].shape == (3, 16)
    for n in range(3):
        texts = [
            models[0].tokenizer.decode(r["tokens"][n][r["counted"][n]].tolist()) for r in (one, two)
        ]
        assert texts[0] == texts[1]
