"""The program ``firecracker`` started directly: the same cells and supervisor, without the jail.

What still holds: one process per role, seccomp filters, no_new_privs, no capabilities in supervisor and workers.
"""

from __future__ import annotations

import gc

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.cli import CommandLine

EXIT_FAILED = 1


def main(argv: list[str]) -> int:
    """Run the program with a command line (``argv[0]`` is the program's name); return the exit status."""
    from vmm import cli as vmm_cli

    arguments = argv[1:]
    try:
        answered = vmm_cli.answer(arguments)
        if answered is not None:  # before anything else is imported: --version costs little more than the interpreter
            return vmm_cli.print_answer(answered)
        command_line = vmm_cli.parse(arguments)
    except vmm_cli.CommandLineError as error:
        from jailer import cli

        cli.print_error(str(error))
        return error.exit_code
    return _launch(arguments, command_line)


def _launch(arguments: list[str], command_line: CommandLine) -> int:
    gc.disable()  # until template.warm()
    from jailer import pack

    pack.install()
    from base import timeline
    from jailer import cli
    from jailer.errors import JailerError

    timeline.start_if_asked()
    try:
        timeline.mark("import libraries")
        from base import lean_msgpack, lean_zmq

        lean_zmq.install()
        lean_msgpack.install()
        from jailer import direct, plan, template

        def load_roles() -> template.Roles:
            return template.load_roles(kernel_cache=command_line.kernel_cache is not None)

        wall_log = command_line.wall_log or ""
        off = frozenset((command_line.without or "").split(",")) - {""}
        started = plan.started_now()
        return direct.launch(tuple(arguments), command_line.id, started, load_roles, wall_log=wall_log, off=off)
    except JailerError as error:
        text = str(error)
    except OSError as error:
        from base import threads

        text = f"{error.filename or 'firecracker'}: {threads.explain(error)}"
    except KeyboardInterrupt:
        from jailer import ending

        return ending.end_interrupted()
    except Exception as error:
        from jailer.cell import describe_error

        text = f"internal error: {describe_error(error)}"
    cli.print_error(text)
    from vmm import main as controller

    return controller.log_refusal(command_line, text, EXIT_FAILED)  # there is no controller that would
