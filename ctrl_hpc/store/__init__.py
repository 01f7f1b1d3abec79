"""Bytes by hash on a shared disk: tests, verdicts."""
