"""How fast fastbptt is, and how much memory it takes, against its peers on this machine.

On the CPU, each as ``python -m benchmarks.NAME``:

* ``compare`` times rows of sizes against the peers and the machine's limits;
* ``uses`` times what programs make of layers, such as loops over single steps;
* ``overhead`` times one step, ``scaling`` size after size, and looks for cliffs;
* ``memory`` counts bytes;
* ``against`` times this tree against another commit;
* ``book`` counts tokens a second of the model that "Dive into Deep Learning" trains;
* ``readme`` puts measured tables into the README and the pages of docs/ (made in ``pages``).

``benchmarks/gpu.sh`` is the one command for a machine with a GPU: it builds, tests, checks and
measures the CUDA path there; with ``--dry-run`` it shows how, without one. All run from the root of
the repository; the packages they need are the ``bench`` extra.

These programs stand on the parts below them: the CPU's in ``cpu`` and the GPU's in ``gpu``, and
both of these on what they share, in ``common``. Nothing imports what stands above it.
"""
