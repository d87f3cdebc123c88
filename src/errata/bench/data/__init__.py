"""Data sets: records validated row by row, the cases made of them, and what is wrong with them.

`load_cases(NAME)` and `load_facts(NAME)` read a set of `DATASETS`; `check(NAME)` lists its faults.
"""

from errata.bench.data.records import Problem
from errata.bench.data.registry import DATASETS, check, load_cases, load_facts, one_edit_per_fact

__all__ = ["DATASETS", "Problem", "check", "load_cases", "load_facts", "one_edit_per_fact"]
