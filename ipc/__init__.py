"""What two Cellblock processes share: plan, messages, channels, shared-memory layouts, fault points.

This package imports nothing of ours; everything else may import it.
"""
