"""Seccomp: one policy text per role, compiled ahead of time, installed without libseccomp."""
