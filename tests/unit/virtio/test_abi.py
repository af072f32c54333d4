"""Layouts of virtio: sizes, and where fields lie."""

from __future__ import annotations

import pytest

from virtio import abi


@pytest.mark.parametrize(("size", "table", "available", "used"), [(1, 16, 8, 14), (256, 4096, 518, 2054)])
def test_sizes_of_the_rings(size, table, available, used):
    assert abi.descriptor_table_size(size) == table
    assert abi.available_ring_size(size) == available
    assert abi.used_ring_size(size) == used


def test_fields_of_the_block_configuration_lie_where_the_specification_says():
    fields = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20]
    packed = abi.VIRTIO_BLK_CONFIG.pack(*fields)
    assert len(packed) == abi.VIRTIO_BLK_CONFIG_SIZE
    places = {0: 1, 8: 2, 12: 3, 16: 4, 18: 5, 19: 6, 20: 7, 24: 8, 25: 9, 26: 10, 28: 11, 32: 12, 33: 13, 34: 14,
              36: 15, 40: 16, 44: 17, 48: 18, 52: 19, 56: 20}  # fmt: skip
    assert {place: packed[place] for place in places} == places


def test_feature_bits_are_single_bits_of_a_64_bit_word():
    bits = [value for name, value in vars(abi).items() if "_F_" in name and name.split("_")[1] in ("F", "BLK")]
    assert len(bits) > 8
    assert all(value & (value - 1) == 0 and 0 < value < 1 << 64 for value in bits)
