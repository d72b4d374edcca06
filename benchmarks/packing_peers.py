"""The peers of `benchmarks.packing`: the same tasks on Ray and on Dask.

Run by path with the Python of an environment that has them, so that Aque needs neither. Reads from stdin
{"cpus": CPUs of the machine, "tasks": [[cpus, seconds], ...]}, submits the tasks in this order, and writes to stdout
{"submitted": when, "spans": [[began, ended], ...], "version": text}; times are those of the monotonic clock.
"""

import json
import os
import sys
import time
from typing import Any

#: The smallest request of the benchmark; so many tasks fit at once, and need a thread or a process each.
SMALLEST = 0.25


def nap(seconds: float) -> tuple[float, float]:
    """Sleep; when it began and ended."""
    began = time.monotonic()
    time.sleep(seconds)
    return began, time.monotonic()


def ray(cpus: int, tasks: list[tuple[float, float]]) -> dict[str, Any]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"  # else a warning: what it means concerns GPUs
    import ray as ray_itself

    ray_itself.init(
        num_cpus=cpus,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        _node_ip_address="127.0.0.1",
    )
    remote = ray_itself.remote(nap)
    at_once = round(cpus / SMALLEST)
    ray_itself.get([remote.options(num_cpus=SMALLEST).remote(1.0) for _ in range(2 * at_once)])  # a process for each
    submitted = time.monotonic()
    futures = [remote.options(num_cpus=amount).remote(seconds) for amount, seconds in tasks]
    return {"submitted": submitted, "spans": ray_itself.get(futures), "version": ray_itself.__version__}


def dask(cpus: int, tasks: list[tuple[float, float]]) -> dict[str, Any]:
    import distributed

    at_once = round(cpus / SMALLEST)
    with (
        distributed.LocalCluster(
            n_workers=1,
            threads_per_worker=at_once,
            resources={"CPU": cpus},
            host="127.0.0.1",
            dashboard_address=None,
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        client.gather([client.submit(nap, 0.1, resources={"CPU": SMALLEST}, pure=False) for _ in range(at_once)])
        submitted = time.monotonic()
        futures = [client.submit(nap, seconds, resources={"CPU": amount}, pure=False) for amount, seconds in tasks]
        return {"submitted": submitted, "spans": client.gather(futures), "version": distributed.__version__}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    wanted = json.load(sys.stdin)
    answer = {"ray": ray, "dask": dask}[sys.argv[1]](wanted["cpus"], wanted["tasks"])
    answers.write(json.dumps(answer))
    answers.close()


if __name__ == "__main__":
    main()
