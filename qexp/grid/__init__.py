"""Grids: the values that a tensor may take, and the range estimators that scale them.

To add a grid, implement `base.Grid`; a range estimator, `base.Range`; and one yaml in conf/weight/.
"""

from qexp.grid.base import Grid as Grid
from qexp.grid.base import Range as Range
from qexp.grid.blocks import BlockGrid as BlockGrid
from qexp.grid.float_formats import LevelGrid as LevelGrid
from qexp.grid.integer import IntGrid as IntGrid
from qexp.grid.scale import Scale as Scale
from qexp.grid.step_grid import StepGrid as StepGrid
