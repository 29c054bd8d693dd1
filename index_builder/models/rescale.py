"""Rewrites a model so that its products can read bytes: the same function, in coordinates that suit them.

In a transformer a few channels are tens of times larger than the rest, so bytes of one scale would leave
the rest no levels. Here each channel gets its own scale and centre, folded into the weights around it: a
normalisation's scale and bias, the value rows of attention, the products that read it (SmoothQuant,
arXiv:2211.10438, with centres as in Outlier Suppression+, arXiv:2304.09145). What is large only now and
then, the activations behind GELU, is shared out over several copies of a neuron.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from index_builder.models.export import Sites
from index_builder.models.ranges import Range
from index_builder.models.source import ModelSource

#: How much of a channel's size goes into the weights: at 1 all of it, at 0 none.
SHARE = 0.7
#: Codes of a byte on either side of its middle.
REACH = 127
#: GELU is no less than this, and a neuron's copy holds no more than `NEURON_MOST`.
GELU_LEAST, NEURON_MOST = -0.17, 5.0
#: Kernels like inputs in multiples of this.
MULTIPLE = 16


class Step(NamedTuple):
    """A byte's meaning: (code - zero) * size."""

    size: float
    zero: int


class Rescaled(NamedTuple):
    """A model rewritten, and what its arithmetic has to know of it."""

    #: With other weights; the vectors are the same.
    source: ModelSource
    #: By site.
    steps: Mapping[str, Step]
    #: What a normalisation's result is multiplied by before it is added, float32 [hidden], by its name. Its
    #: centre is in the bias of the product that it is added to.
    factors: Mapping[str, np.ndarray]


def rescale(source: ModelSource, ranges: Mapping[str, Range]) -> Rescaled:
    """The model with inputs of its products spread evenly; `ranges` by site, as `observe` gives them."""
    weights = {name: np.asarray(value, np.float32) for name, value in source.weights.items()}
    steps: dict[str, Step] = {}
    factors: dict[str, np.ndarray] = {}
    for layer in range(source.architecture.layers):
        at = Sites(layer)
        for norm, site, readers, joined in (
            (at.norm_before, at.heads, at.parts, at.mixed),
            (at.norm_between, at.wide, [at.wide], at.narrow),
        ):
            centre, factors[norm], steps[site] = _coordinates(
                _rounded(ranges[site]), np.concatenate([weights[f"{name}.weight"] for name in readers])
            )
            weights[f"{norm}.weight"] = weights[f"{norm}.weight"] / factors[norm]
            weights[f"{norm}.bias"] = (weights[f"{norm}.bias"] - centre) / factors[norm]
            for name in readers:
                weights[f"{name}.bias"] = weights[f"{name}.bias"] + weights[f"{name}.weight"] @ centre
                weights[f"{name}.weight"] = weights[f"{name}.weight"] * factors[norm]
            weights[f"{joined}.bias"] = weights[f"{joined}.bias"] + centre
        steps[at.mixed] = _spread_values(weights, at, _rounded(ranges[at.mixed]))
        steps[at.narrow] = _share_out(weights, at, ranges[at.narrow].greatest)
    return Rescaled(dataclasses.replace(source, weights=weights), steps, factors)


def _coordinates(seen: Range, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, Step]:
    """Centre and factor of each channel that a weight [out, in] reads, and the step of its bytes then."""
    centre = (seen.greatest + seen.least) / 2
    reach = (seen.greatest - seen.least) / 2
    factor = _factors(reach, weight)
    return centre, factor, Step(float((reach / factor).max()) / REACH, REACH + 1)


def _spread_values(weights: dict[str, np.ndarray], at: Sites, values: Range) -> Step:
    """Give attention's values factors of their own, about zero; a mix of them has the same."""
    factor = _factors(values.largest, weights[f"{at.mixed}.weight"])
    *_, value = at.parts
    weights[f"{value}.weight"] = weights[f"{value}.weight"] / factor[:, None]
    weights[f"{value}.bias"] = weights[f"{value}.bias"] / factor
    weights[f"{at.mixed}.weight"] = weights[f"{at.mixed}.weight"] * factor
    return Step(float((values.largest / factor).max()) / REACH, REACH + 1)


def _share_out(weights: dict[str, np.ndarray], at: Sites, greatest: np.ndarray) -> Step:
    """Add copies of neurons that go beyond a byte, each copy for what is too much for those before it.

    A byte holds at most `NEURON_MOST`, and far from zero GELU is its input: what a copy cuts off begins the
    next one. Copies without an effect fill up to `MULTIPLE`.
    """
    copies = np.maximum(np.ceil(greatest / NEURON_MOST).astype(int) - 1, 0)
    source = np.repeat(np.arange(len(greatest)), copies)
    number = np.concatenate([np.arange(1, n + 1) for n in copies if n] or [np.empty(0)])
    idle = -(len(greatest) + len(source)) % MULTIPLE
    wide, narrow = weights[f"{at.wide}.weight"], weights[f"{at.narrow}.weight"]
    bias = weights[f"{at.wide}.bias"]
    shifted = bias[source] - (number * NEURON_MOST).astype(np.float32)
    weights[f"{at.wide}.weight"] = np.concatenate([wide, wide[source], wide[:idle] * 0])
    weights[f"{at.wide}.bias"] = np.concatenate([bias, shifted, bias[:idle] * 0])
    weights[f"{at.narrow}.weight"] = np.concatenate([narrow, narrow[:, source], narrow[:, :idle] * 0], axis=1)
    size = (NEURON_MOST - GELU_LEAST) / (2 * REACH + 1)
    return Step(size, round(-GELU_LEAST / size))


def _factors(reach: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """A factor for each channel, a power of two: the channel divided by it, its weights multiplied.

    `reach` is the channel's largest distance from its centre, [in]; `weight` is [out, in].
    """
    wanted = np.maximum(reach, reach.max() / 1000) ** SHARE
    wanted /= np.maximum(np.abs(weight).max(axis=0), np.finfo(np.float32).tiny) ** (1 - SHARE)
    exponents = np.log2(wanted)
    factors: np.ndarray = np.exp2(np.rint(exponents - exponents.mean())).astype(np.float32)
    return factors


def _rounded(seen: Range) -> Range:
    """A range widened to values of four binary digits, which is room for texts larger than the probes."""

    def outwards(values: np.ndarray) -> np.ndarray:
        mantissa, exponent = np.frexp(values)
        rounded: np.ndarray = np.ldexp(np.copysign(np.ceil(np.abs(mantissa) * 16) / 16, mantissa), exponent)
        return rounded.astype(np.float32)

    least, greatest = np.minimum(seen.least, 0), np.maximum(seen.greatest, 0)
    return Range(outwards(least), outwards(greatest))
