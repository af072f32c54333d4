"""The program ``firecracker`` started directly: the same cells and supervisor, without the jail.

What still holds: one process per role, seccomp filters, no_new_privs, no capabilities in supervisor and workers.
"""

from __future__ import annotations

from ipc import timeline
from ipc.errno_text import errno_text
from jailer import cli
from jailer.errors import JailerError

EXIT_FAILED = 1
EXIT_ARGUMENT_PARSING = 153


def main(argv: list[str]) -> int:
    """Run the program with a command line (``argv[0]`` is the program's name); return the exit status."""
    from vmm import cli as vmm_cli

    timeline.start_if_asked()
    arguments = argv[1:]
    try:
        answered = vmm_cli.answer(arguments)
        if answered is not None:
            return cli.print_answer(answered)
        command_line = vmm_cli.parse(arguments)
    except vmm_cli.CommandLineError as error:
        cli.print_error(str(error))
        return error.exit_code
    try:
        timeline.mark("import libraries")
        from ipc import zmq_core

        zmq_core.install()
        from jailer import direct, start, template

        def load_roles() -> template.Roles:
            return template.load_roles(kernel_cache=command_line.kernel_cache is not None)

        return direct.launch(tuple(arguments), command_line.id, start.started_now(), load_roles)
    except JailerError as error:
        cli.print_error(str(error))
    except OSError as error:
        cli.print_error(f"{error.filename or 'firecracker'}: {errno_text(error)}")
    except KeyboardInterrupt:
        cli.print_error("interrupted")
    except Exception as error:
        from jailer.cell import describe_error

        cli.print_error(f"internal error: {describe_error(error)}")
    return EXIT_FAILED
