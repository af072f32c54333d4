"""``cellblock seccompiler`` and ``seccompiler-bin``: from Firecracker's JSON to what --seccomp-filter takes."""
