"""Trains and evaluates the models of the pages of results, and makes the tables of these pages.

- plans: the commands behind each page; steps: runs them and records the time of each;
- strips: how long segmenting takes, with pictures of every video;
- join: the scores of all evaluations as one file in profiling/results; tables, page: the tables of the pages.
"""
