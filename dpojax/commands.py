"""What each command does, from its options to its exit status. Heavy imports wait until one runs."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpojax.configs import (
    CheckDataConfig,
    EvalConfig,
    ExportConfig,
    InspectOptions,
    JudgeConfig,
    LogpsConfig,
    LossesConfig,
    MakeTfdsConfig,
    PlanConfig,
    ReportConfig,
    SampleConfig,
    ScoreConfig,
    ShowDataConfig,
    TrainOptions,
)
from dpojax.errors import UserError

if TYPE_CHECKING:
    from dpojax.data import RowKind
    from dpojax.paths import AnyPath


def run_train(config: TrainOptions) -> int:
    """``dpojax dpo`` and ``dpojax sft``."""
    if config.plan is not None:
        from dpojax.plan.command import plan_run

        return plan_run(config)
    from dpojax.train.loop import train

    result = train(config)
    return 0 if result.finished else 130


def run_plan(config: PlanConfig) -> int:
    """``dpojax plan``."""
    from dpojax.plan.command import run_plan

    return run_plan(config)


def run_logps(config: LogpsConfig) -> int:
    """``dpojax logps``."""
    from dpojax.evaluate.scoring import FileScores
    from dpojax.progress import console

    if config.output:
        check_file(config.output)
    scores = FileScores(config)
    sums = scores.of(config.model)
    if not config.output:
        console.print(f"{len(sums)} rows are in the cache beside {config.data[0]}")
        return 0
    rows = map(scores.line, range(len(sums)), sums)
    write_output(config.output, "".join(json.dumps(row) + "\n" for row in rows))
    console.print(f"{len(sums)} rows written to {config.output}")
    return 0


def run_eval(config: EvalConfig) -> int:
    """``dpojax eval``."""
    from dpojax.evaluate import preference_estimates
    from dpojax.evaluate.scoring import FileScores
    from dpojax.progress import console
    from dpojax.train.rundir import options_of_run

    if config.output:
        check_file(config.output)
    scores = FileScores(config)
    own = options_of_run(config.model)
    ref_name = config.ref_model or own.get("ref_model") or own.get("model")
    adapter = None if config.ref_model or own.get("ref_model") else own.get("adapter")
    beta = config.beta or own.get("beta") or beta_of_run(own)
    policy, lengths, prompts = scores.pairs(scores.of(config.model))
    ref = scores.pairs(scores.of(ref_name, adapter))[0] if ref_name else None
    figures = preference_estimates(policy, ref, lengths, beta=beta, groups=prompts)
    for name, figure in sorted(figures.items()):
        console.print(f"{name:30} {figure}")
    console.print(f"{len(policy)} pairs of {len(set(prompts))} prompts; ± is the standard error over prompts")
    if config.output:
        plain = {name: {"mean": f.mean, "standard_error": f.error, "prompts": f.n} for name, f in figures.items()}
        write_output(config.output, json.dumps(plain, indent=2) + "\n")
    return 0


def beta_of_run(own: dict[str, Any]) -> float:
    """The beta of the objective that a run was trained with; 0.1 without a run."""
    from dpojax.losses import spelled

    try:
        return spelled(own["loss"]).beta if "loss" in own else 0.1
    except ValueError as error:
        raise UserError(f"--loss {own['loss']} of the run: {error}; give --beta") from None


def run_score(config: ScoreConfig) -> int:
    """``dpojax score``."""
    from dpojax import processes
    from dpojax.data import parse_filter
    from dpojax.data.prepare import Reading
    from dpojax.evaluate.rewards import model_rewards, scorer_rewards, write_scored
    from dpojax.progress import console

    check_file(config.output, on_disk=True)
    if any(Path(name).resolve() == Path(config.output).resolve() for name in config.data):
        raise UserError(f"--output {config.output}: is among --data; name another file")
    reading = Reading("candidates", config.format, tuple(map(parse_filter, config.filter)))
    rewards = scorer_rewards(config.scorer) if config.scorer else model_rewards(config, config.model or "")
    if not processes.first():
        return 0
    rows = write_scored(config, reading, rewards)
    console.print(f"{rows} rows written to {config.output}")
    return 0


def run_judge(config: JudgeConfig) -> int:
    """``dpojax judge``."""
    from dpojax import processes
    from dpojax.evaluate.judges.command import judge_files
    from dpojax.progress import console

    processes.one_alone("judge")
    check_file(config.output, on_disk=True)
    if config.json is not None:
        check_file(config.json, on_disk=True, flag="--json")
    for line in judge_files(config):
        console.print(line)
    return 0


def run_sample(config: SampleConfig) -> int:
    """``dpojax sample``."""
    from dpojax import processes
    from dpojax.data import Encoder
    from dpojax.generate import make_sampler, sample_all
    from dpojax.generate.prompts import check_prompts, encode_prompt
    from dpojax.progress import track
    from dpojax.startup import keep_memory
    from dpojax.train.by_name import open_policy, tokenizer_for
    from dpojax.train.inputs import encoding_of

    processes.one_alone("sample")
    tokenizer = tokenizer_for(config)
    encoder = Encoder(tokenizer, encoding_of(config))
    prompts = [encode_prompt(encoder, text, config.chat) for text in config.prompt]
    files = open_policy(config.model)
    check_prompts(config, files.config, prompts)
    ends = files.eos_ids(tokenizer)
    model = files.load(None)
    keep_memory()
    # A prompt is computed once for as many of its completions as a batch holds.
    together = min(config.num_samples, config.batch_size)
    rounds = -(-config.num_samples // together)
    sampler = make_sampler(
        model.config,
        num_samples=together,
        max_new_tokens=config.max_new_tokens,
        eos_ids=(*ends, *config.stop_token_ids),
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p,
        repetition_penalty=config.repetition_penalty,
        stop=config.stop,
        tokenizer=tokenizer,
        dtype=config.dtype,
    )
    drawn = sample_all(
        sampler,
        model.params,
        [prompt for prompt in prompts for _ in range(rounds)],
        batch_size=min(max(1, config.batch_size // together), len(prompts) * rounds),
        seed=config.seed,
        track=lambda batches: track(batches, "Sampling"),
    ).texts(tokenizer, config.stop)
    for i, prompt in enumerate(config.prompt):
        completions = [text for round in drawn[i * rounds : (i + 1) * rounds] for text in round]
        for text in completions[: config.num_samples]:  # by print, which leaves a model's text as it is
            print(f"{i + 1}. {prompt}|{text}")
    return 0


def run_export(config: ExportConfig) -> int:
    """``dpojax export``, on the host, also beside TPUs that only all processes together can use."""
    import jax

    from dpojax import processes
    from dpojax.models import load_tokenizer, save_model
    from dpojax.models.peft import save_adapter
    from dpojax.models.safetensors import save_tokenizer
    from dpojax.options import bytes_of
    from dpojax.paths import absolute, path_of, write_text
    from dpojax.progress import console
    from dpojax.train.by_name import load_adapter_of_run, load_run
    from dpojax.train.card import model_card
    from dpojax.train.rundir import is_run

    processes.one_alone("export")
    jax.config.update("jax_platforms", "cpu")
    output = path_of(config.output)
    check_export(config, output)
    if config.adapter:
        model, base, step = load_adapter_of_run(config.run, config.checkpoint)
        if is_run(base) or base.endswith(".gguf"):  # neither is a directory that transformers reads
            console.print(f"its base is {base}; for peft, export that too, and name it in adapter_config.json")
    else:
        model, step = load_run(config.run, config.checkpoint)
    tokenizer = load_tokenizer(str(path_of(config.run) / "model"))
    card = model_card(config.run, step, title=absolute(output).name, adapter=config.adapter)
    if config.adapter:
        save_adapter(model.params, model.config, model.family, output, base=base)
        save_tokenizer(tokenizer, output)
        write_text(output / "README.md", card)
    else:
        shard_bytes = bytes_of(config.max_shard_size)
        save_model(model, output, dtype=config.dtype, shard_bytes=shard_bytes, tokenizer=tokenizer, card=card)
    console.print(f"the {'adapter' if config.adapter else 'policy'} of step {step} written to {output}")
    return 0


def check_export(config: ExportConfig, output: "AnyPath") -> None:
    """Refuse an export that could not be read, before the work is done."""
    if config.adapter and config.dtype != ExportConfig.dtype:
        raise UserError(f"--dtype {config.dtype}: an adapter is written in float32; leave one of them out")
    if config.adapter and config.max_shard_size != ExportConfig.max_shard_size:
        raise UserError(f"--max-shard-size {config.max_shard_size}: an adapter is one file; leave one of them out")
    from dpojax.paths import exists

    if exists(output) and not output.is_dir():
        raise UserError(f"--output {output}: is a file; name a directory")
    other, what = ("model*.safetensors*", "a whole model") if config.adapter else ("adapter_config.json", "an adapter")
    if any(output.glob(other)):
        raise UserError(f"--output {output}: holds {what}, and only one can be meant; name another directory")


def run_check_data(config: CheckDataConfig) -> int:
    """``dpojax check-data``."""
    from dpojax.data import Encoder, parse_filter
    from dpojax.data.check import check_files
    from dpojax.data.prepare import Reading
    from dpojax.progress import console
    from dpojax.train.by_name import load_policy_tokenizer
    from dpojax.train.inputs import cores, encoding_of

    kind, name = kind_to_check(config), config.tokenizer or config.model
    encoder = Encoder(load_policy_tokenizer(name), encoding_of(config)) if name else None
    reading = Reading(kind.form, config.format, tuple(map(parse_filter, config.filter)))
    lengths = config.max_length, config.min_prompt_length
    lines, wrong = check_files(config.data, encoder, kind, *lengths, reading, cores())
    for line in lines:
        console.print(line)
    return 1 if wrong else 0


def run_show_data(config: ShowDataConfig) -> int:
    """``dpojax show-data``."""
    from dpojax.data import Encoder, parse_filter
    from dpojax.data.load import read_tokens
    from dpojax.data.prepare import Reading
    from dpojax.progress import Stage, console
    from dpojax.show.data import look
    from dpojax.train.by_name import load_policy_tokenizer
    from dpojax.train.inputs import cores, encoding_of

    kind = kind_to_check(config)
    tokenizer = load_policy_tokenizer(config.tokenizer or config.model)
    encoder = Encoder(tokenizer, encoding_of(config))
    reading = Reading(kind.form, config.format, tuple(map(parse_filter, config.filter)))
    with Stage(f"Tokenizing {', '.join(Path(name).name for name in config.data)}", 1.0) as stage:
        read, _ = read_tokens(config.data, encoder, reading, workers=cores(), progress=stage.reach)
    lengths = config.max_length, config.min_prompt_length
    for line in look(read, tokenizer, kind, *lengths, rows=config.rows, numbers=config.row):
        console.print(line)
    return 0


def run_make_tfds(config: MakeTfdsConfig) -> int:
    """``dpojax make-tfds``."""
    from dpojax.data.tfds import make_tfds
    from dpojax.progress import console

    named = config.name, config.version
    path = make_tfds(config.data, config.output, *named, split=config.split, rows_per_shard=config.rows_per_shard)
    split = "" if config.split == "train" else f",split={config.split}"
    console.print(f"written to {path}; --data tfds:{path}{split} reads it")
    return 0


def kind_to_check(config: InspectOptions) -> "RowKind":
    """The rows that ``--loss`` reads, or those of ``--kind``."""
    from dpojax.data import RowKind, kind_of
    from dpojax.losses import spelled, traits_of

    if config.loss is None:
        return RowKind(config.kind or "pairs")
    try:
        kind = kind_of(traits_of(spelled(config.loss).objective))
    except ValueError as error:
        raise UserError(f"--loss {config.loss}: {error}") from None
    if config.kind not in (None, kind.form):
        raise UserError(f"--kind {config.kind}: --loss {config.loss} reads {kind.form}; leave one of them out")
    return kind


def run_losses(config: LossesConfig) -> int:
    """``dpojax losses``."""
    from dpojax.progress import console
    from dpojax.show import check_matplotlib, curves_named, draw, print_catalogue, table

    if not config.names:
        for option in ("output", "beta", "span"):
            if (value := getattr(config, option)) != getattr(LossesConfig, option):
                raise UserError(
                    f"--{option} {value}: is for a plot; name objectives, as in dpojax losses sigmoid hinge"
                )
        print_catalogue(console)
        return 0
    check_file(config.output, on_disk=True)
    if not config.output.endswith(".png"):
        raise UserError(f"--output {config.output}: the plot is a PNG file; name it so, as in losses.png")
    check_matplotlib()
    curves = curves_named(config.names, config.beta, config.span)
    draw(curves, Path(config.output))
    for line in [*table(curves), f"plotted in {config.output}"]:
        console.print(line)
    return 0


def run_report(config: ReportConfig) -> int:
    """``dpojax report``."""
    from dpojax.paths import path_of, write_text
    from dpojax.progress import console
    from dpojax.report import html_page, markdown_page, read_all, report_of, title_of

    if not config.runs:
        raise UserError("report: name directories of runs or experiments, as in dpojax report runs/a runs/b")
    if not config.output.endswith(".html"):
        raise UserError(f"--output {config.output}: the report is an HTML file; name it so, as in report.html")
    beside = config.output.removesuffix(".html") + ".md"
    check_file(config.output)
    report = report_of(config.title or title_of(config.runs), *read_all(config.runs))
    page = path_of(config.output)
    write_text(page, html_page(report))
    write_text(path_of(beside), markdown_page(report, beside, page.name))
    console.print(f"written to {config.output} and {beside}")
    return 0


def check_file(name: str, *, on_disk: bool = False, flag: str = "--output") -> None:
    """Refuse an output file that could not be written, before the work is done."""
    from dpojax import processes
    from dpojax.paths import in_store

    if (in_store(name) and not on_disk) or not processes.first():
        return
    if Path(name).is_dir() or not Path(name).absolute().parent.is_dir():
        raise UserError(f"{flag} {name}: is a directory or in none that exists; name a file")


def write_output(name: str, text: str) -> None:
    """Write a file that is either complete or not there; of several processes, the first does."""
    from dpojax import processes
    from dpojax.paths import path_of, write_text

    if processes.first():
        write_text(path_of(name), text)
