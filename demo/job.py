"""A job for a machine of its own: read measurements, compute, and say where."""

import csv
import json
import os
import platform
import statistics
import sys

rows = list(csv.DictReader(sys.stdin))
by_station = {}
for row in rows:
    by_station.setdefault(row["station"], []).append(float(row["celsius"]))

with open("/proc/meminfo") as f:
    memory_kib = int(f.readline().split()[1])

json.dump(
    {
        "rows": len(rows),
        "mean": {name: round(statistics.fmean(v), 3) for name, v in sorted(by_station.items())},
        "machine": {
            "kernel": platform.release(),
            "host name": platform.node(),
            "python": platform.python_version(),
            "cpus": os.cpu_count(),
            "memory MiB": memory_kib // 1024,
            "user": os.environ["USER"],
            "network devices": sorted(os.listdir("/sys/class/net")),
        },
    },
    sys.stdout,
    indent=2,
)
print()
