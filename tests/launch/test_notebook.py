"""The notebook: run from top to bottom with tiny sizes, and its parts with faked surroundings."""

import ast
import csv
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import time
import types
from importlib import metadata

import pytest

from lomdm_jax.main import parse

ROOT = pathlib.Path(__file__).parent.parent.parent
FILE = ROOT / "launch" / "colab_tpu.ipynb"
NOTEBOOK = json.loads(FILE.read_text(encoding="utf-8"))
SOURCES = {cell["id"]: "".join(cell["source"]) for cell in NOTEBOOK["cells"]}
FLOOD = 2000  # characters that a cell prints at most
# A last cell, with more blanks than a sample has tokens.
MISTAKE = """
try:
    ask("sample", "a [[99]]")
except Stop as error:
    print(error)
"""
# In place of training: says what it gets, and on SIGTERM that it saves.
STUB = """#!{}
import signal, sys
def end(*_):
    print("saved", flush=True)
    raise SystemExit(143)
signal.signal(signal.SIGTERM, end)
deaf = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
print("ready", sys.argv[1:], deaf, flush=True)
while True:
    signal.pause()
"""


def definitions(*cells, **known):
    """The names that cells import, define or set to literals; the rest of them is not run."""
    names = dict(known)
    for cell in cells:
        tree = ast.parse(SOURCES[cell])
        tree.body = [node for node in tree.body if harmless(node)]
        exec(compile(tree, cell, "exec"), names)
    return types.SimpleNamespace(**names, names=names)


def harmless(node):
    kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
    try:
        return isinstance(node, kinds) or ast.literal_eval(getattr(node, "value", node)) is not None
    except ValueError:
        return False


def test_the_notebook_holds_no_results():
    code = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)
    assert NOTEBOOK["metadata"]["accelerator"] == "TPU"
    assert NOTEBOOK["metadata"]["kernelspec"]["name"] == "python3"
    assert code[0]["source"][-1].startswith('REPOSITORY = ""  # @param')
    assert not re.search(r"^\s*[%!]", "\n".join(SOURCES.values()), re.M)  # all is plain Python


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The notebook with its results, run in an empty folder with the repository's address filled
    in, and that folder."""
    for package in ("nbclient", "ipykernel"):
        pytest.importorskip(package, reason=f"needs {package}")
    import nbformat
    from nbclient import NotebookClient

    folder = tmp_path_factory.mktemp("notebook")
    notebook = nbformat.read(FILE, as_version=4)
    nbformat.validate(notebook)
    form = next(cell for cell in notebook.cells if cell.id == "repository")
    form.source = form.source.replace('REPOSITORY = ""', f'REPOSITORY = "{ROOT}"')
    notebook.cells.append(nbformat.v4.new_code_cell(MISTAKE, id="mistake"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOMDM_NOTEBOOK_QUICK", "1")
        patch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"].replace("count=8", "count=1"))
        for name in ("IPYTHONDIR", "JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR"):
            patch.setenv(name, str(tmp_path_factory.mktemp(name.lower())))
        resources = {"metadata": {"path": str(folder)}}
        NotebookClient(notebook, timeout=600, resources=resources).execute()
    return {cell.id: cell for cell in notebook.cells}, folder / "lomdm_notebook"


def printed(cell):
    return "".join(out.text for out in cell.outputs if out.output_type == "stream")


def shown(cell):
    return [out.data["text/html"] for out in cell.outputs if out.output_type == "display_data"]


def test_it_trains_and_shows_how_far_it_is(executed):
    cells, folder = executed
    run = folder / "lomdm-ranked-stdlib"
    with open(run / "train.csv", newline="") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert len(losses) == 32
    assert sum(losses[-4:]) < sum(losses[:4]) - 2  # in all, of 6.2 nats at first
    (chart,) = shown(cells["train"])  # one picture, in which all were drawn
    assert len(re.search(r'points="([^"]*)"', chart)[1].split()) == 32
    assert "wrote" in chart.partition("<pre")[2]
    assert re.match(
        r"nelbo_order .* perplexity .*\nunigram .*\norder .*tau", printed(cells["train"])
    )
    for name in ("order.html", "order.png", "samples.jsonl", "evaluation.json"):
        assert (run / name).stat().st_size


def test_the_model_answers(executed):
    cells, _ = executed
    assert "<iframe srcdoc=" in shown(cells["order"])[0]
    (order,) = shown(cells["sentence"])
    ranks = [float(rank) for rank in re.findall(r"<small>([\d.]+)</small>", order)]
    assert len(ranks) > 5 and min(ranks) >= 0 and max(ranks) <= 1
    assert sum(ranks) == pytest.approx(len(ranks) / 2, abs=0.1)  # of one order after another
    for sample in shown(cells["infill"]):
        steps = re.findall(r"<small>(\d+|&nbsp;)</small>", sample)
        filled = sorted(int(step) for step in steps if step.isdigit())
        assert len(steps) == 32 and 0 < len(filled) < 32
        assert filled == list(range(1, len(filled) + 1))
    assert len(shown(cells["infill"])) == 3
    costs = [
        float(nats) for nats in re.findall(r": ([\d.]+) ± [\d.]+ nats", printed(cells["score"]))
    ]
    assert len(costs) == 2 and min(costs) > 5


def test_a_mistake_is_a_message_of_lomdm_jax(executed):
    cells, _ = executed
    assert printed(cells["mistake"]).startswith("The prompt has a blank of 99 tokens")


def test_it_prints_little(executed):
    cells, _ = executed
    code = [cell for cell in cells.values() if cell.cell_type == "code"]
    assert {cell.id: len(printed(cell)) for cell in code if len(printed(cell)) > FLOOD} == {}
    assert [out.name for cell in code for out in cell.outputs if "name" in out].count("stderr") == 0


def test_the_export_runs_in_pytorch(executed):
    cells, folder = executed
    assert (folder / "lomdm-ranked-stdlib" / "export" / "model.safetensors").exists()
    assert "model.safetensors" in printed(cells["export"])
    lines = printed(cells["torch"]).splitlines()
    if importlib.util.find_spec("torch") is None:
        assert lines == ["Skipped, since this Python has no torch: install it with pip."]
        pytest.skip("needs torch")
    assert len([line for line in lines if re.match(r"[\d.]+ ± [\d.]+ nats: ", line)]) == 3
    assert lines[-1] == "This Python has not loaded JAX."


@pytest.mark.parametrize("device", ["tpu", "gpu", "cpu"])
@pytest.mark.parametrize("quick", [False, True])
def test_every_size_is_a_valid_command(device, quick, tmp_path):
    known = definitions("prepare").names
    known |= dict(ROOT=ROOT, WORK=tmp_path, DEVICE=device, QUICK=quick, pathlib=pathlib)
    exec(SOURCES["corpus"], known)
    orders = re.search(r"ORDER = .*# @param (\[.*\])", SOURCES["settings"])[1]
    for order in json.loads(orders):
        source = SOURCES["settings"].replace('ORDER = "lomdm-ranked"', f'ORDER = "{order}"')
        exec(source, known)
        if not (quick and order == "lomdm-order"):
            command = parse(known["TRAIN"])
            assert command.config.order.name == order
            assert command.workdir == tmp_path / f"{order}-stdlib"


@pytest.mark.parametrize(
    ("environ", "files", "device"),
    [
        ({}, [], "cpu"),
        ({"COLAB_TPU_1VM": "", "COLAB_GPU": "1"}, [], "cpu"),
        ({"COLAB_TPU_1VM": "1"}, [], "tpu"),
        ({"TPU_ACCELERATOR_TYPE": "v5e-1"}, [], "tpu"),
        ({}, ["vfio/0", "vfio/vfio"], "tpu"),
        ({}, ["vfio/vfio"], "cpu"),
        ({}, ["accel0"], "tpu"),
        ({}, ["accel/accel0"], "cpu"),  # of Linux, not of TPUs
        ({}, ["nvidia0", "nvidiactl", "vfio/12"], "gpu"),
        ({"JAX_PLATFORMS": "cpu"}, ["nvidia0"], "cpu"),
        ({"JAX_PLATFORMS": "cuda,cpu"}, ["accel0"], "gpu"),
        ({"JAX_PLATFORMS": "tpu"}, [], "tpu"),
    ],
)
def test_the_device_is_told_by_the_surroundings(environ, files, device, tmp_path):
    for name in files:
        path = tmp_path / "dev" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert definitions("device").detect(environ, tmp_path) == device


@pytest.fixture
def install(tmp_path, monkeypatch):
    """The names of the cells that install, where lomdm_jax is not to be found."""
    found = definitions("device", "install", "packages", WORK=tmp_path / "work")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    return found


def test_an_empty_repository_is_a_clear_message(install, tmp_path):
    with pytest.raises(install.Stop, match="REPOSITORY is empty") as stopped:
        install.find_source("", tmp_path)
    assert stopped.value._render_traceback_() == [str(stopped.value)]  # and no more


def test_a_checkout_is_found_without_an_address(install, tmp_path, monkeypatch):
    assert install.find_source("", ROOT / "launch") == ROOT
    assert install.find_source(str(ROOT), tmp_path) == ROOT
    spec = types.SimpleNamespace(origin=str(ROOT / "lomdm_jax" / "__init__.py"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    assert install.find_source("https://nowhere.invalid/lomdm", tmp_path) == ROOT


def test_an_address_is_cloned_once(install, tmp_path):
    origin = tmp_path / "origin.git"
    for name in ("lomdm_jax/__init__.py", "configs/quickstart.py"):
        (origin / name).parent.mkdir(parents=True)
        (origin / name).touch()
    git = ["git", "-C", str(origin), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message=a"]):
        subprocess.run([*git, *command], check=True)
    clone = install.find_source(origin.as_uri(), tmp_path)
    assert install.is_source(clone) and clone.parent == tmp_path / "work"
    origin.rename(tmp_path / "gone")
    assert install.find_source(origin.as_uri(), tmp_path) == clone


def test_a_wrong_address_is_a_clear_message(install, tmp_path):
    with pytest.raises(
        install.Stop, match=r"REPOSITORY is '/no/such', which git cannot clone:\n.*"
    ):
        install.find_source("/no/such", tmp_path)


def test_packages_are_installed_only_where_some_are_missing(install, tmp_path):
    jax = metadata.version("jax")
    for text, ready in {
        f"# a comment\n\njax=={jax}  # why\n": True,
        f"jax=={jax}\nno-such-package>=1\n": False,
        "jax>=99\n": False,
    }.items():
        (tmp_path / "requirements.txt").write_text(text)
        assert install.is_ready(tmp_path, "cpu") is ready
    install.names["PLUGINS"] |= {"tpu": ("no-such-package",)}
    (tmp_path / "requirements.txt").write_text(f"jax=={jax}\n")
    assert not install.is_ready(tmp_path, "tpu")


def test_what_is_installed_suits_the_device(install, tmp_path):
    """The commands are run, but that pip, in the new Python, says its version only."""
    commands, run = [], install.run

    def stub(command):
        commands.append([str(part) for part in command])
        return run([*command[:5], "--version"] if "pip" in command else command)

    install.names["run"] = stub
    python = install.install(tmp_path, "tpu")
    made, pip = commands
    assert pip == [sys.executable, "-m", "pip", "--python", python, *pip[5:]]
    assert pip[5:] == ["install", "--quiet", f"{tmp_path}[tpu]"]
    settings = (pathlib.Path(made[-1]) / "pyvenv.cfg").read_text()
    assert "include-system-site-packages = true" in settings
    assert install.install(tmp_path, "tpu") == python and len(commands) == 2  # once


def test_a_failure_says_why(install):
    print_and_fail = "print('config:', 1); print('error: no such file'); raise SystemExit(2)"
    with pytest.raises(install.Stop, match=r"^error: no such file$"):
        install.run([sys.executable, "-c", print_and_fail])
    with pytest.raises(install.Stop, match="ZeroDivisionError"):
        install.run([sys.executable, "-c", "1 / 0"])


def test_the_stop_button_saves_what_is_trained(tmp_path):
    pytest.importorskip("IPython", reason="needs IPython")
    python, log, shown, killed = tmp_path / "python", tmp_path / "log", [], []
    python.write_text(STUB.format(sys.executable))
    python.chmod(0o755)

    def interrupt(seconds):
        while "ready" not in log.read_text():
            time.sleep(0.05)
        raise KeyboardInterrupt

    surroundings = dict(PYTHON=str(python), TRAIN=["--some=key"], ENV=None, RUN=tmp_path, steps=9)
    model = types.SimpleNamespace(kill=lambda: killed.append(1), wait=lambda: killed.append(2))
    found = definitions("install", "chart", "train", MODELS=[model], **surroundings)
    found.names["time"] = types.SimpleNamespace(sleep=interrupt)
    found.names["HTML"] = str
    found.names["display"] = lambda *_, **__: types.SimpleNamespace(update=shown.append)
    with pytest.raises(found.Stop, match="run this cell again, and training goes on"):
        found.train(log)
    assert "saved" in shown[-1] and killed == [1, 2]  # and the device was free before
    assert log.read_text().startswith("ready ['-m', 'lomdm_jax.main', '--some=key'] True")
