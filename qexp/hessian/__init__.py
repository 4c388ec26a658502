"""In which loss a rounding error counts: sources of a layer's Hessian."""

from qexp.hessian.base import CacheableHessian as CacheableHessian
from qexp.hessian.base import Hessian as Hessian
from qexp.hessian.diagonal import Diagonal as Diagonal
from qexp.hessian.float_weights import AtFloatWeights as AtFloatWeights
from qexp.hessian.layerwise import Layerwise as Layerwise
from qexp.hessian.layerwise import second_moment as second_moment
from qexp.hessian.output import OutputAdaptive as OutputAdaptive
from qexp.hessian.output import TokenWeighted as TokenWeighted
from qexp.hessian.two_sided import BothSides as BothSides
