"""`grpo-mega convert`: a model from one kind of checkpoint into another, with a proof that it is the same model."""
