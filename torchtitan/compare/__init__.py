"""Compares several runs, from their dump folders. Knows nothing of what was trained.

runs      which folders are runs, what they are called, and which options differ
charts    every figure of metrics.jsonl as a chart, in groups
page      both as one HTML page that loads nothing else (page.html)
"""
