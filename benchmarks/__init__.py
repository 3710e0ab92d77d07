"""How fast fastbptt is, and how much memory it takes, against its peers on this machine.

``python -m benchmarks.compare`` times, ``python -m benchmarks.memory`` counts bytes, and
``python -m benchmarks.readme`` puts the measured table into the README. All run from the root of
the repository; the packages they need are the ``bench`` extra.
"""
