"""What benchmarks/gpu.py measures: one module for each of its parts."""
