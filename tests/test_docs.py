"""The commands that the documentation gives: each must at least be understood."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

from lomdm_jax.config import default_config
from lomdm_jax.main import parse

ROOT = Path(__file__).parent.parent
PROGRAM = "python -m lomdm_jax.main "


def commands():
    """(page, arguments) of every command of this program in a block of shell code."""
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                command = line.rpartition(" && ")[2]
                if command.startswith(PROGRAM):
                    yield page.name, command.removeprefix(PROGRAM)


@pytest.mark.parametrize(("page", "command"), list(commands()))
def test_a_command_of_the_documentation_is_understood(page, command, tmp_path, monkeypatch):
    """With the folders of runs that it speaks of, which hold a config."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "novel.txt").write_text("text")
    for name in re.findall(r"--workdir (\S+)", command):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text(default_config().to_json())
    parse(shlex.split(command))


def test_there_are_commands_to_check():
    assert {page for page, _ in commands()} >= {"README.md", "score.md", "fill.md", "compare.md"}
