"""The benchmarks, one declarative file each: every module here holds one `BENCHMARK`, found by its file name."""
