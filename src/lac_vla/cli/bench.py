"""``lac bench``. Without postponed annotations: tyro reads them."""

from typing import Annotated

from lac_vla.bench import BenchConfig, bench_tables, device_table, make_table, run_bench
from lac_vla.cli.marks import FLAT
from lac_vla.cli.output import show


def bench(config: Annotated[BenchConfig, FLAT]) -> None:
    """Measure the milliseconds of a frame: three windows, every stage, interleaved with the stock model.

    Args:
        config: What to measure.
    """
    if config.latency_table is not None:
        show(device_table(make_table(config)))
        return
    for table in bench_tables(run_bench(config)):
        show(table)
