"""What training takes on TPU slices and GPUs, from the compilers of their programs: none is needed.

python benchmarks/scaling.py [--only NAME,...] [--folder runs/scaling]

Needs their compilers (pip install 'jax[tpu]' 'jax[cuda12]') and a few minutes per program on two
cores; those for GPUs have not tuned their products, which they do on the GPU. Each is compiled
in a process of its own and leaves a file in the folder; the tables in benchmarks/scaling.md hold
all that are there.
"""

import argparse
import importlib.metadata
import json
import math
import pathlib
import subprocess
import sys
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from lomdm_jax.distributed.mesh import described  # noqa: E402
from lomdm_jax.evaluation.order_charts import COLOURS, GREY, MARKERS  # noqa: E402


class Case(NamedTuple):
    """A program to compile: its config, the slice, and what differs from the config."""

    config: str
    topology: str
    changes: tuple[str, ...] = ()


SMALL, LARGE = "configs/openwebtext.py", "configs/openwebtext_1b.py"
PROGRAMS = {
    "lomdm-v5e-16": Case(SMALL, "v5e:4x4"),
    "lomdm-v5p-16": Case(SMALL, "v5p:2x2x4", ("train.micro_batches=1",)),
    "lomdm-v6e-256": Case(SMALL, "v6e:16x16", ("train.micro_batches=1",)),
    "lomdm-h200-8": Case(SMALL, "h200:8", ("train.micro_batches=1",)),
    "lomdm-a100-8": Case(SMALL, "a100:8", ("train.micro_batches=2",)),
    "mdm-h200-8": Case(f"{SMALL}:mdm", "h200:8", ("train.micro_batches=1",)),
    "1b-v5p-64": Case(LARGE, "v5p:4x4x4"),
    "too-large-v5e-16": Case(SMALL, "v5e:4x4", ("train.micro_batches=1",)),
}


def batches(size: int, parts: int) -> tuple[str, ...]:
    """Changes for a global batch of `size` sequences in so many parts."""
    sizes = [f"{key}={size}" for key in ("train.batch_size", "eval.batch_size", "sample.count")]
    return (*sizes, f"train.micro_batches={parts}")


# Copies of the model on ever more chips: with as much work on each, 32 sequences in 4 parts, and
# with 512 sequences shared by all.
SLICES = {
    1: "1x1x1",
    4: "2x2x1",
    16: "2x2x4",
    64: "4x4x4",
    128: "4x4x8",
    256: "4x8x8",
    512: "8x8x8",
}
PER_CHIP, GLOBAL = 32, 512
WEAK = {
    f"weak-{chips}": Case(f"{SMALL}:mdm", f"v5p:{SLICES[chips]}", batches(PER_CHIP * chips, 4))
    for chips in (1, 4, 16, 64, 512)
}
STRONG = {
    f"strong-{chips}": Case(f"{SMALL}:mdm", f"v5p:{SLICES[chips]}", batches(GLOBAL, parts))
    for chips, parts in {16: 4, 64: 1, 128: 1, 256: 1, 512: 1}.items()
}
# More chips than sequences: four share each, the work on its positions or the positions themselves.
FEW = {
    f"{name}-{axis}": Case(
        config, f"v5p:{shape}", (*batches(texts, 1), f"data.length={length}", f"mesh.{axis}=4")
    )
    for name, config, shape, texts, length in (
        ("short", f"{SMALL}:mdm", "8x8x8", 128, 1024),
        ("long", f"{SMALL}:mdm", "2x2x4", 4, 32_768),
        ("1b-long", f"{LARGE}:mdm", "4x4x4", 16, 32_768),
    )
    for axis in ("tensor", "sequence")
}
CASES = {"programs": PROGRAMS, "weak": WEAK, "strong": STRONG, "few": FEW}
TITLES = {
    "programs": "",
    "weak": f"{PER_CHIP} sequences per chip, on ever more chips:",
    "strong": f"{GLOBAL} sequences, shared by ever more chips:",
    "few": "More chips than sequences, so that four share each:",
}


def compile_case(name: str, case: Case, folder: pathlib.Path) -> None:
    """Leaves `<name>.json`, or `<name>.txt` if the program does not fit."""
    command = [sys.executable, "-m", "lomdm_jax.main", "--job=compile", f"--config={case.config}"]
    command += [f"--topology={case.topology}", f"--workdir={folder / name}"]
    command += [f"--config.{change}" for change in case.changes]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    found = next((folder / name).glob("compile*.json"), None)
    if done.returncode == 0 and found:
        found.rename(folder / f"{name}.json")
    elif done.returncode == 2:
        (folder / f"{name}.txt").write_text(done.stderr)
    else:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


def row(name: str, case: Case, report: dict[str, Any]) -> str:
    memory, chip = report["memory"]["total"], report["chip"]
    moved = sum(each["moved"] for each in report["collectives"])
    low, high = (1e3 * seconds for seconds in report["step_seconds"])
    cells = [
        name,
        f"{report['devices']} {chip['name']}",
        described(report["mesh"]),
        ", ".join(change for change in case.changes if change.startswith(("train.", "data."))),
        f"{memory / 2**30:.1f} of {chip['memory'] / 2**30:.1f}",
        f"{report['flops'] / report['tokens'] / 1e6:,.0f}",
        f"{moved / 1e9:.2f}",
        *(f"{1e3 * seconds:,.1f}" for seconds in report["seconds"].values()),
        f"{low:,.0f} to {high:,.0f}",
        "{:,.0f} to {:,.0f}".format(*report["tokens_per_second"]),
        "{:.0%} to {:.0%}".format(*report["mfu"]),
        f"{report['compiling']:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


COLUMNS = (
    *("program", "devices", "mesh", "changed", "GiB per device", "MFLOP per token", "GB sent"),
    *("ms: products", "memory", "links", "a step", "tokens per second", "MFU", "compiled in, s"),
)


def table(cases: dict[str, Case], folder: pathlib.Path) -> list[str]:
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{' --- |' * len(COLUMNS)}"]
    for name, case in cases.items():
        if (folder / f"{name}.json").exists():
            lines.append(row(name, case, json.loads((folder / f"{name}.json").read_text())))
    return lines


def write(folder: pathlib.Path) -> None:
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("jax", "libtpu"))
    lines = [
        "# What training takes on TPU slices and GPUs",
        "",
        f"`python benchmarks/scaling.py`, {versions}; docs/scaling.md explains.",
    ]
    for name, cases in CASES.items():
        lines += ["", TITLES[name], ""] if TITLES[name] else [""]
        lines += table(cases, folder)
    for path in sorted(folder.glob("*.txt")):
        lines += ["", f"{path.stem}:", "", "```", path.read_text().strip(), "```"]
    lines += ["", "![Milliseconds of a step against the number of chips](scaling.png)"]
    (ROOT / "benchmarks" / "scaling.md").write_text("\n".join([*lines, ""]))
    draw(folder).savefig(ROOT / "benchmarks" / "scaling.png", dpi=150)


def draw(folder: pathlib.Path) -> Figure:
    """What a step takes on ever more chips."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2, sharey=True), ("weak", "strong"), strict=True):
        paths = [folder / f"{case}.json" for case in CASES[name]]
        reports = [json.loads(path.read_text()) for path in paths if path.exists()]
        if reports:
            draw_parts(axes, reports)
        axes.set(title=TITLES[name].rstrip(":"), xlabel="TPU v5p chips")
    if axes.lines:
        axes.legend(frameon=False)
    figure.axes[0].set_ylabel("milliseconds of a step, at the chip's best")
    return figure


def draw_parts(axes: Axes, reports: list[dict[str, Any]]) -> None:
    chips = [report["devices"] for report in reports]
    low, high = ([1e3 * report["step_seconds"][end] for report in reports] for end in (0, 1))
    axes.fill_between(chips, low, high, color=GREY, alpha=0.25, lw=0, label="a step")
    for number, part in enumerate(("compute", "memory", "links")):
        values = [1e3 * report["seconds"][part] or math.nan for report in reports]
        look = dict(color=COLOURS[number], marker=MARKERS[number], ms=4)
        axes.plot(chips, values, label={"compute": "products"}.get(part, part), **look)
    axes.set(xscale="log", yscale="log", xticks=chips)
    for axis in (axes.xaxis, axes.yaxis):  # numbers instead of powers
        axis.set_major_formatter(ScalarFormatter())
        axis.set_minor_formatter(NullFormatter())
    axes.minorticks_off()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="names of programs; the rest is left as it is")
    parser.add_argument("--folder", type=pathlib.Path, default=ROOT / "runs" / "scaling")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    cases = {name: case for each in CASES.values() for name, case in each.items()}
    wanted = options.only.split(",") if options.only else list(cases)
    for number, name in enumerate(wanted, start=1):
        compile_case(name, cases[name], options.folder)
        print(f"{number}/{len(wanted)} {name}", flush=True)
        write(options.folder)


if __name__ == "__main__":
    main()
