"""Every field of every config changes something: the data, the compiled step, or what comes out.

A field that is added without a row below fails the first test; one that changes nothing fails the second.
"""

import dataclasses
import hashlib
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from dpojax import cli, configs
from dpojax.configs import MeshConfig
from dpojax.losses import spelled

COMMANDS = {kind.__name__: kind for kind, _ in cli.COMMANDS.values()}


CHATTY = (
    "{{ strftime_now('%B') }}{% for m in messages %}{{ m.content }}{{ m.content if twice }}</s>{% endfor %}"
    "{{ '>' if add_generation_prompt }}"
)


def chatty():
    """A tokenizer of bytes that puts a BOS before any text, which its chat template does not write."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: i + 2 for i, letter in enumerate(letters)} | {"<s>": 0, "</s>": 1}, []))
    inner.add_special_tokens(["<s>", "</s>"])
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = CHATTY
    return tokenizer


@pytest.fixture(scope="module")
def world(tiny_dir, pairs_file, tmp_path_factory):
    """Files that base and changed configs name."""
    from transformers import AutoTokenizer

    from dpojax.models import (
        FAMILIES,
        as_reward_model,
        load_model,
        load_tokenizer,
        new_lora,
        new_model,
        save_model,
        with_adapter,
    )
    from dpojax.models.peft import save_adapter
    from tests.conftest import HF_CONFIG, decoder_config, write_rows

    root = tmp_path_factory.mktemp("world")
    tokenizer = AutoTokenizer.from_pretrained(tiny_dir)
    save_model(new_model(decoder_config(HF_CONFIG), seed=9), root / "model2")
    tokenizer.save_pretrained(root / "model2")
    lora = dataclasses.replace(decoder_config(HF_CONFIG), lora=new_lora(("q",), 1, 1.0))
    drawn = with_adapter(lora, new_model(decoder_config(HF_CONFIG)).params)
    save_adapter(drawn, lora, FAMILIES["llama"], root / "adapter", base=str(root / "model2"))
    tokenizer.eos_token = "<unk>"
    tokenizer.save_pretrained(root / "tokenizer2")
    rows = Path(pairs_file).read_text().splitlines(keepends=True)
    (root / "other.jsonl").write_text("".join(rows[:9]))
    (root / "bad.jsonl").write_text("".join([*rows[:9], "{}\n"]))
    completions = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
    write_rows(root / "completions.jsonl", completions)
    chat = {"prompt": [{"role": "user", "content": "the </s> film"}], "chosen": "good", "rejected": "bad"}
    write_rows(root / "chats.jsonl", [chat, chat | {"chosen": "so good"}])
    # Pairs, or published records of another format by their columns.
    write_rows(root / "published.jsonl", [{"sol1": "a", "sol2": "b", "goal": "c", "label": 0}])
    write_rows(root / "rated.jsonl", [json.loads(row) | {"stars": i % 5} for i, row in enumerate(rows)])
    chatty().save_pretrained(root / "chatty")
    reward = as_reward_model(load_model(tiny_dir))
    params = reward.params | {"score": jax.random.normal(jax.random.key(0), (1, reward.config.width))}
    save_model(dataclasses.replace(reward, params=params), root / "reward")
    load_tokenizer(tiny_dir).save_pretrained(root / "reward")
    (root / "scorer.py").write_text("def length(prompts, completions): return list(map(len, completions))")
    run = root / "run"
    flags = ("--batch-size", "8", "--save-steps", "1", "--warmup-steps", "0", "--learning-rate", "0.01")
    base = ("--model", tiny_dir, "--data", pairs_file, "--output", str(run))
    assert cli.main(["dpo", *base, *flags]) == 0
    return {"model": tiny_dir, "pairs": pairs_file, "root": root}


def train_base(w) -> dict:
    return {
        "model": w["model"],
        "data": (w["pairs"],),
        "output": "out",
        "batch_size": 8,
        "steps": 2,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "max_shapes": 1,
    }


def chat_changes(w, base: dict) -> dict:
    """What all commands that may be given chats share; ``base`` are options with which there is one."""
    spelled = base | {"chat_template_kwargs": '{"spelled": true}'}
    return {
        "chat_template_kwargs": ('{"twice": true}', base),
        "chat_date": ("2020-09-01", base | {"chat_date": "2020-05-01"}),
        "chat_special_tokens": ("tokenizer", base),
        "allow_special_tokens": (True, spelled),
    }


def reading_changes(w, data: str = "data") -> dict:
    """What the commands that read records share."""
    root = w["root"]
    # The longest row has as many tokens with the shortest month, and without a BOS.
    dated = {"chat_date": "2020-05-01", "max_length": 25}
    chats = {data: (str(root / "chats.jsonl"),), "tokenizer": str(root / "chatty"), **dated}
    return chat_changes(w, chats) | {
        "format": ("rows", {data: (str(root / "published.jsonl"),)}),
        "filter": (("stars>=3",), {data: (str(root / "rated.jsonl"),)}),
        "as_chat": True,
        "max_length": 20,
        "min_prompt_length": (2, {"max_length": 20}),
    }


def shared_changes(w) -> dict:
    """What the commands that read pairs share."""
    return reading_changes(w) | {
        "model": str(w["root"] / "model2"),
        "tokenizer": str(w["root"] / "tokenizer2"),
        "dtype": "bfloat16",
        "data": (str(w["root"] / "other.jsonl"),),
        "batch_size": 16,
        "logprob_chunk_tokens": 16,
        "attention": "splash",  # refused: this is no TPU
    }


def train_changes(w) -> dict:
    """field -> what it becomes, with whatever else both sides need for it to be seen."""
    root, held_out = w["root"], {"eval_data": (w["pairs"],)}
    return shared_changes(w) | {
        "max_shapes": (2, {"steps": 3}),
        "skip_bad_rows": (True, {"data": (str(root / "bad.jsonl"),)}),
        "output": "elsewhere",
        "plan": "h100:1x1",
        "run_name": "first",
        "report_to": ("none",),
        "eval_data": (w["pairs"],),
        "eval_share": 0.3,
        "epochs": (2, {"steps": None}),
        "steps": 3,
        "optim": "adamw",
        "optim_dtype": "bfloat16",
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 1,
        "weight_decay": (0.1, {"optim": "adamw"}),
        "max_grad_norm": 1e-3,
        "gradient_accumulation_steps": (2, {"batch_size": 16}),
        "train_top_layers": 1,
        "router_aux_loss_coef": 0.5,  # refused: this model has no experts
        "lora_rank": 2,
        "lora_alpha": (9.0, {"lora_rank": 2}),
        "lora_targets": (("q_proj",), {"lora_rank": 2}),
        "lora_dropout": (0.3, {"lora_rank": 2}),
        "use_rslora": (True, {"lora_rank": 2}),
        "lora_init": ("a-zero", {"lora_rank": 2}),
        "quantize_base": ("int8", {"lora_rank": 2}),  # refused where qwix is not installed
        "adapter": str(root / "adapter"),
        "remat": "block",
        "mesh": MeshConfig(data=2, fsdp=2, tensor=2),
        "seed": 5,
        "logging_steps": 2,
        "eval_steps": (1, held_out),
        "save_steps": 1,
        "save_total_limit": (1, {"save_steps": 1}),
    }


def plan_changes(w) -> tuple[dict, dict]:
    """On GPUs, for which nothing is compiled."""
    write = (w["root"] / "lengths.jsonl").write_text
    write('{"prompt": 9, "completions": [7, 5]}\n' * 16)
    adapted = {"lora_rank": 2}
    return {"model": w["model"], "topology": "h100:1x2"}, {
        "model": "gpt2-large",
        "topology": "h100:1x4",
        "loss": "kto",
        "reference": "live",
        "dtype": "bfloat16",
        "attention": "splash",  # refused: these are no TPUs
        "logprob_chunk_tokens": 16,
        "remat": "block",
        "optim": "adamw",
        "optim_dtype": "bfloat16",
        "gradient_accumulation_steps": 2,
        "train_top_layers": 1,
        "lora_rank": 2,
        "lora_targets": (("q_proj",), adapted),
        "quantize_base": ("int8", adapted),  # refused where qwix is not installed
        "mesh": MeshConfig(data=1, fsdp=2),
        "batch_size": 32,
        "max_length": 64,
        "prompt_length": 10,
        "lengths": str(w["root"] / "lengths.jsonl"),
        "rows": 1000,
        "search": 1,
        "top": -1,  # refused: of GPUs there are no source lines
        "json": "plan.json",
    }


def judge_changes(w) -> tuple[dict, dict]:
    """By a scorer; a reward model's options by one, an endpoint's by dry runs, which show them all."""
    root = w["root"]
    for name in ("longer", "shorter"):
        rows = [{"prompt": f"the film {n}", "completion": " ok" * (n % 3 + len(name)), "score": n} for n in range(9)]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    verdicts = {"prompt": "the film 0", "a": " ok" * 6, "b": " ok" * 7, "verdict": "A"}
    (root / "verdicts.jsonl").write_text(json.dumps(verdicts) + "\n")
    (root / "question.txt").write_text("{prompt}? {first} {second}")
    longer, shorter = str(root / "longer.jsonl"), str(root / "shorter.jsonl")
    base = {"a": longer, "b": shorter, "output": "verdicts.jsonl", "scorer": str(root / "scorer.py") + ":length"}
    asked = {"scorer": None, "endpoint": "http://127.0.0.1:9", "judge_model": "m", "dry_run": True}
    model = {"scorer": None, "model": str(root / "reward")}
    changes: dict = {
        "a": shorter,
        "b": longer,
        "output": "elsewhere.jsonl",
        "json": "figures.json",
        "limit": 3,
        "agreement": (str(root / "verdicts.jsonl"),),
        "scored": (True, {"scorer": None, "scored": False, "model": None}),  # no judge, before
        "scorer": (None, {"scored": True}),  # two judges, before
        "model": (str(root / "model2"), model),
        "tokenizer": (str(root / "tokenizer2"), model),
        "dtype": ("bfloat16", model),
        "attention": ("splash", model),  # refused: this is no TPU
        "batch_size": (16, model),
        "max_shapes": (1, model),
        "filter": ("score>=4",),
        "as_chat": True,
        "max_length": (20, model),
        "min_prompt_length": (2, model | {"max_length": 20}),
        "format": ("rows", {"a": str(root / "published.jsonl"), "b": str(root / "published.jsonl")}),
        "endpoint": ("http://127.0.0.1:8", asked),
        "judge_model": ("n", asked),
        "task": ("summary", asked),
        "template": (str(root / "question.txt"), asked),
        "both_orders": (True, asked),
        "seed": (5, asked),
        "api_key_env": ("PATH", asked),  # a key, of some kind
        "request_options": ('{"top_p": 1}', asked),
        "max_answer_tokens": (9, asked),
        "concurrency": (2, asked),
        "retries": (1, asked),
        "timeout": (9.0, asked),
        "price_per_million_input": (2.0, asked),
        "price_per_million_output": (2.0, asked),
        "dry_run": (False, asked | {"retries": 0}),
    }
    chats = {"a": str(root / "chats.jsonl"), "b": str(root / "chats.jsonl"), "tokenizer": str(root / "chatty")}
    return base, chat_changes(w, model | chats | {"chat_date": "2020-05-01"}) | changes


def base_and_changes(name: str, w) -> tuple[dict, dict]:
    root = w["root"]
    if name == "SFTConfig":
        return train_base(w), train_changes(w)
    if name == "DPOConfig":
        moving = {"sync_ref_model": True, "steps": 5}
        own = {
            "loss": "hinge",
            "beta": 0.7,
            "label_smoothing": 0.2,
            "ref_model": str(root / "model2"),
            "reference": "live",
            "sync_ref_model": (True, {"ref_model_sync_steps": 1, "steps": 3}),
            "ref_model_mixup_alpha": (1.0, moving | {"ref_model_sync_steps": 1}),
            "ref_model_sync_steps": (2, moving),
        }
        return train_base(w), train_changes(w) | own
    scoring = {"model": w["model"], "data": (w["pairs"],), "output": "out.json", "max_shapes": 1}
    scoring_changes = shared_changes(w) | {
        "max_shapes": 3,
        "output": "elsewhere.json",
    }
    return {
        "LogpsConfig": (scoring, scoring_changes),
        "EvalConfig": (
            scoring,
            scoring_changes
            | {
                "ref_model": str(root / "model2"),
                "beta": (0.7, {"ref_model": str(root / "model2")}),
                "skip_bad_rows": (True, {"data": (str(root / "bad.jsonl"),)}),
            },
        ),
        "ScoreConfig": (
            scoring | {"model": str(root / "reward"), "output": "out.jsonl"},
            {name: change for name, change in shared_changes(w).items() if name != "logprob_chunk_tokens"}
            | {
                "max_shapes": 3,
                "output": "elsewhere.jsonl",
                "scorer": (str(root / "scorer.py") + ":length", {"model": None}),
            },
        ),
        "JudgeConfig": judge_changes(w),
        "SampleConfig": (
            {"model": w["model"], "prompt": ("the film",), "max_new_tokens": 12, "num_samples": 3},
            chat_changes(w, {"chat": True, "tokenizer": str(root / "chatty"), "prompt": ("hm </s> hm",)})
            | {
                "model": str(root / "model2"),
                "tokenizer": (str(root / "tokenizer2"), {"max_new_tokens": 400}),
                "dtype": "bfloat16",
                "prompt": ("a long way",),
                "chat": True,
                "max_new_tokens": 5,
                "num_samples": 2,
                "temperature": 0.2,
                "top_k": 2,
                "top_p": 0.3,
                "min_p": 0.5,
                "repetition_penalty": 1.5,
                "stop": ("a",),
                "stop_token_ids": tuple(range(3, 200)),
                "batch_size": 2,
                "seed": 4,
            },
        ),
        "ExportConfig": (
            {"run": str(root / "run"), "output": "model"},
            {
                "run": str(root / "model2"),  # refused: it is no run
                "output": "elsewhere",
                "checkpoint": "2",
                "dtype": "bfloat16",
                "max_shard_size": "20KB",
                "adapter": True,  # refused: the run has none
            },
        ),
        "CheckDataConfig": (
            {"data": (w["pairs"],), "model": w["model"], "max_length": 30},
            reading_changes(w)
            | {
                "data": (str(root / "bad.jsonl"),),
                "model": None,
                "tokenizer": (str(root / "other.jsonl"), {}),  # refused: it is no tokenizer
                "kind": ("completions", {"data": (str(root / "completions.jsonl"),)}),
                "loss": "odpo",  # its rows need a margin
            },
        ),
        "ShowDataConfig": (
            {"data": (w["pairs"],), "model": w["model"], "max_length": 40},
            reading_changes(w)
            | {
                "data": (str(root / "other.jsonl"),),
                "model": str(root / "tokenizer2"),
                "tokenizer": str(root / "tokenizer2"),
                "kind": "completions",
                "loss": "odpo",  # its rows need a margin
                "rows": 1,
                "row": (4,),
            },
        ),
        "MakeTfdsConfig": (
            {"data": (w["pairs"],), "output": "sets", "name": "pairs"},
            {
                "data": (str(root / "other.jsonl"),),
                "output": "elsewhere",
                "name": "others",
                "version": "1.0.1",
                "split": "test",
                "rows_per_shard": 7,
            },
        ),
        "ReportConfig": (
            {"runs": (str(root / "run"),)},
            {"runs": (str(root / "model2"),), "output": "elsewhere.html", "title": "Another"},  # the first is no run
        ),
        "PlanConfig": plan_changes(w),
        "LossesConfig": (
            {"names": ("sigmoid",), "output": "curves.png"},
            {"names": ("hinge",), "output": "elsewhere.png", "beta": 0.7, "span": 9.0},
        ),
    }[name]


FIELDS = [(name, field.name) for name, kind in COMMANDS.items() for field in dataclasses.fields(kind)]
TIMES = re.compile(r"[\d.]+ s\b|(pairs|tokens)/s [\d.e+]+|about \d+")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_field_has_a_row(name, world):
    _, changes = base_and_changes(name, world)
    assert set(changes) == {field.name for field in dataclasses.fields(COMMANDS[name])}


def footprint(kind: type, values: dict, directory: Path, monkeypatch, capsys, devices: int = 1) -> dict:
    """All that a command leaves: its words, its files, and the programs it compiled; clocks taken out."""
    from dpojax import generate, progress
    from dpojax.data import cache
    from dpojax.evaluate import scoring
    from dpojax.train import logps_cache, program
    from dpojax.train.session import session_of

    directory.mkdir()
    monkeypatch.chdir(directory)
    programs = []

    def recording(make):
        def made(*args, **kwargs):
            compiled = make(*args, **kwargs)

            seen: dict[str, str] = {}  # a program by its inputs' shapes

            def call(*inputs):
                shapes = str(jax.tree.map(lambda x: (np.shape(x), getattr(x, "dtype", type(x))), inputs))
                if shapes not in seen:
                    seen[shapes] = hashlib.sha256(compiled.lower(*inputs).as_text().encode()).hexdigest()
                programs.append(seen[shapes])
                return compiled(*inputs)

            return call

        return made

    those = jax.devices()[:devices]
    with monkeypatch.context() as patch:
        patch.setattr(jax, "devices", lambda: those)
        patch.setattr(jax, "device_count", lambda: devices)
        patch.setattr(program, "jit_train_step", recording(program.jit_train_step))
        for module in (program, scoring):
            patch.setattr(module, "make_logps_step", recording(module.make_logps_step))
        patch.setattr(scoring, "jit_forward", recording(scoring.jit_forward))
        patch.setattr(generate, "make_sampler", recording(generate.make_sampler))
        patch.setattr(progress, "SECONDS_BETWEEN_LINES", float("inf"))  # lines that only a slow machine has
        for module in (cache, logps_cache):  # what an earlier run has computed would change the words
            patch.setattr(module, "cache_dir", lambda beside: None)
        status = cli.run(kind(**values))
    words = capsys.readouterr()
    files = {}
    for path in sorted(directory.rglob("*")):
        name = str(path.relative_to(directory))
        # Orbax and TensorBoard put times into names and contents; run.json repeats the options themselves.
        if path.is_dir() or "ocdbt" in name or "/d/" in name:
            continue
        if "tfevents" in name or path.name == "run.json":
            told = path.name == "run.json" and session_of(json.loads(path.read_text()))["name"]
            files[str(Path(name).parent)] = told
            continue
        files[name] = path.stat().st_size if "checkpoints" in name else path.read_bytes()
        if path.name == "metrics.jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            files[name] = [{k: v for k, v in line.items() if not k.endswith("_second")} for line in lines]
    return {"status": status, "words": TIMES.sub("", words.out + words.err), "files": files, "programs": programs}


@pytest.fixture(scope="module")
def bases():
    return {}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_same_options_leave_the_same(name, world, tmp_path, monkeypatch, capsys):
    """Else the next test could not fail."""
    base, _ = base_and_changes(name, world)
    first, second = (footprint(COMMANDS[name], base, tmp_path / d, monkeypatch, capsys) for d in ("1", "2"))
    assert first == second


@pytest.mark.parametrize(("name", "field"), FIELDS, ids=lambda x: str(x).removesuffix("Config"))
def test_field_is_alive(name, field, world, bases, tmp_path, monkeypatch, capsys):
    base, changes = base_and_changes(name, world)
    change = changes[field]
    changed, needed = change if isinstance(change, tuple) and isinstance(change[-1], dict) else (change, {})
    devices = 8 if field == "mesh" else 1
    key = (name, json.dumps(needed, default=str), devices)
    if key not in bases:
        bases[key] = footprint(COMMANDS[name], base | needed, tmp_path / "base", monkeypatch, capsys, devices)
    values = base | needed | {field: changed}
    after = footprint(COMMANDS[name], values, tmp_path / "changed", monkeypatch, capsys, devices)
    assert bases[key] != after, f"{name}.{field} = {changed} changes nothing"


def test_defaults_are_the_documented_ones():
    """What the paper has, by default (arXiv 2305.18290, appendix B)."""
    config = configs.DPOConfig(model="", data=(), output="")
    assert (config.optim, config.learning_rate, config.warmup_steps) == ("rmsprop", 1e-6, 150)
    assert spelled(config.loss, beta=config.beta).beta == 0.1
    assert config.lr_scheduler_type == "constant_with_warmup"
