"""Fail unless overall exact match of both adapters of a demo rose by at least 0.30."""

import json
import sys

MINIMUM = 0.30

with open(sys.argv[1], encoding="utf-8") as file:
    demo = json.load(file)
print(f"exact match {demo['exact_match']}, {demo['seconds']} s")
for name, rise in demo["rise"].items():
    print(f"{name}: rose by {rise:.3f}, must rise by at least {MINIMUM}")
sys.exit(min(demo["rise"].values()) < MINIMUM)
