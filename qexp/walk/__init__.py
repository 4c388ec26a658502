"""The model block by block, each with the data that reaches it."""

from qexp.walk.blocks import Block as Block
from qexp.walk.blocks import walk as walk
