"""The parts of ``truncation_bias.py``, in the order in which a run meets them.

options     the command line
problem     the adding problem, the model that learns it, and its loss
modes       the truncations that are compared
training    one training run and its learning curve
bias        bias and deviation of a truncated gradient
cost        seconds of a training step
report      the tables
picture     the figure
"""
