"""Measurements of the engine: on any device, with random weights, without a queue."""
