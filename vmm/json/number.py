"""What serde_json makes of a decimal number that is no whole number of 64 bits: clients read back what it stored.

It is not always the nearest floating point number: the digits that fit into 64 bits are scaled by a power of ten, with
two roundings (the crate's feature ``float_roundtrip``, which Firecracker does not use, would do without).
"""

from __future__ import annotations

from base.lean_typing import Final

_MAX_U64: Final = (1 << 64) - 1
MAX_EXPONENT: Final = (1 << 31) - 1
_MIN_EXPONENT: Final = -(1 << 31)
#: The largest power of ten that a floating point number holds.
_LARGEST_POWER: Final = 308
_INFINITY: Final = float("inf")


def significand(whole: bytes, fraction: bytes) -> tuple[int, int]:
    """Return the leading digits that fit into 64 bits, as a number, and the power of ten that belongs to it.

    Whole digits that do not fit count as zeros, digits of the fraction end the number.
    """
    if len(whole) + len(fraction) < len(str(_MAX_U64)):
        return int(whole + fraction), -len(fraction)
    number = power = 0
    for digit in whole:
        larger = number * 10 + digit - 0x30
        if power or larger > _MAX_U64:
            power += 1
        else:
            number = larger
    for digit in fraction:
        larger = number * 10 + digit - 0x30
        if larger > _MAX_U64:
            break
        number = larger
        power -= 1
    return number, power


def scaled(number: int, power: int) -> float:
    """Return ``number`` times ten to the ``power``; infinity where that is out of range."""
    power = max(_MIN_EXPONENT, min(power, MAX_EXPONENT))
    value = float(number)
    while power < -_LARGEST_POWER and value:
        value /= _power_of_ten(_LARGEST_POWER)
        power += _LARGEST_POWER
    if not value:
        return value
    if power > _LARGEST_POWER:
        return _INFINITY
    return value / _power_of_ten(-power) if power < 0 else value * _power_of_ten(power)


def _power_of_ten(power: int) -> float:
    return float(f"1e{power}")
