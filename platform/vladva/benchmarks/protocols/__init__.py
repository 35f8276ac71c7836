"""Kinds of benchmarks: what all of one kind do alike. A benchmark's own file only says what sets it apart."""
