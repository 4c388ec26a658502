"""Solvers: algorithms that round one matrix. Most of them share one column sweep."""

from qexp.solvers.base import Solution as Solution
from qexp.solvers.base import Solver as Solver
from qexp.solvers.billm import BiLLM as BiLLM
from qexp.solvers.billm import Binarize as Binarize
from qexp.solvers.gptq import GPTQ as GPTQ
from qexp.solvers.lnq import LNQ as LNQ
from qexp.solvers.obq import OBQ as OBQ
from qexp.solvers.pbllm import PBLLM as PBLLM
from qexp.solvers.quip import QuIP as QuIP
from qexp.solvers.rtn import RTN as RTN
from qexp.solvers.spqr import SpQR as SpQR
from qexp.solvers.squeezellm import SqueezeLLM as SqueezeLLM
from qexp.solvers.two_sided import TwoSided as TwoSided
