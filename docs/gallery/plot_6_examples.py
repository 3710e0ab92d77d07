"""The example programs
====================

``examples/`` holds programs that are run from a clone; ``make run`` is the first of them. Here some
run with short settings, and what they print is what they print.

Bias, noise and cost of the truncations
---------------------------------------

``python examples/truncation_bias.py``: every truncation on the adding problem.
:doc:`../choosing_a_truncation` discusses what it finds at full length.
"""

import os
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt

EXAMPLES = Path.cwd().resolve()
while not (EXAMPLES / "examples").is_dir():
    EXAMPLES = EXAMPLES.parent
sys.path.insert(0, str(EXAMPLES / "examples"))
QUICK = "GALLERY_STEPS" in os.environ
OUT = tempfile.mkdtemp()


def show(name):
    """A picture that a program wrote."""
    picture = plt.imread(f"{OUT}/{name}")
    height, width = picture.shape[:2]
    _, axes = plt.subplots(figsize=(12, 12 * height / width), layout="constrained")
    axes.imshow(picture)
    axes.axis("off")
    plt.show()


import truncation_bias  # noqa: E402

short = ["--lengths", "10", "--max-steps", "20", "--draws", "2", "--rounds", "1"] if QUICK else []
truncation_bias.main(["--quick", *short, "--out", OUT])
show("truncation_bias.png")

# %%
# Leaky units by Dale's law
# -------------------------
#
# ``python examples/decision_net.py``: a network of excitatory and inhibitory units decides which
# way dots move. Its fixed points are found by ``torch.func`` on the cell's step.

import decision_net  # noqa: E402

short = ["--steps", "5", "--trials", "10", "--rounds", "1"] if QUICK else []
decision_net.main([*short, "--out", OUT])
show("decision_net.png")

# %%
# Recurrent PPO
# -------------
#
# ``python examples/recurrent_ppo.py``: a policy that has to remember, trained with ``torch.nn``'s
# layer in a loop over steps and with one call that has ``resets``.

import recurrent_ppo  # noqa: E402

recurrent_ppo.main(["--updates", "2" if QUICK else "30", "--out", OUT])
show("curves.png")
