"""How far do gradients reach?
===========================

x
"""

import torch

print(torch.__version__)
