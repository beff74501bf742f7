"""Rounding to 16 bits in whole numbers alone: to the nearest, ties to even, as IEEE 754 has it."""

import ml_dtypes
import numpy as np

# Bits of the fraction, and of the exponent of the smallest normal number.
FORMATS = {np.dtype(ml_dtypes.bfloat16): (7, -126), np.dtype(np.float16): (10, -14)}


def nearest(numbers, kind):
    """float32 numbers in a 16-bit type. A NaN comes back as a quiet one of its sign."""
    fraction, lowest = FORMATS[np.dtype(kind)]
    bits = np.ascontiguousarray(numbers, np.float32).view(np.uint32).astype(np.int64)
    sign, magnitude = bits >> 31, bits & 0x7FFFFFFF
    # |x| = whole * 2^exponent, exactly, subnormal or not.
    field = magnitude >> 23
    whole = np.where(field > 0, magnitude & 0x7FFFFF | 0x800000, magnitude)
    exponent = np.maximum(field, 1) - 150
    # The distance of two neighbours there is 2^spacing.
    length = np.frexp(whole.astype(np.float64))[1]  # of whole, in bits: exact for integers
    spacing = np.maximum(exponent + length - 1, lowest) - fraction
    units = half_even(whole, spacing - exponent)
    # A number's bits are its count of units, plus 2^fraction for each doubling of the spacing: so
    # a carry into the next power of two, or from the largest number to infinity, is right as it is.
    found = units + ((spacing + fraction - lowest) << fraction)
    infinity = ((1 << (15 - fraction)) - 1) << fraction
    found = np.where(magnitude == 0x7F800000, infinity, np.minimum(found, infinity))
    found = np.where(magnitude > 0x7F800000, infinity | 1 << (fraction - 1), found)
    return (found | sign << 15).astype(np.uint16).view(kind).reshape(np.shape(numbers))


def half_even(whole, shift):
    """whole / 2^shift as a whole number, ties to even; a shift below 0 multiplies."""
    down, up = np.clip(shift, 0, 62), np.clip(-shift, 0, 62)
    floor = whole >> down
    rest, half = whole - (floor << down), (1 << down) >> 1
    tie_up = (rest == half) & (floor & 1 == 1) & (down > 0)
    return (floor + ((rest > half) | tie_up)) << up


def every(kind):
    """All 65536 numbers of a 16-bit type, NaNs included."""
    return np.arange(2**16, dtype=np.uint16).view(kind)


def around(kind):
    """float32 at, between and beside all neighbours of a 16-bit type: where rounding turns.

    Every number, the middle of it and the next one, and the float32 before and after both.
    """
    positive = every(kind)[: 2**15]
    at = positive[np.isfinite(positive.astype(np.float32))].astype(np.float32)
    # Beyond the largest number the next would be as far again: from its middle on it is infinity.
    exact = at.astype(np.float64)
    after = np.append(exact[1:], 2 * exact[-1] - exact[-2])
    middle = ((exact + after) / 2).astype(np.float32)
    with np.errstate(over="ignore", under="ignore"):
        beside = [np.nextafter(x, np.float32(to)) for x in (at, middle) for to in (-np.inf, np.inf)]
    points = np.concatenate((at, middle, *beside))
    return np.concatenate((points, -points))
