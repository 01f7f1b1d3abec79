"""Evaluation: critique-revision turns on held-out problems, metrics with confidence intervals, report and plots."""
