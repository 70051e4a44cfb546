"""Fail unless overall exact match of each adapter of a demo rose, at equal parameters."""

import json
import sys

MINIMUM, MOST = 0.30, 0.02

with open(sys.argv[1], encoding="utf-8") as file:
    demo = json.load(file)
print(f"exact match {demo['exact_match']}, {demo['seconds']} s")
for name, rise in demo["rise"].items():
    print(f"{name}: rose by {rise:.3f}, must rise by at least {MINIMUM}")
counts = demo["trainable_parameters"].values()
apart = max(counts) / min(counts) - 1
print(f"parameters differ by {apart:.1%}, may differ by {MOST:.0%}")
sys.exit(min(demo["rise"].values()) < MINIMUM or apart > MOST)
