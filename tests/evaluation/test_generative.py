"""Judges against plain computations of the same likelihood, the metrics by hand, and the job."""

import csv
import json
import math
import pathlib
import shutil
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lomdm_jax.config import default_config
from lomdm_jax.data.tokenizers import load_tokenizer
from lomdm_jax.errors import UserError
from lomdm_jax.evaluation import generative as table
from lomdm_jax.evaluation import judges
from lomdm_jax.evaluation.generative import Row, Texts
from lomdm_jax.evaluation.judges import Judged, make_judge
from lomdm_jax.evaluation.likelihood import evaluate, make_scorer
from lomdm_jax.generation import generate
from lomdm_jax.jobs.generative import plan
from lomdm_jax.jobs.train import save_config
from lomdm_jax.main import main, parse
from lomdm_jax.objectives import make_objective
from lomdm_jax.run import start
from lomdm_jax.trained import load
from lomdm_jax.training.checkpoint import Checkpoints, facts
from lomdm_jax.training.initial import fresh
from lomdm_jax.training.optimizer import make_optimizer

ROOT = pathlib.Path(__file__).parent.parent.parent
TINY = """
data.vocab_size=400 data.length=16 model.width=16 model.layers=1 model.heads=2 model.cond_dim=8
eval.batch_size=16 train.batch_size=16 mesh.data=1
""".split()
TEXTS = (
    "Return the number of items in the list.",
    "",
    "a",
    "A text that is far longer than what the model reads, so that its end is not judged. " * 3,
    "The end.",
)
LIMIT = 24  # tokens that the tiny GPT-2 reads


@pytest.fixture(scope="session")
def run_of(tmp_path_factory):
    """The folder of a run with a given order, whose parameters are far from where they start, as if
    it were trained."""
    data, folders = tmp_path_factory.mktemp("data"), {}
    (data / "text.txt").write_text((ROOT / "README.md").read_text())

    def folder(order):
        if order not in folders:
            folders[order] = tmp_path_factory.mktemp(order)
            changes = [*TINY, f"data.directory={data}", f"data.source={data / 'text.txt'}"]
            changes = [f"--config.{change}" for change in changes]
            config = parse([f"--config={ROOT}/configs/quickstart.py:{order}", *changes]).config
            run = start(config, folders[order])
            state = fresh(run, make_optimizer(config.optimizer))()
            checkpoints = Checkpoints(folders[order] / "checkpoints", 1, create=True)
            known = facts(config, run.prepared, run.mixture)
            checkpoints.save(state.replace(ema=jax.tree.map(moved, state.ema)), {}, known)
            checkpoints.close()
            save_config(run)
        return folders[order]

    return folder


def moved(a):
    return a + 0.3 * jnp.sin(jnp.arange(a.size)).reshape(a.shape)


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory):
    """A folder with a tiny random GPT-2 and its tokenizer, as Hugging Face saves them."""
    torch = pytest.importorskip("torch", reason="a judge of Hugging Face needs torch")
    transformers = pytest.importorskip("transformers", reason="and transformers")
    from tokenizers import ByteLevelBPETokenizer

    folder, bpe = tmp_path_factory.mktemp("gpt2"), ByteLevelBPETokenizer()
    bpe.train_from_iterator(TEXTS, vocab_size=300, special_tokens=["<|endoftext|>"])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        **dict(vocab_size=300, n_positions=LIMIT, n_embd=16, n_layer=2, n_head=2),
        **dict(bos_token_id=0, eos_token_id=0, initializer_range=0.5),  # far from uniform
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def mesh():
    return default_config().mesh


def test_a_text_costs_what_the_models_own_loss_says(gpt2):
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(gpt2).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(gpt2)
    judged, per_token = make_judge(f"hf:{gpt2}", mesh())(TEXTS), []
    for number, text in enumerate(TEXTS):
        ids = tokenizer(text)["input_ids"][:LIMIT]
        assert judged.tokens_N[number] == max(len(ids) - 1, 0)
        if len(ids) < 2:
            assert judged.nats_N[number] == 0
            continue
        with torch.no_grad():
            found = model(
                torch.tensor([ids]), labels=torch.tensor([ids]), output_hidden_states=True
            )
        per_token.append(found.loss.item())
        nats = per_token[-1] * (len(ids) - 1)
        assert judged.nats_N[number] == pytest.approx(nats, rel=1e-5)
        last_D = found.hidden_states[-1][0, -1].numpy()
        np.testing.assert_allclose(judged.features_ND[number], last_D, rtol=1e-4, atol=1e-5)
    assert np.ptp(per_token) > 0.5, "too near uniform to tell anything"
    assert judged.tokens_N[3] == LIMIT - 1, "the long text must be cut"
    assert not judged.features_ND[1].any() and judged.features_ND[2].any()


def test_what_stands_beside_a_text_does_not_matter(gpt2, monkeypatch):
    """Neither does the order of the texts; one by one there is no padding at all."""
    judge = make_judge(f"hf:{gpt2}", mesh())
    together = judge(TEXTS)
    backwards = judge(TEXTS[::-1])
    monkeypatch.setattr(judges, "TOKENS", 1)
    alone = judge(TEXTS)
    for other in (Judged(*(a[::-1] for a in backwards)), alone):
        np.testing.assert_allclose(together.nats_N, other.nats_N, rtol=1e-5)
        np.testing.assert_array_equal(together.tokens_N, other.tokens_N)
        np.testing.assert_allclose(together.features_ND, other.features_ND, rtol=1e-4, atol=1e-5)


def test_our_own_judge_gives_the_chain_rule(run_of):
    """Token by token, each predicted from the text before it with all else masked; and what the
    evaluation makes of the same tokens."""
    folder = run_of("ar")
    model, length = load(folder), 16
    ids = model.tokenizer.encode("Return the number of items in a list, or none if it is empty.")
    ids = ids[:length]
    text = model.tokenizer.decode(ids)
    assert model.tokenizer.encode(text) == ids and len(ids) == length
    tokens_L, where_L = np.array(ids), np.arange(length)
    z_KL = np.where(where_L < where_L[:, None], tokens_L, model.generator.mask_id)
    predict = jax.jit(lambda params, z_KBL: model.generator.reverse(params)(z_KBL, None)[0].logits)
    logits_LLV = predict(model.params, z_KL[:, None])[:, 0]
    nll_L = -jax.nn.log_softmax(logits_LLV[where_L, where_L])[where_L, tokens_L]
    judged = make_judge(str(folder), mesh())([text, "", text])
    assert judged.features_ND is None and np.ptp(nll_L) > 1, "too near uniform to tell anything"
    np.testing.assert_array_equal(judged.tokens_N, [length, 0, length])
    nats = float(jnp.sum(nll_L))
    np.testing.assert_allclose(judged.nats_N, [nats, 0, nats], rtol=1e-5)
    objective = make_objective(
        "order",
        **dict(mask_id=model.generator.mask_id, samples=1, eps=1e-3, reconstruction_share=0.1),
        one_pass="groups",
    )
    scorer = jax.jit(make_scorer(model.generator, objective, 1))
    batch = {"tokens": tokens_L[None].astype(np.int32), "counted": np.ones((1, length), bool)}
    key = jax.random.key(0)
    found = evaluate(scorer, model.params, [batch], key=key, draws=1, byte_lengths=None)
    assert found.nelbo_order.nats_per_token * length == pytest.approx(judged.nats_N[0], rel=1e-5)


def test_a_long_text_is_judged_in_pieces(run_of, monkeypatch):
    """As if each were a text; however many rows a pass has."""
    folder = run_of("ar")
    judge, tokenizer = make_judge(str(folder), mesh()), load(folder).tokenizer
    ids = tokenizer.encode("Return the number of items in the list that are not none. " * 3)
    pieces = [tokenizer.decode(ids[start : start + 16]) for start in range(0, len(ids), 16)]
    assert [len(tokenizer.encode(piece)) for piece in pieces[:-1]] == [16] * (len(pieces) - 1)
    parts, whole = judge(pieces), judge(["A list.", tokenizer.decode(ids)])
    assert whole.tokens_N[1] == len(ids) == parts.tokens_N.sum()
    assert whole.nats_N[1] == pytest.approx(parts.nats_N.sum(), rel=1e-6)
    monkeypatch.setattr(judges, "TOKENS", 1)
    np.testing.assert_allclose(judge(pieces).nats_N, parts.nats_N, rtol=1e-5)


def test_a_judge_that_never_learned_the_first_token_does_not_count_it(run_of, tmp_path):
    """`objective.ignore_first`: what is left is the cost without that of the first token alone."""
    folder = tmp_path / "run"
    shutil.copytree(run_of("ar"), folder)
    config = json.loads((folder / "config.json").read_text())
    config["objective"]["ignore_first"] = True
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(folder / "tokenizer")
    ids = tokenizer.encode("Return a list.")
    texts = [tokenizer.decode(ids), tokenizer.decode(ids[:1])]
    without, whole = (make_judge(str(f), mesh())(texts) for f in (folder, run_of("ar")))
    np.testing.assert_array_equal(without.tokens_N, [len(ids) - 1, 0])
    assert whole.tokens_N[1] == 1 and without.nats_N[1] == 0
    assert without.nats_N[0] == pytest.approx(whole.nats_N[0] - whole.nats_N[1], rel=1e-5)


def test_unigram_entropy_by_hand():
    found = table.unigram_entropy(np.array([7, 7, 3, 5]))
    assert found == pytest.approx(math.log(2) / 2 + 2 * math.log(4) / 4)
    assert table.unigram_entropy(np.array([4] * 9)) == 0
    assert table.unigram_entropy(np.array([], int)) == 0


def test_the_metrics_of_texts_by_hand():
    texts = Texts(["ab", "ab", "b", ""], [np.array(t, int) for t in ([1, 2], [1, 2], [2], [])])
    judged = Judged(np.array([3.0, 5.0, 4.0, 0.0]), np.array([2, 2, 2, 0]), None)
    found = table.measure(texts, judged)
    assert found["samples"] == 4 and found["judged_tokens"] == 6 and found["distinct"] == 0.75
    assert found["perplexity"] == pytest.approx(math.exp(2))
    error = np.std([1.5, 2.5, 2.0], ddof=1) / math.sqrt(3)  # of three texts of equal length
    assert found["perplexity_error"] == pytest.approx(math.exp(2) * error)
    entropies = [math.log(2), math.log(2), 0, 0]
    assert found["entropy"] == pytest.approx(np.mean(entropies))
    assert found["entropy_error"] == pytest.approx(np.std(entropies, ddof=1) / 2)
    empty = table.measure(Texts([""], [np.array([], int)]), Judged(np.zeros(1), np.zeros(1), None))
    assert math.isnan(empty["perplexity"]) and empty["entropy"] == 0


def test_mauve_is_a_number_or_a_reason(monkeypatch):
    def compute_mauve(p_features, q_features):
        return types.SimpleNamespace(mauve=p_features.sum() / q_features.sum())

    def judged(*features):
        return Judged(np.zeros(1), np.ones(1), np.array([features]) if features else None)

    monkeypatch.setitem(sys.modules, "mauve", types.SimpleNamespace(compute_mauve=compute_mauve))
    assert table.mauve(judged(4.0), judged(1.0)) == 0.25, "the reference comes first"
    assert table.mauve(judged(4.0), None) == "no reference"
    assert table.mauve(judged(), judged()) == "no features of this judge"
    monkeypatch.setitem(sys.modules, "mauve", None)
    assert table.mauve(judged(4.0), judged(1.0)) == "not installed"


def row(**values):
    names = dict.fromkeys(Row._fields, 1.0)
    return Row(
        **{
            **names,
            "sampler": "race",
            "mauve": "no reference",
            "gumbel": "full",
            "rejection": "none",
            **values,
        }
    )


def test_files_are_complete_after_every_row(tmp_path):
    """And no number of them is one that JSON does not know."""
    rows = [row(asked_calls=4, samples=2, top_k=0, seed=1, perplexity_error=math.nan)]
    facts = {"judge": "hf:x", "protocol": "x, all tokens", "sample": {"dependence": math.inf}}
    for _ in range(2):
        paths = table.write(tmp_path, facts, rows)
        assert all(path.stat().st_size for path in paths)
        page = (tmp_path / "generative.md").read_text()
        assert page.count("| `race` |") == len(rows) and "x, all tokens" in page
        text = (tmp_path / "generative.json").read_text()
        assert "NaN" not in text and "Infinity" not in text
        assert len(json.loads(text)["rows"]) == len(rows)
        with (tmp_path / "generative.csv").open(newline="") as file:
            assert len([*csv.DictReader(file)]) == len(rows)
        rows.append(row(asked_calls=8, samples=2, top_k=0, seed=1))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", ["generative.judge", "''", "hf:NAME", '"ar"']),
        ("gpt2", ["generative.judge", "'gpt2'", "hf:NAME"]),
        ("hf:", ["generative.judge", "'hf:'", "hf:NAME"]),
        (str(ROOT), [str(ROOT), "config.json"]),
    ],
)
def test_what_is_no_judge_is_refused(name, words):
    with pytest.raises(UserError) as error:
        make_judge(name, mesh())
    assert all(word in str(error.value) for word in words), error.value


def test_a_judge_that_is_not_there_is_refused(gpt2, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"'hf:no/such', which cannot be loaded .*local folder"):
        make_judge("hf:no/such", mesh())
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UserError, match="which cannot be loaded"):
        make_judge(f"hf:{tmp_path}", mesh())
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"packages torch and transformers: python -m pip install"):
        make_judge(f"hf:{gpt2}", mesh())


def test_a_run_that_gives_but_a_bound_is_no_judge(tmp_path):
    """Which its config tells, before anything is loaded."""
    for order, layout in (("lomdm", "own"), ("r2l", "own"), ("ar", "ranked")):
        config = default_config()
        config.order.name, config.model.layout = order, layout
        (tmp_path / "config.json").write_text(config.to_json())
        found = rf"order.name = '{order}' and model.layout = '{layout}'.*a bound"
        with pytest.raises(UserError, match=found):
            make_judge(str(tmp_path), mesh())


def planned(length=32, order="mdm", **changes):
    """(sampler, calls, steps or reveal) of each point."""
    config = default_config()
    config.data.length, config.order.name, config.objective.name = length, order, "order"
    config.generative.update(changes)
    return [
        (p.sampler, p.calls, p.settings.steps if p.sampler[0] == "a" else p.settings.reveal)
        for p in plan(config)
    ]


def test_settings_come_as_near_to_the_calls_as_they_can():
    found = planned(samplers="race, ancestral@grid=linear", calls="8,12,32,64")
    race = [("race", 8, 4), ("race", 12, 3), ("race", 32, 1)]  # at 64 calls as at 32
    assert found == [*race, *(("ancestral@grid=linear", n, n) for n in (8, 12, 32, 64))]
    # Eight blocks, each of which takes a call at least.
    blocks = planned(order="block:4", samplers="race,ancestral", calls="4,16,24")
    assert blocks == [
        *(("race", 4, 4), ("race", 16, 2)),
        *(("ancestral", 4, 1), ("ancestral", 16, 2), ("ancestral", 24, 3)),
    ]
    two = planned(samplers="race@length=64@block=16,ancestral@length=64@block=16", calls="8")
    assert [calls for _, _, calls in two] == [8, 2]


def test_changes_of_a_sampler_are_set():
    config = default_config()
    config.generative.samplers = "race@temperature=0.5@top_p=0.9,confidence@threshold=0.3"
    config.generative.update(calls="16", samples=5)
    race, confidence = (point.settings for point in plan(config))
    assert (race.sampler, race.temperature, race.top_p, race.count) == ("race", 0.5, 0.9, 5)
    assert (confidence.temperature, confidence.threshold, confidence.reveal) == (1.0, 0.3, 8)
    assert config.sample.temperature == 1.0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"samplers": "race,swim"}, ["generative.samplers", "'swim'", "race, "]),
        ({"samplers": "race@temprature=1"}, ["'race@temprature=1'", "sample.temperature"]),
        ({"samplers": "race@top_p=high"}, ["'race@top_p=high'", "float"]),
        ({"samplers": "race@top_p=2"}, ["'race@top_p=2'", "(0, 1]"]),
        ({"samplers": " , "}, ["generative.samplers is empty"]),
        ({"calls": "8,many"}, ["generative.calls", "'8,many'", "8,16,32"]),
        ({"calls": "0"}, ["generative.calls", "'0'", "above zero"]),
        ({"calls": "8,"}, ["generative.calls", "'8,'"]),
    ],
)
def test_what_cannot_be_drawn_is_refused(changes, words):
    with pytest.raises(UserError) as error:
        planned(**changes)
    assert all(word in str(error.value) for word in words), error.value


def job(folder, *changes):
    options = [f"--config.generative.{change}" for change in changes]
    return main(["--workdir", str(folder), "--job", "generative", *options])


def table_of(folder):
    with (folder / "generative.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_job_from_end_to_end(run_of, gpt2, tmp_path, capsys, monkeypatch):
    """A reference and two samplers. Then the same again, interrupted at the second."""
    folder, reference = run_of("mdm"), tmp_path / "real.txt"
    texts = ["A real text.", "Another one, of more tokens.", "A real text."]
    reference.write_text("\n\n".join(texts))
    samplers = ["race@temperature=0.5", "ancestral"]
    command = (f"judge=hf:{gpt2}", f"samplers={','.join(samplers)}", f"reference={reference}")
    command = (*command, "calls=4", "samples=4")
    assert job(folder, *command) == 0
    rows, printed = table_of(folder), capsys.readouterr().out
    assert [row["sampler"] for row in rows] == ["reference", *samplers]
    assert [row["asked_calls"] for row in rows] == ["", "4", "4"]
    assert float(rows[1]["nfe"]) == 4 and 1 <= float(rows[2]["nfe"]) <= 4
    assert [row["samples"] for row in rows] == ["3", "4", "4"]
    assert [row["temperature"] for row in rows] == ["", "0.5", "1.0"]
    assert {row["gumbel"] for row in rows[1:]} == {table.GUMBEL}
    assert all(0 < float(row["entropy"]) <= math.log(16) for row in rows)
    assert float(rows[0]["distinct"]) == pytest.approx(2 / 3)
    tokenizer = load_tokenizer(folder / "tokenizer")
    cut = [tokenizer.decode(tokenizer.encode(text)[:16]) for text in texts]
    assert cut != texts, "the longest must be cut to the length of a sample"
    judged = make_judge(f"hf:{gpt2}", mesh())(cut)
    nats = judged.nats_N.sum() / judged.tokens_N.sum()
    assert float(rows[0]["perplexity"]) == pytest.approx(math.exp(nats), rel=1e-5)
    page = (folder / "generative.md").read_text()
    assert page in printed and page.count("\n| ") == 2 + len(rows) and str(gpt2) in page
    data = json.loads((folder / "generative.json").read_text())
    assert [row["sampler"] for row in data["rows"]] == ["reference", *samplers]
    assert (folder / "generative.png").stat().st_size > 10_000

    drawn = []

    def interrupted(model, settings):
        if drawn:
            raise KeyboardInterrupt
        drawn.append(settings)
        return generate(model, settings)

    monkeypatch.setattr("lomdm_jax.jobs.generative.generate", interrupted)
    assert job(folder, *command) == 130
    kept = table_of(folder)
    for row in (*kept, *rows):
        del row["tokens_per_second"]
    assert kept == rows[:2], "what was done before the interruption, and as it was"


def test_what_the_job_cannot_use_is_refused_before_it_draws(run_of, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lomdm_jax.jobs.generative.generate", None)
    (tmp_path / "empty.txt").write_text("\n \n")
    judge, folder = f"judge={run_of('ar')}", run_of("mdm")
    for change, words in {
        f"reference={tmp_path / 'none.txt'}": [
            "generative.reference",
            "none.txt",
            "cannot be read",
        ],
        f"reference={tmp_path / 'empty.txt'}": ["generative.reference", "holds no text"],
        "judge=elsewhere": ["generative.judge", "'elsewhere'"],
        "calls=-1": ["generative.calls", "'-1'"],
        "samples=0": ["generative.samples is 0", "above zero"],
    }.items():
        assert job(folder, judge, change) == 2
        message = capsys.readouterr().err
        assert all(word in message for word in words), message
    command = ["--workdir", str(folder), "--job", "generative", "--config.sample.prompt=The"]
    assert main(command) == 2
    assert "config.sample.prompt is 'The'" in capsys.readouterr().err
