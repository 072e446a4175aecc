"""How long the README's first command takes, part by part, on a fresh environment.

python benchmarks/quickstart.py [--config.SECTION.KEY=VALUE ...]

Makes a virtual environment in a temporary folder, installs requirements.txt (or takes the time as
zero with --no-install and the running interpreter), runs the quickstart there and reads the
clock at the lines it prints. Prints a Markdown table; the limit is 120 s after installation.
"""

import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
import venv

ROOT = pathlib.Path(__file__).resolve().parent.parent
# What the run prints when a part ends; a part that is not printed takes no time.
PARTS = {
    "start and prepare data": r"^prepare: valid",
    "initialise": r"^compiled|^continuing",
    "train (with its evaluation on the way)": r"^step +(\d+)/\1 ",
    "evaluate": r"^unigram",
    "describe the order": r"^wrote .*order_statistics.png",
    "sample and draw": r"^wrote .*png",
}


def install(folder: pathlib.Path) -> str:
    """A fresh virtual environment with requirements.txt; the path of its interpreter."""
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    subprocess.run(
        [python, "-m", "pip", "install", "-q", "-r", "requirements.txt"], cwd=ROOT, check=True
    )
    return python


def timed_run(command: list[str]) -> tuple[dict[str, float], float, list[str]]:
    """Seconds of each part, of the compilation, and the lines printed."""
    marks, lines, compiling = {}, [], 0.0
    started = time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip())
            for part, pattern in PARTS.items():
                if re.match(pattern, line):
                    marks[part] = time.perf_counter() - started
            if found := re.match(r"compiled the training step in ([\d.]+) s", line):
                compiling = float(found[1])
    if process.returncode:
        raise SystemExit(f"the quickstart failed with status {process.returncode}")
    marks["finish writing the checkpoint and exit"] = time.perf_counter() - started
    return dict(sorted(marks.items(), key=lambda mark: mark[1])), compiling, lines


def main() -> None:
    changes = [argument for argument in sys.argv[1:] if argument.startswith("--config.")]
    with tempfile.TemporaryDirectory() as scratch:
        folder, started = pathlib.Path(scratch), time.perf_counter()
        python = sys.executable if "--no-install" in sys.argv else install(folder / "venv")
        installing = time.perf_counter() - started
        command = [python, "-u", "-m", "lomdm_jax.main", "--config", "configs/quickstart.py"]
        paths = ["--workdir", str(folder / "run"), f"--config.data.directory={folder / 'data'}"]
        marks, compiling, lines = timed_run([*command, *paths, *changes])
    print("\n".join(line for line in lines if re.match(r"step|nelbo|unigram", line)))
    print(f"\n{os.cpu_count()} cores, Python {sys.version.split()[0]}\n")
    print("| part | seconds |\n|---|---|")
    print(f"| install | {installing:.1f} |")
    previous = 0.0
    for part, mark in marks.items():
        seconds = mark - previous - (compiling if part == "initialise" else 0.0)
        print(f"| {part} | {seconds:.1f} |")
        if part == "initialise":
            print(f"| compile the training step | {compiling:.1f} |")
        previous = mark
    print(f"| **all after installation** | **{previous:.1f}** |")


if __name__ == "__main__":
    main()
