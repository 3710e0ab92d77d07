"""The CPU's parts: the machine's limits, other libraries' layers, tables and pictures."""
