"""A run's model card: what Hugging Face shows of a model (``README.md``), of the run's own files alone."""

import ast
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import dpojax
from dpojax.configs import DPOConfig, SFTConfig, TrainOptions
from dpojax.losses import LOSSES, WRAPPERS, spelled
from dpojax.losses.catalogue import entry
from dpojax.losses.spelling import IN_FILE
from dpojax.models import config_from_hf
from dpojax.models.safetensors import CARD_MARK, read_json
from dpojax.options import flag
from dpojax.paths import AnyPath, absolute, path_of
from dpojax.runfile import BESIDE_OPTIONS
from dpojax.show.equations import readable
from dpojax.show.listing import NOTATION, paper
from dpojax.train.rundir import adapter_of_run, default_options, options_of_run, shown
from dpojax.train.session import code_of, session_of

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
HUB_SET = re.compile(r"hub:((?:[\w.-]+/)?[\w.-]+)(?=[,=]|$)", re.ASCII)
TOLD = (
    *("model", "adapter", "data", "eval_data", "eval_share", "filter", "format", "loss", "beta", "output"),
    *("run_name", "report_to"),
)
"""Options that have a place of their own, or say nothing of the policy."""
FIRST = ("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins")


def model_card(run: str | AnyPath, step: int, *, title: str = "", adapter: bool = False) -> str:
    """The model card of a run's policy: YAML front matter, then Markdown.

    Args:
      run: the run's ``--output`` directory.
      step: of the policy that is exported.
      title: the heading (default: the run's name).
      adapter: the adapter alone is exported, for peft.

    Raises:
      UserError: one of the run's files is damaged.
    """
    run = path_of(run)
    own = options_of_run(run)
    reward = config_from_hf(read_json(run / "model" / "config.json"), str(run / "model" / "config.json")).reward
    lines = ["---", _front_matter(own, run, reward=reward, adapter=adapter).rstrip("\n"), "---", ""]
    what = "The LoRA adapter" if adapter else "The reward model" if reward else "The policy"
    lines += [f"# {_plain(title or absolute(run).name)}", "", f"{what} of step {step} of {_named(own)} of dpojax."]
    for heading, section in (
        ("Base model", _base_model(own, run)),
        ("Data", _data(own, _metrics(run))),
        ("Objective", _objective(own)),
        ("Options", [*_options(own), *_code(own)]),
        ("Held-out figures", _held_out(own, _metrics(run), step)),
        ("How to load it", _loading(reward=reward, adapter=adapter)),
    ):
        lines += ["", f"## {heading}", "", *section]
    licence = "The license is not set: it follows from those of the base model and of the data, and is yours to say"
    lines += [
        "",
        "---",
        "",
        f"{CARD_MARK} {dpojax.__version__} from the run's own files. {licence} (`license:`, at the top).",
    ]
    return "\n".join(lines) + "\n"


def _front_matter(own: Mapping[str, Any], run: AnyPath, *, reward: bool, adapter: bool) -> str:
    """The metadata that the hub reads; names that are no hub's ids are left to the text, as the hub refuses them."""
    import yaml  # type: ignore[import-untyped]

    base, lora = _base_name(own, run), adapter_of_run(run) is not None
    sets = [match[1] for name in own.get("data", ()) if (match := HUB_SET.match(name))]
    terms = ["sft"] if "loss" not in own else [{"sigmoid": "dpo"}.get(name, name) for name in _names(own["loss"])]
    tags = ["dpojax", *(["reward-model"] if reward else [] if terms == ["sft"] else ["preference-optimization"])]
    tags += [term for term in terms if term in LOSSES or term == "dpo"] + ["lora"] * lora
    raw: dict[str, Any] = {"library_name": "peft" if adapter else "transformers"}
    raw["pipeline_tag"] = "text-classification" if reward else "text-generation"
    raw |= {"base_model": base} if _is_hub_id(base) else {}
    raw |= {"datasets": list(dict.fromkeys(sets))} if sets else {}
    return yaml.safe_dump(raw | {"tags": list(dict.fromkeys(tags))}, sort_keys=False, allow_unicode=True)


def _base_name(own: Mapping[str, Any], run: AnyPath) -> str:
    """The name of the model that the run began with; of an adapter, what it lies on."""
    beside = adapter_of_run(run)
    return str(own.get("model", "") if beside is None else beside.base)


def _is_hub_id(name: str) -> bool:
    return HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def _base_model(own: Mapping[str, Any], run: AnyPath) -> list[str]:
    lines, beside = [f"- model: {code(own.get('model', ''))}"], adapter_of_run(run)
    if own.get("adapter") is not None:
        lines.append(f"- adapter that training began with: {code(own['adapter'])}")
    if beside is not None:
        lines.append(f"- base of the adapter: {code(beside.base)}")
    named = {"base_hash": "the base", "model_hash": "the policy before training", "reference_hash": "the reference"}
    for name, what in named.items():
        if name in own:
            lines.append(f"- content hash of {what}: {code(own[name])}")
    if own.get("ref_model") is not None:
        lines.append(f"- reference: {code(own['ref_model'])}")
    return lines


def _data(own: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [f"- {code(name)}" for name in own.get("data", ())]
    rows = _rows(own, metrics)
    lines += [] if rows is None else [f"- rows trained on in an epoch: {rows:,}"]
    lines += [f"- filter: {code(text)}" for text in own.get("filter", ())]
    if own.get("format", "auto") != "auto":
        lines.append(f"- format: {code(own['format'])}")
    lines += [f"- held out: {code(name)}" for name in own.get("eval_data", ())]
    if own.get("eval_share"):
        lines.append(f"- held out: {own['eval_share']:g} of the prompts")
    if "today" in own:
        lines.append(f"- date in the chat template: {code(own['today'])}")
    if "data_hash" in own:
        lines.append(f"- content hash of all tokens and annotations: {code(own['data_hash'])}")
    return lines


def _rows(own: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> int | None:
    """The examples of an epoch, of which ``epoch`` is the share that the steps have seen; None before the first."""
    for line in metrics:
        if line.get("epoch") and line.get("step") and own.get("batch_size"):
            return round(line["step"] * own["batch_size"] / line["epoch"])
    return None


def _objective(own: Mapping[str, Any]) -> list[str]:
    spelling = own.get("loss", "sft")
    lines = [f"`{'dpojax dpo' if 'loss' in own else 'dpojax sft'}`, objective {code(spelling)}:", ""]
    for name in _names(spelling):
        described = entry({**LOSSES, **WRAPPERS}[name])
        equation, cited = readable(described.equation), paper(described.source)
        lines += [f"- `{name}`{f' ({cited})' if cited else ''}: {code(equation) if equation else '(none)'}"]
    for path, function in IN_FILE.findall(spelling):
        lines += [f"- {code(f'{path}:{function}')}: a function of the user's own file"]
        if (content := own.get(f"hash of {path}")) is not None:
            lines[-1] += f", whose hash is {code(content)}"
    beta = _beta(own)
    lines += ["", f"Beta: {beta}."] if beta else []
    return [*lines, "", NOTATION.replace("|y|", r"\|y\|").replace("_", r"\_").replace("*", r"\*")]


def _names(spelling: str) -> list[str]:
    """The objectives and wrappers that a spelling names, in their order; the user's files are not executed."""
    try:
        tree = ast.parse(IN_FILE.sub("_in_file", spelling.strip()), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id in {**LOSSES, **WRAPPERS}]
    return list(dict.fromkeys(node.id for node in sorted(names, key=lambda node: (node.lineno, node.col_offset))))


def _beta(own: Mapping[str, Any]) -> str:
    """The strength of the KL penalty, of each term that has one; empty where none has."""
    given, spelling = own.get("beta"), own.get("loss")
    if spelling is None:
        return ""
    try:  # a file of the user's is not executed for this
        betas = (
            None if IN_FILE.search(spelling) else spelled(spelling, label_smoothing=own.get("label_smoothing")).betas
        )
    except ValueError:
        betas = None
    if betas is None:
        return "the objective's own" if given is None else f"{given:g}"
    of_terms = [own_beta if bound or given is None else given for own_beta, bound in betas]
    return ", ".join(dict.fromkeys(f"{beta:g}" if isinstance(beta, int | float) else code(beta) for beta in of_terms))


def _options(own: Mapping[str, Any]) -> list[str]:
    kind: type[TrainOptions] = DPOConfig if "loss" in own else SFTConfig
    defaults = default_options(kind)
    changed = {
        name: value
        for name, value in own.items()
        if name not in TOLD and not BESIDE_OPTIONS.fullmatch(name) and (name not in defaults or defaults[name] != value)
    }
    if not changed:
        return ["All options beside those above are the defaults."]
    lines = [f"- {code(flag(name))}: {code(shown(value))}" for name, value in sorted(changed.items())]
    return ["What differs from the defaults, beside what is above:", "", *lines]


def _named(own: Mapping[str, Any]) -> str:
    name = session_of(own).get("name")
    return f"the run {code(name)}" if name else "a run"


def _code(own: Mapping[str, Any]) -> list[str]:
    """With what code the run was last started."""
    session = session_of(own)
    if not session:
        return []
    names = [f"{name} {version}" for name, version in session["versions"].items()]
    names += [f"commit {commit}"] if (commit := code_of(session)) else []
    return ["", f"It ran with {code(', '.join(names))}, on {code(session['devices'])}."]


def _held_out(own: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]], step: int) -> list[str]:
    evaluated = [line for line in metrics if "eval_loss" in line and line["step"] <= step]
    if not evaluated:
        held_out = own.get("eval_data") or own.get("eval_share")
        return ["No evaluation up to this step is in the run's metrics." if held_out else "The run held no data out."]
    last, before = evaluated[-1], evaluated[0] if evaluated[0]["step"] == 0 else None
    lines = [] if last["step"] == step else [f"Step {step} was not evaluated; these are of step {last['step']}.", ""]
    steps = [last] if before is None or before is last else [before, last]
    names = [name for name in last if name.startswith("eval_")]
    names.sort(key=lambda name: (FIRST.index(name) if name in FIRST else len(FIRST), name))
    rows = [["figure", *(f"step {line['step']}" for line in steps)], ["---"] * (1 + len(steps))]
    rows += [[code(name), *(f"{line[name]:.6g}" if name in line else "-" for line in steps)] for name in names]
    lines += ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows]
    if "eval_rewards/margins" in names:
        lines += ["", "Rewards are beta times the log-ratio of policy and reference, in nats; a tie is half right."]
    return lines


def _loading(*, reward: bool, adapter: bool) -> list[str]:
    module, kind = ("peft", "AutoPeftModel") if adapter else ("transformers", "AutoModel")
    kind += "ForSequenceClassification" if reward else "ForCausalLM"
    names = f"from {module} import {kind}\nfrom transformers import AutoTokenizer"
    names = names if adapter else f"from transformers import {kind}, AutoTokenizer"
    path = 'path = "path/to/this/directory"'
    code_lines = [names, "", path, f"model = {kind}.from_pretrained(path)"]
    code_lines.append("tokenizer = AutoTokenizer.from_pretrained(path)")
    option = "score --data rows.jsonl --output scored.jsonl" if reward else 'sample --prompt "..."'
    also = f"`dpojax {option} --model path/to/this/directory` reads it too."
    return ["```python", *code_lines, "```", "", also]


def _metrics(run: AnyPath) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``, by step; half a line, which a run that was killed may have written, is none."""
    path, lines = run / "metrics.jsonl", []
    for text in path.read_bytes().decode(errors="replace").splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return sorted(lines, key=lambda line: line["step"])


def code(text: Any) -> str:
    r"""A text as Markdown code in one line, whatever it holds.

    >>> print(code("a.jsonl"), code("a`b\n"), code(""))
    `a.jsonl` `` a`b\n `` `""`
    """
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text)) or '""'
    ticks = "`" * (max(map(len, re.findall("`+", shown)), default=0) + 1)
    blank = " " if len(ticks) > 1 or shown[0] == " " == shown[-1] else ""
    return f"{ticks}{blank}{shown}{blank}{ticks}"


def _plain(text: str) -> str:
    """A text as Markdown without markup, in one line."""
    one_line = "".join(c if c.isprintable() else " " for c in text)
    return re.sub(r"([\\`*_{}\[\]()<>#+!|~&-])", r"\\\1", one_line)
