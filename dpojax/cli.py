"""The command line: options to configs, configs to commands, errors to sentences and exit statuses."""

import argparse
import errno
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import tyro

from dpojax.commands import (
    run_check_data,
    run_eval,
    run_export,
    run_judge,
    run_logps,
    run_losses,
    run_make_tfds,
    run_plan,
    run_report,
    run_sample,
    run_score,
    run_show_data,
    run_train,
)
from dpojax.configs import (
    CheckDataConfig,
    DPOConfig,
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
    SFTConfig,
    ShowDataConfig,
)
from dpojax.errors import UserError

Config = (
    DPOConfig
    | SFTConfig
    | LogpsConfig
    | EvalConfig
    | ScoreConfig
    | JudgeConfig
    | SampleConfig
    | ExportConfig
    | CheckDataConfig
    | ShowDataConfig
    | MakeTfdsConfig
    | LossesConfig
    | PlanConfig
    | ReportConfig
)


COMMANDS = {
    "dpo": (DPOConfig, run_train),
    "sft": (SFTConfig, run_train),
    "logps": (LogpsConfig, run_logps),
    "eval": (EvalConfig, run_eval),
    "score": (ScoreConfig, run_score),
    "judge": (JudgeConfig, run_judge),
    "sample": (SampleConfig, run_sample),
    "export": (ExportConfig, run_export),
    "check-data": (CheckDataConfig, run_check_data),
    "show-data": (ShowDataConfig, run_show_data),
    "make-tfds": (MakeTfdsConfig, run_make_tfds),
    "losses": (LossesConfig, run_losses),
    "plan": (PlanConfig, run_plan),
    "report": (ReportConfig, run_report),
}


UNWRITABLE = (errno.ENOSPC, errno.EFBIG, errno.EACCES, errno.EROFS, errno.ENOTDIR)
"""Errors of the operating system that are the user's to mend."""


def run(config: Config) -> int:
    """Carry out one command; returns its exit status."""
    from dpojax.options import check_options

    def command() -> int:
        check_options(config)
        planned = isinstance(config, PlanConfig) or getattr(config, "plan", None)
        # Programs for devices that are not here cannot be read back, so a plan keeps none.
        hosts = ExportConfig | InspectOptions | MakeTfdsConfig | LossesConfig | ReportConfig
        if not planned and not isinstance(config, hosts):
            from dpojax.startup import prepare

            prepare()
        return next(function for kind, function in COMMANDS.values() if kind is type(config))(config)  # type: ignore[operator]

    return reporting(command)


def reporting(command: Callable[[], int]) -> int:
    """Call a command; bad input, a disk that is full, and the end of another process are one sentence and a status."""
    # Tokenizers are all that is used of transformers, and it need not say that torch is missing.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        return command()
    except BrokenPipeError:  # who read our output has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Exception, KeyboardInterrupt) as error:
        from dpojax import processes

        known = sentence_of(error)
        if known is None and processes.count() == 1:
            raise
        if known is None:
            traceback.print_exc()
        sentence, status = known or ("", 1)
        processes.leave(sentence, status)
        print(f"dpojax: {sentence}", file=sys.stderr)
        return status


def sentence_of(error: BaseException) -> tuple[str, int] | None:
    """What is said of an error, and the exit status; None of one that nobody foresaw."""
    from dpojax import processes

    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130  # as a shell reports it
    if processes.is_loss(error):
        return processes.lost(), 1
    if isinstance(error, UserError):
        return str(error), 2
    if isinstance(error, OSError) and error.errno in UNWRITABLE:
        return f"{error.filename or '--output'}: {error.strerror}; free some space, or name another place", 2
    return None


def report_unraisable(what: Any) -> None:
    """Report an error that no code can catch, but not TensorStore's echoes of a write or a read that failed.

    Their callbacks find an event loop that has gone; that it failed we say once ourselves.
    """
    echoes = ("Event loop is closed", "Encountered error while reading array index")
    if not str(what.exc_value).startswith(echoes):
        sys.__unraisablehook__(what)


def parsed(args: list[str]) -> Config:
    """The options that the arguments spell; of a run with ``--config``, beside those in that file.

    Raises:
      SystemExit: the arguments ask for help, or are wrong; all is then said.
      UserError: ``--config`` names no run of this command.
    """
    try:
        if args[:1] in (["dpo"], ["sft"]):
            finder = argparse.ArgumentParser(f"dpojax {args[0]}", "%(prog)s", add_help=False, allow_abbrev=False)
            finder.add_argument("--config")
            found, others = finder.parse_known_args(args[1:])
            if found.config is not None:
                return parsed_beside(args[0], found.config, others)
        return tyro.extras.subcommand_cli_from_dict(
            {name: kind for name, (kind, _) in COMMANDS.items()},
            prog="dpojax",
            description="Direct preference optimization in JAX.",
            args=args,
            config=(tyro.conf.OmitSubcommandPrefixes,),
        )
    finally:
        sys.stdout.flush()


def parsed_beside(command: str, file: str, args: list[str]) -> DPOConfig | SFTConfig:
    """The options of the run that a ``run.json`` is of, but for those that the arguments spell."""
    from dpojax.runfile import check_names, options_of_file

    kind: type[DPOConfig] | type[SFTConfig] = DPOConfig if command == "dpo" else SFTConfig
    options = options_of_file(kind, file)
    config: DPOConfig | SFTConfig = tyro.cli(kind, prog=f"dpojax {command}", args=args, default=options)
    check_names(config, file)
    return config


def main(args: list[str] | None = None) -> int:
    """Parse the arguments, run the command, return its exit status."""
    sys.unraisablehook = report_unraisable
    return reporting(lambda: run(parsed(sys.argv[1:] if args is None else args)))


if __name__ == "__main__":
    sys.exit(main())
