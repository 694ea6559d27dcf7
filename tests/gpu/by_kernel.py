#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Sum the kernel times of an ncu CSV (gpu__time_duration.sum): milliseconds, launches, name, largest first."""

import csv
import sys

TO_MS = {"ns": 1e-6, "nsecond": 1e-6, "us": 1e-3, "usecond": 1e-3, "ms": 1.0, "msecond": 1.0, "s": 1e3, "second": 1e3}


def main(path):
    with open(path, newline="", encoding="utf-8") as f:
        lines = [line for line in f if line.startswith('"')]
    total = {}
    for row in csv.DictReader(lines):
        if row.get("Metric Name") != "gpu__time_duration.sum":
            continue
        ms = float(row["Metric Value"].replace(",", "")) * TO_MS[row["Metric Unit"]]
        name = row["Kernel Name"].split("(")[0][:60] + " " + row.get("Grid Size", "")
        count, time = total.get(name, (0, 0.0))
        total[name] = (count + 1, time + ms)
    for name, (count, time) in sorted(total.items(), key=lambda x: -x[1][1]):
        print(f"{time:9.3f} ms {count:4d} x {name}")
    print(f"{sum(t for _, t in total.values()):9.3f} ms in all")


if __name__ == "__main__":
    main(sys.argv[1])
