"""The parts of ``recurrent_ppo.py``, in the order in which a run meets them.

options     the command line
tmaze       a task: a cue at the first step, wanted at the last
repeat      two tasks: a symbol of some steps before is wanted
tasks       all of them, and environments side by side
policy      encoder, recurrent core, actor and critic; the step loop
rollout     acting in parallel environments; returns and advantages
training    the clipped objective, the training loop, timing
report      the closing table and the plot of the learning curves
"""
