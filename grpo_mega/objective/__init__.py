"""GRPO's mathematics: tensors and floats in, tensors and `Mean`s out. No config, rank, device or in-place write.

One equation a module:

    advantages      A_i = (r_i - mean r) / std r                         DeepSeekMath, arXiv:2402.03300, section 4.1.2
    surrogate       min(rho A, clip(rho) A)                              the same, eq. 3; PPO, arXiv:1707.06347, eq. 7
    kl              pi_ref / pi - ln(pi_ref / pi) - 1                    DeepSeekMath, eq. 4
    normalization   w_t and D: what a token's loss is multiplied by and, once, divided by
    grpo            the four together
"""
