"""The parts of ``char_lm.py``, in the order in which a run meets them.

options     the command line
text        the text file, its vocabulary, and how it is cut into training segments
model       embedding, recurrent layer, decoder; the detach loop; text generation
parallel    what the processes of a data-parallel run share
checkpoint  writing and reading checkpoints
training    the training loop, held-out perplexity
report      the closing table and the plot of the loss curves
"""
