"""How fast fastbptt is, and how much memory it takes, against its peers on this machine.

``python -m benchmarks.compare`` times, ``python -m benchmarks.scaling`` times size after size and
looks for cliffs, ``python -m benchmarks.overhead`` times single steps and ``python -m
benchmarks.uses`` what programs make of layers, ``python -m benchmarks.memory`` counts bytes, and
``python -m benchmarks.readme`` puts the measured table into the README. ``benchmarks/gpu.sh`` is
the one command for a machine with a GPU: it builds, tests, checks and measures the CUDA path there;
with ``--dry-run`` it shows how, without one. All run from the root of the repository; the packages
they need are the ``bench`` extra.

These programs stand on the parts below them: the CPU's in ``cpu`` and the GPU's in ``gpu``, and
both of these on what they share, in ``common``. Nothing imports what stands above it.
"""
