"""Protocols: what all benchmarks of one protocol do alike. A benchmark's own file only says what sets it apart."""
