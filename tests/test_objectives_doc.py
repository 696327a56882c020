"""docs/objectives.md is what the docstrings say, and what it shows runs."""

import importlib.util
import inspect
import re
import shlex
from pathlib import Path

import pytest

from dpojax.cli import main
from dpojax.configs import DPOConfig
from dpojax.losses import LOSSES, WRAPPERS
from dpojax.losses.catalogue import entry
from dpojax.train.task import task_of

ROOT = Path(__file__).resolve().parent.parent
# What GitHub's MathJax has without extensions, and the docstrings use.
COMMANDS = {
    *("Big", "alpha", "bar", "begin", "beta", "big", "cdot", "delta", "dots", "ell", "end", "epsilon", "exp", "frac"),
    *("gamma", "hat", "in", "lambda", "le", "left", "log", "mathrm", "max", "min", "nabla", "pi", "propto", "qquad"),
    *("quad", "right", "sigma", "subseteq", "sum", "tau", "text", "tfrac", "to"),
}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_objectives_doc", ROOT / "scripts" / "make_objectives_doc.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def text() -> str:
    return (ROOT / "docs" / "objectives.md").read_text()


def test_the_file_is_current(script, text):
    assert text == script.document(), "run python scripts/make_objectives_doc.py"


@pytest.mark.parametrize("name", [*LOSSES, *WRAPPERS])
def test_every_objective_has_its_section(script, text, name):
    section = text.split(f"\n### {name}\n")[1].split("\n### ")[0]
    function = (LOSSES | WRAPPERS)[name]
    assert "```math\n" in section
    for option in inspect.signature(function).parameters.values():
        if option.kind is option.KEYWORD_ONLY:
            assert f"`{option.name}`" in section, f"{name}: its docstring does not say what {option.name} is"
    for need in entry(function).needs:
        assert need in section.split("Needs: ")[1]
    for paper in re.findall(r"arXiv (\d{4}\.\d{5})", inspect.getdoc(function)):
        assert f"(https://arxiv.org/abs/{paper})" in section


def test_github_can_show_it(text):
    outside = re.sub(r"```.*?```|\$`[^`]*`\$|`[^`\n]*`", "", text, flags=re.DOTALL)
    assert not re.search(r":\w+:$|``|(?<!\\)[*$]", outside, re.MULTILINE), (
        "reST, or Markdown's own characters, are left"
    )
    for formula in re.findall(r"```math\n(.*?)```|\$`([^`]*)`\$", text, re.DOTALL):
        latex = "".join(formula)
        assert set(re.findall(r"\\([A-Za-z]+)", latex)) <= COMMANDS, latex
        bare = latex.replace(r"\{", "").replace(r"\}", "")
        assert bare.count("{") == bare.count("}") and latex.count(r"\left") == latex.count(r"\right"), latex
        assert "\n\n" not in latex
    for anchor in re.findall(r"\]\(#([^)]*)\)", text):
        headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        assert anchor in [heading.lower().replace(" ", "-") for heading in headings]


def test_what_it_shows_runs(text, tmp_path, monkeypatch, capsys):
    """The objective of one's own, the commands, the compositions and the spellings."""
    (tmp_path / "docs").mkdir()
    monkeypatch.chdir(tmp_path)
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, "docs/objectives.md", "exec"), {})
        if "def squared_hinge" in block:
            (tmp_path / "mine.py").write_text(block)
    for line in "".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).splitlines():
        assert main(shlex.split(line)[1:]) == 0, capsys.readouterr().err
    assert (tmp_path / "docs" / "losses.png").exists()
    table = text.split("## Spelling")[1].split("## Curves")[0]
    spellings = re.findall(r"^\| `([^`]*)`", table, re.MULTILINE)
    assert len(spellings) == 6
    for spelling in spellings:
        task_of(DPOConfig(model="", data=("pairs.jsonl",), output="", loss=spelling.strip('"')))


def test_the_picture_is_small():
    assert (ROOT / "docs" / "losses.png").stat().st_size < 150_000
