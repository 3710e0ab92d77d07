"""The parts of ``influence_balancing.py``.

options   the command line
chain     the linear chain, its influences, and learning its one parameter
picture   the figure
"""
