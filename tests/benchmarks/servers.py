"""What a night costs with more and more servers: the stats and the summary of each, and the summary over all.

Every server has as many customers as the first. So what each of them does should take as long as before, and what
grows is what they share. Run it alone on the machine:

    python -m tests.benchmarks.servers --servers 4 --customers 500 --jobs 20
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.faults.places import DAYS, Layout, make_template
from tests.server import server_to_control

# So many jobs of each customer, over six days.
_FILL = """
    INSERT INTO {schema}.marketplace_jobs (marketplace, action_type_id, status, started_at, completed_at)
    SELECT (ARRAY['vinted', 'ebay', 'etsy'])[1 + h % 3], 1 + h % 9,
           (ARRAY['completed', 'failed'])[1 + (h % 10 = 0)::int], ended - h % 900000 * interval '1 ms', ended
      FROM (SELECT abs(hashint4(id * {number})) AS h FROM generate_series(1, {jobs}) AS id) AS job,
           LATERAL (SELECT timestamptz '{start} 00:00Z' + h % 518400 * interval '1 s' AS ended) AS at"""


def timed(work: Callable[..., Any], *arguments: Any) -> tuple[float, float, Any]:
    """Seconds by the clock and of this process's cores, and what came out."""
    began, cpu = time.monotonic(), time.process_time()
    result = work(*arguments)
    return time.monotonic() - began, time.process_time() - cpu, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--servers", type=int, default=4)
    parser.add_argument("--customers", type=int, default=500)
    parser.add_argument("--jobs", type=int, default=20, help="of a customer, over six days")
    given = parser.parse_args()
    customers = [f"user_{number}" for number in range(1, given.customers + 1)]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers = [stack.enter_context(server_to_control()) for _ in range(given.servers)]
        make_template(servers, customers)
        layouts = [Layout(f"server{number}", [server], 1, customers, folder) for number, server in enumerate(servers)]
        all_of_them = layouts[0]
        for number, layout in enumerate(layouts):
            with layout.connect(layout.home) as connection:
                for n, customer in enumerate(customers, start=1):
                    text = _FILL.format(schema=customer, number=n + 7919 * number, jobs=given.jobs, start=DAYS[0])
                    connection.execute(text.encode())
            stats, _, _ = timed(layout.compute, layout.home, "marketplace_job_stats_job")
            again, _, _ = timed(layout.compute, layout.home, "marketplace_job_stats_job")
            summary, _, _ = timed(layout.compute, layout.home, "marketplace_daily_summary_job")
            if number:
                all_of_them.databases |= layout.databases
                all_of_them.places |= {f"{place} {one}": place for one, place in layout.places.items()}
            first, cpu, result = timed(all_of_them.add_up)
            second, cpu_again, _ = timed(all_of_them.add_up)
            with layout.connect(layout.home) as connection:
                [(catalog, parts)] = connection.execute("""
                    SELECT (SELECT sum(pg_total_relation_size(oid)) FROM pg_class
                             WHERE relnamespace = 'pg_catalog'::regnamespace AND relkind = 'r')::bigint / 1048576,
                           (SELECT pg_total_relation_size('marketplace_stats.marketplace_daily_summary')
                                 + pg_total_relation_size('marketplace_stats.marketplace_daily_summary_days')) / 1024
                """).fetchall()
            print(
                f"{number + 1} servers x {given.customers} customers x {given.jobs} jobs: of the last one a first run "
                f"{stats:.1f} s, again {again:.1f} s, summary {summary:.1f} s, catalog {catalog} MB, its summary "
                f"{parts} kB; over all {first:.2f} s ({cpu:.2f} s CPU), again {second:.2f} s ({cpu_again:.2f} s CPU), "
                f"{len(result.all_events)} events",
                flush=True,
            )


if __name__ == "__main__":
    main()
