"""Checkpoints of full size without their weights, to export as users would."""
