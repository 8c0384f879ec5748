"""``lac bench``: what a frame costs, measured against the stock model, interleaved in one run."""

from lac_vla.bench.config import BenchConfig
from lac_vla.bench.latency_table import make_table
from lac_vla.bench.run import BenchResult, run_bench
from lac_vla.bench.table import bench_tables, device_table

__all__ = ["BenchConfig", "BenchResult", "bench_tables", "device_table", "make_table", "run_bench"]
