"""Trains and evaluates what docs/results/results.md shows, and makes its tables of the numbers.

- plans: the commands of a page's section; steps: runs them and records what each took;
- strips: how long segmenting takes, with pictures of every video;
- join: the scores of all evaluations as one file in profiling/results; tables, page: what the page shows of it.
"""
