"""``dpojax losses``: the catalogue as a table, and curves that are the objectives'."""

import dataclasses
import io
import math
import sys

import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console

from dpojax.cli import main
from dpojax.losses import FAMILIES, LOSSES, WRAPPERS
from dpojax.losses.catalogue import entry
from dpojax.show import curves_named, paper, print_catalogue, readable
from dpojax.show.curves import limits
from tests.test_bad_input import say


def curve(name, **options):
    (found,) = curves_named([name], **options)
    return found.margins.astype(np.float64), found.losses, found.slopes


def test_the_listing_holds_everything(capsys):
    assert main(["losses"]) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    by_name = {row[0]: row[1:] for row in rows if len(row) == 4}
    assert set(by_name) == {"name", *LOSSES, *WRAPPERS}
    for name in LOSSES:
        equation, cited, needs = by_name[name]
        said = entry(LOSSES[name])
        assert equation == readable(said.equation) and "\\" not in equation
        assert cited == paper(said.source) and (any(c.isdigit() for c in cited) or name == "sft")
        assert needs == (", ".join(said.needs) or "-")
    assert by_name["sigmoid"][1:] == ["Rafailov et al. 2023, arXiv 2305.18290", "reference"]
    assert by_name["reward_model"][1:] == ["Ouyang et al. 2022, arXiv 2203.02155", "a reward head"]
    assert by_name["wpo_weighted"][2] == "lengths, token distributions"
    headings = [row[0] for row in rows if row[0].startswith("# ")]
    assert sum("Wrappers" in heading for heading in headings) == 1


@pytest.mark.parametrize("width", [80, 100, 160])
def test_the_table_fits_and_cuts_nothing(width):
    out = io.StringIO()
    print_catalogue(Console(file=out, width=width, force_terminal=True, color_system=None, highlight=False))
    assert max(map(cell_len, out.getvalue().splitlines())) <= width
    assert "…" not in out.getvalue()
    for name in (*LOSSES, *WRAPPERS):
        assert f" {name} " in out.getvalue()
    assert "log-probabilities" in out.getvalue()


def test_families_are_the_catalogue():
    assert sorted(f.__name__ for family in FAMILIES.values() for f in family) == sorted(LOSSES)


@pytest.mark.parametrize(
    ("latex", "text"),
    [
        (r"\left(h - \frac{1}{2\beta}\right)^2", "(h - 1/(2β))²"),
        (r"-\log \frac{\pi(y_w|x)}{\pi_\mathrm{ref}(y_w|x)}", "-log (π(y_w|x)/π_ref(y_w|x))"),
        (r"\frac{a + b}{1 - 2 \epsilon}, \qquad u", "(a + b)/(1 - 2 ε),   u"),
        (r"\tfrac12 \log x", "½ log x"),
        (r"10^{-3} + e^{-\beta h} + \bar\pi", "10⁻³ + e^(-β h) + π̄"),
        (r"\begin{cases} u & \text{now} \\ 2 u & \alpha \end{cases}", "u (now), 2 u (α)"),
        (r"\sum_{t \le n} u^w_t, \quad S \subseteq \{1, \dots\}", "Σ_(t ≤ n) uʷ_t,   S ⊆ {1, ...}"),
    ],
)
def test_readable(latex, text):
    assert readable(latex) == text


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("Zhao et al. 2023, SLiC (arXiv 2305.10425), and Liu et al. 2024 (arXiv 2309.06657).", "Zhao et al. 2023"),
        ("Mitchell 2023, \"A note on DPO\", equation 3.", "Mitchell 2023"),
        ("Bradley and Terry 1952, in Ouyang et al. 2022 (arXiv 2203.02155).", "Ouyang et al. 2022, arXiv 2203.02155"),
        ("TRL 1.16's; Lambert et al. 2024, Tulu 3 (arXiv 2411.15124).", "Lambert et al. 2024, arXiv 2411.15124"),
        ("cross-entropy; as in Pang et al. 2024 (arXiv 2404.19733).", "cross-entropy"),
        ("", ""),
    ],
)  # fmt: skip
def test_paper(source, text):
    assert paper(source).startswith(text) and bool(paper(source)) == bool(text)


def test_sigmoid_is_its_closed_form():
    h, losses, slopes = curve("sigmoid", beta=0.5)
    assert h[0] == -8 and h[-1] == 8 and h[len(h) // 2] == 0  # 4 / 0.5
    np.testing.assert_allclose(losses, np.log1p(np.exp(-0.5 * h)), rtol=1e-5)
    np.testing.assert_allclose(slopes, -0.5 / (1 + np.exp(0.5 * h)), rtol=1e-5)


def test_hinge_is_its_closed_form():
    h, losses, slopes = curve("hinge", span=30.1)
    np.testing.assert_allclose(losses, np.maximum(0, 1 - 0.1 * h), atol=1e-6)
    np.testing.assert_allclose(slopes, np.where(h < 10, -0.1, 0), atol=1e-7)


def test_ipo_is_its_closed_form():
    """On completions of one token; a binding goes before --beta."""
    h, losses, slopes = curve("ipo(beta=0.25)", beta=7.0, span=3.0)
    np.testing.assert_allclose(losses, (h - 2) ** 2, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(slopes, 2 * (h - 2), rtol=1e-4, atol=1e-5)


def test_labelled_completions_have_a_curve_for_each_label():
    good, bad = curves_named(["bco"], beta=1.0)
    u = good.margins.astype(np.float64)
    assert (good.name, bad.name) == ("bco, desirable", "bco, undesirable") and good.single
    np.testing.assert_allclose(good.losses, np.log1p(np.exp(-u)), rtol=1e-5)  # the shift is that of a run's start
    np.testing.assert_allclose(bad.slopes, 1 / (1 + np.exp(-u)), rtol=1e-5)


@pytest.mark.parametrize("name", ["odpo", "wpo", "tdpo2", "ld_dpo", "sampo", "aot", "dr_dpo", "with_weights(sigmoid)"])
def test_neutral_fields_leave_the_sigmoid(name):
    np.testing.assert_allclose(curve(name)[1], curve("sigmoid")[1], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(curve(name)[2], curve("sigmoid")[2], rtol=1e-4, atol=1e-6)


def test_where_the_policy_itself_is_read_it_is_where_the_command_says(tmp_path, capsys):
    args = ["losses", "preferred_ft", "reward_model", "--span", "6", "--output", str(tmp_path / "x.png")]
    assert main(args) == 0
    out = capsys.readouterr().out
    assert "-4 nats" in out
    lines = {line.split()[0]: line.split() for line in out.splitlines()}
    assert lines["preferred_ft"][2] == "4.0000" and lines["preferred_ft"][4] == "-0.5000"
    assert float(lines["reward_model"][2]) == pytest.approx(math.log(2), abs=1e-4)


@pytest.mark.parametrize("name", LOSSES)
def test_every_objective_has_finite_curves(name):
    for found in curves_named([name]):
        for values in dataclasses.astuple(found)[1:4]:
            assert np.isfinite(values).all() and values.shape == found.margins.shape


def test_a_plot_is_a_png(tmp_path, capsys):
    output = tmp_path / "curves.png"
    assert main(["losses", "sigmoid", "hinge", "ipo", "kto", "sigmoid", "--output", str(output)]) == 0
    assert output.read_bytes().startswith(b"\x89PNG") and list(tmp_path.iterdir()) == [output]
    out = capsys.readouterr().out
    assert out.count("per nat") == 5 and str(output) in out


def test_a_steep_curve_leaves_room_for_the_others():
    low, high = limits([np.linspace(0, 4, 5), np.linspace(0, 5, 5), np.linspace(0, 600, 5)])
    assert low > -1 and 5 < high < 10
    assert limits([np.full(5, np.nan)]) is None
    low, high = limits([np.zeros(5)])
    assert low < 0 < high


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["sigmod"], ["no objective 'sigmod'", "perhaps sigmoid"]),
        (["sigmoid", "ipo(gamma=1)"], ["ipo has no option 'gamma'"]),
        (["mine.py:f"], ["mine.py: no such file"]),
        (["unlikelihood", "--beta", "0.3"], ["--beta 0.3", "unlikelihood"]),
        (["sigmoid", "--beta", "-1"], ["--beta -1.0", "above 0"]),
        (["sigmoid", "--span", "0"], ["--span 0", "above 0"]),
        (["sigmoid", "--span", "nan"], ["--span nan", "above 0"]),
        (["sigmoid", "--output", "no/such/x.png"], ["--output no/such/x.png", "name a file"]),
        (["sigmoid", "--output", "x.pdf"], ["--output x.pdf", "PNG"]),
        (["--beta", "0.3"], ["--beta 0.3", "name objectives"]),
        (["--span", "3"], ["--span 3", "name objectives"]),
        (["--output", "x.png"], ["--output x.png", "name objectives"]),
    ],
)
def test_errors(capsys, tmp_path, monkeypatch, args, parts):
    monkeypatch.chdir(tmp_path)
    said = say(capsys, "losses", *args)
    assert all(part in said for part in parts), said
    assert not list(tmp_path.iterdir())


def test_without_matplotlib(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in say(capsys, "losses", "sigmoid")


def test_an_objective_that_has_no_gradient(capsys, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "import jax\nimport jax.numpy as jnp\n\nOUT = jax.ShapeDtypeStruct((1,), jnp.float32)\n\n"
        "def f(policy, ref):\n    return jax.pure_callback(lambda x: x, OUT, policy.chosen[:1]) + ref.chosen\n"
    )
    assert "cannot be differentiated" in say(capsys, "losses", f"{file}:f", "--output", tmp_path / "x.png")
