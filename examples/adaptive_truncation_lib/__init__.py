"""The parts of ``adaptive_truncation.py``.

options   the command line
task      the copy task, and the model that learns it
training  one run: with a fixed K, or with one that is chosen while it trains
report    the table
picture   the figure
"""
