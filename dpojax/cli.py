"""The command line: options to configs, configs to commands, errors to sentences and exit statuses."""

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


def main(args: list[str] | None = None) -> int:
    """Parse the arguments, run the command, return its exit status."""
    sys.unraisablehook = report_unraisable
    config = tyro.extras.subcommand_cli_from_dict(
        {name: kind for name, (kind, _) in COMMANDS.items()},
        prog="dpojax",
        description="Direct preference optimization in JAX.",
        args=args,
        config=(tyro.conf.OmitSubcommandPrefixes,),
    )
    return run(config)


if __name__ == "__main__":
    sys.exit(main())
