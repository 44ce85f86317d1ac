"""The small network in front of a dynamic convolution."""
