"""The program ``jailer``."""

from __future__ import annotations

import gc
import os
import sys

from base import timeline
from base.errno_text import errno_text
from base.lean_typing import Callable
from jailer import cli
from jailer.errors import JailerError

EXIT_FAILED = 1


def main(argv: list[str]) -> int:
    """Run the jailer with a command line (``argv[0]`` is the program's name); return the exit status."""
    timeline.start_if_asked()
    arguments = argv[1:]
    text = cli.answer(arguments)
    if text is not None:
        sys.stdout.write(text)
        sys.stdout.flush()
        return 0
    return guarded(lambda: _run(arguments))


def guarded(run: Callable[[], int]) -> int:
    """Run the program's work, and tell what it fails with in one line; return the exit status."""
    try:
        return run()
    except JailerError as error:
        cli.print_error(str(error))
    except OSError as error:
        cli.print_error(f"{error.filename or 'jailer'}: {errno_text(error)}")
    except KeyboardInterrupt:
        from jailer import ending

        return ending.end_interrupted()
    except Exception as error:
        from jailer.cell import describe_error

        cli.print_error(f"internal error: {describe_error(error)}")
    return EXIT_FAILED


def _run(arguments: list[str]) -> int:
    without = {arguments[at + 1] for at, word in enumerate(arguments[:-1]) if word == "--without"}
    if "descriptors" not in without:
        close_descriptors()
    if "environment" not in without:
        clear_environment()
    try:
        options = cli.parse(arguments)
    except JailerError as error:
        raise type(error)(f"Arguments parsing error: {error} \n\nFor more information try --help.") from None
    if "check" in options.switches:
        from jailer import host_check

        return host_check.main()
    if "purge" in options.values:
        return _purge(options)
    return _launch(options)


def close_descriptors() -> None:
    """Close everything but the standard descriptors, and make sure that those exist."""
    from jailer.operations import Step
    from jailer.steps import process

    with Step("close inherited descriptors"):
        process.close_inherited_descriptors()
    with Step("open the standard descriptors"):
        process.ensure_standard_descriptors()


def clear_environment() -> None:
    """Remove every variable that the caller set."""
    from jailer.steps import process

    process.clear_environment()


def _purge(options: cli.Options) -> int:
    from jailer import cleanup, settings

    microvm_id = options.values["purge"]
    settings.check_id(microvm_id)
    exec_name = os.path.basename(options.value("exec-file")) or cli.DEFAULT_EXEC_NAME
    parent = options.value("parent-cgroup") or exec_name
    base = os.path.realpath(options.value("chroot-base-dir"))
    directory = os.path.join(base, exec_name, microvm_id)
    removed = cleanup.purge(directory, exec_name, f"{parent}/{microvm_id}")
    for path in removed:
        sys.stdout.write(f"removed {path}\n")
    if not removed:
        sys.stdout.write(f"nothing is left of {microvm_id} ({directory})\n")
    return 0


def _launch(options: cli.Options) -> int:
    from jailer import settings

    resolved = settings.resolve(options)
    from vmm import cli as vmm_cli

    try:
        answered = vmm_cli.answer(options.arguments)
        if answered is not None:
            return vmm_cli.print_answer(answered)
        line = vmm_cli.parse(("--id", resolved.microvm_id, *options.arguments))
    except vmm_cli.CommandLineError as error:
        cli.print_error(str(error))
        return error.exit_code
    from jailer import hot, pack

    gc.disable()  # until template.warm()
    pack.install()
    hot.intern_names()
    timeline.mark("import libraries")
    from base import lean_msgpack, lean_zmq

    lean_zmq.install()
    lean_msgpack.install()
    from jailer import launch, plan, template

    started = plan.started_now()
    kernel_cache = bool(options.value("kernel-cache")) or line.kernel_cache is not None
    return launch.JailedLaunch(options, resolved, started).run(lambda: template.load_roles(kernel_cache=kernel_cache))
