"""A report: its numbers are those of the files, it needs nothing beside itself, and it shows runs that went wrong."""

import dataclasses
import importlib.util
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import jax
import pytest

from dpojax.cli import main
from dpojax.configs import DPOConfig
from dpojax.report import html_page, markdown_page, read_all, report_of
from dpojax.report.curves import run_charts
from dpojax.report.numbers import number
from dpojax.report.svg import COLUMNS, Chart, Series, draw, drawable, thinned
from dpojax.runfile import FORMAT

STEPS = 90
EVIL = "<script>alert('x')</script> & \"quoted\" | `code` \x00\u202e **bold**"
PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b550000000a49444154789c636000000002000148afa4710000"
    "000049454e44ae426082"
)


def metrics(steps: int, shift: float = 0.0) -> list[dict]:
    lines = [{"step": 0, "eval_loss": 0.6931471824645996, "eval_rewards/accuracies": 0.5}]
    for step in range(1, steps + 1):
        line = {"step": step, "loss": 0.7 - step / 200 + shift, "rewards/accuracies": 0.5 + step / 400}
        line |= {"logps/chosen": -51.97332763671875, "logps/rejected": -53.0 - step, "grad_norm": 10.0 ** (step / 30)}
        lines.append(line | {"learning_rate": 1e-5, "epoch": step / STEPS, "odd/new_metric": step * 1.5})
    return [*lines, {"step": steps, "eval_loss": 0.3141592653 + shift, "eval_rewards/accuracies": 0.8125}]


def make_run(directory: Path, *, steps: int = STEPS, shift: float = 0.0, tail: str = "", **own) -> Path:
    directory.mkdir(parents=True)
    options = {"run_format": FORMAT, "command": "DPOConfig", "loss": "sigmoid", "beta": None, "model": "m/model"}
    options |= {"data": ["pairs.jsonl"], "learning_rate": 1e-5, "seed": 0, "steps": STEPS, "mesh.data": "auto"}
    (directory / "run.json").write_text(json.dumps(options | {"model_hash": "abc123"} | own))
    lines = "".join(json.dumps(line) + "\n" for line in metrics(steps, shift))
    (directory / "metrics.jsonl").write_text(lines + tail)
    return directory


def make_experiment(directory: Path) -> Path:
    (directory / "points").mkdir(parents=True)
    for method, far in (("dpo", 2.0), ("rloo", 1.5), ("best-of-n", 0.5)):
        for seed in (0, 1):
            curve = [
                {
                    "step": s,
                    "reward": {"mean": 0.1 + far * s / 1000, "error": 0.0123, "n": 64},
                    "entropy": 16.0 - s / 100,
                }
                | {"kl": {"mean": far * s / 100 + seed / 100, "error": 0.0456, "n": 64}}
                for s in (0, 50, 100)
            ]
            point = {"name": f"{method}-{seed}", "method": method, "config": {"beta": far, "batch": 64}, "seed": seed}
            point |= {
                "curve": curve,
                "seconds": 12.5,
                "versions": {"jax": "0.10"},
                "texts": [["a film", f" <{method}>"]],
            }
            (directory / "points" / f"{method}-{seed}.json").write_text(json.dumps(point))
    at = {"mean": [0.6111, 0.7, None], "error": [0.0222, None, None], "seeds": [[0.6], [0.7], [None]]}
    results = {"kl": [0.5, 1.0, 2.0], "reward at matched kl": {"dpo": at}, "held": True, "samples": list(range(1000))}
    results |= {"optimum": {"kl": [9.0, 1.0, 0.0], "reward": [2.0, 0.9, 0.1], "of": [1, 2, 3]}}
    results |= {"ends": {"dpo-x": {"reward": [0.25, 0.0314], "kl": [2.0, None], "length": 7}}}
    (directory / "results.json").write_text(json.dumps(results))
    (directory / "config.json").write_text(json.dumps({"preset": "tiny", "setting": {"samples": 16}}))
    (directory / "frontier.png").write_bytes(PIXEL)
    return directory


class Page(HTMLParser):
    """What tests look at of a page, which fails where an element is not closed."""

    VOID = ("meta", "img", "input", "path")

    def __init__(self, source: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.words: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert tag in self.VOID or self.open.pop() == tag

    def handle_data(self, data):
        if data.strip() and "style" not in self.open:
            self.words.append(data)


def pages(*directories: Path) -> tuple[str, str]:
    report = report_of("A title", *read_all([str(d) for d in directories]))
    return html_page(report), markdown_page(report, str(directories[0].parent / "report.md"), "report.html")


def rows_of(html: str) -> dict[str, list[str]]:
    """The cells of each row of a page's tables by its first, the last of a name."""
    rows = re.findall(r'<tr><th scope="row"[^>]*>(.*?)</th>(.*?)</tr>', html)
    return {name: re.findall(r"<td[^>]*>(.*?)</td>", cells) for name, cells in rows}


def test_numbers_are_those_of_the_files(tmp_path):
    run = make_run(tmp_path / "a")
    html, markdown = pages(run)
    rows = rows_of(html)
    assert rows["--steps"] == [str(STEPS)]
    train, held_out = metrics(STEPS)[-2], metrics(STEPS)[-1]
    for line in (train, held_out):
        for name, value in line.items():
            if name not in ("step", "epoch"):
                assert rows[name] == [number(value)]
                assert float(rows[name][0]) == pytest.approx(value, rel=5e-5)
                assert f"| {name.replace('_', chr(92) + '_')} | {number(value)} |" in markdown


def test_curves_are_the_files_points(tmp_path):
    (run,), _ = read_all([str(make_run(tmp_path / "a"))])
    charts = {chart.title: chart for chart in run_charts([run])}
    assert set(charts) == {
        *("Loss", "Reward accuracy", "Log-probabilities", "Gradient norm", "Learning rate", "odd/new_metric")
    }
    wanted = [(line["step"], line["loss"]) for line in metrics(STEPS) if "loss" in line]
    each, mean, held_out = charts["Loss"].series
    assert list(each.points) == wanted and each.line == "faint"
    assert mean.points[40][1] == pytest.approx(wanted[40][1])  # the mean of a line about its middle is the line
    assert list(held_out.points) == [(0, metrics(1)[0]["eval_loss"]), (STEPS, metrics(STEPS)[-1]["eval_loss"])]
    assert charts["Gradient norm"].log_y and not charts["Loss"].log_y  # 1000 times as large at the end
    assert len(charts["Learning rate"].series) == 1  # not smoothed


def test_the_page_stands_alone_and_is_well_formed(tmp_path):
    run = make_run(tmp_path / "a", sessions=[{"name": "first run", "commit": "f" * 40, "dirty": True}])
    (run / "drawing.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>")
    html, _ = pages(run, make_experiment(tmp_path / "sweep"))
    page = Page(html)
    assert "http" not in html.replace("http-equiv", "") and "url(" not in html and "@import" not in html
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "base", "form"}
    for tag, attributes in page.tags:
        assert all(value.startswith("data:image/") for name, value in attributes.items() if name == "src"), tag
        assert all(value.startswith("#") for name, value in attributes.items() if name == "href"), tag
        assert not any(name.startswith("on") for name in attributes), tag
        assert tag != "th" or attributes["scope"] in ("row", "col")
        assert tag != "img" or attributes["alt"]
        assert tag != "svg" or attributes.get("role") == "img" or attributes.get("aria-hidden")
    assert any("default-src 'none'" in attributes.get("content", "") for _, attributes in page.tags)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    assert {attributes["href"][1:] for tag, attributes in page.tags if tag == "a"} <= set(ids)
    svgs = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(svgs) > 8
    for svg in svgs:
        ElementTree.fromstring(svg)
        assert "nan" not in svg and "inf" not in svg
    assert "first run" in page.words and "f" * 12 + " with changes" in page.words


def test_what_the_files_say_is_text_and_no_markup(tmp_path):
    run = make_run(tmp_path / "a", loss=EVIL)
    row = {"prompt": EVIL, "before": [{"role": "user", "content": "hi"}], "after": "```\nfenced\n```"}
    (run / "samples.jsonl").write_text(json.dumps(row) + "\n" + '{"prompt": 1}\n')
    html, markdown = pages(run)
    page = Page(html)
    assert "script" not in [tag for tag, _ in page.tags]
    assert EVIL.replace("\x00", r"\x00").replace("\u202e", r"\u202e") in page.words
    assert "[user] hi" in page.words and any("1 rows of samples" in words for words in page.words)
    assert "\x00" not in html + markdown and "\u202e" not in html + markdown
    assert "````text\n```\nfenced\n```\n````" in markdown  # a longer fence around a fence
    outside = re.sub(r"(?ms)^(`{3,})text$.*?^\1$", "", markdown)
    assert not re.search(r"(?<!\\)<script", outside) and r"\<script\>" in outside


def test_a_run_that_was_killed(tmp_path):
    run = make_run(tmp_path / "a", steps=40, tail='{"step": 41, "los')
    html, markdown = pages(run)
    for said in ("Stopped at step 40 of 90", "The last line of metrics.jsonl is cut short"):
        assert said in html and said in markdown.replace("\\", "")
    assert rows_of(html)["step"] == ["40"] and "41" not in rows_of(html)["loss"]
    assert "Stopped" not in pages(make_run(tmp_path / "b"))[0]
    half = make_run(tmp_path / "c", steps=45) / "run.json"
    half.write_text(json.dumps(json.loads(half.read_text()) | {"steps": None, "epochs": 1}))
    assert "Stopped at step 45, 0.5 of 1 epochs" in pages(half.parent)[0]


@pytest.mark.parametrize("content", [None, "", "[" * 10**5 + '\n{"step": 1e999}\n{"loss": 1}\n'])
def test_runs_without_a_step(tmp_path, content):
    run = make_run(tmp_path / "a")
    (run / "metrics.jsonl").unlink() if content is None else (run / "metrics.jsonl").write_text(content)
    html, _ = pages(run)
    assert ("There is no metrics.jsonl yet." if content is None else "No step is in metrics.jsonl yet.") in html
    assert "<svg" not in html
    Page(html)


def test_runs_of_other_versions_are_read_as_far_as_they_are_known(tmp_path):
    run = make_run(tmp_path / "a", run_format=1, freeze=3, newer={"deep": [1, 2]}, sessions=7)
    (run / "results.json").write_text("{")
    html, _ = pages(run)
    rows = rows_of(html)
    assert "run.json is of another version (format 1)" in html and "results.json is damaged" in html
    assert rows["freeze"] == ["3"] and rows["newer.deep"] == ["1 2"]


def test_several_runs_side_by_side(tmp_path):
    for seed, shift in enumerate((0.0, 0.01, 0.02)):
        make_run(tmp_path / "sweep" / f"seed{seed}", shift=shift, seed=seed)
    (tmp_path / "sweep" / "curves.png").write_bytes(PIXEL)
    html, markdown = pages(tmp_path / "sweep")
    rows = rows_of(html)
    differing = html.split("<caption>Options that differ")[1].split("</table>")[0]
    assert list(rows_of(differing)) == ["--seed"] and rows["--seed"] == ["0", "1", "2"]
    folded = html.split("<summary>Options that all runs share")[1].split("</details>")[0]
    assert rows_of(folded)["--learning-rate"] == ["1e-05"]
    # Mean and standard error over the seeds: 0.3242 ± 0.01 / sqrt(3).
    assert "0.3242 ± 0.0058" in html and "0.3242 ± 0.0058" in markdown
    assert '<img src="data:image/png;base64,' in html and "![curves.png](sweep/curves.png)" in markdown
    different = make_run(tmp_path / "other" / "seed0", beta=0.5)
    html, _ = pages(tmp_path / "sweep", different)
    assert rows_of(html)["--beta"] == ["–", "–", "–", "0.5"] and "over the seeds" not in html
    assert "other/seed0" in Page(html).words and "sweep/seed0" in Page(html).words  # told apart by their paths


def test_an_experiment(tmp_path):
    sweep = make_experiment(tmp_path / "sweep")
    (sweep / "points" / "half.json").write_text('{"name": "ha')
    html, markdown = pages(sweep)
    page, rows = Page(html), rows_of(html)
    assert "points/half.json is damaged" in html
    cells = ["dpo", "beta 2", "1", "100", "0.300 ± 0.012", "2.010 ± 0.046", "15"]
    of_points = rows_of(html.split("<caption>Every point")[1].split("</table>")[0])
    assert of_points["dpo-1"] == cells and f"| dpo-1 | {' | '.join(cells)} |" in markdown
    assert "dpo-1: reward 0.300 ± 0.012 at KL 2.010 ± 0.046" in page.words  # of the mark in the chart
    frontier = html.split("Reward against KL</b>")[1].split("</figure>")[0]
    assert frontier.count('class="mark" d=') == 6 and frontier.count('class="line error"') == 6
    assert frontier.count('class="line faint"') == 6
    assert "optimum" in frontier and frontier.count('class="line plain"') == 2  # the curve, and in the legend
    assert rows["dpo"] == ["0.611 ± 0.022", "0.7", "–"] and ">KL 0.5</th>" in html
    assert rows["dpo-x"] == ["0.250 ± 0.031", "2", "7"] and rows["held"] == ["true"] and "optimum" not in rows
    assert rows["samples"] == ["(1000 values)"] and rows["setting.samples"] == ["16"]
    assert rows["versions.jax"] == ["0.10"]
    assert "<td>a film</td><td> &lt;rloo&gt;</td>" in html
    assert "data:image/png;base64," in html and "![frontier.png](sweep/frontier.png)" in markdown


def test_markdowns_tables_have_as_many_cells_in_each_row(tmp_path):
    _, markdown = pages(make_run(tmp_path / "a", loss=EVIL), make_experiment(tmp_path / "sweep"))
    tables = re.findall(r"(?:^\|.*\|\n)+", markdown, re.MULTILINE)
    assert len(tables) >= 7
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1, table


def test_what_has_no_place_on_an_axis_is_left_out():
    nan, inf = float("nan"), float("inf")
    points = [(0.0, 1.0), (1.0, nan), (2.0, 0.0), (3.0, inf), (4.0, 100.0)]
    labels, errors = list("abcde"), [(0.0, float(i)) for i in range(5)]
    chart = Chart("t", "x", "y", [Series("s", points, labels=labels, errors=errors)], log_y=True)
    (kept,) = drawable(chart).series
    assert list(kept.points) == [points[0], points[4]] and list(kept.labels) == ["a", "e"]
    assert list(kept.errors) == [errors[0], errors[4]]
    assert draw(Chart("t", "x", "y", [Series("s", [(1.0, nan)])])) == ""
    for same in (0.0, 5.0, -1e-99, 1e99):  # an axis of one value
        ElementTree.fromstring(draw(Chart("t", "x", "y", [Series("s", [(same, same)])])))


def test_a_long_line_keeps_its_peaks():
    points = [(float(i), 1000.0 if i == 77_777 else float(i % 7)) for i in range(100_000)]
    drawn = thinned(points)
    assert len(drawn) <= 2 * COLUMNS and (77_777.0, 1000.0) in drawn and drawn == sorted(drawn)


def test_colours_are_told_from_the_page():
    """WCAG's contrast: 4.5 of text, 3 of lines, in both schemes."""
    style = (Path(__file__).parent.parent / "dpojax" / "report" / "style.css").read_text()
    colours = dict(re.findall(r"--(\w+): light-dark\((.*?)\)", style))

    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    for scheme in (0, 1):
        of = {name: luminance(pair.split(", ")[scheme]) for name, pair in colours.items()}

        def contrast(one: str, other: str, of=of) -> float:
            return (max(of[one], of[other]) + 0.05) / (min(of[one], of[other]) + 0.05)

        for back in ("page", "panel"):
            assert min(contrast(text, back) for text in ("text", "quiet", "link")) >= 4.5
            assert min(contrast(f"s{i}", back) for i in range(8)) >= 3
        assert contrast("text", "warn") >= 4.5


def test_the_command(tmp_path, capsys):
    run, page = make_run(tmp_path / "a"), tmp_path / "out.html"
    assert main(["report", str(run), "--output", str(page)]) == 0
    assert f"written to {page} and {tmp_path / 'out.md'}" in capsys.readouterr().out.replace("\n", "")
    first = page.read_bytes(), (tmp_path / "out.md").read_bytes()
    assert b"<title>a</title>" in first[0]
    assert main(["report", str(run), "--output", str(page)]) == 0
    assert first == (page.read_bytes(), (tmp_path / "out.md").read_bytes())  # the same again


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        ([], ["name directories", "dpojax report runs/a"]),
        (["nowhere"], ["nowhere: no such directory", "--output"]),
        (["empty"], ["empty: is no run and no experiment"]),
        (["run/run.json"], ["run.json: is a file", "name the directory"]),
        (["run", "run"], ["run: is named twice"]),
        (["broken"], ["broken/run.json: is damaged"]),
        (["run", "--output", "report.txt"], ["--output report.txt", ".html"]),
        (["run", "--output", "nowhere/report.html"], ["--output nowhere/report.html", "name a file"]),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, monkeypatch, capsys, names, parts):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    (make_run(tmp_path / "broken") / "run.json").write_text('{"command": "DPO')
    assert main(["report", *names]) == 2
    said = capsys.readouterr().err
    assert said.startswith("dpojax: ") and said.count("\n") == 1, said
    assert all(part in said for part in parts), said
    assert not list(tmp_path.glob("*.html"))


def test_what_a_run_writes_is_what_is_read(tmp_path):
    from dpojax.train.rundir import claim_directory
    from dpojax.train.session import begin_session
    from dpojax.train.writers import JsonLines

    config = DPOConfig(model="m/model", data=("pairs.jsonl",), output=str(tmp_path / "run"), batch_size=16, steps=2)
    config = dataclasses.replace(config, run_name="named")
    claim_directory(config, {"data_hash": "abc123"})
    begin_session(config)
    writer = JsonLines(tmp_path / "run")
    for line in metrics(2):
        writer.write(line.pop("step"), line)
    writer.close()
    html, _ = pages(tmp_path / "run")
    rows = rows_of(html)
    assert rows["eval_loss"] == ["0.31416"] and rows["data_hash"] == ["abc123"]
    given = html.split("<caption>Options that are not the defaults")[1].split("</table>")[0]
    assert set(rows_of(given)) == {"--model", "--data", "--batch-size", "--steps", "--run-name"}
    assert "The command of named:" in html and rows["versions.jax"] == [jax.__version__]
    assert 'role="note"' not in html


@pytest.mark.skipif(importlib.util.find_spec("gcsfs") is None, reason="gcsfs is not installed")
def test_directories_in_a_bucket(tmp_path):
    from tests.gcs import store

    kept = {"a": make_run(tmp_path / "a"), "sweep": make_experiment(tmp_path / "sweep")}
    with store() as bucket:
        for name, directory in kept.items():
            for file in (f for f in directory.rglob("*") if f.is_file()):
                bucket.put("bucket", f"runs/{name}/{file.relative_to(directory)}", file.read_bytes())
        assert main(["report", "gs://bucket/runs", "--output", "gs://bucket/report.html"]) == 0
        html = bucket.objects["bucket", "report.html"][0].decode()
        assert rows_of(html)["loss"] == [number(metrics(STEPS)[-2]["loss"])] and "dpo-1" in rows_of(html)
        assert ("bucket", "report.md") in bucket.objects
