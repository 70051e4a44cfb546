"""Fail unless both adapters of a demo learned: overall exact match rose by at least 0.30."""

import json
import sys

LEAST = 0.30

with open(sys.argv[1], encoding="utf-8") as file:
    demo = json.load(file)
print(f"exact match {demo['exact_match']}, {demo['seconds']} s")
for name, rise in demo["rise"].items():
    print(f"{name}: rose by {rise:.3f}, at least {LEAST} is asked")
sys.exit(min(demo["rise"].values()) < LEAST)
