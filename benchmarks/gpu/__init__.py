"""The GPU's benchmark, from build to report: ``benchmarks/gpu.sh``."""
