"""What `decision_net.py` is made of.

options       the command line
task          trials of the random-dots task
network       leaky excitatory and inhibitory units, and the same by a loop over steps
training      training, the psychometric curve, the time of a step
fixed_points  where the dynamics stand still, and the step's Jacobian there
picture       all of it in one figure
"""
