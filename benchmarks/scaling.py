"""The cost model against measurements.

    python benchmarks/scaling.py [--only calibrate,ranks,check,routing,autoscaling] [--out benchmarks/results]

calibrate: fits `flover.cluster.hardware.Efficiency` to one H200 and says how far off it is, on models that the fit has
seen and on others.
ranks: what it says of several ranks, beside what benchmarks/ranks.py has measured; empty where it has not run.
check: a fluid model of replicas against the real scheduler on a virtual clock, 10^4 requests.
routing, autoscaling: the fluid model's curves; 10^6 requests on 10^3 replicas.
Writes scaling.json and pictures. Deterministic; a minute and a half on one core, half of it the real scheduler.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from _scaling_curves import autoscaling, check, routing
from _scaling_fit import calibrate
from _scaling_ranks import ranks

PARTS = {"calibrate": calibrate, "ranks": ranks, "check": check, "routing": routing, "autoscaling": autoscaling}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    names = args.only.split(",")
    if unknown := set(names) - set(PARTS):
        parser.error(f"--only takes {', '.join(PARTS)}, got {', '.join(map(repr, sorted(unknown)))}")
    target = args.out / "scaling.json"
    results: dict[str, Any] = json.loads(target.read_text()) if target.exists() else {}
    for name in names:
        begin = time.perf_counter()
        results[name] = PARTS[name](args.out)
        print(f"{name}: {time.perf_counter() - begin:.1f} s", flush=True)
    target.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
