"""Unit tests of the jailer."""
