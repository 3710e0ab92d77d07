"""The parts of ``recurrent_ppo.py``, in the order in which a run meets them.

options     the command line
tmaze       the task: a cue at the first step, wanted at the last
policy      encoder, recurrent core, actor and critic; the step loop
rollout     acting in parallel environments; returns and advantages
training    the clipped objective, the training loop, timing
report      the closing table and the plot of the learning curves
"""
