"""The evidence: one hypernetwork against its baselines on real data, planned before it is run.

plan.py        which runs there are, what they are compared for, and what counts as better: decided beforehand
cells.py       one run of the plan: train, answer the test split, keep a score for every answer
runner.py      all cells of a plan, in several processes, each recorded as soon as it ends
statistics.py  differences with intervals, over test items and seeds
report.py      the page of results, from the records alone
"""
