"""The command line from end to end: train, evaluate, sample, kill, resume, and every user error."""

import csv
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import types

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from lomdm_jax.data.prepare import prepare
from lomdm_jax.errors import UserError
from lomdm_jax.evaluation import walk_choice
from lomdm_jax.main import main, parse
from lomdm_jax.objectives.nelbo import Terms
from lomdm_jax.orders.learned import TRIALS
from lomdm_jax.training import checkpoint, compiled
from lomdm_jax.training.loop import Loop
from lomdm_jax.training.metrics import MEASURED

ROOT = pathlib.Path(__file__).parent.parent
TINY = """
data.vocab_size=400 data.length=16 model.width=16 model.layers=1 model.heads=2 model.cond_dim=8
train.steps=40 train.batch_size=16 train.log_every=1 train.eval_every=20 checkpoint.every=10
eval.batch_size=16 eval.sequences=40 eval.draws=2 sample.count=8 optimizer.warmup_steps=5
optimizer.learning_rate=0.01 checkpoint.keep=2
""".split()
EOS = 1  # of a tokenizer trained here


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def arguments(data, monkeypatch):
    """The command line of a tiny run in a given workdir, with changes."""
    monkeypatch.chdir(ROOT)

    def build(workdir, *changes, config="configs/quickstart.py"):
        options = [f"--config.{change}" for change in [*TINY, f"data.directory={data}", *changes]]
        return ["--config", config, "--workdir", str(workdir), *options]

    return build


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The folder of the run that `test_train...` makes and later tests read."""
    return tmp_path_factory.mktemp("trained")


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_train_evaluates_samples_and_draws(arguments, trained, monkeypatch, capsys):
    traces = []
    original = compiled.make_train_step

    def counted(*args):
        step = original(*args)
        return lambda *inputs: (traces.append(1), step(*inputs))[1]

    monkeypatch.setattr(compiled, "make_train_step", counted)
    assert main(arguments(trained)) == 0
    assert len(traces) == 1, "the step must be traced once over a whole run"
    names = {path.name for path in trained.iterdir()}
    assert names >= {"config.json", "train.csv", "eval.csv", "tensorboard", "checkpoints"}
    assert names >= {"evaluation.json", "samples.jsonl", "order.html", "order.png"}
    assert names >= {"order_statistics.json", "order_statistics.png"}
    losses = [float(row["loss"]) for row in rows(trained / "train.csv")]
    assert len(losses) == 40 and np.mean(losses[-5:]) < np.mean(losses[:5])
    assert json.loads((trained / "config.json").read_text())["train"]["steps"] == 40
    printed = capsys.readouterr().out
    assert "nelbo_order" in printed and "bits/byte" in printed and "network calls" in printed


@pytest.mark.parametrize("order", ["ar", "block:4"])
def test_fixed_orders_run_from_end_to_end(arguments, tmp_path, order):
    """Also on the continuous bound, which the same network must serve."""
    changes = (
        "train.steps=2",
        "train.eval_every=2",
        "train.log_every=1",
        "objective.name=continuous",
    )
    command = arguments(tmp_path, *changes, config=f"configs/quickstart.py:{order}")
    assert main(command) == 0
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert found["order"] == found["clock"] == 0
    assert found["nelbo_nats_per_token"] == found["nelbo_order_nats_per_token"] > 0
    record = json.loads((tmp_path / "samples.jsonl").read_text().splitlines()[0])
    reveals = np.array(record["revealed"])
    size = 4 if order == "block:4" else 1
    np.testing.assert_array_equal(
        np.sort(reveals.reshape(-1, size), axis=1).ravel(), np.arange(1, 17)
    )


def test_metrics_name_the_terms_and_the_order(trained):
    first = rows(trained / "train.csv")[0]
    wanted = {"loss", "grad_norm", "learning_rate", "tokens_per_second", *Terms._fields}
    wanted |= {"exponent_q05", "exponent_q50", "exponent_q95", "velocity_confidence_correlation"}
    assert wanted < first.keys()
    events = list((trained / "tensorboard" / "train").glob("events.*"))
    assert events and events[0].stat().st_size > 1000


def test_checkpoints_kept_are_the_latest_and_the_best(trained):
    kept = {int(path.name) for path in (trained / "checkpoints").iterdir() if path.name.isdigit()}
    bounds = {
        int(row["step"]): float(row["nelbo_order_nats_per_token"])
        for row in rows(trained / "eval.csv")
    }
    assert kept == {30, 40, min(bounds, key=bounds.get)}


def test_evaluate_reproduces_the_last_evaluation(arguments, trained, capsys):
    before = json.loads((trained / "evaluation.json").read_text())
    assert main([*arguments(trained), "--job", "evaluate"]) == 0
    assert json.loads((trained / "evaluation.json").read_text()) == before
    assert before["sequences"] == 40 and before["tokens"] == 640 and before["draws"] == 2
    assert before["nelbo_nats_per_token"] >= before["nelbo_order_nats_per_token"]
    assert before["nelbo_order_standard_error"] > 0
    printed = capsys.readouterr().out
    passport = before["data"]
    assert passport["source"] == "stdlib" and passport["split"] == "valid"
    assert f"SHA-256 {passport['sha256'][:12]}" in printed
    assert passport["uncounted_tokens"] == {"padding": 0, "given": 0}


def test_prepare_says_what_it_made_and_finds_it_again(arguments, tmp_path, capsys):
    command = [*arguments(tmp_path, f"data.directory={tmp_path / 'data'}"), "--job", "prepare"]
    assert main(command) == 0
    first = capsys.readouterr().out
    assert main(command) == 0
    second = capsys.readouterr().out
    assert "prepare: train: " in first and "prepare: " not in second
    (folder,) = (tmp_path / "data").iterdir()
    for printed in (first, second):
        assert f"prepared in {folder}" in printed
        blocks = json_of(folder)["splits"]["valid"]["blocks"]
        assert f" tokens, {blocks:,} blocks, " in printed


def test_other_text_is_scored_beside_the_runs_own(arguments, trained, data, tmp_path, capsys):
    """With the run's tokenizer, which its folder holds; text without a training split will do."""
    before = (trained / "evaluation.json").read_text()
    (tmp_path / "other.txt").write_text("\n\n".join(["Some other text to be scored."] * 50))
    model = f"data.tokenizer=sentencepiece:{trained / 'tokenizer' / 'tokenizer.model'}"
    other = (model, "data.source=", f"data.valid_source={tmp_path / 'other.txt'}")
    command = arguments(trained, *other, f"data.directory={tmp_path / 'data'}")
    assert main([*command, "--job", "evaluate"]) == 0
    (folder,) = (tmp_path / "data").iterdir()
    found = json_of(trained / folder.name, "evaluation.json")
    assert found["data"]["source"] == "other" and found["data"]["documents"] == 50
    assert (trained / "evaluation.json").read_text() == before
    assert "no split 'train'; its splits: valid" in refused(command[:2] + command[4:], capsys)


def test_a_preset_sets_the_data_and_is_overruled(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    command = ["--config=configs/quickstart.py", "--data=zero-shot-ptb", "--config.data.length=64"]
    with pytest.raises(UserError, match=r"data.tokenizer 'hf:nowhere'"):
        prepare(parse([*command, "--config.data.tokenizer=hf:nowhere"]).config.data)
    config = parse(command).config
    assert config.data.detokenizer == "ptb" and config.data.length == 64
    assert "'zero-shot-pbt'" in refused([*command[:1], "--data=zero-shot-pbt"], capsys)


@pytest.mark.parametrize(("order", "packing"), [("lomdm", "padded"), ("ar", "documents")])
def test_packings_run_from_end_to_end(arguments, tmp_path, order, packing):
    changes = (f"data.packing={packing}", "train.steps=2", "train.eval_every=2", "data.length=32")
    command = arguments(tmp_path, *changes, config=f"configs/quickstart.py:{order}")
    assert main(command) == 0
    found = json_of(tmp_path, "evaluation.json")
    padding = found["data"]["uncounted_tokens"]["padding"]
    assert found["tokens"] + padding == found["sequences"] * 32
    assert (padding > 0) == (packing == "padded") and found["nelbo_order_nats_per_token"] > 0


def test_a_run_starts_from_anothers_parameters(arguments, trained, tmp_path, capsys):
    """A longer context and another order: what both have is taken, the rest is fresh."""
    changes = (f"train.start_from={trained}", "data.length=32", "train.steps=1", "mesh.data=2")
    changes = (*changes, "train.eval_every=1", "optimizer.learning_rate=1e-12")
    command = arguments(tmp_path, *changes, config="configs/quickstart.py:ar")
    assert main(command) == 0
    assert f"starting from step 40 of {trained}; fresh: nothing" in capsys.readouterr().out
    found, started = (
        restore(f / "checkpoints", s)["state"] for f, s in ((trained, 40), (tmp_path, 1))
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        found["ema"]["backbone"],
        started["params"]["backbone"],
    )
    wider = arguments(tmp_path / "wider", *changes, "model.width=32")
    message = refused(wider, capsys)
    assert "config.train.start_from" in message and "backbone/" in message


def test_the_two_estimators_agree_within_their_errors(arguments, trained):
    """Time-free and continuous are the same bound; each with its own standard error."""
    found = {}
    for name in ("order", "continuous"):
        changes = (f"eval.estimator={name}", "eval.draws=16", "eval.sequences=0")
        assert main([*arguments(trained, *changes), "--job", "evaluate"]) == 0
        found[name] = json.loads((trained / "evaluation.json").read_text())
    for bound in ("nelbo", "nelbo_order"):
        means = [found[name][f"{bound}_nats_per_token"] for name in found]
        errors = [found[name][f"{bound}_standard_error"] for name in found]
        assert abs(means[0] - means[1]) < 4 * np.hypot(*errors)
        assert errors[0] < errors[1], "the time-free estimate should be the less noisy one"


@pytest.mark.parametrize("sampler", ["race", "ancestral"])
def test_sample_completes_a_prompt_and_a_suffix(arguments, trained, sampler):
    changes = ("sample.prompt=Return the ", "sample.suffix= list.", f"sample.sampler={sampler}")
    assert main([*arguments(trained, *changes), "--job", "sample"]) == 0
    lines = (trained / "samples.jsonl").read_text().splitlines()
    assert len(lines) == 8
    for record in map(json.loads, lines):
        assert record["text"].startswith("Return the ") and record["text"].endswith(" list.")
        assert record["revealed"][0] == 0
        assert record["calls"] == len({*record["revealed"]} - {0}), "a call per step that reveals"


# A run that is killed while the checkpoint of step 20 is complete but for its last rename.
KILLED = """
import os, signal, sys
from lomdm_jax.main import main
def guard(rename):
    def call(source, target, *args, **kwargs):
        if os.path.basename(os.fspath(target)) == "20":
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(source, target, *args, **kwargs)
    return call
os.rename, os.replace = guard(os.rename), guard(os.replace)
main(sys.argv[1:])
"""


def test_a_killed_run_continues_bit_for_bit(arguments, trained, tmp_path):
    command = [sys.executable, "-c", KILLED, *arguments(tmp_path)]
    killed = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    saved = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert "10" in saved and "20" not in saved and len(saved) > 1, "not killed in mid-write"
    assert main(arguments(tmp_path)) == 0
    same_end(trained, tmp_path)
    left = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert all(name.isdigit() for name in left), "the half-written checkpoint is still there"


def test_a_terminated_run_saves_and_continues_bit_for_bit(
    arguments, trained, tmp_path, monkeypatch, capsys
):
    """SIGTERM comes while step 14 runs."""
    report = Loop._report

    def terminating(self, number, metrics):
        if number == 13:
            os.kill(os.getpid(), signal.SIGTERM)
        report(self, number, metrics)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_report", terminating)
        assert main(arguments(tmp_path)) == 143
    assert "terminated at step 14, which is saved" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert main(arguments(tmp_path)) == 0
    assert "continuing from step 14" in capsys.readouterr().out
    same_end(trained, tmp_path)


@pytest.mark.parametrize(
    ("file", "damage"),
    [("state/manifest.ocdbt", "cut"), ("data/metadata", "emptied"), ("facts/metadata", "deleted")],
)
def test_a_damaged_checkpoint_is_set_aside(arguments, trained, tmp_path, capsys, file, damage):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "checkpoints" / "40" / file
    content = path.read_bytes()
    path.unlink()
    if damage != "deleted":
        path.write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
    assert main(arguments(tmp_path)) == 0
    printed = capsys.readouterr()
    assert "the checkpoint of step 40 is damaged (" in printed.err
    assert "continuing from step 30" in printed.out
    assert (tmp_path / "damaged_checkpoints" / "40").is_dir()
    same_end(trained, tmp_path)


def test_nothing_is_trained_anew_while_all_checkpoints_are_damaged(
    arguments, trained, tmp_path, capsys
):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    folders = list((tmp_path / "checkpoints").iterdir())
    for folder in folders:
        (folder / "data" / "metadata").unlink()
    assert main(arguments(tmp_path)) == 2
    message = capsys.readouterr().err
    assert f"All {len(folders)} checkpoints of" in message and "damaged_checkpoints" in message


def test_a_run_goes_back_to_an_older_checkpoint(arguments, trained, tmp_path, capsys):
    """The later one is kept aside, and made again with the same bits."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    assert main([*arguments(tmp_path), "--resume=30"]) == 0
    assert "continuing from step 30" in capsys.readouterr().out
    same_end(trained, tmp_path)
    aside = tmp_path / "superseded_checkpoints" / "40" / "state"
    with ocp.StandardCheckpointer() as reader:
        states = [reader.restore(folder) for folder in (aside, trained / "checkpoints/40/state")]
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_what_cannot_be_resumed_as_asked_is_refused(arguments, trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    message = refused([*arguments(tmp_path), "--resume=never"], capsys)
    assert "--resume is never" in message and "30, 40]" in message
    assert "No checkpoint '7'" in refused([*arguments(tmp_path), "--resume=7"], capsys)
    (tmp_path / "checkpoints" / "30" / "data" / "metadata").unlink()
    message = refused([*arguments(tmp_path), "--resume=30"], capsys)
    assert "The checkpoint of step 30 is damaged" in message and "--resume=auto" in message
    assert not (tmp_path / "superseded_checkpoints").exists(), "nothing was moved"
    restore = [*arguments(tmp_path, "checkpoint.restore=30"), "--job=sample"]
    assert main(restore) == 0, "to sample, the data's position is not needed"
    (tmp_path / "checkpoints" / "30" / "state" / "manifest.ocdbt").unlink()
    assert "The checkpoint of step 30 in" in refused(restore, capsys)


FULL_DISK = """
import resource, sys
from lomdm_jax.main import main
from lomdm_jax.training.checkpoint import Checkpoints
save = Checkpoints.save
def limited(self, state, *args):
    if int(state.step) == 20:  # no file may grow beyond this: what writes gets an error
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**15, 2**15))
    save(self, state, *args)
Checkpoints.save = limited
sys.exit(main(sys.argv[1:]))
"""


def test_a_checkpoint_that_cannot_be_written_stops_the_run(arguments, trained, tmp_path):
    command = [sys.executable, "-c", FULL_DISK, *arguments(tmp_path)]
    failed = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert failed.returncode == 2, failed.stderr
    for word in ("could not be written", "Step 10 is intact", "run the same command again"):
        assert word in failed.stderr, failed.stderr
    assert main(arguments(tmp_path)) == 0
    same_end(trained, tmp_path)


def same_end(one, other):
    """The same state after the last step, bit for bit, and the same metrics."""
    ours, theirs = (restore(folder / "checkpoints") for folder in (one, other))
    assert ours["data"] == theirs["data"]
    jax.tree.map(np.testing.assert_array_equal, ours["state"], theirs["state"])
    for name in ("train.csv", "eval.csv"):
        assert strip(rows(one / name)) == strip(rows(other / name))


def restore(folder, step=40):
    with ocp.CheckpointManager(folder) as manager:
        items = {"state": ocp.args.StandardRestore(), "data": ocp.args.JsonRestore()}
        return manager.restore(step, args=ocp.args.Composite(**items))


def strip(table):
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in table]


def test_the_noise_range_is_part_of_a_run_that_continues_bit_for_bit(
    arguments, tmp_path, monkeypatch
):
    """Found at the first evaluation, it changes the steps after, and no evaluation."""
    changes = ["train.steps=8", "train.eval_every=4", "checkpoint.every=2"]

    def command(name, *more):
        every = (*changes, *more)
        return arguments(tmp_path / name, *every, config="configs/quickstart.py:block:4")

    clip = "objective.clip_noise=true"
    assert main(command("plain")) == main(command("whole", clip)) == 0
    with monkeypatch.context() as patch:
        patch.setattr(
            checkpoint.Checkpoints, "save", stopping_after(6, checkpoint.Checkpoints.save)
        )
        assert main(command("stopped", clip)) == 130
    assert main(command("stopped", clip)) == 0
    whole, stopped = (restore(tmp_path / name / "checkpoints", 8) for name in ("whole", "stopped"))
    jax.tree.map(np.testing.assert_array_equal, whole["state"], stopped["state"])
    for name in ("train.csv", "eval.csv"):
        assert strip(rows(tmp_path / "whole" / name)) == strip(rows(tmp_path / "stopped" / name))
    first, last = (
        [float(row["noise_low"]), float(row["noise_high"])]
        for row in rows(tmp_path / "whole" / "eval.csv")
    )
    assert first != [0, 1] and 0.49 < first[1] - first[0] < 0.91
    saved = restore(tmp_path / "stopped" / "checkpoints", 6)["state"]["noise_range"]
    np.testing.assert_allclose(saved, first)
    np.testing.assert_allclose(whole["state"]["noise_range"], last)
    plain, clipped = (strip(rows(tmp_path / name / "train.csv")) for name in ("plain", "whole"))
    assert plain[:4] == clipped[:4]
    assert all(a["loss"] != b["loss"] for a, b in zip(plain[4:], clipped[4:], strict=True))
    found = json_of(tmp_path / "whole", "evaluation.json")
    assert main([*command("whole"), "--job", "evaluate"]) == 0
    assert json_of(tmp_path / "whole", "evaluation.json") == found


@pytest.mark.parametrize("order", ["walk", "lomdm-order"])
def test_a_walk_is_chosen_once_saved_and_kept(arguments, tmp_path, capsys, order):
    def command(steps):
        changes = (f"train.steps={steps}", "train.random_steps=3", "train.eval_every=5")
        file = f"configs/quickstart.py:{order}"
        return arguments(tmp_path, *changes, "checkpoint.every=2", "checkpoint.keep=4", config=file)

    def table(step):
        state = restore(tmp_path / "checkpoints", step)["state"]
        tables = [state[name]["walk_head"]["table"] for name in ("params", "ema")]
        np.testing.assert_array_equal(*tables)
        return tables[0]

    assert main(command(4)) == 0
    chosen = [line for line in capsys.readouterr().out.splitlines() if line.startswith("walk  ")]
    name = chosen[0].rsplit("grows ", 1)[1]
    assert len(chosen) == 1
    assert not table(2).any(), "random before its time"
    assert [row["step"] for row in rows(tmp_path / "eval.csv")] == ["3", "4"]
    np.testing.assert_array_equal(table(4), walk_choice.WALKS[name])
    assert main(command(6)) == 0
    assert "walk  " not in capsys.readouterr().out
    np.testing.assert_array_equal(table(6), walk_choice.WALKS[name])
    ancestral = ["--job", "sample", "--config.sample.sampler=ancestral", "--config.sample.steps=4"]
    assert main([*command(6), *ancestral]) == 0
    record = json.loads((tmp_path / "samples.jsonl").read_text().splitlines()[0])
    assert record["calls"] == 4 and set(record["revealed"]) <= {1, 2, 3, 4}


def stopping_after(step, save):
    """`Checkpoints.save`, with an interrupt once that step is saved."""

    def call(self, state, *args):
        save(self, state, *args)
        if int(state.step) == step:
            raise KeyboardInterrupt

    return call


@pytest.mark.parametrize("order", ["lomdm", "ar", "block:4"])
def test_a_given_first_position_is_neither_scored_nor_generated(arguments, tmp_path, order):
    changes = ("train.steps=2", "objective.ignore_first=true", "sample.suffix= list.")
    command = arguments(tmp_path, *changes, config=f"configs/quickstart.py:{order}")
    assert main(command) == 0
    assert json_of(tmp_path, "evaluation.json")["tokens"] == 40 * 15
    assert [float(row["tokens"]) for row in rows(tmp_path / "train.csv")] == [256, 256]
    lines = list(map(json.loads, (tmp_path / "samples.jsonl").read_text().splitlines()))
    assert {record["tokens"][0] for record in lines} == {EOS}
    assert all(record["revealed"][0] == 0 < record["revealed"][1] for record in lines)
    if order == "ar":
        prompted = [*command, "--config.sample.prompt=Return", "--job", "sample"]
        assert main(prompted) == 0
        record = json.loads((tmp_path / "samples.jsonl").read_text().splitlines()[0])
        assert record["tokens"][0] != EOS and record["text"].startswith("Return")


def test_compile_says_what_a_step_takes_without_data(arguments, tmp_path, capsys):
    """Of the eight devices that are here, which are no chip that is known."""
    command = [*arguments(tmp_path, "data.source=nothing.txt"), "--job=compile"]
    assert main([*arguments(tmp_path, "data.directory=none"), "--job=compile"]) == 0
    printed = capsys.readouterr().out
    assert "8 x cpu (data 8)" in printed and "of unknown" in printed
    report = json_of(tmp_path, "compile.json")
    assert report["tokens"] == 16 * 16 and report["flops"] > report["model_flops"] > 0
    assert {each["kind"] for each in report["collectives"]} >= {"all-reduce"}
    assert not (tmp_path / "checkpoints").exists() and not pathlib.Path("none").exists()
    assert "nothing.txt" in refused(command, capsys)


def test_compile_for_a_slice_that_is_not_here(arguments, tmp_path):
    pytest.importorskip("libtpu", reason="needs the compiler of TPU programs: jax[tpu]")
    environment = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    command = [*arguments(tmp_path), "--job=compile", "--topology=v5e:2x2"]
    done = subprocess.run(
        [sys.executable, "-m", "lomdm_jax.main", *command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "4 x TPU v5e (data 4)" in done.stdout
    report = json_of(tmp_path, "compile-v5e-2x2.json")
    assert report["fits"] and report["devices"] == 4 and report["step_seconds"][0] > 0


def refused(arguments, capsys):
    """The one-paragraph message of a command that must fail."""
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1, "one paragraph"
    return message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("train.stepz=3", ["train.stepz", "no such key", "train.steps"]),
        ("train.steps=many", ["train.steps", "'many'", "int"]),
        ("train.steps=0", ["train.steps", "0", "above zero"]),
        ("model.dropout=1.5", ["model.dropout", "1.5", "[0, 1)"]),
        ("model.time_conditioning=maybe", ["time_conditioning", "maybe", "true or false"]),
        ("order.c2=0.9", ["c1", "0.7", "c2", "0.9", "c1 > c2"]),
        ("order.name=zigzag", ["order.name", "zigzag", "mdm, cosine, ar"]),
        ("order.name=block:5", ["order.name", "blocks of 5", "data.length = 16"]),
        ("order.name=permutation:x", ["order.name", "permutation:x"]),
        ("objective.mask_samples=1", ["objective.mask_samples", "1", "2 or more"]),
        ("model.width=22", ["model.width", "22", "2 * model.heads = 4"]),
        ("train.micro_batches=3", ["train.batch_size", "16", "micro_batches = 3"]),
        ("mesh.data=64", ["mesh.data", "64", "8 cpu device"]),
        ("mesh.tensor=3", ["mesh.tensor", "3", "model.heads = 2"]),
        ("mesh.sequence=4", ["mesh.sequence", "4", "model.heads / mesh.tensor = 2"]),
        ("train.batch_size=12", ["train.batch_size", "12", "8 devices", "config.mesh.sequence"]),
        ("data.source=imaginary", ["data.source", "imaginary", "stdlib"]),
        ("data.vocab_size=100", ["vocab_size", "100"]),
        ("objective.clip_noise=true", ["objective.clip_noise", "'lomdm'", "block:<size>"]),
        ("model.time_conditioning=true", ["objective.name", "'order'", "'continuous'"]),
        ("checkpoint.restore=newest", ["checkpoint.restore", "newest", "best"]),
    ],
)
def test_bad_options_are_refused(arguments, tmp_path, capsys, change, words):
    message = refused(arguments(tmp_path, change), capsys)
    assert all(word in message for word in words), message
    assert not any(tmp_path.iterdir()), "nothing may be written before the check"


def test_bad_command_lines_are_refused(arguments, tmp_path, capsys):
    assert "no such file" in refused(["--config", "configs/none.py"], capsys)
    assert "--config is missing" in refused(["--job", "train"], capsys)
    assert "--job is 'fly'" in refused([*arguments(tmp_path), "--job", "fly"], capsys)
    assert "'loose'" in refused([*arguments(tmp_path), "loose"], capsys)
    assert "--resume is 'newest'" in refused([*arguments(tmp_path), "--resume=newest"], capsys)
    assert "--topology is for" in refused([*arguments(tmp_path), "--topology=v5e:2x2"], capsys)
    for how in ("always", "host:1,2,2", "host,2,0", ":1,2,0"):
        message = refused([*arguments(tmp_path), f"--distributed={how}"], capsys)
        assert f"--distributed is {how!r}" in message and "10.0.0.1:1234,2,0" in message
    assert "--job needs a value" in refused([*arguments(tmp_path), "--job"], capsys)
    assert "'zigzag'" in refused(arguments(tmp_path, config="configs/quickstart.py:zigzag"), capsys)
    assert main(["--help"]) == 0 and "usage:" in capsys.readouterr().out


def test_workdir_and_order_follow_the_config_argument(monkeypatch):
    monkeypatch.chdir(ROOT)
    config, job, workdir, *_ = parse(
        ["--config=configs/quickstart.py:mdm", "--config.train.steps=7"]
    )
    assert config.order.name == "mdm" and config.train.steps == 7
    assert job == "train" and workdir == pathlib.Path("runs/quickstart-mdm")


def test_another_tokenizer_or_model_than_the_checkpoints_is_refused(arguments, trained, capsys):
    other = [*arguments(trained, "data.vocab_size=420"), "--job", "evaluate"]
    message = refused(other, capsys)
    assert "vocab_size = 400" in message and "420" in message and "--workdir" in message
    message = refused([*arguments(trained, "model.layers=2"), "--job", "sample"], capsys)
    assert "model.layers = 1" in message and "2" in message
    message = refused(arguments(trained, "train.batch_size=32"), capsys)
    assert "train.batch_size = 16" in message
    message = refused(arguments(trained, "data.length=32"), capsys)
    assert "data.length = 16" in message and "32" in message


def test_a_checkpoint_that_lacks_a_key_is_refused(monkeypatch):
    monkeypatch.chdir(ROOT)
    tokenizer = types.SimpleNamespace(vocab_size=400, fingerprint="a")
    prepared = types.SimpleNamespace(tokenizer=tokenizer, manifest={"splits": {}})
    current = checkpoint.facts(parse(["--config=configs/quickstart.py"]).config, prepared)
    older = {key: value for key, value in current.items() if key != "objective.clip_noise"}
    checkpoint.check_facts(current, current, resume=True)
    with pytest.raises(UserError, match=r"objective.clip_noise = None, but this run has False"):
        checkpoint.check_facts(older, current, resume=True)


def test_a_time_grid_is_refused_on_the_ranked_layout(arguments, tmp_path, capsys):
    command = arguments(
        tmp_path, "sample.sampler=ancestral", config="configs/quickstart.py:lomdm-ranked"
    )
    message = refused(command, capsys)
    assert "sample.sampler" in message and "without a time" in message and "'race'" in message


@pytest.mark.parametrize(
    ("order", "changes", "words"),
    [
        ("ar", ["objective.clip_noise=true"], ["objective.clip_noise", "'ar'", "block:<size>"]),
        ("walk", ["objective.name=continuous"], ["objective.name", "'walk'", "use 'order'"]),
        ("lomdm-order", ["eval.estimator=continuous"], ["eval.estimator", "'lomdm-order'"]),
        (
            "lomdm",
            ["objective.name=continuous", "objective.temperature=2.0"],
            ["objective.temperature", "2.0", "'continuous' has none: use 1.0"],
        ),
        ("block:1", ["objective.clip_noise=true"], ["objective.clip_noise", "'block:1'"]),
        (
            "block:4",
            ["objective.clip_noise=true", "objective.name=continuous"],
            ["objective.clip_noise", "'continuous'", "'order'"],
        ),
        ("block:4", ["model.time_conditioning=true"], ["time_conditioning", "'block:4'"]),
        ("ar", ["train.random_steps=5"], ["train.random_steps", "5", "'ar' learns none"]),
        ("lomdm", ["train.random_steps=40"], ["train.random_steps", "train.steps = 40 leaves"]),
        ("mdm", ["objective.ignore_first=true", "data.length=1"], ["data.length", "2 or more"]),
        ("mdm", ["objective.blank_share=0.1"], ["objective.blank_share", "0.1", '"ranked"']),
        (
            "lomdm-ranked",
            ["objective.mask_samples=3"],
            ["objective.mask_samples", "3", "divide the 16 rows"],
        ),
        (
            "lomdm-ranked",
            ["objective.order_share=0.1"],
            ["objective.order_share", "0.1", "16 rows", "0.25 to 1"],
        ),
        (
            "walk",
            [
                *("model.layout=ranked", "objective.temperature=1", "train.random_steps=0"),
                "objective.uniform_share=0",
            ],
            ["train.random_steps", "'walk' is found in them"],
        ),
        ("lomdm", ["model.layout=ranked"], ["model.layout", "'lomdm' reads states", "'own'"]),
        ("ar", ["model.layout=twisted"], ["model.layout", "'twisted'", "own, ranked"]),
        (
            "lomdm-ranked",
            ["eval.estimator=continuous"],
            ["eval.estimator", "'continuous'", "whole orders", "'order'"],
        ),
        (
            "mdm",
            ["model.layout=ranked", "sample.sampler=ancestral"],
            ["sample.sampler", "'ancestral'", "'race'"],
        ),
    ],
)
def test_what_an_order_cannot_do_is_refused(arguments, tmp_path, capsys, order, changes, words):
    command = arguments(tmp_path, *changes, config=f"configs/quickstart.py:{order}")
    message = refused(command, capsys)
    assert all(word in message for word in words), message


def test_a_length_other_than_the_prepared_datas_is_refused(arguments, data, tmp_path, capsys):
    """A folder of prepared data named as data.directory is used as it is, or not at all."""
    sizes = {
        path: (json_of(path)["vocab_size"], json_of(path)["length"]) for path in data.iterdir()
    }
    (folder,) = (path for path, size in sizes.items() if size == (400, 16))
    changes = (f"data.directory={folder}", "data.length=32")
    message = refused(arguments(tmp_path, *changes), capsys)
    assert "32" in message and "16" in message and "length" in message


def test_the_ranked_layout_finds_keeps_and_samples_its_order(arguments, tmp_path, capsys):
    """Trials for three steps, then one walk for good; resumed, evaluated, and sampled around a
    prompt and a suffix, several positions a call."""

    def command(steps, *changes):
        changes = (f"train.steps={steps}", "train.random_steps=3", "train.eval_every=5", *changes)
        return arguments(tmp_path, *changes, config="configs/quickstart.py:lomdm-ranked")

    assert main(command(4, "checkpoint.every=3")) == 0
    (chosen,) = (s for s in capsys.readouterr().out.splitlines() if s.startswith("walk  "))
    before, after = (restore(tmp_path / "checkpoints", step)["state"] for step in (3, 4))
    name = chosen.rsplit("grows ", 1)[1]
    assert list(TRIALS)[int(np.argmin(before["trials"]))] == name
    for state in (before, after):
        np.testing.assert_array_equal(state["ema"]["walk_head"]["table"], TRIALS[name])
    np.testing.assert_array_equal(before["trials"], after["trials"])
    assert main(command(6)) == 0
    assert "walk  " not in capsys.readouterr().out
    found = json_of(tmp_path, "evaluation.json")
    assert main([*command(6), "--job", "evaluate"]) == 0
    assert json_of(tmp_path, "evaluation.json") == found and found["clock"] == 0
    for given in ("text", "posterior"):
        changes = ("sample.prompt=the", "sample.suffix=list.", "sample.reveal=4")
        changes = (*changes, f"sample.given={given}", "sample.dependence=1e9")
        assert main([*command(6, *changes), "--job", "sample"]) == 0
        records = (tmp_path / "samples.jsonl").read_text().splitlines()
        record = json.loads(records[0])
        blank = sum(call > 0 for call in record["revealed"])
        assert record["calls"] == -(-blank // 4) and record["revealed"][0] == 0
        assert record["text"].startswith("the") and record["text"].endswith("list.")


def json_of(folder, name="manifest.json"):
    return json.loads((folder / name).read_text())


def test_missing_and_truncated_data_are_refused(arguments, tmp_path, capsys):
    fresh = tmp_path / "data"
    command = arguments(tmp_path / "run", f"data.directory={fresh}", "train.steps=1")
    assert main(command) == 0
    capsys.readouterr()
    (path,) = fresh.glob("*/train-*.array_record")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    message = refused(command, capsys)
    assert path.name in message and str(len(whole)) in message.replace(",", "")
    path.unlink()
    assert path.name in refused(command, capsys)


def test_no_checkpoint_to_evaluate(arguments, tmp_path, capsys):
    message = refused([*arguments(tmp_path), "--job", "evaluate"], capsys)
    assert "No checkpoint" in message and "train first" in message


def test_a_prompt_that_does_not_fit_is_refused(arguments, trained, capsys):
    long = [*arguments(trained, "sample.prompt=" + "word " * 30), "--job", "sample"]
    message = refused(long, capsys)
    assert "'word word" in message and "do not fit in 16 tokens" in message


def test_a_loss_that_is_not_finite_stops_the_run(arguments, tmp_path, capsys, monkeypatch):
    """Step 13 has a NaN gradient: the run stops there, and step 10 is the last one saved."""
    original = compiled.make_train_step

    def broken(*args):
        step = original(*args)

        def call(state, batch, key):
            bad = jax.numpy.where(state.step == 12, jax.numpy.nan, 1.0)
            params = jax.tree.map(lambda a: a * bad, state.params)
            return step(state.replace(params=params), batch, key)

        return call

    monkeypatch.setattr(compiled, "make_train_step", broken)
    message = refused(arguments(tmp_path), capsys)
    for word in ("step 13", "not finite", "main nan", "step 10 is saved", "learning_rate"):
        assert word in message, message
    saved = {path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()}
    assert saved == {"10"}
