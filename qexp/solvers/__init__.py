"""How a matrix is rounded: solvers that share one column sweep."""

from qexp.solvers.gptq import GPTQ as GPTQ
from qexp.solvers.rtn import RTN as RTN
from qexp.solvers.sweep import Solution as Solution
from qexp.solvers.sweep import Solver as Solver
