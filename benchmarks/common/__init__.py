"""What the benchmarks of all devices share: rows, workloads, timing, files, arguments."""
