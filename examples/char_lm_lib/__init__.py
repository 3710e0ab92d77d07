"""The parts of ``char_lm.py``, in the order in which a run meets them.

text        the text file, its vocabulary, and how it is cut into training segments
model       embedding, recurrent layer, decoder; the detach loop; text generation
parallel    what the processes of a data-parallel run share
checkpoint  the output folder, and checkpoints in it
training    the training loop, held-out perplexity, timing, interruption
report      the closing table and the plot of the loss curves
"""


class BadInput(Exception):
    """An argument that cannot be used; the message names it, what it must be, and what it was."""
