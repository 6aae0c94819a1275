"""What a network costs: multiply-accumulates (MACs), counted analytically."""

from accel.cost.macs import ConvShape, count_conv_macs, count_dense_macs, count_macs

__all__ = ["ConvShape", "count_conv_macs", "count_dense_macs", "count_macs"]
