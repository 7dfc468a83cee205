"""`grpo-mega selftest`: does every way of cutting a model over these ranks compute what one process computes?

A small model with random weights goes through sampling, log-probs, loss, gradients and optimizer steps, by the very
parts that train: first in one process, then under each layout; what differs is a row of a table.
"""
